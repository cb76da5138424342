"""Which number format a machine multiplies matrices in fastest."""

from __future__ import annotations

import time
from functools import cache

import torch

from llm2rec.processes import processes

DTYPES = ("auto", "float32", "bfloat16")


def resolve_dtype(name: str) -> torch.dtype:
    """`auto` as a dtype: bfloat16 where its matrix product is the faster one (AMX, GPU), else float32.

    Measured, not looked up: there are processors that list bfloat16 instructions and run them at half the
    speed of float32. A process measures once, so that all of its trainings agree; of several processes, which
    must all come here, the main one decides.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if torch.cuda.is_available():
        return torch.bfloat16
    return processes().agreed(_faster())


@cache
def _faster() -> torch.dtype:
    return min((torch.float32, torch.bfloat16), key=_matmul_seconds)


def _matmul_seconds(dtype: torch.dtype, size: int = 512, repeats: int = 5) -> float:
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    left @ right  # the first call prepares the kernel
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return best
