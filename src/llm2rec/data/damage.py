"""Where a text file is damaged: polars says what is wrong with it, these say in which file and line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from llm2rec.data.files import BYTE_ORDER_MARK, line_chunks, opened, refuse_line, refuse_not_utf_8
from llm2rec.errors import DataError, first_few

LONGEST_CELL = 2**27  # characters; the csv module's own limit is shorter than some descriptions
_UNPAIRED = 'has a quotation mark without a second one (inside a quoted cell write it as "")'


def refuse_damaged_rows(files: list[Path], separator: str, quote: bool = True) -> None:
    """Looks for what makes files of separated cells unreadable; returns where nothing is found.

    Raises:
        DataError: a line that is not UTF-8, has more cells than the header or a quotation mark out of place, a
            header that is not that of the first file, or a file that cannot be unpacked.
    """
    headers = {file: _check_rows(file, separator, quote) for file in files}
    for file, header in headers.items():
        if header != headers[files[0]]:
            raise DataError(
                f"{file} has the columns {first_few(header, 12)}, but {files[0].name} has "
                f"{first_few(headers[files[0]], 12)}; files of one folder need the same columns in the same "
                "order, separated alike"
            )


def refuse_short_rows(files: list[Path], separator: str) -> None:
    """Looks for rows that polars fills up with nulls; returns where there are none. Empty lines are passed over.

    Raises:
        DataError: a row with fewer cells than the header: cut off, or broken by a line break outside quotes.
    """
    csv.field_size_limit(LONGEST_CELL)
    for path in files:
        with opened(path) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="\n")
            lines = (line.replace("\r", "") for line in text)  # polars breaks lines at \n alone, csv at both
            rows = csv.reader(lines, delimiter=separator)
            width = len(next(rows, []))
            for row in rows:
                if 0 < len(row) < width:
                    what = f"has {len(row)} cells instead of {width}"
                    mend = "complete it; a cell with a line break needs quotation marks around it"
                    refuse_line(path, rows.line_num, separator.join(row), what, mend)


def _check_rows(path: Path, separator: str, quote: bool) -> list[str]:
    """The header of a file whose rows are in order."""
    csv.field_size_limit(LONGEST_CELL)
    with opened(path) as stream:
        lines = _Lines(stream)
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE
        rows = csv.reader(lines, delimiter=separator, quoting=quoting, strict=quote)
        header = None
        try:
            for row in rows:
                raw, start = lines.taken()
                header = row if header is None else header
                if len(row) > len(header):
                    refuse_line(path, start, raw, f"has {len(row)} cells instead of {len(header)}")
                if quote and raw.count('"') % 2:
                    refuse_line(path, start, raw, _UNPAIRED)
        except csv.Error as error:
            raw, start = lines.taken()
            refuse_line(
                path, start, raw, _UNPAIRED if raw.count('"') % 2 else f"holds no separated cells ({error})"
            )
        except _NotText as error:
            refuse_not_utf_8(path, rows.line_num + 1, error.line)
    if not header:
        raise DataError(f"{path} is empty; write a header and rows, or remove it")
    return header


class _NotText(Exception):
    """A line that is not UTF-8."""

    def __init__(self, line: bytes) -> None:
        super().__init__(line)
        self.line = line


class _Lines:
    """The lines of a stream as text, and those that the row read last was made of."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._number = 0
        self._row: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._stream):
            try:
                text = line.decode("utf-8" if number else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise _NotText(line) from error
            self._number += 1
            self._row.append(text)
            yield text

    def taken(self) -> tuple[str, int]:
        """The lines taken since the last call, and the number of the first of them (from 1)."""
        row, self._row = self._row, []
        return "".join(row), self._number - len(row) + 1


def refuse_damaged_records(files: list[Path]) -> None:
    """Looks for what makes JSON lines unreadable; returns where nothing is found.

    Raises:
        DataError: a byte-order mark, a line that is no JSON object, a value of another type than before, or a
            file that cannot be unpacked.
    """
    kinds: dict[str, tuple[str, str]] = {}  # key -> kind of its values, where it was met first
    for path in files:
        with opened(path) as stream:
            if stream.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
                raise DataError(
                    f"{path} begins with a byte-order mark; save it as UTF-8 without one (tail -c +4 OLD > NEW)"
                )
        for first, chunk in line_chunks(path):
            for number, line in enumerate(chunk.split(b"\n"), first):
                if line.strip():
                    _check_record(path, number, line, kinds)


def _check_record(path: Path, number: int, line: bytes, kinds: dict[str, tuple[str, str]]) -> None:
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        refuse_not_utf_8(path, number, line)
    except (ValueError, RecursionError) as error:
        place = f"{error.msg}, character {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        refuse_line(path, number, line, f"is no JSON object ({place})")
    if not isinstance(record, dict):
        refuse_line(path, number, line, "is no JSON object; each line must be one")
    for key, value in record.items():
        kind = _kind(value)
        known, place = kinds.setdefault(key, (kind, f"{path.name}, line {number}")) if kind else ("", "")
        if kind != known:
            refuse_line(path, number, line, f"has a {kind} as {key!r}, where {place} has a {known}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON; write null")


def _kind(value: Any) -> str:
    """What JSON calls a value, "" for null."""
    names = {bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "object"}
    return names.get(type(value), "")
