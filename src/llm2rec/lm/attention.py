"""Attention over a packed row: each of its sequences by itself, re-padded around the kernel only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from llm2rec.errors import ArtifactError

PACKED = "llm2rec_packed"


@contextmanager
def packed_attention(body: nn.Module) -> Iterator[None]:
    """Makes a decoder's layers attend inside the sequences of a packed row; they must be given `segments`."""
    before = body.config._attn_implementation
    body.config._attn_implementation = PACKED
    try:
        yield
    finally:
        body.config._attn_implementation = before


class _Padded(torch.autograd.Function):
    """Rows (T, ...) of a packed row as padded cells (S * L, ...); a cell without a row repeats row 0.

    A plain `index_select` would add up gradients cell by cell. Each row has exactly one cell of its own, and
    the other cells' gradients are zero: nothing that is used sees them.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        return rows.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scatter,) = ctx.saved_tensors
        return gradient.index_select(0, scatter), None, None


class _Flat(torch.autograd.Function):
    """Padded cells (S * L, heads, d) as rows (T, heads, d) of a packed row; the reverse of `_Padded`."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, gather: Tensor, valid: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(gather, valid)
        return cells.index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        gather, valid = ctx.saved_tensors
        return gradient.index_select(0, gather) * valid[:, None, None], None, None, None


def _packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: dict[str, Tensor],
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside each sequence of a packed row: (1, heads, T, d) in, (1, T, heads, d) out.

    `segments` is what `packing.pack` gives; its `visible` (S, L, L), where it has one, says which cell sees
    which and replaces the causal or the bidirectional rule.
    """
    gather, valid, scatter = segments["gather"], segments["valid"], segments["scatter"]
    sequences, longest = gather.shape
    if softcap is not None or (sliding_window is not None and longest > sliding_window):
        raise ArtifactError(
            f"packed attention has no soft cap and no sliding window (this model: {softcap}, {sliding_window}; "
            f"longest sequence {longest} tokens); lower data.history_length or model.max_title_tokens"
        )

    def pad(states: Tensor) -> Tensor:  # (1, heads, T, d) -> (S, heads, L, d)
        cells = _Padded.apply(states[0].transpose(0, 1), gather.view(-1), scatter)
        return cells.view(sequences, longest, states.shape[1], states.shape[3]).transpose(1, 2)

    causal = getattr(module.config, "is_causal", True) is not False and "visible" not in segments
    mask = segments["visible"][:, None] if "visible" in segments else valid[:, None, None, :]
    mixed = F.scaled_dot_product_attention(
        pad(query),
        pad(key),
        pad(value),
        attn_mask=None if causal else mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # (S, heads, L, d)
    cells = mixed.transpose(1, 2).reshape(sequences * longest, query.shape[1], query.shape[3])
    return _Flat.apply(cells, gather.view(-1), valid.view(-1), scatter)[None], None


AttentionInterface.register(PACKED, _packed_attention_forward)
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)
