"""The memory of this process: its peak, and giving back what is free."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path


def release() -> None:
    """Gives back what a stage held: trainers are reference cycles, and glibc keeps freed memory to itself."""
    gc.collect()
    trim()


def trim() -> None:
    """Gives freed memory back to the system.

    Tensors whose sizes change from step to step leave gaps in glibc's heap that it neither fills nor returns: a
    long training would slowly take all memory.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if give_back is not None:
        give_back(0)


def reset_peak() -> None:
    """The high-water mark starts anew, where the system has one (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_gib() -> float:
    """Peak resident memory in GiB since `reset_peak` (Linux), of the process elsewhere."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 2**20, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
