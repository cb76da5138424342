"""Item tables: where the (N, H) vectors come from that a recommender reads histories with and scores against.

A step calls `vectors()` once and looks histories up in its result, so that an adapter over frozen vectors is
applied to the catalogue once, and input and output share one gradient. Tables over frozen vectors may hold M
added items, which the training did not know: they follow the N trained ones and have no learned part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2rec.errors import DataError
from llm2rec.rec.table_linear import ROWS, TableLinear
from llm2rec.rec.vectors import FrozenVectors

INITIAL_STD = 0.02
# Mean square of GELU of a standard normal variable, by which the second layer of an adapter is scaled.
_GELU_SQUARE = 0.425
_TINY = 1e-12


class ItemTable(nn.Module, ABC):
    """What a recommender needs to know of its items."""

    n_added = 0

    @property
    @abstractmethod
    def n_items(self) -> int:
        """Items that can be seen and scored, N, or N + M with added ones."""

    @abstractmethod
    def vectors(self, rows: Tensor | None = None) -> Tensor:
        """(N + M, H) float32, row j for item_index j + 1; call once a step.

        Args:
            rows: (R,) int64 in 0..N - 1, of a table without added items: only these, (R, H), computed without
                the others, so that a step over samples of a large catalogue does not cost the catalogue.
        """

    def blank(self, rows: Tensor) -> None:
        """Zeroes what is learned of the items at (N,) bool `rows`, which no training will see.

        Their initial values are noise. Zero, an item has what is known of it otherwise, or counts as unknown.
        """

    def parts(self, values: Tensor) -> tuple[Tensor, ...]:
        """`values` (N + M, ...) as its trained and its added rows, or as one part without added items.

        Matrix products may round by shape: apart, the scores of the trained items stay as they were everywhere.
        """
        return values.split([self.n_items - self.n_added, self.n_added]) if self.n_added else (values,)


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
        self.weight = learned(n_items, hidden_size)

    @property
    def n_items(self) -> int:
        """Items in the catalogue, N."""
        return len(self.weight)

    def vectors(self, rows: Tensor | None = None) -> Tensor:
        """(N, H) float32: the table itself."""
        return _at(self.weight, rows)

    def blank(self, rows: Tensor) -> None:
        """See the base class."""
        _zero(self.weight, rows)


@dataclass(frozen=True)
class Categories:
    """Which categories (genres, brands, ...) each item has, in compressed rows.

    indices: (nnz,) int64, categories 0..C - 1. offsets: (N + 1,) int64; the item in row j (item_index j + 1) has
    `indices[offsets[j]:offsets[j + 1]]`, which may be none.

    Raises:
        DataError: offsets that do not run from 0 to nnz without falling, or a negative category.
    """

    indices: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        rising = len(self.offsets) > 0 and (np.diff(self.offsets) >= 0).all()
        if not rising or self.offsets[0] != 0 or self.offsets[-1] != len(self.indices):
            raise DataError(
                f"category offsets must run from 0 to the {len(self.indices)} category indices without falling, "
                "one more than there are items"
            )
        if len(self.indices) and self.indices.min() < 0:
            raise DataError(f"category {self.indices.min()} is negative; categories are counted from 0")

    @classmethod
    def of(cls, names: Sequence[Sequence[str]]) -> Categories:
        """From the category names of each item, in the order of the catalogue; categories are sorted by name."""
        known = {name: index for index, name in enumerate(sorted({one for row in names for one in row}))}
        indices = np.array([known[one] for row in names for one in row], dtype=np.int64)
        return cls(indices, np.cumsum([0, *map(len, names)]).astype(np.int64))

    @property
    def n_items(self) -> int:
        """Items covered, N."""
        return len(self.offsets) - 1


class CategorisedItems(LearnedItems):
    """Learned vectors plus the mean of one learned vector a category; an item without one keeps its own alone.

    The categories are saved with the weights: loading needs nothing else.
    """

    def __init__(self, categories: Categories, hidden_size: int) -> None:
        super().__init__(categories.n_items, hidden_size)
        self.category_indices: Tensor
        self.category_offsets: Tensor
        self.register_buffer("category_indices", torch.from_numpy(categories.indices.astype(np.int64)))
        self.register_buffer("category_offsets", torch.from_numpy(categories.offsets.astype(np.int64)))
        highest = int(categories.indices.max()) if len(categories.indices) else 0
        self.category_weight = learned(highest + 1, hidden_size)

    def vectors(self, rows: Tensor | None = None) -> Tensor:
        """(N, H) float32: own vector plus mean of the categories'."""
        indices, offsets = self.category_indices, self.category_offsets
        if rows is not None:
            starts, counts = offsets[rows], offsets.diff()[rows]
            offsets = F.pad(counts.cumsum(0), (1, 0))
            places = torch.arange(int(offsets[-1]), device=rows.device)
            indices = indices[places + (starts - offsets[:-1]).repeat_interleave(counts)]
        bags = F.embedding_bag(indices, self.category_weight, offsets, mode="mean", include_last_offset=True)
        return _at(self.weight, rows) + bags


