"""Item vectors smoothed over what is consumed together, before a recommender reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from llm2rec.data.sequences import Sequences

_BLOCK_COLUMNS = 64


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


def smoothed(vectors: np.ndarray, mean: np.ndarray, neighbours: Neighbours, share: float) -> np.ndarray:
    """(N, D) float32: unit vectors, each with `share` of it replaced by the mean of its neighbours'.

    A neighbour counts as often as it stood beside the item. Items without neighbours stay unit vectors. Beyond the
    result it holds the neighbours and a block of columns.

    Args:
        vectors: (N, D) float32, raw. mean: (D,) float32, theirs.
        share: in [0, 1).
    Source: smoothing on co-consumption after Rec-PCA (arXiv 2604.20490), here once, over direct successions, and
    without its projection. Centred unit vectors are ours: raw ones of language models all point one way.
    """
    lengths = _lengths(vectors, mean)
    own_share = 1 - share * (np.diff(neighbours.offsets) > 0).astype(np.float32)[:, None]
    neighbour_shares = neighbours.shares() * np.float32(share)
    result = np.empty(vectors.shape, dtype=np.float32)
    for columns in _blocks(vectors):
        own = (vectors[:, columns] - mean[columns]) / lengths
        result[:, columns] = own_share * own + neighbour_shares @ own
    return result


def unit(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(M, D) float32: items without neighbours, as `smoothed` has them."""
    return (vectors - mean) / _lengths(vectors, mean)


def _lengths(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(N, 1) float32: distance of each vector from the mean; 1 where it is the mean."""
    squares = sum(np.square(vectors[:, columns] - mean[columns]).sum(axis=1) for columns in _blocks(vectors))
    lengths = np.sqrt(squares)[:, None]
    return np.where(lengths > 0, lengths, np.float32(1))


def _blocks(vectors: np.ndarray) -> Iterator[slice]:
    for start in range(0, vectors.shape[1], _BLOCK_COLUMNS):
        yield slice(start, start + _BLOCK_COLUMNS)
