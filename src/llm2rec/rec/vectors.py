"""Frozen item vectors: checked, known by their hash, and transformed once, before training.

Raw vectors of language models train badly: their dimensions have means of hundreds and spreads that differ
by orders of magnitude, and one direction may hold half of the variance. All of the transformation is measured
on the training catalogue (smoothing: on its events) and saved with the weights, so that items added later are
treated as the first were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.rec.smoothing import Neighbours, smoothed

# A component's standard deviation is divided by itself to this power.
WHITENING_POWERS = {"none": 0.0, "half": 0.5, "full": 1.0}
# Components below this share of the first one's variance are rounding noise, which whitening would blow up.
SMALLEST_VARIANCE = 1e-6
_CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Statistics:
    """What transforms raw vectors: mean and scale, (D,) float32 each, and a projection (D, K) float32 or None.

    longest: length of the longest transformed vector that was trained on, to which all others are cut; None, of a
    recommender that was saved without it: all vectors of the catalogue count as trained on.
    """

    mean: np.ndarray
    scale: np.ndarray
    projection: np.ndarray | None = None
    longest: float | None = None

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, K) float32, K = D without a projection: centred, scaled, projected."""
        standardised: np.ndarray = (vectors - self.mean) / self.scale
        return standardised if self.projection is None else standardised @ self.projection


@dataclass(frozen=True)
class FrozenVectors:
    """Transformed vectors, ready for an item table.

    values: (N + M, K) bfloat16, the N items of training before the M added ones: rounded to 8 bits a value, which
    is far finer than what a catalogue's vectors differ by, they take half the memory.
    n_added: M. statistics: of the N, smoothed where they are. sha256: of the raw vectors of the N.
    neighbours: what they are smoothed over, if at all.
    """

    values: Tensor
    n_added: int
    statistics: Statistics
    sha256: str
    neighbours: Neighbours | None


def freeze(
    vectors: np.ndarray,
    *,
    smoothing: float = 0.0,
    neighbours: Neighbours | None = None,
    whitening: str = "none",
    dimensions: int | None = None,
    statistics: Statistics | None = None,
    trainable: np.ndarray | None = None,
    added: np.ndarray | None = None,
    sha256: str | None = None,
) -> FrozenVectors:
    """Checks, hashes and transforms vectors.

    Args:
        vectors: (N, D) float, raw, of the training catalogue.
        smoothing: see `rec.smoothing`; over the `neighbours` of the N items, None smooths nothing.
        whitening, dimensions: see `measure`; not looked at where `statistics` are given.
        statistics: those of the training; None measures them on `vectors`.
        trainable: (N,) bool, the rows that they are measured on; None: all. Held-out items have no say, as items
            that come later have none.
        added: (M, D) raw vectors of items that the training did not know.
        sha256: of `vectors` that are checked and hashed already; None: they are not.

    Raises:
        ArtifactError: not (N, D), NaN or infinite values, `added` of another width, or neighbours of other items.
        ConfigError: more `dimensions` than the vectors have.
    """
    if sha256 is None:
        vectors = checked_vectors(vectors)
        sha256 = hash_vectors(vectors)
    added = np.empty_like(vectors[:0]) if added is None else _checked_added(added, vectors)
    if neighbours is not None:
        if len(neighbours.offsets) != len(vectors) + 1:
            raise ArtifactError(
                f"neighbours of {len(neighbours.offsets) - 1:,} items do not fit {len(vectors):,} item vectors"
            )
        known = np.diff(neighbours.offsets) > 0
        mean, _ = column_statistics(vectors, known if known.any() else None)
        vectors, added = smoothed(vectors, mean, neighbours, smoothing, added)
    measured = statistics or measure(vectors, whitening, dimensions, trainable)
    values = _transformed(vectors, measured)
    if statistics is None:
        measured = replace(measured, longest=_longest(values, trainable))
    if len(added):
        values = torch.cat([values, _transformed(added, measured)])
    if measured.longest is None:
        _shorten(values[len(vectors) :], _longest(values[: len(vectors)]))
    else:
        _shorten(values, measured.longest)
    return FrozenVectors(values, len(added), measured, sha256, neighbours)