class FrozenItems(ItemTable):
    """Frozen vectors under one trained adapter (K -> H).

    The statistics that transformed the vectors and the neighbours that they are smoothed over are saved with the
    trained weights; the vectors are not, but known by `sha256`.

    Source: linear adapter of LLM2Rec section 4.1; the MLP (K -> `adapter_size`, GELU, -> H) is ours.
    """

    def __init__(self, frozen: FrozenVectors, hidden_size: int, adapter: str, adapter_size: int) -> None:
        super().__init__()
        self.sha256, self.n_added = frozen.sha256, frozen.n_added
        self.frozen: Tensor
        for name in ("mean", "scale", "projection"):
            values = getattr(frozen.statistics, name)
            if values is not None:
                self.register_buffer(name, torch.from_numpy(values))
        if frozen.statistics.longest is not None:
            self.register_buffer("longest_trained", torch.tensor(frozen.statistics.longest))
        if frozen.neighbours is not None:
            for field in fields(frozen.neighbours):
                values = getattr(frozen.neighbours, field.name)
                self.register_buffer(f"neighbour_{field.name}", torch.from_numpy(values))
        # (N + M, K); neither saved nor written into checkpoints.
        self.register_buffer("frozen", frozen.values, persistent=False)
        self.adapter = make_adapter(adapter, frozen.values.shape[1], hidden_size, adapter_size)

    @property
    def n_items(self) -> int:
        """Items in the catalogue and added, N + M."""
        return len(self.frozen)

    def vectors(self, rows: Tensor | None = None) -> Tensor:
        """(N + M, H): the adapter applied to the whole catalogue."""
        return self._adapted(self.frozen if rows is None else self.frozen.index_select(0, rows))

    def _adapted(self, values: Tensor) -> Tensor:
        return self._apart(self.adapter, values)

    def _apart(self, layer: nn.Module, values: Tensor) -> Tensor:
        """`layer` over the trained and the added rows of `values`; see `parts`.

        Without gradients some rows at a time, so that hidden units are never held of the whole catalogue.
        """
        parts = self.parts(values)
        if not torch.is_grad_enabled():
            parts = tuple(rows for part in parts for rows in _alike(part))
        return torch.cat([layer(part) for part in parts]) if len(parts) > 1 else layer(parts[0])

    def _for_all(self, table: Tensor, rows: Tensor | None = None) -> Tensor:
        """(N, ...) -> (N + M, ...): zeros for the added items; or some rows."""
        return F.pad(table, (0, 0, 0, self.n_added)) if self.n_added else _at(table, rows)


class SummedItems(FrozenItems):
    """Adapted frozen vector plus a learned vector an item; an added item has the adapted one alone."""

    def __init__(self, frozen: FrozenVectors, hidden_size: int, adapter: str, adapter_size: int) -> None:
        super().__init__(frozen, hidden_size, adapter, adapter_size)
        self.weight = learned(len(frozen.values) - frozen.n_added, hidden_size)

    def vectors(self, rows: Tensor | None = None) -> Tensor:
        """(N + M, H) float32: the sum."""
        return super().vectors(rows) + self._for_all(self.weight, rows)

    def blank(self, rows: Tensor) -> None:
        """See the base class."""
        _zero(self.weight, rows)


