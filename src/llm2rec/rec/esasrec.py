"""eSASRec: SASRec with LiGR blocks, gated residual pre-norm layers with a SwiGLU feed-forward network.

Source: Tikhonovich et al. 2025 (eSASRec, arXiv 2508.06450), which combines SASRec's shifted targets, the blocks of
LiGR (arXiv 2502.03417) and a sampled softmax (the last is `rec.fit`'s affair: `loss="sampled_softmax"`); details
from its public implementation in RecTools: a gate is a sigmoid of a linear map of the block's unnormalised input
and scales what the branch adds; the feed-forward network is four times as wide, without biases; no
normalisation follows the last block. Differences: positions count from the first item seen and not from the
last, item vectors are scaled by the root of H and weights drawn from N(0, 0.02), as in our SASRec.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llm2rec.rec.dropout import dropout
from llm2rec.rec.histories import Places
from llm2rec.rec.sasrec import SASRec, causal_attention, initialise_linears

WIDENING = 4


class ESASRec(SASRec):
    """SASRec of LiGR blocks, without a last normalisation."""

    def _block(self, hidden_size: int, heads: int, dropout: float) -> nn.Module:
        return LiGRBlock(hidden_size, heads, dropout)

    def _last_norm(self, hidden_size: int) -> nn.Module:
        return nn.Identity()


class LiGRBlock(nn.Module):
    """`x + gate(x) * attention(norm(x))`, then `x + gate(x) * SwiGLU(norm(x))`, each gate its own."""

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.attention_gate = nn.Linear(hidden_size, hidden_size)
        self.feed_forward_norm = nn.LayerNorm(hidden_size)
        # Both inner maps of the SwiGLU in one product: the one under SiLU first.
        self.feed_forward_in = nn.Linear(hidden_size, 2 * WIDENING * hidden_size, bias=False)
        self.feed_forward_out = nn.Linear(WIDENING * hidden_size, hidden_size, bias=False)
        self.feed_forward_gate = nn.Linear(hidden_size, hidden_size)
        initialise_linears(self)

    def forward(self, states: Tensor, places: Places) -> Tensor:
        """(T, H) -> (T, H); position i of a history sees its positions 0..i."""
        share = self.dropout if self.training else 0.0
        attended = causal_attention(self.query_key_value(self.attention_norm(states)), places, self.heads, share)
        states = states + self.attention_gate(states).sigmoid() * self._drop(self.attention_out(attended))
        bent, straight = self.feed_forward_in(self.feed_forward_norm(states)).chunk(2, dim=-1)
        inner = self.feed_forward_out(self._drop(F.silu(bent) * straight))
        return states + self.feed_forward_gate(states).sigmoid() * self._drop(inner)

    def _drop(self, states: Tensor) -> Tensor:
        return dropout(states, self.dropout, self.training)