def _checked_added(added: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    added = checked_vectors(added)
    if added.shape[1] != vectors.shape[1]:
        raise ArtifactError(
            f"added item vectors have {added.shape[1]} dimensions, those of training {vectors.shape[1]}; "
            "encode the added items with the same encoder"
        )
    return added


def _transformed(vectors: np.ndarray, statistics: Statistics) -> Tensor:
    """(N, D) -> (N, K) bfloat16, never held in float32."""
    width = vectors.shape[1] if statistics.projection is None else statistics.projection.shape[1]
    values = torch.empty(len(vectors), width, dtype=torch.bfloat16)
    for rows in _chunks(vectors):
        values[rows] = torch.from_numpy(statistics.apply(vectors[rows])).bfloat16()
    return values


def _longest(values: Tensor, counted: np.ndarray | None = None) -> float:
    """Length of the longest row of (N, K), of those at (N,) bool `counted` if given."""
    lengths = torch.cat([values[rows].float().norm(dim=1) for rows in _chunks(values)])
    return float(lengths.max() if counted is None else lengths[torch.from_numpy(counted)].max())


def _shorten(values: Tensor, longest: float) -> None:
    """Cuts rows of (N, K) that are longer than `longest`, beyond which nothing was trained, to that length.

    Ours. Scores grow with the length, so that a text unlike all others of the catalogue would lead every list.
    """
    for rows in _chunks(values):
        lengths = values[rows].float().norm(dim=1, keepdim=True)
        values[rows] *= longest / lengths.clamp(min=longest)


def _chunks(vectors: np.ndarray | Tensor) -> Iterator[slice]:
    for start in range(0, len(vectors), _CHUNK_ROWS):
        yield slice(start, start + _CHUNK_ROWS)


def measure(
    vectors: np.ndarray,
    whitening: str = "none",
    dimensions: int | None = None,
    counted: np.ndarray | None = None,
) -> Statistics:
    """The statistics of a catalogue.

    Every dimension is centred and scaled to unit variance (population variance; a constant one is scaled
    by 1). With `whitening="none"` and no `dimensions` that is all. Otherwise the standardised vectors are
    turned into their principal components, strongest first; "half" takes their standard deviations to the
    power 1/2, "full" makes them all 1, "none" keeps them; then one factor makes the mean variance 1, which the
    adapter's initial weights expect. Components without variance (fewer items than dimensions) are left out, and
    those with less than chance gives are taken as that much (`_noise`): of few items they look weaker than they
    are, and items added later would stand out in them by many times the length of the others.

    Args:
        vectors: (N, D) float32, finite.
        whitening: a key of WHITENING_POWERS.
        dimensions: principal components kept; None keeps all that have variance.
        counted: (N,) bool, the rows that are looked at; None: all.

    Raises:
        ConfigError: more `dimensions` than there are components with variance.
        ArtifactError: every vector is the same.
    Source: principal components of standardised vectors (ours: raw ones are led by single outlying dimensions);
    their floor is ours.
    """
    mean, scale = column_statistics(vectors, counted)
    standardised = Statistics(mean, scale)
    if whitening == "none" and dimensions is None:
        return standardised
    covariance, fourth, n = np.zeros((vectors.shape[1],) * 2), 0.0, _number(vectors, counted)
    for rows in _counted_chunks(vectors, counted):
        chunk = standardised.apply(rows).astype(np.float64)
        covariance += chunk.T @ chunk / n
        fourth += float(np.square(np.square(chunk).sum(axis=1)).sum()) / n
    variances, directions = np.linalg.eigh(covariance)
    variances, directions = variances[::-1], directions[:, ::-1]  # strongest first
    usable = int((variances > SMALLEST_VARIANCE * variances[0]).sum()) if variances[0] > 0 else 0
    if usable == 0:
        raise ArtifactError("every item vector is the same: there is nothing to tell items apart by; encode again")
    if dimensions is not None and dimensions > usable:
        raise ConfigError(
            f"dimensions is {dimensions}, but the vectors vary in {usable} directions; choose {usable} or fewer"
        )
    variances, directions = variances[: dimensions or usable], directions[:, : dimensions or usable]
    power = WHITENING_POWERS[whitening]
    taken = np.maximum(variances, _noise(covariance, fourth, n))
    whitened = variances * taken**-power
    projection = directions * (taken ** (-power / 2) / np.sqrt(whitened.mean()))
    # The sign of a component is arbitrary; this one does not depend on the linear algebra library.
    strongest = np.abs(directions).argmax(axis=0)
    projection *= np.sign(directions[strongest, np.arange(len(strongest))])
    return Statistics(mean, scale, np.ascontiguousarray(projection, dtype=np.float32))


def _noise(covariance: np.ndarray, fourth: float, n: int) -> float:
    """The variance that chance alone gives a direction of `n` vectors.

    The share of the mean variance that the optimal shrinkage of a covariance (D, D) moves every direction towards.

    Args:
        fourth: mean of the vectors' lengths to the power 4.
    Source: Ledoit & Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices, section 3.
    """
    mean, squares = np.trace(covariance) / len(covariance), np.square(covariance).sum()
    spread = squares - mean**2 * len(covariance)
    share = 1.0 if spread <= 0 else min(1.0, max(0.0, (fourth - squares) / n / spread))
    return float(share * mean)


def checked_vectors(vectors: np.ndarray) -> np.ndarray:
    """The vectors as (N, D) float32.

    Raises:
        ArtifactError: another shape, or a value is NaN or infinite; nothing is replaced silently.
    """
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise ArtifactError(f"item vectors have shape {vectors.shape}; expected (items, dimensions)")
    finite = np.ones(len(vectors), dtype=bool)
    for rows in _chunks(vectors):
        finite[rows] = np.isfinite(vectors[rows]).all(axis=1)
    if not finite.all():
        raise ArtifactError(
            f"{(~finite).sum():,} of {len(vectors):,} item vectors hold NaN or infinite values (first: row "
            f"{int(np.argmin(finite))}); run the encode stage again"
        )
    return np.ascontiguousarray(vectors, dtype=np.float32)


def column_statistics(vectors: np.ndarray, counted: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of each column, (D,) float32; 1 where a column is constant.

    Summed in float64: language models have dimensions with means of hundreds and a spread below one.

    Args:
        counted: (N,) bool, the rows that are looked at, one at least; None: all.
    """
    n, width = _number(vectors, counted), vectors.shape[1]
    mean, squares = np.zeros(width), np.zeros(width)
    low, high = np.full(width, np.inf), np.full(width, -np.inf)
    for rows in _counted_chunks(vectors, counted):
        mean += rows.sum(axis=0, dtype=np.float64) / n
        low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
    for rows in _counted_chunks(vectors, counted):
        squares += np.square(rows - mean).sum(axis=0)
    scale = np.sqrt(squares / n)
    # Exact: the standard deviation of equal float32 values may come out as 1e-17 instead of 0.
    scale[low == high] = 1.0
    return mean.astype(np.float32), scale.astype(np.float32)


def _number(vectors: np.ndarray, counted: np.ndarray | None) -> int:
    return len(vectors) if counted is None else int(counted.sum())


def _counted_chunks(vectors: np.ndarray, counted: np.ndarray | None) -> Iterator[np.ndarray]:
    """The rows of `vectors` that count, some at a time."""
    for rows in _chunks(vectors):
        if counted is None:
            yield vectors[rows]
        elif counted[rows].any():
            yield vectors[rows][counted[rows]]


def hash_vectors(vectors: np.ndarray) -> str:
    """SHA-256 of shape and float32 values, as hex: what a saved text recommender knows its vectors by."""
    values = np.ascontiguousarray(vectors, dtype="<f4")
    digest = hashlib.sha256(repr(values.shape).encode())
    digest.update(values.data)
    return digest.hexdigest()
