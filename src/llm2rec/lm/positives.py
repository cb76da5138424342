"""Positives from data: items consumed next to each other, as pairs of titles for contrastive learning."""

from __future__ import annotations

import numpy as np

from llm2rec.data.sequences import Sequences
from llm2rec.errors import ConfigError
from llm2rec.lm.packing import shuffled_pass


def consumed_next(sequences: Sequences, text_of_item: np.ndarray) -> np.ndarray:
    """Pairs (P, 2) of text numbers: an item and what its user consumed next, one for each training event.

    Args:
        text_of_item: (N,) number of the text of item_index i + 1; pairs of equal texts are left out.

    Raises:
        ConfigError: no two different titles stand next to each other.
    """
    pairs = np.stack([text_of_item[items - 1] for items in sequences.successions()], axis=1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    if not len(pairs):
        raise ConfigError("no two different titles were consumed next to each other; use positives=dropout")
    return pairs


def distinct_batches(
    pairs: np.ndarray, steps: int, batch_size: int, seed: int, shares: np.ndarray | None = None
) -> list[np.ndarray]:
    """`steps` batches (batch_size, 2) of pairs in which no text stands twice, from shuffled passes.

    A pair with a text that its batch already has is left out until the next pass; else a popular item would
    be a negative of its own.

    Args:
        shares: (texts,) the probability that a pass has the pairs that begin with each text; None = 1.

    Raises:
        ConfigError: a whole pass does not fill one batch.
    """
    generator = np.random.default_rng(seed)
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        before, batch, used = len(batches), list[int](), set[int]()
        order = shuffled_pass(np.ones(len(pairs)) if shares is None else shares[pairs[:, 0]], generator)
        for row in order:
            first, second = pairs[row].tolist()
            if first in used or second in used:
                continue
            batch.append(row)
            used |= {first, second}
            if len(batch) == batch_size:
                batches.append(pairs[batch])
                batch, used = [], set()
                if len(batches) == steps:
                    return batches
        if len(batches) == before:
            raise ConfigError(
                f"the pairs consumed next to each other fill {len(batch)} places of a batch of {batch_size} "
                "without a title twice; lower iem.contrastive.batch_size"
            )
    return batches
