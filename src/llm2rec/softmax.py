"""Softmax cross-entropy over a large vocabulary that never holds the whole logits.

Serves the head of the language model (V tens of thousands, M thousands of tokens a step) and the full
softmax of the recommenders (V = the catalogue).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits a chunk: 24 MB in float32 (above 32 the allocator returns each buffer to the system; half of that loses
# time on small products), 12 MB in bfloat16 (24 take half as long again where a catalogue has 17,000 items).
CHUNK_LOGITS = {"cpu": 6 * 2**20, "cuda": 2**27}  # a GPU only waits over small products; 512 MB in float32
# Chunks of fewer rows spend their time on the (V, H) matrices; measured where the two ways take equally long.
FEWEST_ROWS = 48
# On a CPU a sum or product of two dtypes converts one operand whole; a few rows at a time that stays in the cache.
# Measured for (16384, 576): bfloat16 added to float32 takes 33 ms whole, 8 ms so.
CACHED_VALUES = 256 * 576


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None = None) -> Tensor:
    """Sum of the cross-entropies of `softmax(hidden @ weight.T)` at `targets` (scalar, nats, float32).

    Loss and gradients are computed together, `chunk_rows` rows at a time, during the forward pass: the
    gradient of a softmax needs the logits just computed, so nothing of size (M, V) outlives its chunk.
    Memory beyond the inputs is one (chunk_rows, V) matrix plus the gradients (M, H) and (V, H) themselves,
    whatever M; the plain way keeps three (M, V) matrices. Logits are rounded to the dtype of the inputs, as
    `F.linear` rounds them, and with bfloat16 so are their shares; sums are float32.

    The gradients are scaled in their own memory, so a second backward pass (`retain_graph`) raises a RuntimeError.

    Where V is so large that a chunk would hold fewer than `FEWEST_ROWS` rows, chunks are taken along V instead:
    once for the partition function and once for the gradients, four products where rows take three.

    Args:
        hidden: (M, H) float32 or bfloat16; M = 0 gives 0.
        weight: (V, H), the dtype of `hidden`. Frozen inputs cost no gradient, nor does `torch.no_grad()`.
        targets: (M,) int64 in [0, V); every row counts, so drop unlabelled rows before.
        chunk_rows: rows at a time; by default as many as give the device's `CHUNK_LOGITS`, or chunks along V.

    Raises:
        ValueError: shapes or dtypes do not fit, or `chunk_rows` < 1.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (M, H), (V, H)")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be ({hidden.shape[0]},), one a row of hidden")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}; convert one of them first")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, must be at least 1")
    if not torch.is_grad_enabled():  # inside a Function, needs_input_grad is set even under no_grad
        hidden, weight = hidden.detach(), weight.detach()
    logits = CHUNK_LOGITS[weight.device.type]
    rows = logits // weight.shape[0] if chunk_rows is None else chunk_rows
    loss: Tensor
    if chunk_rows is None and rows < min(FEWEST_ROWS, len(hidden)):
        loss = _ByColumns.apply(hidden, weight, targets, max(1, logits // len(hidden)))
    else:
        loss = _ByRows.apply(hidden, weight, targets, max(1, rows))
    return loss


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        buffer = hidden.new_empty(min(chunk_rows, len(hidden)), len(weight))
        slopes_and_loss = _slopes if hidden.dtype == torch.float32 else _rounded_slopes
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            chunk = hidden[rows]  # (C, H)
            logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])  # (C, V)
            slopes, sums, loss = slopes_and_loss(logits, targets[rows])
            total += loss
            if grad_hidden is not None:
                torch.mm(slopes, weight, out=grad_hidden[rows])
                grad_hidden[rows] /= sums
            if wants_weight:
                grad_weight = _plus_product(grad_weight, slopes.T, (chunk / sums).to(hidden.dtype))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return _scaled_gradients(ctx, upstream)


