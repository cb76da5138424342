"""The layout of the LLM2Rec authors: samples of (history, target), already split.

A sample is not a log, so each event carries what it is a target of: `part` is the part of the file in which
the event is the target, and null where it is history only (neither trained on as a target nor evaluated).
`timestamp` is the position within the sequence, from 0: the format has no clock time.

- Downstream text files name no user. A line whose history is the end of a sequence read so far continues it, so
  the prefixes of one user become one sequence again, in which each target stands once; any other line begins a
  sequence. Every history stays exactly that of its line. Sequences are called by file and line, `train-1`.
- CSFT CSV files name the user: rows are chained, in the order train, valid, test and of the rows, into one
  sequence a user, in which each target stands once. A row whose history does not end that sequence begins
  another one, `<user>#2`, so no row's history is ever changed.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import polars as pl

from llm2rec.data.files import (
    PACKED,
    line_chunks,
    matching,
    names_of,
    opened,
    read_text,
    refuse_line,
    refuse_missing,
    refuse_not_utf_8,
)
from llm2rec.data.layouts.assembly import assemble
from llm2rec.data.layouts.delimited import header_of
from llm2rec.data.layouts.records import UNREADABLE
from llm2rec.data.tables import RawTables
from llm2rec.errors import DataError

TITLES = "item_titles.json"
SAMPLES = {"train_data.txt": "train", "val_data.txt": "validation", "test_data.txt": "test"}
SEQUENCES = "data.txt"
CSFT_COLUMNS = ("user_id", "history_item_title", "item_title", "history_item_id", "item_id")
CSFT_FOLDERS = {"train": "train", "valid": "validation", "test": "test"}
SCHEMA = {"user_id": pl.String(), "item_id": pl.String(), "timestamp": pl.Int64(), "part": pl.String()}
ROWS_A_FRAME = 100_000

Row: TypeAlias = tuple[str, str, int, str | None]  # user_id, item_id, timestamp, part


def read_llm2rec(folder: Path) -> RawTables:
    """The downstream files `train_data.txt`, `val_data.txt`, `test_data.txt` or the CSFT CSV files of `folder`.

    Beside the text files lies `item_titles.json` ({"1": title}). `data.txt` (the same events as whole
    sequences) is read only where the three are missing; it has no parts. CSV files lie in `train/`, `valid/`
    and `test/`, or in the folder itself, where they count as training; titles are those of the rows.

    Raises:
        DataError: a file is missing, damaged or holds a malformed line, or one id has two titles.
    """
    names = names_of(folder)
    if TITLES in names:
        return _read_downstream(folder, names)
    files = csft_files(folder)
    if not files:
        refuse_missing(folder, f"{TITLES} with {', '.join(SAMPLES)}, and no CSV with {', '.join(CSFT_COLUMNS)}")
    return _read_csft(files, folder)


def csft_files(folder: Path) -> list[tuple[Path, str]]:
    """The CSFT CSV files of a folder with the part of each, in the order train, validation, test."""
    places = [(folder / name, part) for name, part in CSFT_FOLDERS.items() if (folder / name).is_dir()]
    return [
        (path, part)
        for place, part in places or [(folder, "train")]
        for path in matching(place, r".+\.csv" + PACKED)
        if set(CSFT_COLUMNS) <= set(header_of(path))
    ]


def _read_downstream(folder: Path, names: list[str]) -> RawTables:
    present = [name for name in SAMPLES if name in names]
    if present and len(present) < len(SAMPLES):
        refuse_missing(folder, next(name for name in SAMPLES if name not in names))
    if not present and SEQUENCES not in names:
        refuse_missing(folder, ", ".join(SAMPLES))
    if present:
        events = _joined({part: _samples(folder / name, part) for name, part in SAMPLES.items()})
    else:
        events = _whole_sequences(_samples(folder / SEQUENCES, None))
    return assemble(events, _titles(folder / TITLES), {}, str(folder))


def _samples(path: Path, part: str | None) -> pl.DataFrame:
    frames = [_sample_lines(path, number, chunk, part) for number, chunk in line_chunks(path)]
    return pl.concat(frames)


def _sample_lines(path: Path, number: int, chunk: bytes, part: str | None) -> pl.DataFrame:
    try:
        text = chunk.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        line = chunk.count(b"\n", 0, error.start)
        refuse_not_utf_8(path, number + line, chunk.split(b"\n")[line])
    lines = pl.DataFrame({"line": text.split("\n")}, schema={"line": pl.String()})
    lines = lines.with_row_index("number", offset=number)
    lines = lines.with_columns(pl.col("line").str.extract_all(r"\S+").alias("item_id"))
    lines = lines.filter(pl.col("item_id").list.len() > 0)
    short = lines.filter(pl.col("item_id").list.len() < 2)
    if part and short.height:
        refuse_line(path, short["number"][0], short["line"][0], "is a target without a history")
    return lines.select("number", "item_id")


def _whole_sequences(lines: pl.DataFrame) -> pl.DataFrame:
    """One user a line."""
    times = pl.int_ranges(0, pl.col("item_id").list.len(), dtype=pl.Int64)
    named = lines.select(pl.format("line-{}", "number").alias("user_id"), "item_id", times.alias("timestamp"))
    return named.explode("item_id", "timestamp")


def _joined(samples: dict[str, pl.DataFrame]) -> pl.DataFrame:
    """Samples of all parts as sequences: a sample continues the sequence that its history is the end of."""
    longest = max(int(lines["item_id"].list.len().max() or 0) - 1 for lines in samples.values())  # type: ignore[arg-type]
    ends: dict[tuple[str, ...], list[tuple[str, int]]] = {}  # last items -> (name, length) of sequences
    rows: list[Row] = []
    for part, lines in samples.items():
        for number, items in lines.iter_rows():
            *history, target = items
            open_ends = ends.get(tuple(history))
            if open_ends:
                name, length = open_ends.pop(0)
            else:
                name, length = f"{part}-{number}", len(history)
                rows += [(name, item, position, None) for position, item in enumerate(history)]
            rows.append((name, target, length, part))
            ends.setdefault(tuple(items[-longest:]), []).append((name, length + 1))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _titles(path: Path) -> pl.DataFrame:
    try:
        titles = json.loads(read_text(path, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); mend it") from error
    if not isinstance(titles, dict) or not titles:
        raise DataError(f'{path} must be one object {{"1": title, ...}}; it is {str(titles)[:80]}')
    wrong = next((item for item, title in titles.items() if not isinstance(title, (str, type(None)))), None)
    if wrong is not None:
        raise DataError(f"{path}: the title of {wrong!r} is {titles[wrong]!r}; it must be a text")
    texts = [_encodable(title) for title in titles.values()]
    return pl.DataFrame({"item_id": [_encodable(key) for key in titles], "title": texts}, schema=_ITEM_SCHEMA)


_ITEM_SCHEMA = {"item_id": pl.String(), "title": pl.String()}


def _encodable(text: str | None) -> str | None:
    return text if text is None else text.encode("utf-8", "replace").decode()


@dataclass
class _Chains:
    """One growing sequence a user, and the titles met so far. Item ids are interned: a few bytes an event."""

    sequences: dict[str, list[str]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    def add(self, user: str, history: list[str], target: str, part: str) -> Iterator[Row]:
        """The events that this row adds: its target, and its history where it begins a sequence."""
        sequence = self.sequences.get(user)
        if sequence is None or sequence[-len(history) :] != history:
            self.turns[user] = self.turns.get(user, 0) + 1
            self.names[user] = user if self.turns[user] == 1 else f"{user}#{self.turns[user]}"
            sequence = self.sequences[user] = list(history)
            yield from ((self.names[user], item, position, None) for position, item in enumerate(history))
        yield self.names[user], target, len(sequence), part
        sequence.append(target)


def _read_csft(files: list[tuple[Path, str]], folder: Path) -> RawTables:
    csv.field_size_limit(2**27)
    chains, frames = _Chains(), []
    rows: list[Row] = []
    for path, part in files:
        for number, row in _csv_rows(path):
            user, history, target = _sample_of(path, number, row, chains.titles)
            rows += chains.add(user, history, target, part)
            if len(rows) >= ROWS_A_FRAME:
                frames.append(pl.DataFrame(rows, schema=SCHEMA, orient="row"))
                rows = []
    frames.append(pl.DataFrame(rows, schema=SCHEMA, orient="row"))
    items = pl.DataFrame({"item_id": [*chains.titles], "title": [*chains.titles.values()]}, schema=_ITEM_SCHEMA)
    return assemble(pl.concat(frames), items, {}, str(folder))


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows by the line number at which each ends."""
    with opened(path) as stream:
        rows = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
        try:
            header = next(rows)
            if len(set(header)) < len(header):
                raise DataError(f"{path}: the header names a column more than once: {header}")
            for row in rows:
                if len(row) != len(header) and row:
                    what = f"ends a row of {len(row)} cells instead of {len(header)}"
                    refuse_line(path, rows.line_num, ",".join(row), what)
                if row:
                    yield rows.line_num, dict(zip(header, row, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the row after line {rows.line_num} cannot be read ({error})") from error


def _sample_of(path: Path, number: int, row: dict[str, str], titles: dict[str, str]) -> tuple[str, list[str], str]:
    history = [sys.intern(item) for item in _literal_list(path, number, row["history_item_id"])]
    names = _literal_list(path, number, row["history_item_title"])
    user, target = row["user_id"].strip(), sys.intern(row["item_id"].strip())
    if not user or not target or not history or len(history) != len(names):
        what = "needs a user, an item, and a history of as many titles as ids"
        refuse_line(path, number, str(row), what)
    for item, title in zip((*history, target), (*names, row["item_title"]), strict=True):
        if titles.setdefault(item, title) != title:
            raise DataError(
                f"{path}: line {number} calls item {item!r} {title!r}, before it was {titles[item]!r}; a file "
                "that mixes domains with overlapping ids is no catalogue, take the file of one domain"
            )
    return user, history, target


def _literal_list(path: Path, number: int, cell: str) -> list[str]:
    try:
        with warnings.catch_warnings():  # Python warns of escapes such as "\i" inside a literal
            warnings.simplefilter("ignore")
            values = ast.literal_eval(cell)
    except UNREADABLE:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, (str, int)) for value in values):
        refuse_line(path, number, cell, "holds a history that is no Python list of texts or whole numbers")
    return [str(_encodable(str(value))) for value in values]
