"""MovieLens as GroupLens publishes it, unpacked (Harper & Konstan 2015). Timestamps are seconds."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from llm2rec.data.files import PACKED, read_text, refuse_line, the_one
from llm2rec.data.layouts.assembly import assemble
from llm2rec.data.layouts.delimited import numbers, read_delimited, require_cells, whole_numbers
from llm2rec.data.readers import movielens_100k_frames
from llm2rec.data.tables import RawTables
from llm2rec.errors import DataError

LATIN_1 = "latin-1"
NO_GENRES = "(no genres listed)"


def read_movielens_100k(folder: Path) -> RawTables:
    """`u.data` and `u.item` (Latin-1) of MovieLens 100K. Text columns: release_date, genres.

    Raises:
        DataError: a file is missing, damaged or holds a malformed line.
    """
    ratings = the_one(folder, r"u\.data" + PACKED, "u.data")
    films = the_one(folder, r"u\.item" + PACKED, "u.item")
    texts = read_text(ratings, LATIN_1), read_text(films, LATIN_1)
    events, items = movielens_100k_frames(*texts, str(folder))
    return assemble(_typed(events, ratings, has_header=False), items, {}, str(folder))


def read_movielens_1m(folder: Path) -> RawTables:
    """`ratings.dat` and `movies.dat` ("::") of MovieLens 1M (Latin-1) and 10M (UTF-8). Text column: genres.

    Raises:
        DataError: a file is missing, damaged or holds a malformed line.
    """
    ratings = the_one(folder, r"ratings\.dat" + PACKED, "ratings.dat")
    films = the_one(folder, r"movies\.dat" + PACKED, "movies.dat")
    events = _read_double_colons(ratings, ("user_id", "item_id", "rating", "timestamp"))
    items = _read_double_colons(films, ("item_id", "title", "genres"))
    return assemble(_typed(events, ratings, has_header=False), _without_no_genres(items), {}, str(folder))


def read_movielens_csv(folder: Path) -> RawTables:
    """`ratings.csv` and `movies.csv` of latest-small, 20M, 25M and 32M. Text column: genres.

    Raises:
        DataError: a file is missing, damaged or holds a malformed line.
    """
    ratings = the_one(folder, r"ratings\.csv" + PACKED, "ratings.csv")
    films = the_one(folder, r"movies\.csv" + PACKED, "movies.csv")
    events = read_delimited(ratings, ("userId", "movieId", "rating", "timestamp"))
    require_cells(events, ("userId", "movieId"), ratings)
    events = events.rename({"userId": "user_id", "movieId": "item_id"})
    items = read_delimited(films, ("movieId", "title", "genres")).rename({"movieId": "item_id"})
    return assemble(_typed(events, ratings), _without_no_genres(items), {}, str(folder))


def _text_of(path: Path) -> str:
    """A file in UTF-8, else in Latin-1, which reads any bytes."""
    try:
        return read_text(path, "utf-8")
    except DataError:
        return read_text(path, LATIN_1)


def _read_double_colons(path: Path, columns: tuple[str, ...]) -> pl.DataFrame:
    lines = pl.Series("line", _text_of(path).split("\n"), dtype=pl.String).str.strip_chars_end("\r")
    cells = lines.str.split("::")
    wrong = (cells.list.len() != len(columns)) & (lines.str.strip_chars() != "")
    if wrong.any():
        row = int(wrong.arg_max() or 0)
        what = f"has {len(cells[row])} fields instead of {len(columns)}"
        refuse_line(path, row + 1, lines[row], what)
    filled = cells.filter(cells.list.len() == len(columns))
    return pl.DataFrame({name: filled.list.get(number) for number, name in enumerate(columns)})


def _typed(events: pl.DataFrame, path: Path, has_header: bool = True) -> pl.DataFrame:
    return events.select(
        "user_id",
        "item_id",
        whole_numbers(events, "timestamp", path, has_header),
        numbers(events, "rating", path, has_header),
    )


def _without_no_genres(items: pl.DataFrame) -> pl.DataFrame:
    return items.with_columns(pl.col("genres").replace(NO_GENRES, ""))
