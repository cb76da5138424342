"""What item vectors know, without a recommender: pure functions on (N, D) vectors; numpy only.

Row j of `vectors` belongs to item_index j + 1, and pairs hold item_index. Every probe says what it would read
by chance and between which values it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
from scipy.special import hyp0f1

if TYPE_CHECKING:
    from llm2rec.data.sequences import Sequences

HIGHER, LOWER, NEITHER = "higher", "lower", "neither"

_CHUNK_BYTES = 64 * 2**20
# Up to so many items every pair of them counts; of more, those of a sample of items with all others.
ALL_PAIRS_UP_TO, SAMPLED_ITEMS = 20_000, 5_000
DRAWS = 4  # random items a pair
_REDRAWS = 20
_COSINE_RESOLUTION = 1e-6


class NothingToMeasure(ValueError):
    """What a probe would measure is not in the data; its message says what is missing."""


class Probe(TypedDict):
    """One measured number.

    chance: what vectors without any such knowledge would read, None where there is no such level.
    lowest, highest: bounds of the value, None where there is none.
    error: standard error of the value, None where it is exact for these items.
    n: pairs, items or events that it was measured on.
    better: whether "higher" or "lower" is better, or "neither".
    """

    value: float
    chance: float | None
    lowest: float | None
    highest: float | None
    error: float | None
    n: int
    better: str


class PairCosines(NamedTuple):
    """Cosines of true pairs (P,), of their drawn pairs (P, draws), and which of these exist (P, draws) bool."""

    true: np.ndarray
    random: np.ndarray
    drawn: np.ndarray


def reading(
    value: float,
    chance: float | None,
    lowest: float | None,
    highest: float | None,
    n: int,
    better: str,
    error: float | None = None,
) -> Probe:
    """One number as a Probe; the fields are explained there."""
    return {
        "value": float(value),
        "chance": chance,
        "lowest": lowest,
        "highest": highest,
        "error": error,
        "n": n,
        "better": better,
    }


def vector_probes(
    vectors: np.ndarray,
    pairs: np.ndarray,
    popularity: np.ndarray,
    categories: Sequence[str | None] | None = None,
    neighbours: int = 10,
    seed: int = 0,
) -> tuple[dict[str, Probe], dict[str, str], np.ndarray | None]:
    """Every probe of one vector set by name; by name why a probe had nothing to measure; and `co_consumption`.

    The last is None where there are no pairs to compare.

    Args:
        vectors: (N, D) float, finite, no zero row.
        pairs: (P, 2) item_index of items consumed together in held-out data, from `consumed_together`.
        popularity: (N,) training events of each item.
        categories: one label an item, None where unknown; None where the items have none at all.
        neighbours: k of `same_category_share`.
        seed: of the random pairs, and of the sample of items where there are many.

    Raises:
        ValueError: as the single probes, where the arguments do not fit.
    """
    labels = [None] * len(vectors) if categories is None else categories
    compared = cache(lambda: compare_pairs(vectors, pairs, popularity, seed=seed))
    probes: dict[str, Callable[[], Probe]] = {
        "co_consumption_auc": lambda: co_consumption_auc(co_consumption(compared())),
        "pair_separation": lambda: pair_separation(compared()),
        "alignment": lambda: alignment(vectors, pairs),
        "uniformity": lambda: uniformity(vectors, seed),
        "mean_cosine": lambda: mean_cosine(vectors),
        "effective_rank": lambda: effective_rank(vectors),
        "first_direction_share": lambda: first_direction_share(vectors),
        "same_category_share": lambda: same_category_share(vectors, labels, neighbours, seed),
    }
    found, left_out = {}, {}
    for name, probe in probes.items():
        try:
            found[name] = probe()
        except NothingToMeasure as reason:
            left_out[name] = str(reason)
    return found, left_out, co_consumption(compared()) if "co_consumption_auc" in found else None


def consumed_together(sequences: Sequences, part: int) -> np.ndarray:
    """Distinct pairs (P, 2) int64 of different item_index: a held-out event of `part` and the event before it."""
    positions = sequences.held_out(part)
    positions = positions[positions > np.asarray(sequences.offsets)[sequences.users_of(positions)]]
    items = np.asarray(sequences.items).astype(np.int64)
    pairs = np.stack([items[positions - 1], items[positions]], axis=1)
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)


def compare_pairs(
    vectors: np.ndarray, pairs: np.ndarray, popularity: np.ndarray, draws: int = DRAWS, seed: int = 0
) -> PairCosines:
    """Cosines of true pairs (a, b), and of a with random items about as popular as b.

    Each random item is drawn from the items next to b in the order of training events and is no partner of a:
    vectors that encode popularity alone stay at chance. Pairs without any are left out. Equal pairs, popularity
    and seed give the same drawn items whatever the vectors, so that two sets can be compared pair by pair.

    Args:
        vectors: (N, D) float, finite, no zero row.
        pairs: (P, 2) item_index, a != b.
        popularity: (N,) training events of each item.
        draws: random items a pair.
        seed: of the draws.

    Raises:
        NothingToMeasure: no pairs, or none with an item to compare with.
        ValueError: vectors, pairs or popularity do not fit.
    """
    unit = _unit(vectors)
    first, second = _checked_pairs(pairs, len(unit))
    if popularity.shape != (len(unit),) or draws < 1:
        raise ValueError(
            f"popularity has shape {popularity.shape}, draws is {draws}; expected ({len(unit)},) and >= 1"
        )
    others, drawn = _matched_items(first, second, popularity, draws, np.random.default_rng(seed))
    kept = drawn.any(axis=1)
    if not kept.any():
        raise NothingToMeasure("no pair has a random item to compare with: nearly all items are partners")
    first, second, others, drawn = first[kept], second[kept], others[kept], drawn[kept]
    random = np.stack([_cosines(unit, first, column) for column in others.T], axis=1)
    return PairCosines(_cosines(unit, first, second), random, drawn)


def co_consumption(compared: PairCosines) -> np.ndarray:
    """Of each true pair the share of its random items that are less near, ties counted half, (P,) in [0, 1]."""
    true = compared.true[:, None]
    wins = (true > compared.random) + 0.5 * (true == compared.random)
    shares: np.ndarray = (wins * compared.drawn).sum(axis=1) / compared.drawn.sum(axis=1)
    return shares


def co_consumption_auc(shares: np.ndarray) -> Probe:
    """How often a true partner is nearer than a random item as popular as it; chance 0.5, in [0, 1].

    The mean over pairs; its error takes them as independent.

    Args:
        shares: (P,) from `co_consumption`.
    """
    return reading(shares.mean(), 0.5, 0.0, 1.0, len(shares), HIGHER, _error(shares))


def co_consumption_gain(before: np.ndarray, after: np.ndarray) -> Probe:
    """How much higher the co-consumption AUC of one vector set is than that of another; chance 0, in [-1, 1].

    The error is that of the difference pair by pair: two sets agree on most pairs, so it is smaller than what the
    errors of both AUCs let expect.

    Args:
        before, after: (P,) `co_consumption` of both sets over the same pairs and drawn items.
    """
    gains = after - before
    return reading(gains.mean(), 0.0, -1.0, 1.0, len(gains), HIGHER, _error(gains))


def _error(values: np.ndarray) -> float | None:
    """Standard error of the mean, None of a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def pair_separation(compared: PairCosines) -> Probe:
    """Mean cosine of true pairs minus that of random ones, in standard deviations; chance 0, unbounded.

    The standard deviation is the pooled one of both groups (Cohen's d), at least 1e-6, which is what float32
    resolves of a cosine.
    """
    true, other = compared.true, compared.random[compared.drawn]
    spread = float(np.sqrt((len(true) * true.var() + len(other) * other.var()) / (len(true) + len(other))))
    return reading(
        (true.mean() - other.mean()) / max(spread, _COSINE_RESOLUTION), 0.0, None, None, len(true), HIGHER
    )


