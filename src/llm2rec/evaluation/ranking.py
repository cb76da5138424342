"""Ranks, their metrics, the one top-k and what its lists look like: pure functions, one rule for ties.

Scores are (B, N); column j belongs to item_index j + 1, because item_index 0 is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

HEADLINE_CUTOFF = 10
# Scores that are made and counted before the next are made: 4 MB, which stay in the cache. Whole, the scores of
# 256 users over 17,000 items take 17 MB, and writing and reading them takes longer than the product.
BLOCK_SCORES = 2**20
BLOCK_SCORES_OF_A_GPU = 2**27  # which would wait between small ones; 512 MB
FEW_QUERIES = 64
# Columns of a group of `top_k`, and how many groups there must be for each wanted item. Measured with 8 to 64
# columns a group, in microseconds a row: 6.4 -> 5.7 (1,682 columns), 59 -> 21 (16,859), 626 -> 162 (200,000).
GROUP, FEWEST_GROUPS = 16, 8


def ranks(scores: Tensor, targets: Tensor, exclude: Tensor | None = None) -> Tensor:
    """Rank of each target among all items, (B,) int64, 1 = best.

    1 + the number of *other* items that score at least as high as the target: a tie counts against it, so
    that a scorer without an opinion ranks last and not first. Compared in float32, counted, never sorted.

    Args:
        scores: (B, N), any float dtype.
        targets: (B,) item_index, 1..N.
        exclude: (B, L) item_index that do not compete in each row, padded with 0; duplicates are fine, and a
            target among them still competes. None excludes nothing.

    Raises:
        ValueError: a score is not finite, an item is outside 1..N, or the shapes do not fit.
    """
    scores = _checked(scores)
    if targets.shape != scores.shape[:1]:
        raise ValueError(f"targets have shape {tuple(targets.shape)}; expected ({scores.shape[0]},), one a row")
    targets = targets.to(scores.device, torch.int64)
    _check_item_indices(targets, scores.shape[1], "target", lowest=1)
    target_scores = scores.gather(1, targets.unsqueeze(1) - 1)  # (B, 1)
    if exclude is not None:
        scores = _hide(scores, exclude).scatter_(1, targets.unsqueeze(1) - 1, target_scores)
    return _counted(scores >= target_scores)  # the target itself is the 1 of the definition


def blocks(items: Tensor, n_queries: int) -> tuple[Tensor, ...]:
    """`items` (N, H) as runs of rows, each of which gives at most BLOCK_SCORES scores with `n_queries` (B, H).

    On a GPU at most BLOCK_SCORES_OF_A_GPU. All of one length, or one less: a remainder of few rows is rounded in
    another way than the rest, so that equal items would not tie.
    """
    scores = BLOCK_SCORES if items.device.type == "cpu" else BLOCK_SCORES_OF_A_GPU
    rows = max(1, scores // max(1, n_queries))
    return items.tensor_split(max(1, -(-len(items) // rows)))


def ranks_of_products(queries: Tensor, items: Tensor, targets: Tensor, exclude: Tensor | None = None) -> Tensor:
    """`ranks(queries @ items.T, targets, exclude)`, (B,) int64, without ever holding the scores.

    A block of scores at a time is made and counted in the cache. Scores are those of the whole product up to its
    rounding; the target is compared as one number with all others. Products of few queries round by their shape,
    so that an item equal to the target might not tie with it: these are held as a whole.

    Args:
        queries: (B, H) float32.
        items: (N, H) float32, row j for item_index j + 1.
        targets, exclude: as in `ranks`.

    Raises:
        ValueError: as `ranks`.
    """
    if targets.shape != queries.shape[:1]:
        raise ValueError(f"targets have shape {tuple(targets.shape)}; expected ({len(queries)},), one a row")
    targets = targets.to(queries.device, torch.int64)
    _check_item_indices(targets, len(items), "target", lowest=1)
    if len(queries) < FEW_QUERIES:
        scores = torch.cat([queries @ block.T for block in blocks(items, len(queries))], dim=1)
        return ranks(scores, targets, exclude)
    exclude = None if exclude is None else _checked_exclude(exclude, queries, len(items))
    target_scores = (queries @ items[targets - 1].T).diagonal()[:, None]  # (B, 1); a product, to round as they do
    counts = torch.zeros_like(targets)
    first = 1  # item_index of the block's first column
    for block in blocks(items, len(queries)):
        scores = queries @ block.T
        if not scores.sum(dim=1).isfinite().all():
            _checked(queries @ items.T)  # which names the first; large finite scores may add up to infinity
        if exclude is not None:
            rows, columns = _cells(exclude, first, len(block))
            scores[rows, columns] = -torch.inf
        rows, _ = among = _cells(targets[:, None], first, len(block))
        scores[among] = target_scores[rows, 0]
        counts += _counted(scores >= target_scores)
        first += len(block)
    return counts


def _cells(item_index: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column, (C,) int64 each, of those of (B, L) `item_index` that are `first` to `first + width - 1`."""
    columns = item_index - first
    rows, places = ((columns >= 0) & (columns < width)).nonzero(as_tuple=True)
    return rows, columns[rows, places]


