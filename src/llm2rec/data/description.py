"""What a log looks like before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from llm2rec.config import load_recipe
from llm2rec.data import readers, sources
from llm2rec.data.tables import Catalogue, Interactions, check_known_items
from llm2rec.errors import ConfigError


def describe_input(what: str | Path, items: str | Path | None) -> dict[str, Any]:
    """The description of a named source, of a recipe's data, or of an interactions and an items file.

    Raises:
        DataError, ConfigError: whatever is wrong with the input.
    """
    interactions, catalogue = _open(str(what), items)
    check_known_items(interactions, catalogue)
    return describe_tables(interactions, catalogue)


def _open(what: str, items: str | Path | None) -> tuple[Interactions, Catalogue]:
    if what in sources.DATA:
        return sources.fetch_data(what)
    if items is not None:
        return readers.read_interactions(Path(what)), readers.read_items(Path(items))
    if Path(what).suffix in (*readers.SEPARATORS, ".parquet"):
        raise ConfigError(f"{what}: name the items file as well (`llm2rec data describe {what} ITEMS`)")
    data = load_recipe(what).data
    if data.source:
        return sources.fetch_data(data.source)
    assert data.interactions and data.items
    return readers.read_interactions(data.interactions), readers.read_items(data.items)


def describe_tables(interactions: Interactions, catalogue: Catalogue) -> dict[str, Any]:
    """Plain numbers by name; lengths and popularity as quantiles, shares in [0, 1]."""
    events = interactions.frame
    lengths = events.group_by("user_id").len()["len"]
    popularity = events.group_by("item_id").len()["len"].sort(descending=True)
    users, consumed = len(lengths), len(popularity)
    titles = catalogue.frame["title"]
    tied = events.select(pl.struct("user_id", "timestamp").is_duplicated().mean()).item()
    repeats = events.height - events.select(pl.struct("user_id", "item_id").n_unique()).item()
    top = popularity.head(max(1, consumed // 10)).sum()
    return {
        "users": users,
        "items": len(catalogue),
        "items_consumed": consumed,
        "events": events.height,
        "density": round(events.height / (users * len(catalogue)), 6),
        "events_per_user_min": lengths.min(),
        "events_per_user_median": lengths.median(),
        "events_per_user_90_percent": lengths.quantile(0.9),
        "events_per_user_max": lengths.max(),
        "share_of_events_on_top_tenth_of_items": round(top / events.height, 3),
        "repeated_events": repeats,
        "share_of_events_tied_in_time": round(tied, 3),
        "first_timestamp": events["timestamp"].min(),
        "last_timestamp": events["timestamp"].max(),
        "title_characters_median": titles.str.len_chars().median(),
        "title_characters_max": titles.str.len_chars().max(),
        "duplicate_titles": len(titles) - titles.n_unique(),
        "text_columns": ", ".join(name for name in catalogue.frame.columns if name != "item_id"),
    }