def same_category_share(
    vectors: np.ndarray, categories: Sequence[str | None], k: int = 10, seed: int = 0
) -> Probe:
    """Share of an item's k nearest (cosine) that are of its category, mean over items; in [0, 1].

    Items without a category are left out altogether. Above ALL_PAIRS_UP_TO items the mean is over a sample of
    them, whose nearest are among all, and has an error. Chance is the same share among random neighbours:
    `sum_c n_c (n_c - 1) / (n (n - 1))`.

    Args:
        vectors: (N, D) float, finite, no zero row.
        categories: one label an item, None where unknown.
        k: neighbours of each item; fewer where there are fewer items.
        seed: of the sample.

    Raises:
        NothingToMeasure: fewer than two items have a category.
        ValueError: k < 1, or another number of categories than of vectors.
    """
    if len(categories) != len(vectors) or k < 1:
        raise ValueError(
            f"{len(categories)} categories for {len(vectors)} vectors, k is {k}; k must be at least 1"
        )
    known = np.array([category is not None for category in categories])
    if known.sum() < 2:
        raise NothingToMeasure(f"{int(known.sum())} of {len(known)} items have a category; it takes at least 2")
    _, labels = np.unique([category for category in categories if category is not None], return_inverse=True)
    unit = _unit(vectors)[known]
    k = min(k, len(unit) - 1)
    shares = []
    for items, cosines in _cosine_chunks(unit, seed):
        cosines[np.arange(len(items)), items] = -np.inf  # no item is its own neighbour
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        shares.append((labels[nearest] == labels[items, None]).mean(axis=1))
    of_items = np.concatenate(shares)
    sizes = np.bincount(labels).astype(np.float64)
    n = len(unit)
    chance = float((sizes * (sizes - 1)).sum() / (n * (n - 1)))
    error = _error(of_items) if len(of_items) < n else None
    return reading(of_items.mean(), chance, 0.0, 1.0, len(of_items), HIGHER, error)


