"""Attention of the decoder: inside each sequence of a packed row, and its dropout.

Registered with transformers under the name PACKED, so that any decoder that takes an attention function takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from llm2rec.errors import ArtifactError

PACKED = "llm2rec_packed"
# Of torch's kernels all but cuDNN's, which plans for every new shape (S, L) anew: on an H200 that was 226 of the
# 400 ms of a CSFT step of 2,048 tokens.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LONGEST_AT_ONCE = 512  # tokens; 9 heads then keep 2.4 million shares a sequence and layer for the backward pass


@contextmanager
def dropout(model: nn.Module, share: float) -> Iterator[None]:
    """Sets the attention dropout of every layer for the time being; the configuration stays as it was.

    A model without one that can be set (`has_attention_dropout`) stays as it is.
    """
    before = [layer.attention_dropout for layer in _attentions(model)]
    for layer in _attentions(model):
        layer.attention_dropout = share
    try:
        yield
    finally:
        for layer, value in zip(_attentions(model), before, strict=True):  # a training may replace layers
            layer.attention_dropout = value


def has_attention_dropout(model: nn.Module) -> bool:
    """Whether the attention of a model has a dropout that can be set; that of GPT-2 and OPT has not."""
    return bool(_attentions(model))


def _attentions(model: nn.Module) -> list[Any]:
    return [
        module for module in model.modules() if isinstance(getattr(module, "attention_dropout", None), float | int)
    ]


@contextmanager
def attending(body: nn.Module, name: str) -> Iterator[None]:
    """Lets a decoder attend by the registered function `name` for the time being."""
    before = body.config._attn_implementation
    body.config._attn_implementation = name
    try:
        with sdpa_kernel(KERNELS):
            yield
    finally:
        body.config._attn_implementation = before


def _packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: dict[str, Any],
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention inside each sequence of a packed row: (1, heads, T, d) in, (1, T, heads, d) out.

    `segments` is what `packing.pack` gives; the `visible` (B, L, L) of its blocks, where they have one, says which
    cell sees which and replaces the causal or the bidirectional rule.
    """
    blocks = segments["blocks"].values()
    longest = max(block["gather"].shape[1] for block in blocks)
    if softcap is not None or (sliding_window is not None and longest > sliding_window):
        raise ArtifactError(
            f"packed attention has no soft cap and no sliding window (this model: {softcap}, {sliding_window}; "
            f"longest sequence {longest} tokens); lower data.history_length or model.max_title_tokens"
        )

    causal = getattr(module.config, "is_causal", True) is not False
    mixed = [_attend_in_block(query, key, value, block, causal, dropout, scaling) for block in blocks]
    return torch.cat(mixed).index_select(0, segments["scatter"])[None], None


def _attend_in_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: dict[str, Tensor],
    causal: bool,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Attention inside each sequence of one block of a packed row: (1, heads, T, d) in, (B * L, heads, d) out."""
    gather = block["gather"]
    sequences, longest = gather.shape

    def pad(states: Tensor) -> Tensor:  # (1, heads, T, d) -> (B, heads, L, d)
        rows = states[0].transpose(0, 1).index_select(0, gather.view(-1))
        return rows.view(sequences, longest, states.shape[1], states.shape[3]).transpose(1, 2)

    if "visible" in block:
        seen = block["visible"][:, None]
    else:
        seen = None if causal else block["valid"][:, None, None, :]
    attend = _attend_at_once if query.device.type == "cpu" and longest <= LONGEST_AT_ONCE else _attend_in_tiles
    mixed = attend(pad(query), pad(key), pad(value), seen, dropout, scaling)  # (B, heads, L, d)
    return mixed.transpose(1, 2).reshape(sequences * longest, query.shape[1], query.shape[3])


def _attend_in_tiles(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """Attention by torch's kernel, whose memory does not grow with L x L.

    Args:
        query, key, value: (S, heads, L, d); key and value may have fewer heads, each for as many of the query's.
        seen: bool, broadcast to (S, heads, L, L), which cell (row) sees which; None: each those up to itself.
    """
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=seen,
        dropout_p=dropout,
        is_causal=seen is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """The same by matrix products, with all scores in memory: 4 to 7 times as fast for short sequences on a CPU.

    Torch's kernel needed 29 % of a CSFT step for its bfloat16 backward pass, 39 ms where this needs 4 (140 titles
    of 16 tokens). Scores and shares are rounded to the dtype of the inputs, as in transformers' eager attention.
    """
    sequences, heads, longest, width = query.shape
    groups = key.shape[1]

    def stacked(states: Tensor) -> Tensor:  # (S, heads, L, d) -> (S * groups, heads / groups * L, d)
        return states.reshape(sequences * groups, -1, width)

    if seen is None:
        seen = query.new_ones(longest, longest, dtype=torch.bool).tril()
    barred = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
    barred.masked_fill_(~seen, torch.finfo(query.dtype).min)  # finite: padding that sees nothing gives no NaN
    scale = scaling if scaling is not None else width**-0.5
    scores = torch.bmm(stacked(query) * scale, stacked(key).transpose(1, 2))
    scores = scores.view(sequences, heads, longest, longest) + barred
    shares = F.dropout(torch.softmax(scores, dim=-1), dropout)
    mixed = torch.bmm(shares.view(sequences * groups, -1, longest), stacked(value))
    return mixed.view(sequences, heads, longest, width)


AttentionInterface.register(PACKED, _packed_attention_forward)
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)
