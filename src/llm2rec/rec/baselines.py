"""Floors without training: popularity, and the item after the last one.

They are not saved: counting a million events takes milliseconds, so every use counts the training events
again, and a floor can never be older than its data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from llm2rec.rec.histories import checked, last

if TYPE_CHECKING:
    from llm2rec.data.sequences import Sequences


class Popularity:
    """Scores an item by its training events, whatever the history."""

    def __init__(self, sequences: Sequences) -> None:
        self.n_items = sequences.n_items
        self._counts = torch.from_numpy(_counts(sequences).astype(np.float32))

    def score(self, histories: Tensor) -> Tensor:
        """(B, N) float32: training events of each item (exact up to 2**24)."""
        return self._counts.repeat(len(checked(histories, self.n_items)), 1)


class Markov:
    """Scores an item by how often it directly followed the last item in training; popularity breaks ties.

    A last item that nothing followed, or an empty history, falls back to popularity altogether.
    """

    def __init__(self, sequences: Sequences) -> None:
        items, offsets = sequences.training()
        items = np.asarray(items, dtype=np.int64)
        follows = np.ones(max(len(items) - 1, 0), dtype=bool)
        boundaries = np.asarray(offsets)[1:-1]
        follows[boundaries[(boundaries > 0) & (boundaries < len(items))] - 1] = False
        before, after = items[:-1][follows], items[1:][follows]
        self.n_items = sequences.n_items
        # Row 0 is the empty history. Duplicates are summed.
        self._transitions = sparse.csr_array(
            (np.ones(len(before), dtype=np.float32), (before, after - 1)), (self.n_items + 1, self.n_items)
        )
        # Ranks of the distinct counts, and not the counts: evenly spaced, they stay apart in float32.
        levels, level = np.unique(_counts(sequences), return_inverse=True)
        self._tie_break = (level / len(levels)).astype(np.float32)  # (N,) in [0, 1)

    def score(self, histories: Tensor) -> Tensor:
        """(B, N) float32: transitions counted, plus the popularity level in [0, 1)."""
        newest = last(checked(histories, self.n_items)).cpu().numpy()
        return torch.from_numpy(self._transitions[newest].toarray() + self._tie_break)


FLOORS: dict[str, type[Popularity] | type[Markov]] = {"popularity": Popularity, "markov": Markov}


def _counts(sequences: Sequences) -> np.ndarray:
    """Training events of each item, (N,) int64."""
    items, _ = sequences.training()
    return np.bincount(np.asarray(items), minlength=sequences.n_items + 1)[1:]
