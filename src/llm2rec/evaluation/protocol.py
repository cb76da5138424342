"""The evaluation protocol: full ranking of held-out events, per-user table, intervals and paired tests.

A user is the unit of every statistic. A user's metric is first averaged over recommender seeds and over the
user's test events; users are then resampled with replacement (bootstrap), the same users for every row, so
that comparisons are paired. Users, not events, are independent: their events are clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypedDict, runtime_checkable

import numpy as np
import polars as pl
import torch
from torch import Tensor

from llm2rec.errors import ArtifactError, ConfigError, first_few
from llm2rec.evaluation.ranking import measure, ranks, top_k
from llm2rec.evaluation.significance import Comparison, bootstrap_means, compare_paired
from llm2rec.evaluation.verdicts import COMPARED_METRIC
from llm2rec.progress import track

if TYPE_CHECKING:
    from llm2rec.data.sequences import Sequences

PER_USER_COLUMNS = ("row", "seed", "user_id", "item_id", "rank")
CATALOGUE = "the whole catalogue"  # among what a target is ranked

_EVENT = ["user_id", "item_id"]


class Scorer(Protocol):
    """Whatever scores every item of the catalogue after a history."""

    @property
    def n_items(self) -> int:
        """Items in the catalogue."""
        ...

    def score(self, histories: Tensor) -> Tensor:
        """(B, N) float32, column j for item_index j + 1, from (B, L) int64 left-aligned, 0 = padding."""
        ...


@runtime_checkable
class Ranker(Protocol):
    """A scorer that finds ranks faster than by scoring everything."""

    def ranks(self, targets: Tensor, exclude: Tensor | None, *histories: Tensor) -> Tensor:
        """`ranking.ranks` of the scores of `histories`, (B,) int64; their times follow where it needs them."""
        ...


class MetricSummary(TypedDict):
    """One metric of one row; `std` is None with one seed, where no spread over seeds can be known."""

    mean: float
    std: float | None
    values: list[float]
    n: int
    low: float
    high: float


Summary = dict[str, dict[str, dict[str, MetricSummary]]]


def evaluate(
    scorer: Scorer,
    sequences: Sequences,
    part: int,
    history_length: int,
    batch_size: int = 256,
    description: str | None = "ranking",
    mask_history: bool = False,
    list_length: int = 0,
    known_length: int | None = None,
) -> pl.DataFrame:
    """Rank of every held-out event of `part` over the whole catalogue: user_index, item_index, rank.

    Full ranking: nothing is sampled. One row an event, in the order of `sequences`. Whether items of the
    history compete is said by `ranking_in_words`.

    Args:
        scorer: anything with `n_items` and `score`; a `Ranker` is asked for ranks where no list is wanted.
        sequences: the prepared data.
        part: VALIDATION or TEST of `data.sequences`.
        history_length: events before the target that the scorer sees, at most.
        batch_size: histories a call of the scorer; its scores take 4 * batch_size * n_items bytes.
        description: of the progress bar; None draws none (inside another bar).
        mask_history: hide every item that the user is known to have consumed before the target, be it in the
            scorer's window or not, unless it is the target itself.
        list_length: above 0, a column `recommended` holds the best items of each event, an array of this
            many item_index, best first, filled up with 0. With `mask_history` the lists, which know no
            target, lack every known item: a repeated target is then ranked but never listed.
        known_length: events before the target that the user is known by, at most: `mask_history` hides no others;
            None: all of them.

    Raises:
        ValueError: the scorer knows another number of items, or a score is not finite.
    """
    if scorer.n_items != sequences.n_items:
        raise ValueError(
            f"the scorer ranks {scorer.n_items} items, the catalogue has {sequences.n_items}; fit it again"
        )
    positions = sequences.held_out(part)
    targets = np.asarray(sequences.items[positions])
    starts: Sequence[int] = range(0, len(positions), batch_size)
    found = np.empty(len(positions), dtype=np.int64)
    lists = np.zeros((len(positions), list_length), dtype=np.int32)
    with torch.inference_mode():
        for start in starts if description is None else track(starts, description, len(starts)):
            batch = slice(start, start + batch_size)
            histories = seen(scorer, sequences, positions[batch], history_length)
            known = known_items(sequences, positions[batch], known_length) if mask_history else None
            wanted = torch.from_numpy(targets[batch].astype(np.int64))
            if isinstance(scorer, Ranker) and not list_length:
                found[batch] = scorer.ranks(wanted, known, *histories).cpu().numpy()
                continue
            scores = scorer.score(*histories)
            if scores.shape[1] != sequences.n_items:
                raise ValueError(f"{scores.shape[1]} scores a history; expected {sequences.n_items}, one an item")
            found[batch] = ranks(scores, wanted, exclude=known).cpu().numpy()
            if list_length:
                best, _ = top_k(scores, list_length, exclude=known)
                lists[batch, : best.shape[1]] = best.cpu().numpy()
    users = sequences.users_of(positions)
    ranked = pl.DataFrame({"user_index": users, "item_index": targets, "rank": found})
    return ranked.with_columns(pl.Series("recommended", lists)) if list_length else ranked


def seen(scorer: Scorer, sequences: Sequences, positions: np.ndarray, history_length: int) -> list[Tensor]:
    """What a scorer is given for events at `positions` (B,): histories (B, L), and times where it needs them."""
    given = [torch.from_numpy(sequences.histories(positions, history_length).astype(np.int64))]
    if getattr(scorer, "needs_times", False):
        given.append(torch.from_numpy(sequences.history_times(positions, history_length)))
    return given


def never_repeats(sequences: Sequences) -> bool:
    """Whether no user of the log consumes an item twice."""
    users = np.repeat(np.arange(sequences.n_users), np.diff(sequences.offsets))
    events = pl.DataFrame({"user": users, "item": np.asarray(sequences.items)})
    return int(events.select(pl.struct("user", "item").n_unique()).item()) == events.height


def ranking_in_words(
    mask_history: bool,
    none_repeats: bool = False,
    candidates: str = CATALOGUE,
    known_length: int | None = None,
) -> str:
    """What competes with a target, for the `protocol` entry of `metrics.json`.

    Args:
        none_repeats: see `never_repeats`; then rows that put items of the history first lose places that no target
            can have, which is said.
        candidates: among which a target is ranked.
        known_length: as in `evaluate`.
    """
    if mask_history:
        known = "whole known history"
        if known_length is not None:
            known = "last known event alone" if known_length == 1 else f"last {known_length} known events alone"
        return (
            f"full, over {candidates} without the items of the user's {known}, unless such an item is the target"
        )
    competing = f"full, over {candidates}; items of the history compete as well"
    if none_repeats:
        return (
            competing
            + ", though no user of this log consumes one twice (evaluation.mask_history: true hides them)"
        )
    return competing


def per_user_table(ranked: pl.DataFrame, sequences: Sequences, row: str, seed: int) -> pl.DataFrame:
    """The result of `evaluate` under outside ids, ready for `per_user.parquet`: PER_USER_COLUMNS."""
    user_ids = pl.Series(sequences.user_ids, dtype=pl.String)
    item_ids = pl.Series(sequences.item_ids, dtype=pl.String)
    return ranked.select(
        row=pl.lit(row),
        seed=pl.lit(seed, dtype=pl.Int64),
        user_id=user_ids.gather(ranked["user_index"]),
        item_id=item_ids.gather(ranked["item_index"].cast(pl.Int64) - 1),
        rank=pl.col("rank"),
    )


def mean_metric(ranked: pl.DataFrame, name: str) -> float:
    """One metric of an `evaluate` result, averaged within users, then over users."""
    within = _with_metrics(ranked, [name]).group_by("user_index", maintain_order=True).agg(pl.mean(name))
    return float(within[name].to_numpy().mean())


def summarise(per_user: pl.DataFrame, names: Sequence[str], samples: int = 10_000, seed: int = 0) -> Summary:
    """The content of `metrics.json`: `{"rows": {row: {metric: MetricSummary}}}`.

    `values` holds one mean over users a seed, `mean` is theirs, `std` is over seeds with n - 1. `low` and
    `high` bound a 95 % percentile bootstrap over users of the seed-averaged metric: they carry the chance of
    which users were asked, not that of training again.

    Args:
        per_user: PER_USER_COLUMNS, all rows and seeds on the same test events.
        names: of the metrics, as those of `ranking.metric_names`.
        samples: resamples of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ArtifactError: the table is empty, or rows or seeds differ in their test events.
    """
    by_row = _user_metrics(per_user, names)
    averaged = np.stack([values.mean(axis=0) for values in by_row.values()], axis=1)  # (U, R, M)
    n_users = averaged.shape[0]
    means = bootstrap_means(averaged.reshape(n_users, -1), samples, seed)
    low, high = np.quantile(means, [0.025, 0.975], axis=0).reshape(2, len(by_row), len(names))
    return {
        "rows": {
            row: {
                name: _metric_summary(values[:, :, m].mean(axis=1), low[r, m], high[r, m])
                for m, name in enumerate(names)
            }
            for r, (row, values) in enumerate(by_row.items())
        }
    }


def compare_rows(
    per_user: pl.DataFrame, reference: str, samples: int = 10_000, seed: int = 0
) -> dict[str, Comparison]:
    """NDCG@10 of every other row against `reference`: paired bootstrap over users, Holm over the rows that differ.

    `low` and `high` bound the difference (95 %, not corrected for the number of rows); the verdict is "better" or
    "worse" where both tests, each after Holm, are below 0.05, else "not distinguishable". Below MINIMUM_USERS
    users no test is made: "too few users".

    Raises:
        ConfigError: there is no row `reference`.
        ArtifactError: the table is empty, or rows or seeds differ in their test events.
    """
    averaged = _seed_averaged(per_user)
    if reference not in averaged:
        raise ConfigError(f"reference row {reference!r} is not in the table; rows: {', '.join(averaged)}")
    base = averaged.pop(reference)
    return compare_paired(averaged, {row: base for row in averaged}, samples, seed)


def compare_runs(
    runs: Mapping[str, pl.DataFrame], samples: int = 10_000, seed: int = 0, against: str | None = None
) -> dict[str, dict[str, Comparison]]:
    """NDCG@10 of each run's rows against the same rows of the first run: `{run: {row: Comparison}}`.

    Rows that only one of the two holds are left out. The Holm family is all of the table that differs.
    Statistics as in `compare_rows`.

    Args:
        runs: name -> its `per_user.parquet`; the first is the reference.
        samples: resamples of the bootstrap.
        seed: of the bootstrap.
        against: one row of the first run, which every other row of every run is tested against instead.

    Raises:
        ConfigError: fewer than two runs and no row `against`, or the first run does not have it.
        ArtifactError: test events differ (the first difference is named), or no row is shared.
    """
    if len(runs) < 2 and against is None:
        raise ConfigError(f"comparing takes at least two runs, got {len(runs)}; name a second run folder")
    averaged = {run: _seed_averaged(table) for run, table in runs.items()}
    first = next(iter(runs))
    known = averaged[first]
    if against is not None and against not in known:
        raise ConfigError(f"{first!r} has no row {against!r}; its rows: {', '.join(known)}")
    rows, bases = {}, {}
    for run, values_of in averaged.items():
        _require_same_events(_test_events(runs[first]), _test_events(runs[run]), first, run)
        for row, values in values_of.items():
            base = against or row
            if base in known and (run, row) != (first, base):
                rows[run, row], bases[run, row] = values, known[base]
    if not rows:
        raise ArtifactError(f"there is no other row to compare with {against or 'those'} of {first!r}")
    compared = compare_paired(rows, bases, samples, seed)
    named = [run for run in runs if run != first or against is not None]
    return {run: {row: result for (name, row), result in compared.items() if name == run} for run in named}


def recall_curves(per_user: pl.DataFrame, up_to: int = 50) -> dict[str, list[tuple[int, float]]]:
    """Recall@k of each row for k = 1..up_to, as (k, recall) points: averaged as in `summarise`."""
    cutoffs = range(1, up_to + 1)
    by_row = _user_metrics(per_user, [f"recall@{k}" for k in cutoffs])
    means = {row: values.mean(axis=(0, 1)).tolist() for row, values in by_row.items()}
    return {row: list(zip(cutoffs, values, strict=True)) for row, values in means.items()}


def known_items(sequences: Sequences, positions: np.ndarray, known_length: int | None = None) -> Tensor:
    """(B, L) int64 item_index of the user's events before each position, all or the last so many, 0-padded."""
    before = positions - np.asarray(sequences.offsets)[sequences.users_of(positions)]
    longest = max(1, int(before.max()))
    length = longest if known_length is None else min(known_length, longest)
    return torch.from_numpy(sequences.histories(positions, length).astype(np.int64))