def alignment(vectors: np.ndarray, pairs: np.ndarray) -> Probe:
    """Mean squared distance of true pairs on the unit sphere, in [0, 4]; lower is better.

    Chance is that of all pairs of different items. Low together with a low chance is no merit: see `uniformity`.
    Source: Wang and Isola (ICML 2020), alpha = 2.

    Raises:
        NothingToMeasure: no pairs.
        ValueError: vectors or pairs do not fit.
    """
    unit = _unit(vectors)
    first, second = _checked_pairs(pairs, len(unit))
    distances = 2 - 2 * _cosines(unit, first, second)
    return reading(distances.mean(), 2 - 2 * _mean_cosine(unit), 0.0, 4.0, len(first), LOWER)


def uniformity(vectors: np.ndarray, seed: int = 0) -> Probe:
    """Log of the mean of exp(-2 squared distance) over all pairs of items, in [-8, 0]; lower = more spread out.

    0: all vectors point the same way. Chance is that of directions drawn uniformly from the D-sphere. Above
    ALL_PAIRS_UP_TO items the pairs are those of a sample of items, drawn by `seed`, and there is an error.
    Source: Wang and Isola (ICML 2020), t = 2.

    Raises:
        NothingToMeasure: fewer than two vectors.
        ValueError: they do not fit.
    """
    unit = _unit(vectors)
    sums = [
        np.exp(4 * (np.minimum(cosines, 1) - 1), dtype=np.float64).sum(axis=1)
        for _, cosines in _cosine_chunks(unit, seed)
    ]
    of_items = (np.concatenate(sums) - 1) / (len(unit) - 1)  # without each item's exp(0) with itself
    error = _error(of_items) if len(of_items) < len(unit) else None
    # E[exp(4 cos)] of uniform directions is 0F1(; D / 2; 4).
    chance = float(np.log(hyp0f1(unit.shape[1] / 2, 4.0)) - 4)
    mean = of_items.mean()
    return reading(
        np.log(mean), chance, -8.0, 0.0, len(of_items), LOWER, None if error is None else float(error / mean)
    )


