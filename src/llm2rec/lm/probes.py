"""Probes that need the language model itself: what it sees of the future, what it expects next."""

from __future__ import annotations

from collections import Counter

import numpy as np

from llm2rec.data.sequences import Sequences
from llm2rec.evaluation.probes import NothingToMeasure
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.csft import Form, held_out_items, last_title_batches, perplexity

BATCH_TOKENS = 2048


def next_title_perplexity(
    lm: Backbone, sequences: Sequences, titles: list[str], form: Form, seed: int
) -> dict[str, float]:
    """Perplexity per token of the `true` next title after its history, and of a `random` one, both >= 1.

    Measured on the validation events of a sample of users. The random titles are the true ones, dealt out to other
    users, so that a model which knows nothing of a user gives both nearly the same perplexity. One that knows who
    consumes what expects the true title more, by more than the untrained model does.

    Args:
        titles: (N,) title of item_index i + 1.
        form: that CSFT trains in; in another one its perplexity says nothing of what it learned.
        seed: of the sample and of the random titles.

    Raises:
        NothingToMeasure: fewer than two different titles come next.
    """
    true = held_out_items(sequences, form.history_length, seed)
    others = other_targets([int(items[-1]) for items in true], titles, np.random.default_rng(seed))
    random = [np.append(items[:-1], other) for items, other in zip(true, others, strict=True)]
    return {
        name: perplexity(lm, last_title_batches(lm.tokenizer, titles, whole, form, BATCH_TOKENS))
        for name, whole in (("true", true), ("random", random))
    }


def other_targets(targets: list[int], titles: list[str], generator: np.random.Generator) -> list[int]:
    """The targets dealt out anew, to each place one of another title than its own.

    The same titles, each as often: what a title costs by itself cancels. Only where one title is that of more than
    half the targets, the others must serve several times.

    Raises:
        NothingToMeasure: fewer than two titles among the targets.
    """
    names = [titles[target - 1] for target in targets]
    counts = Counter(names)
    if len(counts) < 2:
        raise NothingToMeasure("fewer than two different titles come next in the validation events")
    rank = dict(zip(counts, generator.permutation(len(counts)).tolist(), strict=True))
    # Places of one title stand together, so that a shift by the largest group leaves every group.
    places = sorted(generator.permutation(len(targets)).tolist(), key=lambda place: rank[names[place]])
    dealt = list(targets)
    for place, other in zip(places, np.roll(places, max(counts.values())).tolist(), strict=True):
        dealt[place] = targets[other]
        if names[other] == names[place]:
            dealt[place] = int(generator.choice([one for one in targets if titles[one - 1] != names[place]]))
    return dealt