def _metric_summary(values: np.ndarray, low: float, high: float) -> MetricSummary:
    return {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else None,
        "values": values.tolist(),
        "n": len(values),
        "low": float(low),
        "high": float(high),
    }


def _seed_averaged(per_user: pl.DataFrame) -> dict[str, np.ndarray]:
    """Row -> (U,) the compared metric of each user, users in order of id."""
    by_row = _user_metrics(per_user, [COMPARED_METRIC])
    return {row: values.mean(axis=0)[:, 0] for row, values in by_row.items()}


def _user_metrics(per_user: pl.DataFrame, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Row -> (S, U, M) metrics averaged within users; rows as first met, seeds and users in order of id."""
    seeds: dict[str, list[np.ndarray]] = {}
    for row, frame in _trainings(per_user):
        ordered = _with_metrics(frame, names).sort("user_id", "item_id", "rank")
        within = ordered.group_by("user_id", maintain_order=True).agg(pl.col(names).mean())
        seeds.setdefault(row, []).append(within.select(names).to_numpy())
    return {row: np.stack(values) for row, values in seeds.items()}


def _with_metrics(frame: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    rank = torch.from_numpy(frame["rank"].to_numpy().astype(np.int64))
    return frame.with_columns(pl.Series(name, measure(rank, name).numpy()) for name in names)


def _trainings(per_user: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """(row, events) of each training: rows as first met, seeds in order, all on the same test events."""
    missing = [column for column in PER_USER_COLUMNS if column not in per_user.columns]
    if missing:
        raise ArtifactError(f"per-user table lacks {first_few(missing)}; run the evaluate stage again")
    if per_user.is_empty():
        raise ArtifactError("the per-user table is empty: there is nothing to evaluate")
    expected = _test_events(per_user)
    trainings = []
    for by_row in per_user.partition_by("row", maintain_order=True):
        for frame in by_row.sort("seed", maintain_order=True).partition_by("seed", maintain_order=True):
            _require_same_events(expected, _events(frame), _training_name(per_user), _training_name(frame))
            trainings.append((frame["row"][0], frame))
    return trainings


def _training_name(frame: pl.DataFrame) -> str:
    return f"{frame['row'][0]}, seed {frame['seed'][0]}"


def _test_events(per_user: pl.DataFrame) -> pl.DataFrame:
    """The sorted (user_id, item_id) of the first training in the table."""
    first = (pl.col("row") == per_user["row"][0]) & (pl.col("seed") == per_user["seed"][0])
    return _events(per_user.filter(first))


def _events(training: pl.DataFrame) -> pl.DataFrame:
    return training.select(_EVENT).sort(_EVENT)


def _require_same_events(first: pl.DataFrame, second: pl.DataFrame, first_name: str, second_name: str) -> None:
    if first.equals(second):
        return
    shown = []
    for name, here, there in ((first_name, first, second), (second_name, second, first)):
        counted = here.group_by(_EVENT, maintain_order=True).len()
        extra = counted.join(there.group_by(_EVENT).len(), on=[*_EVENT, "len"], how="anti", maintain_order="left")
        if not extra.is_empty():
            user, item = extra.row(0)[:2]
            shown.append(f"{extra.height} only in {name!r} (first: user {user!r}, item {item!r})")
    raise ArtifactError(
        f"the test events of {first_name!r} ({first.height}) and {second_name!r} ({second.height}) differ: "
        f"{'; '.join(shown)}. Compare results of the same data and the same split"
    )
