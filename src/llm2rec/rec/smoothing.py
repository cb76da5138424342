"""Item vectors smoothed over what is consumed together, before a recommender reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from llm2rec.data.sequences import Sequences

_BLOCK_COLUMNS, _BLOCK_ROWS = 64, 8192
_RIDGE = 1.0  # as much as one item in every direction


@dataclass(frozen=True)
class Neighbours:
    """Which items users consumed right before or after each item in training, and how often, in compressed rows.

    indices: (nnz,) int32, rows of other items, 0..N - 1. counts: (nnz,) int32. offsets: (N + 1,) int64; the item
    in row j (item_index j + 1) has `indices[offsets[j]:offsets[j + 1]]`, which are none where no event of training
    has it beside another.
    """

    indices: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, sequences: Sequences) -> Neighbours:
        """Counts training events alone; an item beside itself does not count."""
        before, after = (items - 1 for items in sequences.successions())
        apart = before != after
        pairs, shape = (before[apart], after[apart]), (sequences.n_items, sequences.n_items)
        forwards = sparse.csr_array((np.ones(len(pairs[0]), dtype=np.int32), pairs), shape)  # sums repeated pairs
        counted = sparse.csr_array(forwards + forwards.T)
        counted.sort_indices()
        return cls(
            counted.indices.astype(np.int32), counted.data.astype(np.int32), counted.indptr.astype(np.int64)
        )

    def shares(self) -> sparse.csr_array:
        """(N, N) float32: each neighbour's share of all that stood beside an item; a row sums to 1 or is empty."""
        totals = np.add.reduceat(np.append(self.counts, 0), self.offsets[:-1]) * (np.diff(self.offsets) > 0)
        shares = self.counts / np.repeat(totals, np.diff(self.offsets))
        n_items = len(self.offsets) - 1
        return sparse.csr_array((shares.astype(np.float32), self.indices, self.offsets), (n_items, n_items))


def smoothed(
    vectors: np.ndarray, mean: np.ndarray, neighbours: Neighbours, share: float, added: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) and (M, D) float32: unit vectors, `share` of each replaced by the mean of its neighbours'.

    A neighbour counts as often as it stood beside the item. Items without any, those of the training catalogue and
    the added ones, have the mean that their text lets expect: ridge regression from the unit vectors of the
    others to their neighbours' means. As they are they would be longer than all others, and lead every list.
    Beyond the results it holds the neighbours, a block of columns, and a matrix (D, D).

    Args:
        vectors: (N, D) float32, raw. mean: (D,) float32, of those with neighbours. added: (M, D) float32, raw.
        share: in (0, 1).
    Source: smoothing on co-consumption after Rec-PCA (arXiv 2604.20490), here once, over direct successions, and
    without its projection. Ours: centred unit vectors, for raw ones of language models all point one way, and
    what items without neighbours get.
    """
    lengths = _lengths(vectors, mean)
    neighbour_shares = neighbours.shares() * np.float32(share)
    result = np.empty(vectors.shape, dtype=np.float32)
    for start in range(0, vectors.shape[1], _BLOCK_COLUMNS):
        columns = slice(start, start + _BLOCK_COLUMNS)
        own = (vectors[:, columns] - mean[columns]) / lengths
        result[:, columns] = (1 - share) * own + neighbour_shares @ own
    known = np.diff(neighbours.offsets) > 0
    expected = _expected_neighbours(vectors, mean, result, known, share)
    alone = np.flatnonzero(~known)
    for rows in np.array_split(alone, len(alone) // _BLOCK_ROWS + 1):
        result[rows] = _without_neighbours(vectors[rows], mean, expected, share)
    return result, _without_neighbours(added, mean, expected, share)


def _expected_neighbours(
    vectors: np.ndarray, mean: np.ndarray, result: np.ndarray, known: np.ndarray, share: float
) -> np.ndarray:
    """(D, D) float32: a unit vector times this is the mean of its neighbours to be expected.

    Args:
        result: (N, D), smoothed at the `known` (N,) rows.
    """
    width = vectors.shape[1]
    squares, products = _RIDGE * np.eye(width), np.zeros((width, width))
    for rows in np.array_split(np.flatnonzero(known), known.sum() // _BLOCK_ROWS + 1):
        own = _unit(vectors[rows], mean).astype(np.float64)
        squares += own.T @ own
        products += own.T @ ((result[rows] - (1 - share) * own) / share)
    return np.linalg.solve(squares, products).astype(np.float32)


def _without_neighbours(vectors: np.ndarray, mean: np.ndarray, expected: np.ndarray, share: float) -> np.ndarray:
    """(M, D) float32: raw vectors smoothed by the neighbours to be expected."""
    own = _unit(vectors, mean)
    return (1 - share) * own + share * (own @ expected)


def _unit(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    return (vectors - mean) / _lengths(vectors, mean)


def _lengths(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(N, 1) float32: distance of each vector from the mean; 1 where it is the mean."""
    lengths = np.empty((len(vectors), 1), dtype=np.float32)
    for start in range(0, len(vectors), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        lengths[rows, 0] = np.linalg.norm(vectors[rows] - mean, axis=1)
    return np.where(lengths > 0, lengths, np.float32(1))
