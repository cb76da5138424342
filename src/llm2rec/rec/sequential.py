"""What every trained recommender shares: its items, the window, empty histories, and scoring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2rec.evaluation import ranking
from llm2rec.rec.architecture import Architecture
from llm2rec.rec.histories import checked, checked_times, lengths, recent
from llm2rec.rec.items import ItemTable


class _Catalogue(NamedTuple):
    """Vectors (N + M, H) to read histories with and to score against, and which items have one, (N + M,) bool."""

    vectors: Tensor
    candidates: Tensor
    known: Tensor


class _Kept(NamedTuple):
    """A catalogue, and what it was made from: held, so that no other tensor takes its address."""

    tensors: list[Tensor]
    state: list[tuple[int, int, int]]
    catalogue: _Catalogue


class SequentialRecommender(nn.Module, ABC):
    """Turns a history into states, one a position; state i predicts the item after position i.

    Histories are left-aligned with padding at the end, so a model that looks back alone keeps padding out of
    every state of a real item, and positions count from the first item seen.
    """

    needs_times = False

    def __init__(self, items: ItemTable, architecture: Architecture) -> None:
        super().__init__()
        self.items = items
        self.architecture = architecture
        self.hidden_size, self.dropout = architecture.hidden_size, architecture.dropout
        self.history_length = architecture.history_length
        self._kept: _Kept | None = None

    @property
    def n_items(self) -> int:
        """Items that can be seen and scored, N + M."""
        return self.items.n_items

    @property
    def known(self) -> Tensor:
        """Items with a vector, (N + M,) bool: not those that no training saw and nothing else describes."""
        with self._exact():
            return self._catalogue().known

    @abstractmethod
    def forward(self, histories: Tensor, vectors: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """A state a position, (B, L, H) float32; finite but meaningless at padding.

        Args:
            histories: (B, L) int64, L <= history_length, left-aligned, 0 = padding.
            vectors: the result of `items.vectors()` where the step already has it.
            times: (B, L) int64, epoch seconds of the events; looked at where `needs_times` alone.
        """

    def comparable(self, states: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """States (..., H) and item vectors (N + M, H) such that their dot product is the score.

        As they are, or for cosine scoring both of unit length, the states divided by the temperature.
        """
        temperature = self.architecture.temperature
        if temperature is None:
            return states, vectors
        return F.normalize(states.float(), dim=-1) / temperature, F.normalize(vectors.float(), dim=-1)

    def score(self, histories: Tensor, times: Tensor | None = None) -> Tensor:
        """Scores of the whole catalogue after each history, (B, N + M) float32, no gradient; set `eval()` first.

        Only the last `history_length` items are looked at. An empty history is answered from the first
        position alone: finite, the same for everyone, and untrained, so prefer popularity there. Autocast
        around the call has no effect.

        Args:
            histories: (B, L) int64, any L >= 1, left-aligned, 0 = padding.
            times: (B, L) int64, epoch seconds of the events, never falling; needed by models with
                `needs_times`, which would otherwise see other inputs than in training.

        Raises:
            ValueError: an item outside the catalogue, padding before an item, L = 0, or times that are
                missing or do not fit.
        """
        with self._exact():
            queries, candidates = self._compared(histories, times)
            parts = self.items.parts(candidates)
            scores = [queries @ block.T for part in parts for block in ranking.blocks(part, len(queries))]
            return torch.cat(scores, dim=1) if len(scores) > 1 else scores[0]

    def ranks(
        self, targets: Tensor, exclude: Tensor | None, histories: Tensor, times: Tensor | None = None
    ) -> Tensor:
        """`ranking.ranks` of the scores, (B,) int64, which are never written to memory whole.

        Args:
            targets: (B,) item_index.
            exclude: (B, L) item_index that do not compete, padded with 0, or None.
            histories, times: as in `score`.

        Raises:
            ValueError: as `score`, or a score is not finite.
        """
        with self._exact():
            queries, candidates = self._compared(histories, times)
            return ranking.ranks_of_products(queries, candidates, targets, exclude)

    @contextmanager
    def _exact(self) -> Iterator[None]:
        """Without gradients, and in float32 whatever surrounds the call."""
        with torch.no_grad(), torch.autocast(next(self.parameters()).device.type, enabled=False):
            yield

    def _compared(self, histories: Tensor, times: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is compared after each history (B, H), and with what (N + M, H)."""
        device = next(self.parameters()).device
        histories = checked(histories.to(device), self.n_items)
        if self.needs_times:
            if times is None:
                raise ValueError(
                    f"a recommender {self.architecture.name} needs the times of the events; give them"
                )
            times = recent(histories, self.history_length, checked_times(times.to(device), histories))
        seen = recent(histories, self.history_length)
        vectors, candidates, _ = self._catalogue()
        newest = (lengths(seen) - 1).clamp(min=0)
        states = self(seen, vectors, times)[torch.arange(len(seen), device=device), newest]  # (B, H)
        return self.comparable(states, vectors[:0])[0], candidates

    def _catalogue(self) -> _Catalogue:
        """Item vectors, to be asked for without gradients; kept from call to call while nothing changes.

        Else every call would put the whole catalogue through the adapter again, which costs more than the scores.
        A change that torch does not count, one through `.data` or numpy, is not seen: call `eval()` after it.
        """
        tensors = [*self.items.parameters(), *self.items.buffers()]
        if self.training or any(tensor.is_inference() for tensor in tensors):  # those count no changes
            return self._computed_catalogue()
        state = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]
        kept = self._kept
        if kept is None or kept.state != state:
            kept = self._kept = _Kept(tensors, state, self._computed_catalogue())
        return kept.catalogue

    def _computed_catalogue(self) -> _Catalogue:
        vectors = self.items.vectors()
        _, candidates = self.comparable(vectors[:0], vectors)
        return _Catalogue(vectors, candidates, vectors.any(dim=1))

    def train(self, mode: bool = True) -> SequentialRecommender:
        """Sets training or evaluation mode, as in torch; forgets what `score` has kept."""
        self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SequentialRecommender:
        """What torch calls to move or convert a module, where memory may be used again at the same address."""
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which do without what `score` has kept."""
        return self.__dict__ | {"_kept": None}