def mean_cosine(vectors: np.ndarray) -> Probe:
    """Mean cosine of all pairs of different items, at most 1; chance 0. Near 1: one common direction rules.

    Source: Ethayarajh (EMNLP 2019), anisotropy of contextual vectors.

    Raises:
        NothingToMeasure: fewer than two vectors.
        ValueError: they do not fit.
    """
    unit = _unit(vectors)
    return reading(_mean_cosine(unit), 0.0, -1 / (len(unit) - 1), 1.0, len(unit), LOWER)


def effective_rank(vectors: np.ndarray) -> Probe:
    """Directions that the centred vectors really use: the exponential of the entropy of the singular values.

    In [1, min(D, N - 1)]; chance is the upper end, all directions alike, which a sample of few items does not
    quite reach. Equal vectors read 1. Source: Roy and Vetterli (EUSIPCO 2007).

    Raises:
        NothingToMeasure: fewer than two vectors.
        ValueError: they do not fit.
    """
    values = np.sqrt(_principal(vectors)[0])
    shares = values[values > 0] / values.sum() if values[0] else np.ones(1)
    most = float(min(vectors.shape[1], len(vectors) - 1))
    return reading(np.exp(-(shares * np.log(shares)).sum()), most, 1.0, most, len(vectors), HIGHER)


def first_direction_share(vectors: np.ndarray) -> Probe:
    """Share of the centred vectors' variance in the first principal direction, in [1 / min(D, N - 1), 1].

    Chance is the lower end, all directions alike; a sample of few items lies somewhat above it. Equal vectors
    read 1.

    Raises:
        NothingToMeasure: fewer than two vectors.
        ValueError: they do not fit.
    """
    variances = _principal(vectors)[0]
    chance = 1 / min(vectors.shape[1], len(vectors) - 1)
    share = variances[0] / variances.sum() if variances[0] else 1.0
    return reading(share, chance, chance, 1.0, len(vectors), LOWER)


def principal_plane(vectors: np.ndarray, places: Sequence[int] | None = None) -> np.ndarray:
    """Items on the two directions of most variance of all centred vectors, (P, 2) float64, for a map of them.

    PCA. Each direction is turned so that its component of largest size is positive (the first such one):
    the same vectors give the same map. With D = 1 the second coordinate is 0.

    Args:
        vectors: (N, D) float, finite, N >= 2; not scaled to unit length.
        places: rows of the P items that are wanted, all N by default.

    Raises:
        NothingToMeasure: fewer than two vectors.
        ValueError: they do not fit.
    """
    _, directions = _principal(vectors)
    plane = directions[:, :2]  # (D, 2)
    largest = np.abs(plane).argmax(axis=0)
    plane = plane * np.sign(plane[largest, np.arange(plane.shape[1])])
    wanted = vectors if places is None else vectors[np.asarray(places)]
    centred = wanted.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    return np.pad(centred @ plane, ((0, 0), (0, 2 - plane.shape[1])))


def _checked(vectors: np.ndarray) -> np.ndarray:
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise ValueError(f"vectors have shape {vectors.shape}; expected (N, D), D >= 1, one row an item")
    if len(vectors) < 2:
        raise NothingToMeasure(f"there is {len(vectors)} item; expected are at least 2 to compare")
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(f"the vector of item_index {int(np.flatnonzero(~finite)[0]) + 1} is not finite")
    return vectors


