"""Probes that need the language model itself: what it sees of the future, what it expects next."""

from __future__ import annotations

import numpy as np

from llm2rec.data.sequences import Sequences
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.csft import csft_texts, held_out_items, perplexity, supervise
from llm2rec.lm.packing import TokenisedTexts, token_budget_batches

BATCH_TOKENS = 2048


def next_title_perplexity(
    lm: Backbone,
    sequences: Sequences,
    titles: list[str],
    *,
    history_length: int,
    max_title_tokens: int,
    seed: int,
) -> dict[str, float]:
    """Perplexity per token of the `true` next title after its history, and of a `random` one, both >= 1.

    Measured on the validation events of a sample of users. A model that has learned who consumes what expects the
    true title more than the random one, by more than the untrained model does.

    Args:
        titles: (N,) title of item_index i + 1.
        seed: of the sample and of the random titles.
    """
    texts = csft_texts(lm.tokenizer, titles, max_title_tokens)
    true = held_out_items(sequences, history_length, seed)
    drawn = np.random.default_rng(seed).integers(1, sequences.n_items + 1, len(true))
    random = [np.append(items[:-1], other) for items, other in zip(true, drawn, strict=True)]
    return {"true": _perplexity(lm, texts, true), "random": _perplexity(lm, texts, random)}


def _perplexity(lm: Backbone, texts: TokenisedTexts, whole: list[np.ndarray]) -> float:
    lengths = np.array([int(texts.lengths[items - 1].sum()) for items in whole])
    batches = []
    for rows in token_budget_batches(lengths, BATCH_TOKENS):
        members = [whole[row] for row in rows]
        batches.append(supervise(texts, members, [len(items) - 1 for items in members]))
    return perplexity(lm, batches)
