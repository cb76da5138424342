"""Published log layouts: one function a layout, `(folder) -> RawTables`, and which layout a folder holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import polars as pl

from llm2rec.data.files import PACKED, names_of
from llm2rec.data.layouts.amazon import read_amazon_2018, read_amazon_2023
from llm2rec.data.layouts.authors import csft_files, read_llm2rec
from llm2rec.data.layouts.movielens import (
    read_movielens_1m,
    read_movielens_100k,
    read_movielens_csv,
)
from llm2rec.data.layouts.recbole import read_recbole
from llm2rec.data.layouts.ucsd import read_goodreads, read_steam
from llm2rec.data.tables import ITEM, PART, RATING, Catalogue, Interactions, RawTables
from llm2rec.errors import ConfigError, DataError

LAYOUTS: dict[str, Callable[[Path], RawTables]] = {
    "amazon-2023": read_amazon_2023,
    "amazon-2018": read_amazon_2018,
    "movielens-100k": read_movielens_100k,
    "movielens-1m": read_movielens_1m,
    "movielens-csv": read_movielens_csv,
    "goodreads": read_goodreads,
    "steam": read_steam,
    "recbole": read_recbole,
    "llm2rec": read_llm2rec,
}


def read_folder(folder: Path, layout: str = "auto") -> RawTables:
    """What `folder` holds, in the layout of that name or in the one that its files tell.

    Raises:
        ConfigError: no such layout.
        DataError: no layout is told, or a file is missing or damaged.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise ConfigError(f"data.layout: there is no layout {layout!r}; known: auto, {', '.join(LAYOUTS)}")
    found = detect_layout(folder) if layout == "auto" else layout
    if found is None:
        raise DataError(
            f"{folder} holds no published layout that is known ({', '.join(LAYOUTS)}); for tables of your own "
            "give data.interactions and data.items"
        )
    return LAYOUTS[found](folder)


def validated(raw: RawTables, origin: str) -> tuple[Interactions, Catalogue, dict[str, int]]:
    """The canonical tables of a layout with its ratings and parts, and reason -> rows that were left out.

    Items that no event names are left out: catalogues are published for whole shops.

    Raises:
        DataError: what validation refuses.
    """
    further = [name for name in (RATING, PART) if name in raw.events.collect_schema().names()]
    interactions = Interactions.from_frame(raw.events, origin, further)
    consumed = interactions.ids(ITEM).cast(pl.String)
    items = raw.items.filter(pl.col(ITEM).is_in(consumed.implode()))
    dropped = dict(raw.dropped)
    if items.height < raw.items.height:
        dropped["items_without_events"] = raw.items.height - items.height
    return interactions, Catalogue.from_frame(items, origin), dropped


# The file that tells each layout; the rest of its files may still be missing, which its reader then says.
_TELLING = {
    "llm2rec": r"item_titles\.json",
    "movielens-100k": r"u\.(data|item)" + PACKED,
    "movielens-1m": r"(ratings|movies)\.dat" + PACKED,
    "recbole": r".+\.(inter|item)" + PACKED,
    "goodreads": r"goodreads_(interactions|books).*\.json" + PACKED,
    "steam": r"steam_(reviews|new|games)\.json" + PACKED,
    "amazon-2023": r"meta_.+\.jsonl" + PACKED,
    "amazon-2018": r"meta_.+\.json" + PACKED,
    "movielens-csv": r"movies\.csv" + PACKED,
}


def detect_layout(folder: Path) -> str | None:
    """The name in LAYOUTS of what `folder` holds, by its files' names; None where no published name is there.

    Only CSFT CSV files, which have no fixed name, are opened, for their header.

    Raises:
        DataError: there is no such folder.
    """
    names = names_of(folder)
    for layout, pattern in _TELLING.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return layout
    return "llm2rec" if csft_files(folder) else None
