"""Several domains as one: what the language model is trained on when a recipe names more than one log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from llm2rec.data.sequences import Sequences


@dataclass(frozen=True)
class Mixture:
    """The users and items of all domains end to end; nobody has events of two domains.

    Attributes:
        sequences: item indices of the second domain follow those of the first, ids are `domain/id`.
        texts: (N,) text of item_index i + 1.
        item_shares: (N,) in [0, 1], how often an item's text is trained on: the weight of its domain over the
            largest weight; 0 for held-out (cold) items, whose text no language stage may see.
        user_shares: (U,) in (0, 1], the same for a user's windows.
    """

    sequences: Sequences
    texts: list[str]
    item_shares: np.ndarray
    user_shares: np.ndarray

    @property
    def training_texts(self) -> list[str]:
        """The texts that language stages may learn from."""
        return [text for text, share in zip(self.texts, self.item_shares, strict=True) if share]


@dataclass(frozen=True)
class Part:
    """One domain of a mixture."""

    name: str
    sequences: Sequences
    texts: list[str]
    trainable: np.ndarray
    weight: float


def mix(parts: Sequence[Part]) -> Mixture:
    """The parts as one; a single part keeps its item and user ids."""
    largest = max(part.weight for part in parts)
    shares = [part.weight / largest for part in parts]
    return Mixture(
        sequences=parts[0].sequences if len(parts) == 1 else _merged(parts),
        texts=[text for part in parts for text in part.texts],
        item_shares=np.concatenate([share * part.trainable for share, part in zip(shares, parts, strict=True)]),
        user_shares=np.repeat(shares, [part.sequences.n_users for part in parts]),
    )


def _merged(parts: Sequence[Part]) -> Sequences:
    own = [part.sequences for part in parts]
    lengths = np.concatenate([np.diff(np.asarray(one.offsets)) for one in own])
    first_item = np.cumsum([0, *(one.n_items for one in own)])
    return Sequences(
        items=np.concatenate([np.asarray(one.items) + first for one, first in zip(own, first_item, strict=False)]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        parts=np.concatenate([np.asarray(one.parts) for one in own]),
        item_ids=[f"{part.name}/{item}" for part in parts for item in part.sequences.item_ids],
        user_ids=pl.concat([part.name + "/" + part.sequences.user_ids.cast(pl.String) for part in parts]),
        times=np.concatenate([np.asarray(one.times) for one in own]),
    )
