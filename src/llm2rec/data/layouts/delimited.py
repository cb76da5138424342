"""Files of separated cells, with or without a header; every cell is text until it is asked for as a number."""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from llm2rec.data.damage import refuse_damaged_rows
from llm2rec.data.files import (
    GZIP_MAGIC,
    ZSTD_MAGIC,
    first_line,
    opened,
    refuse_line,
)
from llm2rec.data.tables import LARGEST_EXACT_FLOAT, refuse_repeated_columns
from llm2rec.errors import DataError, first_few


def read_delimited(
    path: Path,
    columns: tuple[str, ...],
    *,
    separator: str = ",",
    quote: str | None = '"',
    has_header: bool = True,
    optional: tuple[str, ...] = (),
) -> pl.DataFrame:
    """The named columns as String; without a header they are the columns in order. Other columns are ignored.

    A gzip or zstd file is unpacked into a temporary file: polars reads both, but whole into memory.

    Raises:
        DataError: a missing or repeated column, a row with too many or too few cells or that is not UTF-8 (both
            name the line), no rows, or a damaged file.
    """
    with _plain(path) as plain:
        try:
            scan = pl.scan_csv(
                plain,
                separator=separator,
                quote_char=quote,
                has_header=has_header,
                new_columns=None if has_header else list(columns),
                infer_schema=False,
                glob=False,
            )
            header = scan.collect_schema().names()
            _check_header(path, header, columns)
            present = [name for name in (*columns, *optional) if name in header]
            table = scan.select(present).collect()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            refuse_damaged_rows([path], separator, quote is not None)
            raise DataError(f"{path} cannot be read ({first_line(error)})") from error
        if table.is_empty():
            raise DataError(f"{path} has no rows")
        return table


def header_of(path: Path, separator: str = ",") -> list[str]:
    """The cells of the first line; empty where the file cannot be read as text."""
    try:
        with opened(path) as stream:
            line = stream.readline(2**16).decode("utf-8-sig")
        return next(csv.reader([line.rstrip("\r\n")], delimiter=separator), [])
    except (DataError, UnicodeDecodeError, csv.Error):
        return []


def whole_numbers(table: pl.DataFrame, column: str, path: Path, has_header: bool = True) -> pl.Series:
    """A text column as Int64; `881250949.0` is a whole number too.

    Raises:
        DataError: naming the first line whose cell is not one.
    """
    values = table[column].str.strip_chars()
    floats = values.cast(pl.Float64, strict=False)
    exact = floats.is_finite() & (floats == floats.round()) & (floats.abs() <= LARGEST_EXACT_FLOAT)
    whole = floats.set(~exact.fill_null(False), None).cast(pl.Int64)
    _refuse_null(table, whole, column, "whole number", path, has_header)
    return whole.alias(column)


def numbers(table: pl.DataFrame, column: str, path: Path, has_header: bool = True) -> pl.Series:
    """A text column as Float64.

    Raises:
        DataError: naming the first line whose cell is not a finite number.
    """
    values = table[column].str.strip_chars().cast(pl.Float64, strict=False)
    values = values.set(~values.is_finite().fill_null(False), None)
    _refuse_null(table, values, column, "number", path, has_header)
    return values.alias(column)


def require_cells(table: pl.DataFrame, columns: tuple[str, ...], path: Path, has_header: bool = True) -> None:
    """Raises DataError where a cell of `columns` is empty: the row was cut off."""
    for column in columns:
        empty = table[column].is_null() | (table[column].str.strip_chars() == "")
        if empty.any():
            _refuse_row(table, int(empty.arg_max() or 0), f"has no {column}", path, has_header)


def _refuse_null(
    table: pl.DataFrame, values: pl.Series, column: str, kind: str, path: Path, has_header: bool
) -> None:
    if values.null_count():
        row = int(values.is_null().arg_max() or 0)
        _refuse_row(table, row, f"has a {column} that is no {kind}", path, has_header)


def _refuse_row(table: pl.DataFrame, row: int, what: str, path: Path, has_header: bool) -> None:
    cells = ", ".join("" if cell is None else str(cell) for cell in table.row(row))
    refuse_line(path, row + 1 + has_header, cells, what)


def _check_header(path: Path, header: list[str], columns: tuple[str, ...]) -> None:
    refuse_repeated_columns(header, str(path))
    missing = [name for name in columns if name not in header]
    if missing:
        raise DataError(f"{path}: no column {first_few(missing)}; it has {first_few(header, 12)}")


@contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """The path itself, or that of a temporary unpacked copy."""
    with opened(path) as stream:
        with path.open("rb") as raw:
            magic = raw.read(4)
        if not magic:
            raise DataError(f"{path} is empty (zero bytes)")
        if magic[:2] != GZIP_MAGIC and magic != ZSTD_MAGIC:
            yield path
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "table"
            with copy.open("wb") as sink:
                shutil.copyfileobj(stream, sink, 2**20)
            yield copy
