"""A linear map of a whole catalogue of frozen vectors, never held whole in another format than their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS = 4096


class TableLinear(nn.Linear):
    """`nn.Linear` that takes a frozen (N, K) table in any float dtype, converted a few rows at a time.

    The result is float32, or under autocast of its dtype. A table that takes a gradient is mapped as usual.
    """

    def forward(self, table: Tensor) -> Tensor:
        """(N, K) -> (N, H)."""
        if table.requires_grad:
            return super().forward(table)
        device = table.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        mapped: Tensor = _MapTable.apply(table, self.weight, self.bias, dtype)
        return mapped


class _MapTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(table)
        ctx.weight_dtype = weight.dtype
        mapped = torch.empty(len(table), len(weight), dtype=dtype, device=table.device)
        columns, bias = weight.T.to(dtype), bias.to(dtype)
        with torch.autocast(table.device.type, enabled=False):
            for part, into in zip(table.split(ROWS), mapped.split(ROWS), strict=True):
                torch.addmm(bias, part.to(dtype), columns, out=into)
        return mapped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, Tensor, None]:
        (table,) = ctx.saved_tensors
        grad_weight = table.new_zeros(upstream.shape[1], table.shape[1], dtype=ctx.weight_dtype)
        grad_bias = grad_weight.new_zeros(upstream.shape[1])
        with torch.autocast(table.device.type, enabled=False):
            for part, slopes in zip(table.split(ROWS), upstream.split(ROWS), strict=True):
                grad_weight += slopes.T @ part.to(slopes.dtype)
                grad_bias += slopes.to(ctx.weight_dtype).sum(0)
        return None, grad_weight, grad_bias, None
