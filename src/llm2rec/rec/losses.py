"""Losses of a recommender over its catalogue: tensors in, tensors out.

The full softmax is `softmax.linear_cross_entropy`. The two below look at K sampled items instead, the same
for every target of a batch, so that a step costs M x K and not M x N.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FULL, SAMPLED_SOFTMAX, GBCE = "full", "sampled_softmax", "gbce"
LOSSES = (FULL, SAMPLED_SOFTMAX, GBCE)
UNIFORM, POPULARITY = "uniform", "popularity"
SAMPLINGS = (UNIFORM, POPULARITY)


def sampled_softmax(
    queries: Tensor, candidates: Tensor, targets: Tensor, negatives: Tensor, log_expected: Tensor
) -> Tensor:
    """Sum of the cross-entropies of a softmax over the target and K sampled items (scalar, nats, float32).

    Each sampled item stands for 1 / (K q) items, q its probability of being drawn, so its share of the
    partition function is divided by that (logQ correction). A sample that is the target of a row is left out of
    that row, where the target itself stands uncorrected, being there with certainty: the expectation of the
    estimated partition function is then the true one, the sum over all items of exp(score). The loss, its
    logarithm, is too low on average (Jensen) by an amount that vanishes as K grows.

    Args:
        queries: (M, H) float32 or bfloat16; candidates: (N, H), the same dtype: their dot products are the scores.
        targets: (M,) int64 in 0..N - 1.
        negatives: (K,) int64 in 0..N - 1, drawn with replacement; shared by all rows.
        log_expected: (K,) float32, log(K q) of each; zeros with every item once gives the full softmax.
    Source: Bengio & Senecal 2008; the uncorrected positive: Khrylchenko et al. 2025, arXiv 2507.09331.
    """
    positive, negative = _scores(queries, candidates, targets, negatives)
    # In place and without comparing (M, K) numbers, which took half of the loss's time (docs/log.md).
    negative.sub_(log_expected)[_collisions(targets, negatives)] = -math.inf
    partition = torch.logaddexp(positive, negative.logsumexp(dim=1))  # (M,)
    return (partition - positive).sum()


def gbce(queries: Tensor, candidates: Tensor, targets: Tensor, negatives: Tensor, beta: float) -> Tensor:
    """Sum of the generalised binary cross-entropies of the targets (scalar, nats, float32).

    A row costs `(-beta log sigmoid(s+) - sum of log(1 - sigmoid(s-))) / (K + 1)`; a sample that is the row's
    target is left out.

    Args:
        queries, candidates, targets, negatives: as for `sampled_softmax`; negatives drawn uniformly.
        beta: see `gbce_beta`; 1 is the plain binary cross-entropy.
    Source: Petrov & Macdonald 2023 (gSASRec, arXiv 2308.07192). Ours: the negatives are shared within a batch.
    """
    positive, negative = _scores(queries, candidates, targets, negatives)
    negative[_collisions(targets, negatives)] = -math.inf
    against = F.softplus(negative).sum(dim=1)  # (M,)
    return (beta * F.softplus(-positive) + against).sum() / (len(negatives) + 1)


def gbce_beta(negatives: int, n_items: int, calibration: float) -> float:
    """The power of the positive's probability: `alpha (t (1 - 1 / alpha) + 1 / alpha)` with `alpha = K / (N - 1)`.

    Args:
        negatives: K, at most N - 1.
        calibration: t in [0, 1]: 0 gives 1, the plain binary cross-entropy; 1 gives alpha, which makes
            the predicted probabilities those of training on all negatives.
    """
    return 1 - calibration * (1 - negatives / (n_items - 1))  # the formula, multiplied out


class NegativeSampler:
    """Draws items with replacement, uniformly or by training popularity."""

    def __init__(
        self, counts: np.ndarray, negatives: int, sampling: str, trainable: np.ndarray | None = None
    ) -> None:
        """Takes the training events of every item.

        Args:
            counts: (N,) int64; one is added to each, as an item without events must be drawn too.
            negatives: K, items a draw.
            sampling: UNIFORM (`counts` are not looked at) or POPULARITY.
            trainable: (N,) bool, False for items that are never drawn; None draws from all.
        """
        weights = np.ones(len(counts)) if sampling == UNIFORM else counts + 1.0
        if trainable is not None:
            weights = np.where(trainable, weights, 0.0)
        shares = weights / weights.sum()
        self._cumulative = np.cumsum(shares)
        with np.errstate(divide="ignore"):  # -inf where the share is 0: never drawn
            self._log_expected = np.log(negatives * shares).astype(np.float32)
        self._negatives = negatives

    def draw(self, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Items (K,) int64 in 0..N - 1, and log(K q) of each, (K,) float32."""
        drawn = np.searchsorted(self._cumulative, generator.random(self._negatives), side="right")
        drawn = np.minimum(drawn, len(self._cumulative) - 1)  # the last sum may round to below 1
        return torch.from_numpy(drawn), torch.from_numpy(self._log_expected[drawn])


def _scores(queries: Tensor, candidates: Tensor, targets: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the targets (M,) and of the negatives (M, K), float32; of 16-bit inputs the latter are rounded."""
    positive = (queries.float() * F.embedding(targets, candidates).float()).sum(dim=1)
    return positive, (queries @ F.embedding(negatives, candidates).T).float()


def _collisions(targets: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns, (C,) each, where a sampled item is the target of the row: few of (M, K)."""
    order = negatives.argsort()
    ordered = negatives[order]
    first = torch.searchsorted(ordered, targets)
    counts = torch.searchsorted(ordered, targets, right=True) - first  # (M,)
    rows = torch.arange(len(targets), device=targets.device).repeat_interleave(counts)
    within = torch.arange(len(rows), device=targets.device) - (counts.cumsum(0) - counts)[rows]
    return rows, order[first[rows] + within]
