"""SASRec with side features: the opponent that knows what an id alone does not tell.

Two features: the time between consecutive events, added to the position (here), and the categories of the items,
added to their learned vectors (`items.CategorisedItems`, for any model). The times travel beside the histories in
the same shape, `score(histories, times)`; the categories are given once, when the recommender is built.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2rec.rec.architecture import Architecture
from llm2rec.rec.items import ItemTable, learned
from llm2rec.rec.sasrec import SASRec

# 0 = no event before, 1 = the same second, then a bucket each doubling: 1, 2..3, 4..7, ... 68 years and over.
LARGEST_POWER = 31
BUCKETS = LARGEST_POWER + 3


class ContextSASRec(SASRec):
    """SASRec whose positions also carry how long ago the event before was; needs the times of the events."""

    needs_times = True

    def __init__(self, items: ItemTable, architecture: Architecture) -> None:
        super().__init__(items, architecture)
        self.gaps = learned(BUCKETS, architecture.hidden_size)

    def _position_vectors(self, histories: Tensor, times: Tensor | None) -> Tensor:
        if times is None:
            raise ValueError("the forward pass of sasrec-context needs the times of the events; give them")
        return super()._position_vectors(histories, times) + F.embedding(gap_buckets(times), self.gaps)


def gap_buckets(times: Tensor) -> Tensor:
    """The bucket of the time since the event before, (B, L) int64 in 0..BUCKETS - 1; meaningless at padding.

    Args:
        times: (B, L) int64, epoch seconds, never falling within a history.
    """
    edges = 2 ** torch.arange(LARGEST_POWER + 1, device=times.device)
    buckets = 1 + torch.bucketize(times.diff(dim=1), edges, right=True)
    return F.pad(buckets, (1, 0))
