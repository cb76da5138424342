"""Whether a recommender uses the order of a history: the same test events after the history in other orders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import polars as pl
import torch

from llm2rec.data.sequences import Sequences
from llm2rec.evaluation import protocol
from llm2rec.evaluation.probes import NothingToMeasure
from llm2rec.evaluation.verdicts import COMPARED_METRIC

AS_IT_WAS, SHUFFLED, REVERSED = "as it was", "shuffled", "reversed"
ORDERS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    SHUFFLED: lambda history, generator: generator.permutation(history),
    REVERSED: lambda history, generator: history[::-1].copy(),
}


class Reordered:
    """A scorer that sees every history in another order; times of events stay in their places."""

    def __init__(self, scorer: protocol.Scorer, order: str, seed: int = 0) -> None:
        self._scorer, self._order = scorer, ORDERS[order]
        self._generator = np.random.default_rng(seed)
        self.n_items = scorer.n_items
        self.needs_times = getattr(scorer, "needs_times", False)

    def score(self, histories: torch.Tensor, *times: torch.Tensor) -> torch.Tensor:
        """Scores (B, N) after the reordered histories."""
        changed = histories.numpy().copy()
        for row, length in zip(changed, (changed > 0).sum(axis=1), strict=True):
            row[:length] = self._order(row[:length], self._generator)
        return self._scorer.score(torch.from_numpy(changed), *times)


def order_probe(
    scorers: Mapping[int, protocol.Scorer],
    as_it_was: pl.DataFrame,
    sequences: Sequences,
    part: int,
    *,
    history_length: int,
    mask_history: bool,
    samples: int,
) -> dict[str, Any]:
    """NDCG@10 of one row by order of the history, and each other order tested against the history as it was.

    Args:
        scorers: the row's recommender of each seed.
        as_it_was: the row in `per_user.parquet`, those seeds: what was measured with the history as it was.
        sequences: the prepared data.
        part: whose events `as_it_was` holds.
        history_length, mask_history: those that `as_it_was` was measured with.
        samples: of the bootstrap.

    Returns:
        `ndcg@10` (order -> MetricSummary), `comparisons` (each other order -> Comparison with AS_IT_WAS), `users`
        (those with two different items in a history: the order of the others cannot matter).

    Raises:
        NothingToMeasure: no user has two different items in a history.
    """
    users = _users_with_an_order(sequences, part, history_length)
    if not users:
        raise NothingToMeasure("no history of a test event has two different items, so it has no order")
    tables = [as_it_was.with_columns(row=pl.lit(AS_IT_WAS))]
    for order in ORDERS:
        for seed, scorer in scorers.items():
            ranked = protocol.evaluate(
                Reordered(scorer, order),
                sequences,
                part,
                history_length,
                description=f"history {order}",
                mask_history=mask_history,
            )
            tables.append(protocol.per_user_table(ranked, sequences, order, seed))
    per_user = pl.concat(tables)
    rows = protocol.summarise(per_user, [COMPARED_METRIC], samples)["rows"]
    return {
        COMPARED_METRIC: {order: metrics[COMPARED_METRIC] for order, metrics in rows.items()},
        "comparisons": protocol.compare_rows(per_user, AS_IT_WAS, samples),
        "users": users,
    }


def _users_with_an_order(sequences: Sequences, part: int, history_length: int) -> int:
    """How many users have an event of `part` with two different items among those before it that are looked at."""
    positions = sequences.held_out(part)
    histories = sequences.histories(positions, history_length)
    differ = ((histories > 0) & (histories != histories[:, :1])).any(axis=1)
    return len(np.unique(sequences.users_of(positions[differ])))
