"""What stages feed the training engine: ready-made micro-batches of one epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

Batch = dict[str, Any]


class Batches(Dataset):
    """Ready-made micro-batches of one epoch; the base class of what stages feed the engine.

    `batches[i]` is a dict of tensors with `n_targets`, the number of targets its loss sums over.
    `set_epoch` must reshuffle from (seed, epoch) alone, so that a resumed run sees the same batches.
    """

    def __len__(self) -> int:
        """Micro-batches in the current epoch; must be the same for every epoch."""
        raise TypeError(f"{type(self).__name__} must define __len__")

    def __getitem__(self, index: int) -> Batch:
        """The micro-batch at `index` of the current epoch."""
        raise TypeError(f"{type(self).__name__} must define __getitem__")

    def set_epoch(self, epoch: int) -> None:
        """Reshuffles for `epoch`; called by the engine before each pass."""


class Numbered(Dataset):
    """Batches that know their number, `index`, so that an error can name one."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        """As many as there are."""
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        """The micro-batch and its number."""
        return {**self._batches[index], "index": index}

    def set_epoch(self, epoch: int) -> None:
        """Reshuffles."""
        self._batches.set_epoch(epoch)


def only(batches: Sequence[Batch]) -> Batch:
    """The one micro-batch that a loader was asked for."""
    return batches[0]