class ConcatenatedItems(FrozenItems):
    """Adapted frozen vector and a learned vector an item, side by side under a linear map (2H -> H).

    An added item stands with zeros in the place of its learned vector.
    """

    def __init__(self, frozen: FrozenVectors, hidden_size: int, adapter: str, adapter_size: int) -> None:
        super().__init__(frozen, hidden_size, adapter, adapter_size)
        self.weight = learned(len(frozen.values) - frozen.n_added, hidden_size)
        self.merge = nn.Linear(2 * hidden_size, hidden_size)
        nn.init.normal_(self.merge.weight, std=(2 * hidden_size) ** -0.5)  # keeps the standard deviation
        nn.init.zeros_(self.merge.bias)

    def vectors(self, rows: Tensor | None = None) -> Tensor:
        """(N + M, H) float32: both, merged."""
        both = torch.cat([super().vectors(rows), self._for_all(self.weight, rows)], dim=1)  # (N + M, 2H)
        return self._apart(self.merge, both)

    def blank(self, rows: Tensor) -> None:
        """See the base class."""
        _zero(self.weight, rows)


class DeltaItems(FrozenItems):
    """Frozen vector plus a small trained delta in its own space, both under the adapter.

    The delta begins at zero and is never longer than `share` times the vector: a longer one is scaled back.
    An added item has no delta, and so stays where the encoder put it, close to the trained ones.

    Source: Pembek et al. 2025, arXiv 2507.19473, which bounds the delta by 0.5 beside vectors of unit length.
    Ours: the bound is a share of each vector's own length, scaling back is part of the gradient (there the
    table itself is renormalised), and an adapter leads to H, so that the delta is learned in K dimensions.
    """

    def __init__(
        self, frozen: FrozenVectors, hidden_size: int, adapter: str, adapter_size: int, share: float
    ) -> None:
        super().__init__(frozen, hidden_size, adapter, adapter_size)
        trained = self.frozen[: len(self.frozen) - self.n_added].float()
        self.longest: Tensor
        self.register_buffer("longest", share * trained.norm(dim=1, keepdim=True), persistent=False)  # (N, 1)
        self.delta = nn.Parameter(torch.zeros_like(trained))

    def vectors(self, rows: Tensor | None = None) -> Tensor:
        """(N + M, H) float32: the adapter applied to the moved vectors."""
        frozen = self.frozen if rows is None else self.frozen.index_select(0, rows)
        return self._adapted(frozen + self._for_all(self.bounded_delta(rows)))

    def bounded_delta(self, rows: Tensor | None = None) -> Tensor:
        """(N, K) float32, or of some rows (R, K): the deltas, none longer than `share` of its vector."""
        delta, longest = _at(self.delta, rows), _at(self.longest, rows)
        squares = delta.square().sum(dim=1, keepdim=True)  # (N, 1)
        # Where the delta is short enough the factor is 1 and has no gradient; tiny keeps 0 / 0 away.
        return delta * (longest * squares.clamp(min=longest.square() + _TINY).rsqrt())


TEXT_TABLES = {"text": FrozenItems, "sum": SummedItems, "concatenation": ConcatenatedItems}


def learned(rows: int, hidden_size: int) -> nn.Parameter:
    """Trained vectors, (rows, H), drawn from N(0, 0.02)."""
    return nn.Parameter(nn.init.normal_(torch.empty(rows, hidden_size), std=INITIAL_STD))


def _at(table: Tensor, rows: Tensor | None) -> Tensor:
    """The table, or some of its rows."""
    return table if rows is None else F.embedding(rows, table)


def _alike(values: Tensor) -> tuple[Tensor, ...]:
    """The rows of a table in parts of at most ROWS, of one length (or one less).

    Equal vectors must score alike wherever they stand, and products of a single row, which a remainder may be, are
    rounded in another way than those of many.
    """
    return values.tensor_split(max(1, -(-len(values) // ROWS)))


def _zero(weight: nn.Parameter, rows: Tensor) -> None:
    with torch.no_grad():
        weight[rows] = 0


def make_adapter(kind: str, width: int, hidden_size: int, size: int) -> nn.Module:
    """A trained map (K -> H) that turns vectors of unit variance into ones of INITIAL_STD, as learned items have.

    Args:
        kind: "linear", or "mlp" for K -> size, GELU, -> H.
        width: K.
        size: hidden units of the mlp.
    """
    if kind == "linear":
        return _initialised(TableLinear(width, hidden_size), INITIAL_STD / width**0.5)
    inner = _initialised(TableLinear(width, size), width**-0.5)
    outer = _initialised(nn.Linear(size, hidden_size), INITIAL_STD / (_GELU_SQUARE * size) ** 0.5)
    return nn.Sequential(inner, nn.GELU(), outer)


def _initialised(layer: nn.Linear, std: float) -> nn.Linear:
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer
