"""Which number format a machine multiplies matrices in fastest."""

from __future__ import annotations

import time
from functools import cache

import torch

from llm2rec.processes import processes

DTYPES = ("auto", "float32", "bfloat16")
SIZES = {"cpu": 512, "cuda": 4096}  # rows and columns of the matrices; over small ones a GPU only waits


def resolve_dtype(name: str) -> torch.dtype:
    """`auto` as a dtype: bfloat16 where its matrix product is the faster one (AMX, GPU), else float32.

    Measured, not looked up: there are processors that list bfloat16 instructions and run them at half the
    speed of float32, and GPUs that only emulate it (P100, V100, T4). A process measures once, so that all of its
    trainings agree; of several processes, which must all come here, the main one decides.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return processes().agreed(_faster())


@cache
def _faster() -> torch.dtype:
    return min((torch.float32, torch.bfloat16), key=_matmul_seconds)


def _matmul_seconds(dtype: torch.dtype, repeats: int = 5) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(SIZES[device], SIZES[device], dtype=dtype, device=device)

    def multiply() -> float:
        began = time.perf_counter()
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()  # else only the launch is timed
        return time.perf_counter() - began

    multiply()  # the first call prepares the kernel
    return min(multiply() for _ in range(repeats))
