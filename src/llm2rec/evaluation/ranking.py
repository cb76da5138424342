"""Ranks, their metrics and the one top-k: pure functions on tensors, one rule for ties.

Scores are (B, N); column j belongs to item_index j + 1, because item_index 0 is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

HEADLINE_CUTOFF = 10


def ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Rank of each target among all items, (B,) int64, 1 = best.

    1 + the number of *other* items that score at least as high as the target: a tie counts against it, so
    that a scorer without an opinion ranks last and not first. Compared in float32, counted, never sorted.

    Args:
        scores: (B, N), any float dtype.
        targets: (B,) item_index, 1..N.

    Raises:
        ValueError: a score is not finite, a target is outside 1..N, or the shapes do not fit.
    """
    scores = _checked(scores)
    if targets.shape != scores.shape[:1]:
        raise ValueError(f"targets have shape {tuple(targets.shape)}; expected ({scores.shape[0]},), one a row")
    targets = targets.to(scores.device, torch.int64)
    _check_item_indices(targets, scores.shape[1], "target", lowest=1)
    target_scores = scores.gather(1, targets.unsqueeze(1) - 1)  # (B, 1)
    return (scores >= target_scores).sum(dim=1)  # the target itself is the 1 of the definition


def recall(rank: Tensor, k: int) -> Tensor:
    """1 where the only relevant item is among the first k, else 0; float64, shape of `rank`.

    With one relevant item a test event this is also the hit rate at k.
    """
    return (rank <= k).double()


def ndcg(rank: Tensor, k: int) -> Tensor:
    """Normalised discounted cumulative gain of one relevant item, in [0, 1]; float64, shape of `rank`.

    1 / log2(rank + 1) within the first k, else 0; the ideal gain is 1.
    """
    return recall(rank, k) / torch.log2(rank.double() + 1)


def mrr(rank: Tensor) -> Tensor:
    """Reciprocal rank without a cut-off, in (0, 1]; float64, shape of `rank`."""
    return rank.double().reciprocal()


METRICS: dict[str, Callable[..., Tensor]] = {"recall": recall, "ndcg": ndcg, "mrr": mrr}
WITHOUT_CUTOFF = frozenset({"mrr"})


def metric_names(cutoffs: Iterable[int]) -> list[str]:
    """Every metric at every cut-off in rising order: `recall@5`, `ndcg@5`, ..., `mrr`.

    The headline cut-off 10 is always among them: comparisons and reports are made at it.
    """
    ordered = sorted({*cutoffs, HEADLINE_CUTOFF})
    with_cutoff = [f"{name}@{k}" for k in ordered for name in METRICS if name not in WITHOUT_CUTOFF]
    return with_cutoff + [name for name in METRICS if name in WITHOUT_CUTOFF]


def measure(rank: Tensor, name: str) -> Tensor:
    """The metric called `name` (`recall@10`, `ndcg@10`, `mrr`) of each rank; float64, shape of `rank`.

    Raises:
        ValueError: there is no such metric, or its cut-off is missing, superfluous or below 1.
    """
    base, _, cutoff = name.partition("@")
    if base in WITHOUT_CUTOFF and not cutoff:
        return METRICS[base](rank)
    if base in METRICS and base not in WITHOUT_CUTOFF and cutoff.isdecimal() and int(cutoff) > 0:
        return METRICS[base](rank, int(cutoff))
    raise ValueError(f"no metric {name!r}; allowed: {', '.join(metric_names(()))}, and other cut-offs")


def top_k(scores: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k best items of each row as (item_index int64, score float32), both (B, K), best first.

    Equal scores are ordered by the lower item_index, so the answer is the same on every device. K is k, or
    the most items that any row has left where that is fewer; a row with fewer left than K is filled up at
    its end with item_index 0 and score -inf.

    Args:
        scores: (B, N), any float dtype; compared in float32.
        k: >= 1.
        exclude: (B, L) item_index to hide in each row, padded with 0; duplicates are fine.

    Raises:
        ValueError: a score is not finite, k < 1, an excluded item is outside 0..N, or the shapes do not fit.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    scores = _checked(scores)
    if exclude is not None:
        scores = _hide(scores, exclude)
    left = int(scores.isfinite().sum(dim=1).max()) if scores.numel() else 0
    width = min(k, left)
    if width == 0:
        empty = scores[:, :0]
        return empty.long(), empty
    # torch.topk breaks ties as it likes: take only its threshold, then the lowest indices at the threshold.
    threshold = scores.topk(width, dim=1).values[:, -1:]  # (B, 1)
    above, level = scores > threshold, scores == threshold
    wanted = width - above.sum(dim=1, keepdim=True)
    chosen = above | (level & (level.cumsum(dim=1) <= wanted))
    indices = chosen.nonzero()[:, 1].view(-1, width)  # ascending in each row
    best, order = scores.gather(1, indices).sort(dim=1, descending=True, stable=True)
    found = indices.gather(1, order) + 1
    return found.masked_fill(best.isneginf(), 0), best


def _hide(scores: Tensor, exclude: Tensor) -> Tensor:
    """A copy of `scores` with the excluded items at -inf."""
    if exclude.dim() != 2 or exclude.shape[0] != scores.shape[0]:
        raise ValueError(f"exclude has shape {tuple(exclude.shape)}; expected ({scores.shape[0]}, L)")
    exclude = exclude.to(scores.device, torch.int64)
    _check_item_indices(exclude, scores.shape[1], "excluded", lowest=0)
    hidden = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    hidden.scatter_(1, exclude, True)  # column 0 collects the padding
    return scores.masked_fill(hidden[:, 1:], -torch.inf)


def _checked(scores: Tensor) -> Tensor:
    """`scores` in float32; a score that is not finite (there) raises, naming the first."""
    if scores.dim() != 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; expected (B, N), one column an item")
    scores = scores.float()
    finite = scores.isfinite()
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{int((~finite).sum())} of {scores.numel()} scores are not finite; first: "
            f"{scores[row, column].item()} in row {row} for item_index {column + 1}. The scorer has diverged "
            "or overflowed float32; look at its training loss"
        )
    return scores


def _check_item_indices(indices: Tensor, n_items: int, what: str, lowest: int) -> None:
    wrong = (indices < lowest) | (indices > n_items)
    if wrong.any():
        raise ValueError(f"{what} item_index {int(indices[wrong][0])} is outside {lowest}..{n_items}")
