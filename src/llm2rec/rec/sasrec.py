"""SASRec: self-attention over the history, scored against the whole catalogue.

Source: Kang & McAuley (2018), Self-Attentive Sequential Recommendation. Differences, all usual today:
pre-norm blocks that normalise queries, keys and values alike, separate random numbers for every dropout,
and a full softmax over the catalogue instead of one sampled negative (which is `rec.fit`'s affair).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2rec.rec.dropout import dropout
from llm2rec.rec.histories import checked, lengths, recent
from llm2rec.rec.items import INITIAL_STD, ItemTable, lookup


class SASRec(nn.Module):
    """Causal transformer over item vectors; state i predicts the item after position i.

    Histories are left-aligned with padding at the end, so the causal mask alone keeps padding out of every
    state of a real item, and positions count from the first item seen.
    """

    def __init__(
        self,
        items: ItemTable,
        *,
        hidden_size: int,
        layers: int,
        heads: int,
        dropout: float,
        history_length: int,
    ) -> None:
        super().__init__()
        self.items = items
        self.hidden_size, self.heads, self.dropout = hidden_size, heads, dropout
        self.history_length = history_length
        self.positions = nn.Parameter(torch.empty(history_length, hidden_size))
        self.blocks = nn.ModuleList(Block(hidden_size, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_size)
        nn.init.normal_(self.positions, std=INITIAL_STD)

    @property
    def n_items(self) -> int:
        """Items in the catalogue, N."""
        return self.items.n_items

    def forward(self, histories: Tensor, vectors: Tensor | None = None) -> Tensor:
        """A state a position, (B, L, H) float32; finite but meaningless at padding.

        Args:
            histories: (B, L) int64, L <= history_length, left-aligned, 0 = padding.
            vectors: the result of `items.vectors()` where the step already has it.
        """
        vectors = self.items.vectors() if vectors is None else vectors
        # The item vectors are small (std 0.02) beside what the blocks add: scaled as in the paper.
        states = lookup(vectors, histories) * self.hidden_size**0.5 + self.positions[: histories.shape[1]]
        states = dropout(states, self.dropout, self.training)  # (B, L, H)
        for block in self.blocks:
            states = block(states)
        normed: Tensor = self.norm(states)
        return normed

    def score(self, histories: Tensor) -> Tensor:
        """Scores of the whole catalogue after each history, (B, N) float32, no gradient; set `eval()` first.

        Only the last `history_length` items are looked at. An empty history is answered from the first
        position alone: finite, the same for everyone, and untrained, so prefer popularity there.

        Args:
            histories: (B, L) int64, any L >= 1, left-aligned, 0 = padding.

        Raises:
            ValueError: an item outside the catalogue, padding before an item, or L = 0.
        """
        with torch.no_grad():
            seen = recent(checked(histories.to(self.positions.device), self.n_items), self.history_length)
            vectors = self.items.vectors()
            newest = (lengths(seen) - 1).clamp(min=0)
            states = self(seen, vectors)[torch.arange(len(seen), device=seen.device), newest]  # (B, H)
            return (states @ vectors.T).float()


class Block(nn.Module):
    """Pre-norm self-attention and a point-wise feed-forward network of the same width (as in the paper)."""

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.feed_forward_norm = nn.LayerNorm(hidden_size)
        self.feed_forward_in = nn.Linear(hidden_size, hidden_size)
        self.feed_forward_out = nn.Linear(hidden_size, hidden_size)
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INITIAL_STD)
                nn.init.zeros_(module.bias)

    def forward(self, states: Tensor) -> Tensor:
        """(B, L, H) -> (B, L, H); position i sees positions 0..i."""
        states = states + self._drop(self._attend(self.attention_norm(states)))
        inner = self._drop(F.relu(self.feed_forward_in(self.feed_forward_norm(states))))
        return states + self._drop(self.feed_forward_out(inner))

    def _attend(self, states: Tensor) -> Tensor:
        split = self.query_key_value(states).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, heads, H / heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # (B, heads, L, H / heads) each
        share = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=share)
        attended: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return attended

    def _drop(self, states: Tensor) -> Tensor:
        return dropout(states, self.dropout, self.training)
