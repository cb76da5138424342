"""Where a row wins: test events sorted into slices, and each row's NDCG@10 on each slice.

A slicing puts every test event into exactly one of its slices. Slices are exploratory: they show where a
difference comes from and choose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import polars as pl

from llm2rec.errors import ArtifactError, ConfigError, first_few
from llm2rec.evaluation.protocol import MetricSummary, compare_rows, summarise
from llm2rec.evaluation.significance import Comparison, enough_samples, holm, verdict
from llm2rec.evaluation.verdicts import COLD_TARGET, COMPARED_METRIC, differs, too_few_users

if TYPE_CHECKING:
    from llm2rec.data.sequences import Sequences

MEANINGS = {
    "target": "whether the user has consumed the target before (repeat) or not (novel)",
    "history_length": "events of the user before the target, in the window or not",
    "item_popularity": (
        "of the target by training events: head = the most popular items, which gather the first third of all "
        "training events, middle = those of the second third, tail = all others"
    ),
    "item_training": "whether the target has a training event at all; without one it is a cold item",
    "user_training": "training events of the user; with few it is a cold user",
}
LENGTH_BOUNDS = (5, 10, 20, 50)
COLD_USER_EVENTS = 5

_EVENT = ["user_id", "item_id"]
_TRAINING = ["row", "seed"]
_OCCURRENCE = "occurrence"


class SliceSummary(TypedDict):
    """One slice: NDCG@10 by row, each row against the reference, and the warning where users are too few."""

    users: int
    events: int
    rows: dict[str, MetricSummary]
    comparisons: dict[str, Comparison]
    warning: str | None


class SlicingSummary(TypedDict):
    """One slicing: what it means, and its slices that hold events, in their order."""

    meaning: str
    slices: dict[str, SliceSummary]


def slice_events(
    sequences: Sequences,
    part: int,
    length_bounds: Sequence[int] = LENGTH_BOUNDS,
    cold_user_events: int = COLD_USER_EVENTS,
) -> pl.DataFrame:
    """The slices of every held-out event: `user_id`, `item_id` and one Enum column a slicing (MEANINGS).

    One row an event, in the order of `sequences`, so that it stands beside a result of `protocol.evaluate`.
    There is no slice by time: histories may carry no clock time.

    Args:
        sequences: the prepared data.
        part: VALIDATION or TEST of `data.sequences`.
        length_bounds: last length of each bucket but the open one, rising: (5, 10) gives up to 5, 6 to 10, over
            10.
        cold_user_events: a user with fewer training events is cold.

    Raises:
        ConfigError: the bounds do not rise or are below 1, or `cold_user_events` < 1.
    """
    _check_bounds(length_bounds, cold_user_events)
    positions = sequences.held_out(part)
    users = sequences.users_of(positions)
    targets = np.asarray(sequences.items)[positions]
    _, offsets = sequences.training()
    counts = sequences.training_counts()
    lengths = positions - np.asarray(sequences.offsets)[users]
    cold_user = np.diff(offsets)[users] < cold_user_events
    user_words = [f"fewer than {cold_user_events}", f"{cold_user_events} or more"]
    buckets = np.searchsorted(np.asarray(length_bounds), lengths)  # a length equal to a bound is within it
    chosen = {
        "target": (["repeat", "novel"], (~_consumed_before(sequences)[positions]).astype(np.int64)),
        "history_length": (_length_words(length_bounds), buckets),
        "item_popularity": (["head", "middle", "tail"], popularity_thirds(counts)[targets - 1]),
        "item_training": ([COLD_TARGET, "in training"], (counts[targets - 1] > 0).astype(np.int64)),
        "user_training": (user_words, (~cold_user).astype(np.int64)),
    }
    ids = {
        "user_id": pl.Series(sequences.user_ids, dtype=pl.String).gather(users),
        "item_id": pl.Series(sequences.item_ids, dtype=pl.String).gather(targets.astype(np.int64) - 1),
    }
    columns = {name: _enum(words, places) for name, (words, places) in chosen.items()}
    return pl.DataFrame(ids | columns)


def popularity_thirds(counts: np.ndarray) -> np.ndarray:
    """0 (head), 1 (middle) or 2 (tail) of each item, (N,) int64.

    Items in falling order of training events, equal ones by index: the head goes on until a third of all
    events is gathered, the middle until two thirds are, the item that crosses a bound included; the tail is
    the rest. An item without training events is in the tail.

    Args:
        counts: (N,) training events of each item, integers >= 0.
    """
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]  # events of all more popular items
    thirds = np.empty(len(counts), dtype=np.int64)
    thirds[order] = (3 * before >= counts.sum()).astype(np.int64) + (3 * before >= 2 * counts.sum())
    return np.where(counts > 0, thirds, 2)


def summarise_slices(
    per_user: pl.DataFrame, slices: pl.DataFrame, reference: str, samples: int = 10_000, seed: int = 0
) -> dict[str, SlicingSummary]:
    """NDCG@10 of every row on every slice with bootstrap intervals, by slicing.

    A user counts in each slice with the mean over the user's events of that slice. Rows are compared with
    `reference` as in `compare_rows`, but the Holm family is the slicing: all its slices that have users enough.
    A slice with fewer than MINIMUM_USERS users has intervals, a warning, and no test.

    Args:
        per_user: PER_USER_COLUMNS, all rows and seeds on the same test events.
        slices: of the same events, from `slice_events`. Events of the same user and item are told apart by
            their order, which both tables keep.
        reference: row that the others are compared with.
        samples: resamples of each slice's bootstrap; more where a verdict takes more (`enough_samples`).
        seed: of the bootstrap.

    Raises:
        ArtifactError: an event of `per_user` has no slice, or as in `compare_rows`.
        ConfigError: there is no row `reference`.
    """
    slicings = {name: dtype.categories for name, dtype in slices.schema.items() if isinstance(dtype, pl.Enum)}
    joined = _with_slices(per_user, slices)
    others = per_user["row"].n_unique() - 1
    found: dict[str, SlicingSummary] = {}
    for slicing, words in slicings.items():
        enough = enough_samples(samples, others * len(words))
        by_slice: dict[str, SliceSummary] = {}
        for word in words:
            events = joined.filter(pl.col(slicing) == word)
            if not events.is_empty():
                by_slice[word] = _summary(events.select(per_user.columns), reference, enough, seed)
        _correct(by_slice)
        found[slicing] = {"meaning": MEANINGS[slicing], "slices": by_slice}
    return found


def _summary(events: pl.DataFrame, reference: str, samples: int, seed: int) -> SliceSummary:
    rows = summarise(events, [COMPARED_METRIC], samples, seed)["rows"]
    users = events["user_id"].n_unique()
    return {
        "users": users,
        "events": events.height // events.select(_TRAINING).n_unique(),
        "rows": {row: metrics[COMPARED_METRIC] for row, metrics in rows.items()},
        "comparisons": compare_rows(events, reference, samples, seed),
        "warning": too_few_users(users),
    }


def _correct(by_slice: dict[str, SliceSummary]) -> None:
    """Holm over all tested comparisons of a slicing that differ, instead of those of each slice; in place."""
    tested = [
        result
        for summary in by_slice.values()
        if summary["warning"] is None
        for result in summary["comparisons"].values()
        if differs(result)
    ]
    flipped = holm([result["p_sign_flip"] for result in tested])
    corrected = holm([result["p"] for result in tested])
    for result, p_holm, flipped_holm in zip(tested, corrected, flipped, strict=True):
        result["p_holm"], result["p_sign_flip_holm"] = p_holm, flipped_holm
        result["verdict"] = verdict(result["difference"], max(p_holm, flipped_holm), result["users"])


def _with_slices(per_user: pl.DataFrame, slices: pl.DataFrame) -> pl.DataFrame:
    """`per_user` with the slices of each of its events."""
    number = pl.int_range(pl.len())
    joined = per_user.with_columns(number.over([*_TRAINING, *_EVENT]).alias(_OCCURRENCE)).join(
        slices.with_columns(number.over(_EVENT).alias(_OCCURRENCE), pl.lit(True).alias("found")),
        on=[*_EVENT, _OCCURRENCE],
        how="left",
        maintain_order="left",
    )
    missing = joined.filter(pl.col("found").is_null())
    if not missing.is_empty():
        events = [f"{user} {item}" for user, item in missing.select(_EVENT).unique(maintain_order=True).rows()]
        raise ArtifactError(
            f"{len(events)} test events have no slice (user and item: {first_few(events)}); "
            "slice the data that the table was made from"
        )
    return joined


def _consumed_before(sequences: Sequences) -> np.ndarray:
    """(E,) bool: the same user has an earlier event of the same item."""
    owners = np.repeat(np.arange(sequences.n_users), np.diff(np.asarray(sequences.offsets)))
    events = pl.DataFrame({"user": owners, "item": np.asarray(sequences.items)})
    return events.select(pl.int_range(pl.len()).over("user", "item") > 0).to_series().to_numpy()


def _enum(words: list[str], places: np.ndarray) -> pl.Series:
    return pl.Series(words, dtype=pl.String).gather(places.astype(np.int64)).cast(pl.Enum(words))


def _length_words(bounds: Sequence[int]) -> list[str]:
    inner = [f"{low + 1} to {high}" for low, high in zip(bounds, bounds[1:], strict=False)]
    return [f"up to {bounds[0]}", *inner, f"over {bounds[-1]}"]


def _check_bounds(length_bounds: Sequence[int], cold_user_events: int) -> None:
    if not length_bounds or list(length_bounds) != sorted(set(length_bounds)) or length_bounds[0] < 1:
        raise ConfigError(f"length bounds are {list(length_bounds)}; give rising whole numbers from 1, as [5, 10]")
    if cold_user_events < 1:
        raise ConfigError(f"cold_user_events is {cold_user_events}; it must be at least 1")
