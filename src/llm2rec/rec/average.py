"""The average of two recommenders' scores: the plainest way to put ids and text together.

Source: EnsRec (arXiv 2512.17820) averages recommenders that were trained apart. Ours: scores are standardised and
weighted as validation chooses, because where one is much the better an equal say costs more than it gives.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2rec.data.sequences import VALIDATION, Sequences
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.evaluation import protocol, ranking
from llm2rec.progress import track
from llm2rec.rec.histories import without_items_above
from llm2rec.rec.sequential import SequentialRecommender

AVERAGE = "average.json"
WEIGHTS = tuple(step / 10 for step in range(11))
METRIC = protocol.COMPARED_METRIC
BATCH = 256
_TINY = 1e-12


class ScoreAverage:
    """Standardised scores of two trained recommenders, averaged; nothing of its own is trained.

    The scores of a history are centred and scaled to unit variance over the catalogue first, so that the
    weight does not depend on which of the two scores more steeply. Of an item that one of the two does not know,
    as learned ids do not know one that was held out, it is given the score that the other's predicts: that score
    times the correlation of the two over the items that both know. With the other's score alone such items would
    stand above all those that two must agree on; with none they would never be listed. So it is with the items
    that were added since the training, which `second` may score; where one stands in a history, `first` reads
    the history without it, and has no say where nothing is left.
    """

    def __init__(self, first: SequentialRecommender, second: SequentialRecommender, weight: float = 0.5) -> None:
        """Takes two loaded recommenders over the same catalogue.

        Args:
            second: may score M added items besides.
            weight: of `first`, in [0, 1]; `second` has the rest.

        Raises:
            ConfigError: a weight outside [0, 1].
            ArtifactError: they score different numbers of items.
        """
        if not 0 <= weight <= 1:
            raise ConfigError(f"weight is {weight}; it must be from 0 to 1")
        if first.n_items not in (second.n_items, second.n_items - second.items.n_added):
            raise ArtifactError(
                f"scores of {first.n_items:,} and of {second.n_items:,} items cannot be averaged; load "
                "recommenders of one catalogue"
            )
        self.n_items = second.n_items
        self.needs_times = first.needs_times or second.needs_times
        self.history_length = max(first.history_length, second.history_length)
        self._first, self._second, self.weight = first, second, weight

    def score(self, histories: Tensor, times: Tensor | None = None) -> Tensor:
        """(B, N + M) float32; arguments and errors as for the two recommenders."""
        one, other = self.standardised_scores(histories, times)
        return self.weight * one + (1 - self.weight) * other

    def standardised_scores(self, histories: Tensor, times: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is averaged: the scores of both, (B, N + M) each."""
        first, second = self._first, self._second
        added = self.n_items - first.n_items
        readable = without_items_above(first.n_items, histories) if added else histories
        known, also = F.pad(first.known, (0, added)), second.known
        trained = also & (torch.arange(self.n_items, device=also.device) < first.n_items)
        one = standardised(F.pad(first.score(readable, times), (0, added)), known)
        other = standardised(second.score(histories, times), also, trained)
        one, other = _completed(one, other, known, also)
        unread = (histories > 0).any(dim=1) & ~(readable > 0).any(dim=1)
        return other.where(unread[:, None], one), other


def validation_by_weight(
    average: ScoreAverage,
    sequences: Sequences,
    history_length: int,
    description: str | None = None,
    mask_history: bool = False,
) -> dict[float, float]:
    """Validation NDCG@10 of the average under each of WEIGHTS, ranked over the whole catalogue.

    Args:
        average: of any weight.
        description: of the progress bar; None draws none.
        mask_history: as in `protocol.evaluate`.

    Raises:
        ValueError: a score is not finite.
    """
    positions = sequences.held_out(VALIDATION)
    targets = torch.from_numpy(np.asarray(sequences.items[positions]).astype(np.int64))
    found = torch.empty(len(WEIGHTS), len(positions), dtype=torch.int64)
    starts = range(0, len(positions), BATCH)
    with torch.inference_mode():
        for start in starts if description is None else track(starts, description, len(starts)):
            batch = slice(start, start + BATCH)
            given = protocol.seen(average, sequences, positions[batch], history_length)
            one, other = average.standardised_scores(*given)
            known = protocol.known_items(sequences, positions[batch]) if mask_history else None
            for row, weight in enumerate(WEIGHTS):
                found[row, batch] = ranking.ranks(weight * one + (1 - weight) * other, targets[batch], known)
    events = pl.DataFrame({"user_index": sequences.users_of(positions), "item_index": targets.numpy()})
    ranked = (events.with_columns(rank=pl.Series(ranks.numpy())) for ranks in found)
    return {weight: protocol.mean_metric(one, METRIC) for weight, one in zip(WEIGHTS, ranked, strict=True)}


def best_weight(by_weight: dict[float, float]) -> float:
    """The weight with the best validation; of equally good ones that nearest to an equal say."""
    return max(by_weight, key=lambda weight: (by_weight[weight], -abs(weight - 0.5)))


def _completed(one: Tensor, other: Tensor, known: Tensor, also: Tensor) -> tuple[Tensor, Tensor]:
    """Both scores (B, N); of an item not `known` to `one`, or `also` not to `other`, as the other's predict it."""
    both = known & also
    if both.all():
        return one, other
    correlation = (one * other)[:, both].mean(dim=1, keepdim=True)  # (B, 1)
    return one.where(known, correlation * other), other.where(also, correlation * one)


def standardised(scores: Tensor, known: Tensor, measured: Tensor | None = None) -> Tensor:
    """Scores (B, N) with mean 0 and population variance 1 over the (N,) `measured` items of every row.

    Zeros where a row is constant, and for items that are not `known`; None measures over all known items.
    """
    measured = known if measured is None else measured
    centred = (scores - _mean(scores, measured)) * known
    return centred / _mean(centred.square(), measured).clamp(min=_TINY).sqrt()


def _mean(values: Tensor, over: Tensor) -> Tensor:
    """Means (B, 1) over some of the items, (N,) bool."""
    return (values * over).sum(dim=1, keepdim=True) / over.sum().clamp(min=1)
