"""What a log looks like before anything is trained on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llm2rec.config import DataConfig
from llm2rec.data import filters, origins, sources
from llm2rec.data.layouts import detect_layout
from llm2rec.data.sequences import consumed, part_counts, split_log
from llm2rec.data.splits import Split, check_parts, too_short
from llm2rec.data.tables import ITEM, MOMENT, TIME, TITLE, USER, Catalogue, Interactions, check_known_items
from llm2rec.data.texts import item_texts
from llm2rec.errors import ConfigError, DataError, first_few
from llm2rec.loading import load_recipe, recipe_names

POINTS = 60  # of a curve
NO_VALUE = ("nan", "none", "null", "na", "<na>")  # what becomes of an empty cell that is written as text
Points = list[tuple[float, float]]
CountTokens = Callable[[list[str]], list[int]]


@dataclass(frozen=True)
class Description:
    """A log in numbers, in words where something needs a decision, and as curves.

    Attributes:
        facts: name -> plain value; lengths and popularity as quantiles, shares in [0, 1].
        warnings: what will go wrong or mislead, and what to set.
        curves: name -> (x, y) points.
        over_time: (year, events from there to the next) points; none where the times are ranks.
    """

    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    curves: dict[str, Points] = field(default_factory=dict)
    over_time: Points = field(default_factory=list)


def describe(
    what: str | Path,
    items: str | Path | None = None,
    count_tokens: CountTokens | None = None,
    overrides: tuple[str, ...] = (),
) -> dict[str, Description]:
    """Domain -> description of a named source, a folder in a known layout, a recipe, or two files.

    A recipe's filters and split, as changed by `overrides` (`KEY=VALUE`), are applied and checked; otherwise the
    split is the default one.

    Raises:
        DataError, ConfigError: whatever is wrong with the input.
    """
    configs, seed = _configs(str(what), items, overrides)
    return {name: _describe(config, seed, count_tokens) for name, config in configs.items()}


def _configs(what: str, items: str | Path | None, overrides: tuple[str, ...]) -> tuple[dict[str, DataConfig], int]:
    path = Path(what)
    if items is None and (what in recipe_names() or path.suffix in (".yaml", ".yml")):
        recipe = load_recipe(what, overrides)
        return dict(recipe.by_domain), recipe.seed
    if overrides:
        raise ConfigError(f"--set changes keys of a recipe, and {what} is none; write one that names these data")
    if items is not None:
        return {path.name: DataConfig(interactions=path, items=Path(items))}, 0
    if what in sources.DATA:
        return {what: DataConfig(source=what)}, 0
    if path.is_dir() and detect_layout(path) is not None:
        return {path.name: DataConfig(folder=path)}, 0
    if path.exists():
        raise ConfigError(f"{what}: name the items file as well (`llm2rec data describe {what} ITEMS`)")
    raise ConfigError(f"{what!r} is no file, no folder, no recipe and none of: {', '.join(sources.DATA)}")


def _describe(config: DataConfig, seed: int, count_tokens: CountTokens | None) -> Description:
    log, catalogue, dropped = origins.read(config)
    log, filtered_out = filters.filtered(log, **dict(config.filters), seed=seed)
    check_known_items(log, catalogue, config.origin)
    if config.filters.k_core > 1:
        catalogue = consumed(catalogue, log)
    texts = item_texts(catalogue, config.text)
    facts = _text_facts(catalogue, texts)
    if config.categories:
        facts["categories"] = len({label for labels in catalogue.labels(config.categories) for label in labels})
    tied = log.frame.select(pl.struct(USER, TIME).is_duplicated().sum()).item()
    facts = _event_facts(log, catalogue) | _time_facts(log, tied) | facts
    warnings = _text_warnings(texts) + _no_value_warnings(log, catalogue)
    warnings += _time_warnings(log, tied, config.split.by)
    curves = {"events of each item, most popular first": _popularity(log), "events a user": _lengths(log)}
    if count_tokens is not None:
        tokens = np.array(count_tokens(texts))
        quantiles = zip(("median", "95_percent", "max"), np.quantile(tokens, [0.5, 0.95, 1.0]), strict=True)
        facts |= {f"text_tokens_{name}": int(value) for name, value in quantiles}
        curves["tokens of an item's text"] = _histogram(tokens)
    for reason, count in (dropped | filtered_out).items():
        facts[f"left out: {reason}"] = count
    split = Split(**dict(config.split), seed=seed)
    split_facts, split_warnings = _split_facts(log, split, config.short_histories)
    over_time = _over_time(log) if _has_clock(log) else []
    return Description(facts | split_facts, warnings + split_warnings, curves, over_time)


def _event_facts(log: Interactions, catalogue: Catalogue) -> dict[str, Any]:
    lengths, popularity = _counts(log, USER), np.sort(_counts(log, ITEM))[::-1]
    repeats = len(log) - log.frame.select(pl.struct(USER, ITEM).n_unique()).item()
    quantiles = np.quantile(lengths, [0.0, 0.5, 0.9, 1.0])
    names = ("min", "median", "90_percent", "max")
    return {
        "users": len(lengths),
        "items": len(catalogue),
        "items_consumed": len(popularity),
        "events": len(log),
        "density": round(len(log) / (len(lengths) * len(catalogue)), 6),
        **{f"events_per_user_{name}": int(value) for name, value in zip(names, quantiles, strict=True)},
        "share_of_events_on_top_tenth_of_items": round(
            float(popularity[: max(1, len(popularity) // 10)].sum() / len(log)), 3
        ),
        "repeated_events": repeats,
    }


def _time_facts(log: Interactions, tied: int) -> dict[str, Any]:
    times = log.times()
    first, last = (_as_date(log, int(at)) for at in (times.min(), times.max()))
    return {"first_event": first, "last_event": last, "share_of_events_tied_in_time": round(tied / len(log), 3)}


def _has_clock(log: Interactions) -> bool:
    """Whether the times are moments and no ranks, which end long before 1973 where they are taken for seconds."""
    return log.frame[TIME].dtype == MOMENT or bool(log.times().max() // log.ticks_per_second() > 10**8)


def _looks_like_dates(log: Interactions) -> bool:
    """Whether every time has the digits of a year, a month and a day."""
    year, month, day = log.times() // 10_000, log.times() // 100 % 100, log.times() % 100
    dates = (year > 1900) & (year < 2100) & (month > 0) & (month <= 12) & (day > 0) & (day <= 31)
    return bool(dates.all())


def _as_date(log: Interactions, at: int) -> str:
    """A time of the log as an ISO date, or as it is where it is a rank."""
    moment = np.datetime64(at // log.ticks_per_second(), "s")
    return str(moment.astype("datetime64[D]")) if _has_clock(log) else str(at)


def _text_facts(catalogue: Catalogue, texts: list[str]) -> dict[str, Any]:
    lengths = np.array([len(text) for text in texts])
    return {
        "text_characters_median": int(np.median(lengths)),
        "text_characters_max": int(lengths.max()),
        "duplicate_texts": len(texts) - len(set(texts)),
        "text_columns": ", ".join(name for name in catalogue.frame.columns if name != ITEM),
    }


def _text_warnings(texts: list[str]) -> list[str]:
    distinct = len(set(texts))
    if distinct < 0.9 * len(texts):
        return [
            f"only {distinct:,} different texts for {len(texts):,} items: a text model cannot tell the others "
            "apart; add columns to data.text"
        ]
    return []


def _no_value_warnings(log: Interactions, catalogue: Catalogue) -> list[str]:
    """Ids and titles that only say that there is none, which pass for an id or a title like any other."""
    items = np.ones(len(catalogue), dtype=np.int64)
    found = []
    for name, values, counts, of in (
        (USER, log.ids(USER), log.counts(USER), "events"),
        (ITEM, catalogue.frame[ITEM], items, "items"),
        (TITLE, catalogue.frame[TITLE], items, "items"),
    ):
        places = np.flatnonzero(
            values.str.strip_chars().str.to_lowercase().is_in(NO_VALUE).to_numpy() & (counts > 0)
        )
        if len(places):
            found.append(f"{name} of {counts[places].sum():,} {of} reads {values[int(places[0])]!r}")
    mend = "where that stands for an empty cell, fill it in or remove these rows"
    return [f"{'; '.join(found)}: {mend}"] if found else []


def _time_warnings(log: Interactions, tied: int, split_by: str) -> list[str]:
    """Ties, whose order is not that of consumption, and moments at which nobody consumed anything."""
    warnings = []
    if tied > 0.1 * len(log) or (tied and split_by == "given"):
        order = f"part, then {ITEM}" if split_by == "given" else ITEM
        warnings.append(
            f"{tied:,} events ({tied / len(log):.1%}) share user and time with another: their order is that of "
            f"{order}, not of consumption or of the file"
        )
    if split_by == "time" and not _has_clock(log):
        warnings.append(
            "the split is by time, and the times are numbers, no dates: where they count each user's own events, "
            "only long histories are tested; split by last then"
        )
    if _looks_like_dates(log):
        warnings.append("the times look like dates written as 20191231, but are read as seconds: write 2019-12-31")
    if _has_clock(log):
        seconds = log.times() // log.ticks_per_second()
        for wrong, when in (
            (seconds <= 0, "at 1970-01-01 00:00 or before"),
            (seconds > time.time(), "later than now"),
        ):
            if wrong.any():
                example = _as_date(log, int(log.times()[wrong.argmax()]))
                warnings.append(
                    f"{int(wrong.sum()):,} events lie {when} ({example}): where that stands for an unknown time, "
                    "remove them"
                )
    return warnings


def _split_facts(log: Interactions, split: Split, short_histories: str) -> tuple[dict[str, Any], list[str]]:
    """Events of each part, which with those that the split leaves out sum to `events`, and what it refuses."""
    warnings = []
    short = too_short(log, split)
    if short and short_histories == "error":
        warnings.append(
            f"{len(short):,} users are too short for the split (by {split.by}, holdout {split.holdout}): "
            f"{first_few(short)}; data.short_histories: drop leaves them out"
        )
    try:
        log, parts, cold, dropped = split_log(log, split, "drop")
    except DataError as error:
        return {"split": "refused"}, [*warnings, str(error)]
    try:
        check_parts(log, parts, split, cold)
    except DataError as error:
        return {"leakage_check": "failed"}, [*warnings, str(error)]
    left_out = {f"left out by the split: {reason}": count for reason, count in dropped.items()}
    return left_out | part_counts(parts) | {"leakage_check": "passed"}, warnings


def _popularity(log: Interactions) -> Points:
    counts = np.sort(_counts(log, ITEM))[::-1]
    places = np.unique(np.geomspace(1, len(counts), POINTS).astype(int))
    return [(float(place), float(counts[place - 1])) for place in places]


def _lengths(log: Interactions) -> Points:
    return _histogram(_counts(log, USER))


def _counts(log: Interactions, column: str) -> np.ndarray:
    """How many events each user or item has, of those that have any."""
    counts = log.counts(column)
    return counts[counts > 0]


def _histogram(values: np.ndarray) -> Points:
    """(value, how many) up to the 99th percentile, in at most POINTS steps."""
    highest = max(2, int(np.quantile(values, 0.99)))
    counts, edges = np.histogram(values, bins=min(POINTS, highest), range=(0.5, highest + 0.5))
    middles = (edges[1:] + edges[:-1]) / 2  # whole numbers where each has a step of its own
    return [(float(middle), float(count)) for middle, count in zip(middles, counts, strict=True)]


def _over_time(log: Interactions) -> Points:
    times = log.times()
    counts, edges = np.histogram(times.astype(np.float64) - float(times.min()), bins=POINTS)
    edges = edges + float(times.min())
    per_year = 365.2425 * 86_400 * log.ticks_per_second()
    return [(float(edge / per_year + 1970), float(count)) for edge, count in zip(edges, counts, strict=False)]