def recall(rank: Tensor, k: int) -> Tensor:
    """1 where the only relevant item is among the first k, else 0; float64, shape of `rank`.

    A test event has one relevant item, so this is the hit rate at k as well: `measure` takes `hit@k` for it,
    but `metric_names` lists it once, because two columns of one number look like two results.
    """
    return (rank <= k).double()


def ndcg(rank: Tensor, k: int) -> Tensor:
    """Normalised discounted cumulative gain of one relevant item, in [0, 1]; float64, shape of `rank`.

    1 / log2(rank + 1) within the first k, else 0; the ideal gain is 1.
    """
    return recall(rank, k) / torch.log2(rank.double() + 1)


def mrr(rank: Tensor, k: int | None = None) -> Tensor:
    """Reciprocal rank, in [0, 1]; float64, shape of `rank`. 0 beyond the first k; without k never 0.

    Its mean over test events is the mean reciprocal rank (Voorhees 1999).
    """
    reciprocal = rank.double().reciprocal()
    return reciprocal if k is None else reciprocal * recall(rank, k)


METRICS: dict[str, Callable[..., Tensor]] = {"recall": recall, "ndcg": ndcg, "mrr": mrr}
WITHOUT_CUTOFF = frozenset({"mrr"})  # may also stand alone
ALIASES = {"hit": "recall"}


def metric_names(cutoffs: Iterable[int]) -> list[str]:
    """Every metric at every cut-off in rising order: `recall@5`, `ndcg@5`, `mrr@5`, ..., `mrr`.

    The headline cut-off 10 is always among them: comparisons and reports are made at it.
    """
    ordered = sorted({*cutoffs, HEADLINE_CUTOFF})
    with_cutoff = [f"{name}@{k}" for k in ordered for name in METRICS]
    return with_cutoff + [name for name in METRICS if name in WITHOUT_CUTOFF]