def _unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors at length 1, float32."""
    unit = np.empty(_checked(vectors).shape, dtype=np.float32)
    for start, rows in _row_chunks(vectors):
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not lengths.all():
            zero = start + int(np.flatnonzero(lengths == 0)[0])
            raise ValueError(f"the vector of item_index {zero + 1} is zero")
        unit[start : start + len(rows)] = rows / lengths
    return unit


def _row_chunks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, (B, D) float64 of the rows from there), so many at a time that they take 64 MB."""
    rows = max(1, _CHUNK_BYTES // (8 * vectors.shape[1]))
    for start in range(0, len(vectors), rows):
        yield start, vectors[start : start + rows].astype(np.float64)


def _mean_cosine(unit: np.ndarray) -> float:
    """Over all pairs of different rows of (N, D) unit vectors, from the length of their sum."""
    total = unit.sum(axis=0, dtype=np.float64)
    return float((total @ total - len(unit)) / (len(unit) * (len(unit) - 1)))


def _cosine_chunks(unit: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows (B,), their (B, N) cosines), so many rows at a time that a chunk takes 64 MB.

    The rows are all N in order, or a sample of them where N is above ALL_PAIRS_UP_TO.
    """
    places = np.arange(len(unit))
    if len(unit) > ALL_PAIRS_UP_TO:
        places = np.sort(np.random.default_rng(seed).choice(len(unit), SAMPLED_ITEMS, replace=False))
    rows = max(1, _CHUNK_BYTES // (4 * len(unit)))
    for start in range(0, len(places), rows):
        chunk = places[start : start + rows]
        yield chunk, unit[chunk] @ unit.T


def _principal(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared singular values (D,) in falling order and directions (D, D) in columns, of the centred vectors.

    All values are 0 where the vectors are equal.
    """
    mean = _checked(vectors).mean(axis=0, dtype=np.float64)
    scatter, squares = np.zeros((vectors.shape[1], vectors.shape[1])), 0.0
    for _, rows in _row_chunks(vectors):
        squares += float(np.square(rows).sum())
        rows -= mean
        scatter += rows.T @ rows
    variances, directions = np.linalg.eigh(scatter)
    variances = np.maximum(variances[::-1], 0)
    # Rounding leaves noise of this size where a direction holds nothing.
    variances[variances < 1e-14 * max(variances[0], squares)] = 0
    return variances, directions[:, ::-1]


def _checked_pairs(pairs: np.ndarray, n_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Both sides of the pairs as rows 0..N - 1."""
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs have shape {pairs.shape}; expected (P, 2)")
    if not len(pairs):
        raise NothingToMeasure("no test event follows an event of another item")
    wrong = (pairs < 1) | (pairs > n_items)
    if wrong.any():
        raise ValueError(f"pairs hold item_index {int(pairs[wrong][0])}; allowed: 1..{n_items}")
    if (pairs[:, 0] == pairs[:, 1]).any():
        raise ValueError("a pair holds the same item twice; leave such pairs out")
    return pairs[:, 0] - 1, pairs[:, 1] - 1


def _cosines(unit: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of each pair of (N, D) unit vectors, (P,) float32; so many at a time that they take 64 MB."""
    cosines = np.empty(len(first), dtype=np.float32)
    pairs = max(1, _CHUNK_BYTES // (8 * unit.shape[1]))
    for start in range(0, len(first), pairs):
        chunk = slice(start, start + pairs)
        cosines[chunk] = np.einsum("pd,pd->p", unit[first[chunk]], unit[second[chunk]])
    return cosines


def _matched_items(
    first: np.ndarray, second: np.ndarray, popularity: np.ndarray, draws: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Items (P, draws) about as popular as `second`, no partners of `first`; and which were found, bool."""
    n_items = len(popularity)
    order = np.argsort(-popularity, kind="stable")
    place = np.empty(n_items, dtype=np.int64)
    place[order] = np.arange(n_items)
    reach = min(max(10, n_items // 50), (n_items - 1) // 2)  # places on either side, in the order of popularity
    lowest = np.clip(place[second] - reach, 0, n_items - 1 - 2 * reach)
    # Pairs as one number each: partners either way round, and an item with itself.
    forbidden = np.concatenate([first * n_items + second, second * n_items + first, first * (n_items + 1)])
    others = np.empty((len(first), draws), dtype=np.int64)
    open_cells = np.ones(others.shape, dtype=bool)
    for _ in range(_REDRAWS):
        rows = np.nonzero(open_cells)[0]
        others[open_cells] = order[lowest[rows] + generator.integers(0, 2 * reach + 1, len(rows))]
        open_cells[open_cells] = np.isin(first[rows] * n_items + others[open_cells], forbidden)
        if not open_cells.any():
            break
    return others, ~open_cells
