"""What every trained recommender shares: its items, the window, empty histories, and scoring."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2rec.rec.architecture import Architecture
from llm2rec.rec.histories import checked, checked_times, lengths, recent
from llm2rec.rec.items import ItemTable


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
        self._kept: tuple[list[tuple[int, int]], Tensor, Tensor] | None = None

    @property
    def n_items(self) -> int:
        """Items that can be seen and scored, N + M."""
        return self.items.n_items

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
        position alone: finite, the same for everyone, and untrained, so prefer popularity there.

        Args:
            histories: (B, L) int64, any L >= 1, left-aligned, 0 = padding.
            times: (B, L) int64, epoch seconds of the events, never falling; needed by models with
                `needs_times`, which would otherwise see other inputs than in training.

        Raises:
            ValueError: an item outside the catalogue, padding before an item, L = 0, or times that are
                missing or do not fit.
        """
        with torch.no_grad():
            device = next(self.parameters()).device
            histories = checked(histories.to(device), self.n_items)
            if self.needs_times:
                if times is None:
                    raise ValueError(
                        f"a recommender {self.architecture.name} needs the times of the events; give them"
                    )
                times = recent(histories, self.history_length, checked_times(times.to(device), histories))
            seen = recent(histories, self.history_length)
            vectors, candidates = self._catalogue()
            newest = (lengths(seen) - 1).clamp(min=0)
            states = self(seen, vectors, times)[torch.arange(len(seen), device=device), newest]  # (B, H)
            queries, _ = self.comparable(states, vectors[:0])
            scores = [queries @ part.T for part in self.items.parts(candidates)]
            return torch.cat(scores, dim=1) if len(scores) > 1 else scores[0]

    def _catalogue(self) -> tuple[Tensor, Tensor]:
        """Item vectors to read histories with, and to score against; kept from call to call while nothing changes.

        Else every call would put the whole catalogue through the adapter again, which costs more than the scores.
        """
        tensors = [*self.items.parameters(), *self.items.buffers()]
        state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if self.training or self._kept is None or self._kept[0] != state:
            vectors = self.items.vectors()
            _, candidates = self.comparable(vectors[:0], vectors)
            self._kept = state, vectors, candidates
        return self._kept[1:]

    def train(self, mode: bool = True) -> SequentialRecommender:
        """Sets training or evaluation mode, as in torch; forgets what `score` has kept."""
        self._kept = None
        return super().train(mode)
