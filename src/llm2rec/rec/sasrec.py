"""SASRec: self-attention over the history, scored against the whole catalogue.

Source: Kang & McAuley (2018), Self-Attentive Sequential Recommendation. Differences, all usual today:
pre-norm blocks that normalise queries, keys and values alike, separate random numbers for every dropout,
and a full softmax over the catalogue instead of one sampled negative (which is `rec.fit`'s affair).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2rec.rec.architecture import Architecture
from llm2rec.rec.dropout import dropout
from llm2rec.rec.histories import Places
from llm2rec.rec.items import INITIAL_STD, ItemTable, lookup
from llm2rec.rec.sequential import SequentialRecommender


class SASRec(SequentialRecommender):
    """Causal transformer over item vectors and positions."""

    def __init__(self, items: ItemTable, architecture: Architecture) -> None:
        super().__init__(items, architecture)
        hidden_size, heads = architecture.hidden_size, architecture.heads
        self.positions = nn.Parameter(torch.empty(architecture.history_length, hidden_size))
        self.blocks = nn.ModuleList(
            self._block(hidden_size, heads, architecture.dropout) for _ in range(architecture.layers)
        )
        self.norm = self._last_norm(hidden_size)
        nn.init.normal_(self.positions, std=INITIAL_STD)

    def forward(self, histories: Tensor, vectors: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """(B, L) -> (B, L, H); see the base class."""
        vectors = self.items.vectors() if vectors is None else vectors
        places = Places.of(histories)
        # The item vectors are small (std 0.02) beside what the blocks add: scaled as in the paper.
        states = lookup(vectors, places.flat(histories)) * self.hidden_size**0.5  # (T, H)
        states = states + places.flat(self._position_vectors(histories, times))
        states = dropout(states, self.dropout, self.training)
        for block in self.blocks:
            states = block(states, places)
        return places.padded(self.norm(states))

    def _block(self, hidden_size: int, heads: int, dropout: float) -> nn.Module:
        return Block(hidden_size, heads, dropout)

    def _last_norm(self, hidden_size: int) -> nn.Module:
        return nn.LayerNorm(hidden_size)

    def _position_vectors(self, histories: Tensor, times: Tensor | None) -> Tensor:
        """What tells positions apart, (B, L, H)."""
        return self.positions[: histories.shape[1]].expand(len(histories), -1, -1)


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
        initialise_linears(self)

    def forward(self, states: Tensor, places: Places) -> Tensor:
        """(T, H) -> (T, H); position i of a history sees its positions 0..i."""
        states = states + self._drop(self._attend(self.attention_norm(states), places))
        inner = self._drop(F.relu(self.feed_forward_in(self.feed_forward_norm(states))))
        return states + self._drop(self.feed_forward_out(inner))

    def _attend(self, states: Tensor, places: Places) -> Tensor:
        share = self.dropout if self.training else 0.0
        mixed = causal_attention(self.query_key_value(states), places, self.heads, share)
        attended: Tensor = self.attention_out(mixed)
        return attended

    def _drop(self, states: Tensor) -> Tensor:
        return dropout(states, self.dropout, self.training)


def causal_attention(query_key_value: Tensor, places: Places, heads: int, dropped_share: float) -> Tensor:
    """(T, 3H) queries, keys and values side by side -> (T, H); position i of a history sees its positions 0..i.

    Padding stands at the end, where causal attention never looks.
    """
    split = places.padded(query_key_value).unflatten(-1, (3, heads, -1))  # (B, L, 3, heads, H / heads)
    query, key, value = split.permute(2, 0, 3, 1, 4)  # (B, heads, L, H / heads) each
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropped_share)
    return places.flat(mixed.transpose(1, 2)).flatten(1)


def initialise_linears(module: nn.Module) -> None:
    """Draws the weights of the linear layers directly in `module` from N(0, 0.02) and zeroes their biases."""
    for layer in module.children():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=INITIAL_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
