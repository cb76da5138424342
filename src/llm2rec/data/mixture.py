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
        trainable: (N,) bool, False for held-out (cold) items, whose text no language stage may see.
        item_shares: (N,) in (0, 1], how often an item's text is trained on: weight over the largest weight.
        user_shares: (U,) the same for a user's windows.
    """

    sequences: Sequences
    texts: list[str]
    trainable: np.ndarray
    item_shares: np.ndarray
    user_shares: np.ndarray

    @property
    def training_texts(self) -> list[str]:
        """The texts that language stages may learn from."""
        return [text for text, allowed in zip(self.texts, self.trainable, strict=True) if allowed]

    @property
    def training_shares(self) -> np.ndarray:
        """`item_shares` of `training_texts`."""
        return self.item_shares[self.trainable]


@dataclass(frozen=True)
class Part:
    """One domain of a mixture."""

    name: str
    sequences: Sequences
    texts: list[str]
    cold: pl.Series
    weight: float


def mix(parts: Sequence[Part]) -> Mixture:
    """The parts as one; a single part keeps its item and user ids."""
    largest = max(part.weight for part in parts)
    first_item = np.cumsum([0] + [part.sequences.n_items for part in parts])
    first_event = np.cumsum([0] + [len(part.sequences.items) for part in parts])
    merged = parts[0].sequences
    if len(parts) > 1:
        merged = Sequences(
            items=np.concatenate(
                [np.asarray(p.sequences.items) + n for p, n in zip(parts, first_item, strict=False)]
            ),
            offsets=np.concatenate(
                [np.zeros(1, dtype=np.int64)]
                + [np.asarray(p.sequences.offsets[1:]) + n for p, n in zip(parts, first_event, strict=False)]
            ),
            parts=np.concatenate([np.asarray(part.sequences.parts) for part in parts]),
            item_ids=[f"{part.name}/{item}" for part in parts for item in part.sequences.item_ids],
            user_ids=pl.concat([part.name + "/" + part.sequences.user_ids.cast(pl.String) for part in parts]),
        )
    return Mixture(
        sequences=merged,
        texts=[text for part in parts for text in part.texts],
        trainable=np.concatenate([~_is_in(part.sequences.item_ids, part.cold) for part in parts]),
        item_shares=np.repeat([part.weight / largest for part in parts], np.diff(first_item)),
        user_shares=np.repeat([p.weight / largest for p in parts], [p.sequences.n_users for p in parts]),
    )


def _is_in(item_ids: list[str], cold: pl.Series) -> np.ndarray:
    return pl.Series(item_ids, dtype=pl.String).is_in(cold.cast(pl.String).implode()).to_numpy()
