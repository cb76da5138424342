"""Recommenders without gradients: popularity, the item after the last one, neighbours, and EASE.

All count training events alone. They are not saved: counting a million events takes milliseconds, so every use
counts again, and a floor can never be older than its data. EASE inverts a matrix and takes longer (see there).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from llm2rec.errors import ConfigError
from llm2rec.rec.histories import checked, last
from llm2rec.rows import LARGEST_EASE

if TYPE_CHECKING:
    from llm2rec.data.sequences import Sequences

_PAIRS_AT_ONCE = 2**22  # of items that users have in common: 60 bytes each while they are sorted


class Popularity:
    """Scores an item by its training events, whatever the history."""

    def __init__(self, sequences: Sequences) -> None:
        self.n_items = sequences.n_items
        self._counts = torch.from_numpy(sequences.training_counts().astype(np.float32))

    def score(self, histories: Tensor) -> Tensor:
        """(B, N) float32: training events of each item (exact up to 2**24)."""
        return self._counts.repeat(len(checked(histories, self.n_items)), 1)


class Markov:
    """Scores an item by how often it directly followed the last item in training; popularity breaks ties.

    A last item that nothing followed, or an empty history, falls back to popularity altogether.
    """

    def __init__(self, sequences: Sequences) -> None:
        before, after = sequences.successions()
        self.n_items = sequences.n_items
        # Row 0 is the empty history. Duplicates are summed.
        self._transitions = sparse.csr_array(
            (np.ones(len(before), dtype=np.float32), (before, after - 1)), (self.n_items + 1, self.n_items)
        )
        # Ranks of the distinct counts, and not the counts: evenly spaced, they stay apart in float32.
        levels, level = np.unique(sequences.training_counts(), return_inverse=True)
        self._tie_break = (level / len(levels)).astype(np.float32)  # (N,) in [0, 1)

    def score(self, histories: Tensor) -> Tensor:
        """(B, N) float32: transitions counted, plus the popularity level in [0, 1)."""
        newest = last(checked(histories, self.n_items)).cpu().numpy()
        return torch.from_numpy(self._transitions[newest].toarray() + self._tie_break)


class ItemKNN:
    """Scores an item by its similarity to the items of the history, each of which speaks for its nearest alone.

    The similarity of items i and j is `c_ij / (sqrt(c_i c_j) + shrinkage)`, c_ij the users with both and c_i those
    with i: the cosine of their columns in the users' histories, drawn to 0 where few users support it. Ties
    among neighbours go to the lower item_index. Every item of the history speaks once for each time it stands
    there; recency does not count.

    Source: Deshpande & Karypis 2004; shrinkage after Bell & Koren 2007.
    """

    def __init__(self, sequences: Sequences, *, neighbours: int = 100, shrinkage: float = 10.0) -> None:
        """Counts the training events.

        Args:
            neighbours: most similar items kept for each item.
            shrinkage: at least 0, in users.

        Raises:
            ConfigError: a number out of range.
        """
        if neighbours < 1 or shrinkage < 0:
            raise ConfigError(
                f"item-knn got neighbours {neighbours}, shrinkage {shrinkage}; they must be at least 1 and 0"
            )
        self.n_items = sequences.n_items
        seen = _seen(sequences)
        users = seen.sum(axis=0)  # c_i
        nearest = [self._nearest(rows, both, users, neighbours, shrinkage) for rows, both in _together(seen)]
        self._similarity = sparse.vstack(nearest, format="csr")

    @staticmethod
    def _nearest(
        rows: slice, together: sparse.csr_array, users: np.ndarray, neighbours: int, shrinkage: float
    ) -> sparse.csr_array:
        """(R, N) float32: the similarities of some items to their nearest, from `_together`."""
        pairs = together.tocoo()
        apart = pairs.row + rows.start != pairs.col
        row, column, both = pairs.row[apart], pairs.col[apart], pairs.data[apart]
        similarity = both / (np.sqrt(users[rows][row] * users[column]) + shrinkage)
        order = np.lexsort((column, -similarity, row))
        row, column, similarity = row[order], column[order], similarity[order]
        starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=together.shape[0]))])
        near = np.arange(len(row)) - starts[row] < neighbours
        return sparse.csr_array((similarity[near].astype(np.float32), (row[near], column[near])), together.shape)

    def score(self, histories: Tensor) -> Tensor:
        """(B, N) float32: summed similarity to the items of each history; 0 for an empty one."""
        histories = checked(histories, self.n_items)
        return torch.from_numpy((_indicator(histories, self.n_items) @ self._similarity).toarray())


class Ease:
    """Scores an item by a linear map of the set of items in the history, fitted in closed form.

    With G_ij the users that items i and j have in common and `P = (G + regularisation I)^-1`, the weights are
    `B_ij = -P_ij / P_jj`, zero on the diagonal: the map that best rebuilds every user's set from its other items.
    Order does not count.

    Source: Steck 2019, Embarrassingly Shallow Autoencoders for Sparse Data.
    """

    def __init__(self, sequences: Sequences, *, regularisation: float = 250.0) -> None:
        """Solves for the weights: 4 N^2 bytes kept, twice that while solving, float32.

        Args:
            regularisation: above 0, in users.

        Raises:
            ConfigError: the catalogue is too large, or `regularisation` is not above 0.
        """
        self.n_items = sequences.n_items
        if self.n_items > LARGEST_EASE:
            raise ConfigError(
                f"ease on {self.n_items:,} items: its weights are N^2 floats ({4e-9 * self.n_items**2:.1f} GB, as "
                f"much again to solve for them) and its time grows with N^3; leave it out above {LARGEST_EASE:,}"
            )
        if not regularisation > 0:
            raise ConfigError(f"regularisation is {regularisation}; it must be above 0")
        counts = np.empty((self.n_items, self.n_items), dtype=np.float32)
        for rows, both in _together(_seen(sequences)):
            both.toarray(out=counts[rows])
        gram = torch.from_numpy(counts)
        gram.diagonal().add_(regularisation)
        factor = torch.linalg.cholesky(gram)
        del counts, gram
        weights = torch.cholesky_inverse(factor)  # P
        weights.div_(-weights.diagonal().clone())
        weights.fill_diagonal_(0)
        self._weights = weights  # (N, N), row i: what item i of a history says

    def score(self, histories: Tensor) -> Tensor:
        """(B, N) float32; 0 for an empty history."""
        present = _indicator(checked(histories, self.n_items), self.n_items)
        items, starts = (torch.from_numpy(part).long() for part in (present.indices, present.indptr[:-1]))
        # A sum of rows, a fifth of the time of scipy's product with a dense matrix.
        return F.embedding_bag(items, self._weights, starts, mode="sum")


FLOORS: dict[str, type[Popularity] | type[Markov] | type[ItemKNN] | type[Ease]] = {
    "popularity": Popularity,
    "markov": Markov,
    "item-knn": ItemKNN,
    "ease": Ease,
}


def _seen(sequences: Sequences) -> sparse.csr_array:
    """(U, N) float32: 1 where a user has the item among the training events."""
    items, offsets = sequences.training()
    columns = np.asarray(items, dtype=np.int64) - 1
    seen = sparse.csr_array(
        (np.ones(len(columns), dtype=np.float32), columns, offsets), (len(offsets) - 1, sequences.n_items)
    )
    seen.sum_duplicates()
    seen.data[:] = 1.0
    return seen


def _together(seen: sparse.csr_array) -> Iterator[tuple[slice, sparse.csr_array]]:
    """Items by rows, and the users that these have in common with every item: (R, N) float32.

    As many rows as `_PAIRS_AT_ONCE` allows: one user with L items makes L^2 pairs.
    """
    by_item = seen.T.tocsr()
    pairs = np.minimum(by_item @ np.diff(seen.indptr), seen.shape[1])  # of each row, at most
    starts = np.flatnonzero(np.diff(np.cumsum(pairs) // _PAIRS_AT_ONCE, prepend=-1))
    for start, end in pairwise([*starts.tolist(), seen.shape[1]]):
        yield slice(start, end), by_item[start:end] @ seen


def _indicator(histories: Tensor, n_items: int) -> sparse.csr_array:
    """(B, N) float32: how often each item stands in each history."""
    cells = histories.cpu().numpy()
    row, place = np.nonzero(cells)
    found = sparse.csr_array(
        (np.ones(len(row), dtype=np.float32), (row, cells[row, place] - 1)), (len(cells), n_items)
    )
    found.sum_duplicates()
    return found
