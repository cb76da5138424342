"""The average of two recommenders' scores: the plainest way to put ids and text together."""

from __future__ import annotations

from torch import Tensor

from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.rec.sequential import SequentialRecommender

_TINY = 1e-12


class ScoreAverage:
    """Standardised scores of two trained recommenders, averaged; nothing of its own is trained.

    The scores of a history are centred and scaled to unit variance over the catalogue first, so that the
    weight does not depend on which of the two scores more steeply. Of an item that one of the two does not know,
    as learned ids do not know one that was held out, it is given the score that the other's predicts: that score
    times the correlation of the two over the items that both know. With the other's score alone such items would
    stand above all those that two must agree on; with none they would never be listed.
    """

    def __init__(self, first: SequentialRecommender, second: SequentialRecommender, weight: float = 0.5) -> None:
        """Takes two loaded recommenders over the same catalogue.

        Args:
            weight: of `first`, in [0, 1]; `second` has the rest.

        Raises:
            ConfigError: a weight outside [0, 1].
            ArtifactError: they score different numbers of items.
        """
        if not 0 <= weight <= 1:
            raise ConfigError(f"weight is {weight}; it must be from 0 to 1")
        if first.n_items != second.n_items:
            raise ArtifactError(
                f"scores of {first.n_items:,} and of {second.n_items:,} items cannot be averaged; load "
                "recommenders of one catalogue"
            )
        self.n_items = first.n_items
        self.needs_times = first.needs_times or second.needs_times
        self._parts = ((first, weight), (second, 1 - weight))

    def score(self, histories: Tensor, times: Tensor | None = None) -> Tensor:
        """(B, N) float32; arguments and errors as for the two recommenders."""
        (first, first_weight), (second, second_weight) = self._parts
        one, other = (standardised(part.score(histories, times), part.known) for part in (first, second))
        both = first.known & second.known
        if not both.all():
            correlation = (one * other)[:, both].mean(dim=1, keepdim=True)  # (B, 1)
            one, other = one.where(first.known, correlation * other), other.where(second.known, correlation * one)
        return first_weight * one + second_weight * other


def standardised(scores: Tensor, known: Tensor) -> Tensor:
    """Scores (B, N) with mean 0 and population variance 1 over the (N,) `known` items of every row.

    Zeros where a row is constant, and for items that are not known.
    """
    centred = (scores - _mean(scores, known)) * known
    return centred / _mean(centred.square(), known).clamp(min=_TINY).sqrt()


def _mean(values: Tensor, known: Tensor) -> Tensor:
    """Means (B, 1) over the known items."""
    return (values * known).sum(dim=1, keepdim=True) / known.sum().clamp(min=1)
