"""Published log layouts: one function a layout, `(folder) -> RawTables`, and which layout a folder holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from llm2rec.data.layouts.amazon import read_amazon_2018, read_amazon_2023
from llm2rec.data.layouts.authors import csft_files, read_llm2rec
from llm2rec.data.layouts.files import PACKED, names_of
from llm2rec.data.layouts.movielens import (
    read_movielens_1m,
    read_movielens_100k,
    read_movielens_csv,
)
from llm2rec.data.layouts.recbole import read_recbole
from llm2rec.data.layouts.ucsd import read_goodreads, read_steam
from llm2rec.data.tables import RawTables

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
