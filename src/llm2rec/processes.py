"""Several processes that torchrun started: which one leads, how the others agree with it, and when they part.

The main process (rank 0) alone reads data, keeps manifests and logs, fits recommenders and evaluates. The others
join it where a language model is trained or encodes. Where there is one process only, nothing here imports torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

# How long a process waits for the others: the main one may prepare or validate for hours while they do.
PATIENCE = timedelta(days=7)
# What makes this process one of several, to us and to every library that looks.
LAUNCHED = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "RANK", "LOCAL_RANK")


def is_main() -> bool:
    """Whether this process leads; true of a single one, whatever RANK a job's environment gives it."""
    return not are_several() or os.environ.get("RANK", "0") == "0"


def are_several() -> bool:
    """Whether torchrun (or accelerate) started several processes that have not parted yet."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is; the main one (rank 0) alone writes results."""

    rank: int
    count: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()

    def agreed(self, value: T) -> T:
        """The main process's value, on every process; each must come here."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


def processes() -> Processes:
    """The processes that torchrun started, once they have met; one, without any setting up, where it did not."""
    if not are_several():
        return Processes(0, 1)
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes)


def part() -> None:
    """Ends what the processes have in common; each must come here. Afterwards the main one works by itself."""
    if not are_several():
        return
    processes().wait()
    import torch.distributed

    torch.distributed.destroy_process_group()
    if is_main():
        for name in LAUNCHED:
            os.environ.pop(name, None)