def measure(rank: Tensor, name: str) -> Tensor:
    """The metric called `name` (`recall@10` or `hit@10`, `ndcg@10`, `mrr@10`, `mrr`) of each rank.

    Returns:
        float64, shape of `rank`.

    Raises:
        ValueError: there is no such metric, or its cut-off is missing or below 1.
    """
    if name in WITHOUT_CUTOFF:
        return METRICS[name](rank)
    base, _, cutoff = name.partition("@")
    base = ALIASES.get(base, base)
    if base in METRICS and cutoff.isdecimal() and int(cutoff) > 0:
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
    left = scores.shape[1] if len(scores) else 0
    if exclude is not None:
        scores = _hide(scores, exclude)
        left = int(_counted(scores.isfinite()).max()) if scores.numel() else 0
    width = min(k, left)
    if width == 0:
        empty = scores[:, :0]
        return empty.long(), empty
    more = width < scores.shape[1]
    values, indices = _largest(scores, width + more)
    # torch.topk breaks ties as it likes; which items it chose matters where the first one left out is as good.
    tied = (values[:, width - 1] == values[:, -1]).nonzero()[:, 0] if more else []
    indices = indices[:, :width].sort(dim=1).values
    if len(tied):
        indices[tied] = _lowest_of_the_best(scores[tied], values[tied, width - 1 : width], width)
    best, order = scores.gather(1, indices).sort(dim=1, descending=True, stable=True)
    found = indices.gather(1, order) + 1
    return found.masked_fill(best.isneginf(), 0), best


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(k)` of (B, N), in a third of the time where the columns are many.

    The k largest lie in the k groups of columns with the largest maxima, so only those are searched: every other
    group holds nothing above the k-th of these maxima. Among equal values other columns may be chosen.
    """
    groups = scores.shape[1] // GROUP
    if groups < FEWEST_GROUPS * k:
        return scores.topk(k, dim=1)
    grouped = groups * GROUP
    maxima = (
        scores[:, :grouped].unflatten(1, (GROUP, groups)).amax(dim=1)
    )  # columns j, j + groups, ... are group j
    best = maxima.topk(k, dim=1, sorted=False).indices
    inside = torch.arange(0, grouped, groups, device=scores.device)
    rest = torch.arange(grouped, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([(best[:, :, None] + inside).flatten(1), rest], dim=1)
    values, places = scores.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)


def _lowest_of_the_best(scores: Tensor, threshold: Tensor, width: int) -> Tensor:
    """Columns (B, width), rising, of all scores above (B, 1) `threshold` and of the first ones that equal it."""
    above, level = scores > threshold, scores == threshold
    wanted = width - above.sum(dim=1, keepdim=True)
    chosen = above | (level & (level.cumsum(dim=1) <= wanted))
    return chosen.nonzero()[:, 1].view(-1, width)


def coverage(lists: Tensor, k: int, n_items: int) -> float:
    """Share of the catalogue that stands in at least one list's first k, in [0, 1].

    `|union of the first k of all lists| / N`. It grows with the number of lists: compare equal numbers.
    Source: catalogue coverage of Ge, Delgado-Battenfeld and Jannach (RecSys 2010).

    Args:
        lists: (U, K) item_index, best first, 0 = no item; from `top_k`.
        k: 1..K.
        n_items: N.

    Raises:
        ValueError: k does not fit the lists, or an item is outside 0..N.
    """
    return float((_times_recommended(lists, k, n_items) > 0).double().mean())


def gini(lists: Tensor, k: int, n_items: int) -> float:
    """Gini index of how often each item of the catalogue is recommended, in [0, 1 - 1/N].

    0: every item equally often; 1 - 1/N: always the same item. With x the times that the N items stand in a
    list's first k, in rising order, `sum_j (2 j - N - 1) x_j / (N sum_j x_j)`, which is half the mean absolute
    difference over the mean. Some divide by N - 1 instead of N (Shani and Gunawardana 2011).

    Raises:
        ValueError: as `coverage`, or the lists are all empty.
    """
    times = _times_recommended(lists, k, n_items).double().sort().values
    if not times.sum():
        raise ValueError("the lists recommend nothing, so there is no concentration to measure")
    places = torch.arange(1, n_items + 1, dtype=torch.float64)
    return float(((2 * places - n_items - 1) * times).sum() / (n_items * times.sum()))


def novelty(lists: Tensor, k: int, counts: Tensor) -> float:
    """Mean self-information of the recommended items in bits, in [0, log2(T + N)]; higher = less popular.

    An item with c of the T training events carries `-log2((c + 1) / (T + N))` bits: one is added to every
    count, so that an item without training events is finite. Averaged over a list's first k, then over lists;
    an empty list has no say.
    Source: Zhou et al. (PNAS 2010), surprisal; the smoothing is ours.

    Args:
        lists: (U, K) item_index, best first, 0 = no item.
        k: 1..K.
        counts: (N,) training events of each item.

    Raises:
        ValueError: as `coverage`, or the lists are all empty.
    """
    bits = -torch.log2((counts.double() + 1) / (counts.sum() + len(counts)))
    means = _mean_in_rows(_first(lists, k, len(counts)), bits)
    means = means[means.isfinite()]
    if not len(means):
        raise ValueError("the lists recommend nothing, so there is no novelty to measure")
    return float(means.mean())


def popularity_lift(lists: Tensor, histories: Tensor, k: int, counts: Tensor) -> float:
    """How much more popular the recommended items are than those of the histories; 0 = alike, >= -1.

    `(P(lists) - P(histories)) / P(histories)`, P the mean over users of the mean training events of the items
    in their list or history; users without either are left out of both.
    Source: popularity lift of Abdollahpouri et al. (RecSys 2020), after their GAP metric.

    Args:
        lists: (U, K) item_index, best first, 0 = no item.
        histories: (U, L) item_index of the same users, 0 = padding.
        k: 1..K.
        counts: (N,) training events of each item.

    Raises:
        ValueError: as `coverage`; other users; or no history holds an item with a training event.
    """
    if len(histories) != len(lists):
        raise ValueError(f"{len(histories)} histories for {len(lists)} lists; give one a list")
    recommended = _mean_in_rows(_first(lists, k, len(counts)), counts.double())
    consumed = _mean_in_rows(_first(histories, histories.shape[1], len(counts)), counts.double())
    both = recommended.isfinite() & consumed.isfinite()
    base = float(consumed[both].sum())
    if not base:
        raise ValueError("no history beside a list holds an item with a training event: the lift has no base")
    return float(recommended[both].sum()) / base - 1


def list_metrics(
    lists: Tensor, histories: Tensor, counts: Tensor, cutoffs: Iterable[int] = (HEADLINE_CUTOFF,)
) -> dict[str, float]:
    """`coverage@k`, `gini@k`, `novelty@k` and `popularity_lift@k` at every cut-off, by name.

    Args:
        lists: (U, K) item_index, best first, 0 = no item; K at least the largest cut-off.
        histories: (U, L) item_index of the same users, 0 = padding.
        counts: (N,) training events of each item.
        cutoffs: each 1..K.

    Raises:
        ValueError: as the four metrics.
    """
    found = {}
    for k in sorted(set(cutoffs)):
        found[f"coverage@{k}"] = coverage(lists, k, len(counts))
        found[f"gini@{k}"] = gini(lists, k, len(counts))
        found[f"novelty@{k}"] = novelty(lists, k, counts)
        found[f"popularity_lift@{k}"] = popularity_lift(lists, histories, k, counts)
    return found


def _first(lists: Tensor, k: int, n_items: int) -> Tensor:
    """The first k columns, int64 item_index in 0..N."""
    if lists.dim() != 2 or not 1 <= k <= lists.shape[1]:
        raise ValueError(f"k is {k}, the lists have shape {tuple(lists.shape)}; allowed: (U, K) with 1 <= k <= K")
    first = lists[:, :k].long()
    _check_item_indices(first, n_items, "listed", lowest=0)
    return first


def _times_recommended(lists: Tensor, k: int, n_items: int) -> Tensor:
    """How many lists hold each item among their first k, (N,) int64."""
    return torch.bincount(_first(lists, k, n_items).flatten(), minlength=n_items + 1)[1:]


def _mean_in_rows(items: Tensor, values: Tensor) -> Tensor:
    """Mean of (N,) `values` over the items of each row, (U,) float64; not finite for a row without items."""
    padded = torch.cat([values.new_zeros(1), values])
    return padded[items].sum(dim=1) / (items > 0).sum(dim=1)


def _counted(marks: Tensor) -> Tensor:
    """How many of (B, N) booleans are true in each row, (B,) int64."""
    # On a CPU torch's sum of booleans takes 40 times as long.
    return marks.view(torch.int8).sum(dim=1, dtype=torch.int32).long()


def _hide(scores: Tensor, exclude: Tensor) -> Tensor:
    """A copy of `scores` with the excluded items at -inf."""
    exclude = _checked_exclude(exclude, scores, scores.shape[1])
    hidden = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    hidden.scatter_(1, exclude, True)  # column 0 collects the padding
    return scores.masked_fill(hidden[:, 1:], -torch.inf)


def _checked_exclude(exclude: Tensor, rows: Tensor, n_items: int) -> Tensor:
    """(B, L) int64 item_index on the device of `rows` (B, ...), whose rows they are excluded in."""
    if exclude.dim() != 2 or exclude.shape[0] != rows.shape[0]:
        raise ValueError(f"exclude has shape {tuple(exclude.shape)}; expected ({rows.shape[0]}, L)")
    exclude = exclude.to(rows.device, torch.int64)
    _check_item_indices(exclude, n_items, "excluded", lowest=0)
    return exclude


def _checked(scores: Tensor) -> Tensor:
    """`scores` in float32; a score that is not finite (there) raises, naming the first."""
    if scores.dim() != 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; expected (B, N), one column an item")
    scores = scores.float()
    if scores.sum(dim=1).isfinite().all():  # one quick pass; large finite scores may add up to infinity
        return scores
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
