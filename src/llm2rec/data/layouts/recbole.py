"""RecBole's atomic files (Zhao et al. 2021): tab-separated, with the type of each field in the header."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from llm2rec.data.files import PACKED, matching, names_of, refuse_missing, the_one
from llm2rec.data.layouts.assembly import PIPE, assemble
from llm2rec.data.layouts.delimited import (
    header_of,
    numbers,
    read_delimited,
    require_cells,
    whole_numbers,
)
from llm2rec.data.tables import RawTables
from llm2rec.errors import DataError, first_few

TITLE_FIELDS = (
    "title",
    "movie_title",
    "name",
    "item_name",
    "product_title",
    "book_title",
    "game_title",
    "app_name",
)
LABEL_FIELDS = ("genre", "genres", "class", "category", "categories", "tags")
TEXT_TYPES = ("token", "token_seq")
PARTS = {"train": "train", "valid": "validation", "test": "test"}


def read_recbole(folder: Path) -> RawTables:
    """`<name>.inter` (or the split `<name>.train.inter`, `.valid.inter`, `.test.inter`) and `<name>.item`.

    Fields user_id, item_id, timestamp (unit as published) and, where there is one, rating. The title is the
    first of TITLE_FIELDS; other token and token_seq fields become text columns, numbers do not. Sequences are
    separated by spaces: labels (genres, categories) are joined by "|", running text keeps its spaces.

    Raises:
        DataError: a file or a field is missing (without .item there are no titles), or a malformed line.
    """
    logs = _logs(folder)
    if not matching(folder, r".+\.item" + PACKED):
        held = first_few(names_of(folder), 12)
        raise DataError(f"{folder} has no <name>.item, which holds the titles that are needed; it holds {held}")
    item_file = the_one(folder, r".+\.item" + PACKED, "<name>.item")
    frames = [_events(path, part) for path, part in logs]
    return assemble(pl.concat(frames), _items(item_file), {}, str(folder))


def _logs(folder: Path) -> list[tuple[Path, str | None]]:
    found = matching(folder, r".+\.inter" + PACKED)
    if not found:
        refuse_missing(folder, "<name>.inter")
    split = [(path, part) for name, part in PARTS.items() for path in found if f".{name}.inter" in path.name]
    if split and len(split) == len(found) == len({part for _, part in split}):
        return [(path, part) for path, part in split]
    if len(found) > 1:
        names = first_few([path.name for path in found])
        raise DataError(f"{folder} holds several <name>.inter: {names}; keep one, or the three of one split")
    return [(found[0], None)]


def _fields(path: Path) -> dict[str, tuple[str, str]]:
    """Field -> (column as it stands in the header, type)."""
    header = header_of(path, "\t")
    typed = {cell.partition(":")[0].strip(): (cell, cell.partition(":")[2].strip()) for cell in header}
    if not typed or not all(kind for _, kind in typed.values()):
        raise DataError(f"{path}: the header must name each field with its type (user_id:token); it is {header}")
    if len(typed) < len(header):
        raise DataError(f"{path}: the header names a field more than once: {header}")
    return typed


def _read(path: Path, needed: tuple[str, ...], wanted: list[str]) -> pl.DataFrame:
    fields = _fields(path)
    missing = [name for name in needed if name not in fields]
    if missing:
        raise DataError(f"{path}: no field {first_few(missing)}; it has {first_few([*fields], 12)}")
    names = [*needed, *(name for name in wanted if name in fields and name not in needed)]
    table = read_delimited(path, tuple(fields[name][0] for name in names), separator="\t", quote=None)
    return table.rename({fields[name][0]: name for name in names})


def _events(path: Path, part: str | None) -> pl.DataFrame:
    table = _read(path, ("user_id", "item_id", "timestamp"), ["rating"])
    require_cells(table, ("user_id", "item_id"), path)
    columns = [whole_numbers(table, "timestamp", path)]
    if "rating" in table.columns:
        columns.append(numbers(table, "rating", path))
    events = table.select("user_id", "item_id", *columns)
    return events if part is None else events.with_columns(part=pl.lit(part, dtype=pl.String))


def _items(path: Path) -> pl.DataFrame:
    fields = _fields(path)
    title = next((name for name in TITLE_FIELDS if name in fields), None)
    if title is None:
        raise DataError(
            f"{path}: no title field ({', '.join(TITLE_FIELDS)}); it has {first_few([*fields], 12)}. "
            "Titles are needed: rename the field that holds them"
        )
    texts = [name for name, (_, kind) in fields.items() if kind in TEXT_TYPES]
    table = _read(path, ("item_id", title), [name for name in texts if name not in ("item_id", title)])
    labels = [name for name in table.columns if name in LABEL_FIELDS and fields[name][1] == "token_seq"]
    spaced = [~pl.col(name).str.contains(",", literal=True) for name in labels]
    table = table.with_columns(
        pl.when(is_spaced)
        .then(pl.col(name).str.strip_chars().str.replace_all(r"\s+", PIPE))
        .otherwise(pl.col(name))
        .alias(name)
        for name, is_spaced in zip(labels, spaced, strict=True)
    )
    others = [name for name in table.columns if name not in ("item_id", title)]
    return table.select("item_id", pl.col(title).alias("title"), *(name for name in others if name != "title"))
