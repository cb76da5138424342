"""Batches of histories: (B, L) int64 item indices, oldest first, left-aligned, 0 = padding at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def checked(histories: Tensor, n_items: int) -> Tensor:
    """The histories, unchanged.

    Raises:
        ValueError: not (B, L) with L >= 1, an item_index outside 0..N, or padding before an item.
    """
    if histories.ndim != 2 or histories.shape[1] == 0:
        raise ValueError(f"histories have shape {tuple(histories.shape)}; expected (B, L) with L >= 1")
    if histories.numel():
        low, high = (int(bound) for bound in histories.aminmax())
        if low < 0 or high > n_items:
            raise ValueError(
                f"histories hold item_index {low if low < 0 else high}; allowed: 1..{n_items}, 0 = padding"
            )
    real = histories > 0
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError("histories hold padding (0) before an item; align them left, padding at the end")
    return histories


def without_items_above(highest: int, histories: Tensor) -> Tensor:
    """Histories (B, L) without the items above an item_index: the others move up, padding follows them."""
    kept = histories * (histories <= highest)
    order = (kept == 0).sort(dim=1, stable=True).indices
    return kept.gather(1, order)


def checked_times(times: Tensor, histories: Tensor) -> Tensor:
    """The times of the events of checked histories, unchanged; what stands at padding is not looked at.

    Raises:
        ValueError: another shape or not int64, or an event earlier than the one before it.
    """
    if times.shape != histories.shape or times.dtype != torch.int64:
        raise ValueError(
            f"times are {tuple(times.shape)} {times.dtype}; expected {tuple(histories.shape)} torch.int64, as the "
            "histories are"
        )
    if ((times[:, 1:] < times[:, :-1]) & (histories[:, 1:] > 0)).any():
        raise ValueError("times fall within a history; sort its events, oldest first")
    return times


@dataclass(frozen=True)
class Places:
    """The places of a batch that count: work on them alone and no product sees padding.

    A place holds an item or is the first of its history, from which an empty one is answered. shape: (B, L).
    rows: (T,) int64, the places in the flattened (B * L,).
    """

    shape: tuple[int, int]
    rows: Tensor

    @classmethod
    def of(cls, histories: Tensor) -> Places:
        """The places of (B, L) histories."""
        real = F.pad(histories[:, 1:] > 0, (1, 0), value=True)
        return cls((histories.shape[0], histories.shape[1]), real.flatten().nonzero()[:, 0])

    def flat(self, values: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...)."""
        return values.flatten(0, 1).index_select(0, self.rows)

    def padded(self, values: Tensor) -> Tensor:
        """(T, ...) -> (B, L, ...), zeros elsewhere."""
        full = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[1:])
        return full.index_copy(0, self.rows, values).unflatten(0, self.shape)


def lengths(histories: Tensor) -> Tensor:
    """Items in each history, (B,) int64; 0 for an empty one."""
    return (histories > 0).sum(dim=1)


def recent(histories: Tensor, length: int, values: Tensor | None = None) -> Tensor:
    """The last `length` items of each history, (B, min(L, length)), left-aligned again.

    With `values` (B, L), one an event, those of the same events instead.
    """
    values = histories if values is None else values
    if histories.shape[1] <= length:
        return values
    first = (lengths(histories) - length).clamp(min=0)
    return values.gather(1, first[:, None] + torch.arange(length, device=histories.device))


def last(histories: Tensor) -> Tensor:
    """The newest item of each history, (B,) int64; 0 for an empty one."""
    return histories.gather(1, (lengths(histories) - 1).clamp(min=0)[:, None])[:, 0]
