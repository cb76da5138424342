"""Which number format a machine multiplies matrices in fastest."""

from __future__ import annotations

import time

import torch

from llm2rec.processes import processes

DTYPES = ("auto", "float32", "bfloat16")


def resolve_dtype(name: str) -> torch.dtype:
    """`auto` as a dtype: bfloat16 where its matrix product is the faster one (AMX, GPU), else float32.

    Measured, not looked up: there are processors that list bfloat16 instructions and run them at half the
    speed of float32. Of several processes, which must all come here, the main one measures.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if torch.cuda.is_available():
        return torch.bfloat16
    seconds = {dtype: _matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return processes().agreed(min(seconds, key=lambda dtype: seconds[dtype]))


def _matmul_seconds(dtype: torch.dtype, size: int = 512, repeats: int = 5) -> float:
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    left @ right  # the first call prepares the kernel
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return best