def _slopes(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From float32 logits (C, V), which are overwritten, and targets (C,).

    Returns:
        (softmax minus one-hot) times sums (C, V), the sums (C, 1) and the summed loss. The narrow factors are
        divided by the sums instead of (C, V).
    """
    logits.sub_(logits.amax(dim=1, keepdim=True))
    target_logits = logits.gather(1, target[:, None])
    shares = logits.exp_()
    sums = shares.sum(dim=1, keepdim=True)
    _add_at(shares, target, -sums)
    return shares, sums, (sums.log() - target_logits).sum()


def _rounded_slopes(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from 16-bit logits in one pass, by torch's softmax, which adds up in float32; the sums are 1.

    A share is rounded to 8 bits: the loss of one row is off by at most 0.004, the mean over rows by far less.
    """
    shares = torch.softmax(logits, dim=1, out=logits)
    smallest = torch.finfo(torch.float32).tiny
    loss = -shares.gather(1, target[:, None]).float().clamp(min=smallest).log().sum()
    ones = shares.new_ones(len(target), 1)
    _add_at(shares, target, -ones)
    return shares, ones, loss


def _add_at(values: Tensor, column: Tensor, summand: Tensor) -> None:
    """Adds `summand` (C, 1) to `values` (C, V) in place, in one `column` (C,) of each row."""
    # `scatter_add_` would copy all of `values` on a CPU, which takes longer than their softmax.
    rows = torch.arange(len(values), device=values.device)
    values[rows, column] += summand[:, 0]


class _ByColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_columns: int) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.empty_like(weight) if wants_weight else None
        highest = hidden.new_full((len(hidden), 1), -torch.inf, dtype=torch.float32)
        sums, target_logits = torch.zeros_like(highest), torch.zeros_like(highest)  # (M, 1) each
        buffer = highest.new_empty(len(hidden) * min(chunk_columns, len(weight)))
        chunks = [slice(start, start + chunk_columns) for start in range(0, len(weight), chunk_columns)]
        for columns in chunks:
            logits = _chunk_logits(hidden, weight[columns], buffer)  # (M, C)
            place, inside = _places(targets, columns, logits.shape[1])
            target_logits = torch.where(inside, logits.gather(1, place), target_logits)
            higher = torch.maximum(highest, logits.amax(dim=1, keepdim=True))
            sums = sums * (highest - higher).exp() + logits.sub_(higher).exp_().sum(dim=1, keepdim=True)
            highest = higher
        partitions = sums.log() + highest  # (M, 1)
        for columns in chunks if wants_hidden or wants_weight else []:
            shares = _chunk_logits(hidden, weight[columns], buffer).sub_(partitions).exp_()
            place, inside = _places(targets, columns, shares.shape[1])
            slopes = shares.scatter_add_(1, place, -inside.to(shares.dtype)).to(hidden.dtype)  # minus one-hot
            if grad_hidden is not None:
                _add_product(grad_hidden, slopes, weight[columns])
            if grad_weight is not None:
                torch.mm(slopes.T, hidden, out=grad_weight[columns])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return (partitions - target_logits).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        return _scaled_gradients(ctx, upstream)


def _scaled_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    """The gradients kept by the forward pass, times `upstream`."""
    grad_hidden, grad_weight = ctx.saved_tensors
    if grad_hidden is not None:
        grad_hidden = _scaled(grad_hidden, upstream, ctx.weight_dtype)
    if grad_weight is not None:
        grad_weight = _scaled(grad_weight, upstream, ctx.weight_dtype)
    return grad_hidden, grad_weight, None, None


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient` times `upstream`, in its own memory or in another dtype."""
    if gradient.dtype == dtype:
        return gradient.mul_(upstream)
    scaled = torch.empty_like(gradient, dtype=dtype)
    for part, into in _parts(gradient, scaled):
        torch.mul(part, upstream, out=into)
    return scaled


def _parts(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matrices of one shape, on a CPU a few rows at a time."""
    first = matrices[0]
    rows = max(1, CACHED_VALUES // first.shape[1]) if first.device.type == "cpu" else len(first)
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)


def _chunk_logits(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Logits (M, C) of C columns in the float32 `buffer`, whose last chunk is narrower."""
    return _product(hidden, weight.T, buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight)))


def _places(targets: Tensor, columns: slice, width: int) -> tuple[Tensor, Tensor]:
    """Where each target stands in a chunk of columns, (M, 1) int64, and whether it stands there, (M, 1) bool."""
    place = (targets - columns.start)[:, None]
    return place.clamp(0, width - 1), (place >= 0) & (place < width)


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right` in the float32 `out`; a bfloat16 product is rounded first."""
    return torch.mm(left, right, out=out) if left.dtype == out.dtype else out.copy_(left @ right)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` as it comes, or added to what earlier chunks gave, in float32."""
    if total is None:
        return left @ right
    total = total.float()
    _add_product(total, left, right)
    return total


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds `left @ right` to the float32 `total` in place; a bfloat16 product is rounded once a chunk."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        for part, into in _parts(left @ right, total):
            into.add_(part)
