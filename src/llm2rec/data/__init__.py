"""Tables, readers, named sources, sequences and embeddings: everything that is not a model.

The verbs `llm2rec data list | fetch | describe` are `llm2rec.data.list()`, `.fetch(name)`, `.describe(...)`.
"""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm2rec.data.description import CountTokens, Description
    from llm2rec.data.sources import Source
    from llm2rec.data.tables import Catalogue, Interactions


def list() -> builtins.list[Source]:
    """The data sets known by name."""
    from llm2rec.data.sources import DATA

    return [*DATA.values()]


def fetch(name: str) -> tuple[Interactions, Catalogue]:
    """The canonical tables of a named data set, downloaded into the cache if need be.

    Raises:
        DataError: no such name, or no mirror has the registered content.
    """
    from llm2rec.data.sources import fetch_data

    return fetch_data(name)


def describe(
    what: str | Path,
    items: str | Path | None = None,
    count_tokens: CountTokens | None = None,
    overrides: tuple[str, ...] = (),
) -> dict[str, Description]:
    """Counts, density, lengths, popularity, repeats, ties, split and leakage check of a log, by domain.

    Args:
        what: a source, a recipe (name or path), a folder in a published layout, or an interactions file.
        items: the items file that belongs to an interactions file.
        count_tokens: texts -> tokens of each, to know what truncation costs.
        overrides: `KEY=VALUE` for a recipe, as `run` takes them.

    Raises:
        DataError, ConfigError: whatever is wrong with the input.
    """
    from llm2rec.data import description

    return description.describe(what, items, count_tokens, overrides)
