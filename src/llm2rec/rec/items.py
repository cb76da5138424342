"""Item tables: where the (N, H) vectors come from that a recommender reads histories with and scores against.

A step calls `vectors()` once and looks histories up in its result, so that an adapter over frozen vectors is
applied to the catalogue once, and input and output share one gradient.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2rec.errors import ArtifactError

INITIAL_STD = 0.02


class ItemTable(nn.Module, ABC):
    """What a recommender needs to know of its items."""

    @property
    @abstractmethod
    def n_items(self) -> int:
        """Items in the catalogue, N."""

    @abstractmethod
    def vectors(self) -> Tensor:
        """(N, H) float32, row j for item_index j + 1; call once a step."""


def lookup(vectors: Tensor, item_index: Tensor) -> Tensor:
    """The rows of `vectors` at each item_index, zeros at padding: (..., H).

    Args:
        vectors: (N, H), row j for item_index j + 1.
        item_index: (...) int64 in 0..N, 0 = padding, which receives no gradient.
    """
    # F.embedding and not vectors[index], whose backward is slow on a CPU.
    rows = F.embedding((item_index - 1).clamp(min=0), vectors)
    return rows * (item_index > 0).unsqueeze(-1)


class LearnedItems(ItemTable):
    """One trained vector an item, N(0, 0.02): the same table reads histories and scores candidates."""

    def __init__(self, n_items: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_items, hidden_size))
        nn.init.normal_(self.weight, std=INITIAL_STD)

    @property
    def n_items(self) -> int:
        """Items in the catalogue, N."""
        return len(self.weight)

    def vectors(self) -> Tensor:
        """(N, H) float32: the table itself."""
        return self.weight


class FrozenItems(ItemTable):
    """Frozen vectors, standardised, under one trained linear adapter (D -> H).

    Each dimension is centred and scaled to unit variance over the catalogue (population variance; a constant
    dimension is scaled by 1). Mean and scale are saved with the trained weights, so that items added later
    are standardised as the training catalogue was; the vectors are not saved, but known by `sha256`.

    Source: linear adapter of LLM2Rec section 4.1; standardisation because raw LM vectors train badly.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        hidden_size: int,
        statistics: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Standardises and hashes the vectors.

        Args:
            vectors: (N, D) float, raw.
            hidden_size: H.
            statistics: mean and scale, (D,) float32 each, of the training catalogue; None takes them from
                `vectors`.

        Raises:
            ArtifactError: `vectors` is not (N, D), or a value is NaN or infinite.
        """
        super().__init__()
        vectors = checked_vectors(vectors)
        mean, scale = statistics or column_statistics(vectors)
        self.frozen: Tensor
        self.sha256 = hash_vectors(vectors)
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("scale", torch.from_numpy(scale))
        # (N, D); neither saved nor written into checkpoints.
        self.register_buffer("frozen", torch.from_numpy((vectors - mean) / scale), persistent=False)
        self.adapter = nn.Linear(vectors.shape[1], hidden_size)
        # Standardised inputs: vectors of INITIAL_STD, as learned items have them.
        nn.init.normal_(self.adapter.weight, std=INITIAL_STD / vectors.shape[1] ** 0.5)
        nn.init.zeros_(self.adapter.bias)

    @property
    def n_items(self) -> int:
        """Items in the catalogue, N."""
        return len(self.frozen)

    def vectors(self) -> Tensor:
        """(N, H) float32: the adapter applied to the whole catalogue."""
        adapted: Tensor = self.adapter(self.frozen)
        return adapted


def checked_vectors(vectors: np.ndarray) -> np.ndarray:
    """The vectors as (N, D) float32.

    Raises:
        ArtifactError: another shape, or a value is NaN or infinite; nothing is replaced silently.
    """
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise ArtifactError(f"item vectors have shape {vectors.shape}; expected (items, dimensions)")
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ArtifactError(
            f"{(~finite).sum():,} of {len(vectors):,} item vectors hold NaN or infinite values (first: row "
            f"{int(np.argmin(finite))}); run the encode stage again"
        )
    return np.ascontiguousarray(vectors, dtype=np.float32)


def column_statistics(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of each column, (D,) float32; 1 where a column is constant.

    Summed in float64: language models have dimensions with means of hundreds and a spread below one.
    """
    mean = vectors.mean(axis=0, dtype=np.float64)
    scale = vectors.std(axis=0, dtype=np.float64)
    # Exact: the standard deviation of equal float32 values may come out as 1e-17 instead of 0.
    scale[vectors.min(axis=0) == vectors.max(axis=0)] = 1.0
    return mean.astype(np.float32), scale.astype(np.float32)


def hash_vectors(vectors: np.ndarray) -> str:
    """SHA-256 of shape and float32 values, as hex: what a saved text recommender knows its vectors by."""
    values = np.ascontiguousarray(vectors, dtype="<f4")
    return hashlib.sha256(repr(values.shape).encode() + values.data).hexdigest()
