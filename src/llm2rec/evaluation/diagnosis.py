"""A diagnosis in words: which known failures of the method the probes and the data show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from llm2rec.evaluation.probes import HIGHER, NEITHER, NothingToMeasure, Probe, reading
from llm2rec.evaluation.verdicts import MINIMUM_USERS, WORSE

# Rules of thumb, not laws: below or above these a cause is named, the numbers stand beside it.
FEW_EVENTS_PER_ITEM = 10.0
DISTINCT_TEXTS = 0.8
CATEGORY_GAIN = 0.05  # of the way from chance to 1
CHANCE_AUC = 0.52
COLLAPSED_UNIFORMITY = -0.1
COLLAPSED_RANK = 0.5
COLD_SHARE = 0.1
LEARNED_PERPLEXITY = 0.99  # of the untrained model's

DATA = "data"
BACKBONE, CSFT, FINAL = "backbone", "csft", "llm2rec"
PERPLEXITY, ORDER = "perplexity", "order"  # what the parts of a probing are called that are no single Probe
# Vector sets of the untrained and the CSFT model; those that attend as the item encoder does are preferred.
CAUSAL = "-causal"
_BACKBONES, _CSFTS = (BACKBONE, "backbone-causal"), (CSFT, "csft-causal")
BEFORE_CSFT = dict(zip(_CSFTS, _BACKBONES, strict=True))
_BEFORE_CONTRASTIVE = ("mntp", CSFT, BACKBONE, "csft-causal", "backbone-causal")


class Diagnosis(TypedDict):
    """What a probing says of the known failures; each of them is in one of the three.

    found: a sentence or two for each sign of a failure. not_found: failures that were looked for and do not show.
    not_looked_for: failure -> what is missing to look for it.
    """

    found: list[str]
    not_found: list[str]
    not_looked_for: dict[str, str]


@dataclass(frozen=True)
class Probed:
    """What was measured, as `probing.probe` gives it and as it is written to JSON; any of it may be absent.

    Attributes:
        vectors: `data` -> `data_probes`, and vector set -> `vector_probes`.
        language_model: model -> perplexity of the `true` and of a `random` next title.
        order: the `row`, and `order.order_probe` of it.
        left_out: what was not measured -> why.
    """

    vectors: Mapping[str, Mapping[str, Probe]] = field(default_factory=dict)
    language_model: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    order: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def probe(self, where: str, name: str) -> Probe:
        """One probe of the data or of a vector set.

        Raises:
            NothingToMeasure: it was not measured.
        """
        if name not in self.vectors.get(where, {}):
            raise NothingToMeasure(self.left_out.get(name, f"{name} of {where} is not measured"))
        return self.vectors[where][name]

    def first_set(self, names: Sequence[str], what: str) -> str:
        """The first of the vector sets that there is.

        Raises:
            NothingToMeasure: there is none.
        """
        found = next((name for name in names if name in self.vectors), None)
        if found is None:
            raise NothingToMeasure(f"no vectors {what}")
        return found

    def preferred(self, names: Sequence[str]) -> list[str]:
        """Vector sets in their order, the causal ones first where the item encoder was probed and is causal."""
        causal = self.language_model.get(FINAL, {}).get("future_sensitivity") == 0
        return sorted(names, key=lambda name: causal and not name.endswith(CAUSAL))

    def next_titles(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Perplexities of the `true` and the `random` next title before and after CSFT.

        Raises:
            NothingToMeasure: there is no CSFT model, or they were not measured.
        """
        if CSFT not in self.language_model:
            raise NothingToMeasure("no CSFT model")
        before, after = (self.language_model.get(name, {}) for name in (BACKBONE, CSFT))
        if "true" not in before or "true" not in after:
            raise NothingToMeasure(self.left_out.get(PERPLEXITY, "no perplexities"))
        return before, after


def data_probes(counts: np.ndarray, texts: Sequence[str], test_targets: np.ndarray) -> dict[str, Probe]:
    """`events_per_item`, `distinct_text_share` and `cold_test_share` of a prepared data set.

    Training events a catalogue item on average, >= 0; share of items whose text no other item has, in [0, 1];
    share of test events whose target has no training event, in [0, 1]. None has a level of chance.

    Args:
        counts: (N,) training events of each item.
        texts: what the language model reads of each item, N strings.
        test_targets: (M,) item_index of the test events.

    Raises:
        ValueError: the sizes do not fit, or there is no item or no test event.
    """
    if len(texts) != len(counts) or not len(counts) or not len(test_targets):
        raise ValueError(
            f"{len(counts)} counts, {len(texts)} texts, {len(test_targets)} test events; give N, N and some"
        )
    _, copies = np.unique(np.array(list(texts), dtype=object), return_inverse=True)
    distinct = np.bincount(copies)[copies] == 1
    cold = counts[test_targets - 1] == 0
    return {
        "events_per_item": reading(counts.mean(), None, 0.0, None, len(counts), HIGHER),
        "distinct_text_share": reading(distinct.mean(), None, 0.0, 1.0, len(counts), HIGHER),
        "cold_test_share": reading(cold.mean(), None, 0.0, 1.0, len(test_targets), NEITHER),
    }


def diagnose(probed: Probed) -> Diagnosis:
    """Which known failures show in what was measured, which do not, and which could not be looked for."""
    diagnosis = Diagnosis(found=[], not_found=[], not_looked_for={})
    for failure, look_for in _FAILURES.items():
        try:
            sentences = look_for(probed)
        except NothingToMeasure as missing:
            diagnosis["not_looked_for"][failure] = str(missing)
            continue
        diagnosis["found"] += sentences
        if not sentences:
            diagnosis["not_found"].append(failure)
    return diagnosis


def _shared_texts(probed: Probed) -> list[str]:
    distinct = probed.probe(DATA, "distinct_text_share")["value"]
    if distinct >= DISTINCT_TEXTS:
        return []
    return [
        f"Text does not describe the item: {100 * (1 - distinct):.0f} % of the items share their text with "
        "another, and no encoder can tell them apart. Add columns to the text."
    ]


def _undescriptive_text(probed: Probed) -> list[str]:
    name = probed.first_set(probed.preferred(_BACKBONES), "of the untrained model")
    if "same_category_share" not in probed.vectors[name]:
        auc = probed.probe(name, "co_consumption_auc")["value"]
        if auc >= CHANCE_AUC:
            return []
        return [
            f"Text may not describe the item: the co-consumption AUC of {name} is {auc:.3f}, chance is 0.5. Look "
            "at the titles and the neighbours; add columns to the text."
        ]
    share = probed.probe(name, "same_category_share")
    chance = share["chance"] or 0.0
    if share["value"] >= chance + CATEGORY_GAIN * (1 - chance):
        return []
    return [
        f"Text does not describe the item: {share['value']:.2f} of an item's nearest by {name} are of its "
        f"category, chance is {chance:.2f}. Look at the titles; add columns to the text."
    ]


def _unlearned_csft(probed: Probed) -> list[str]:
    before, after = (one["true"] for one in probed.next_titles())
    if after <= LEARNED_PERPLEXITY * before:
        return []
    return [
        f"CSFT did not learn: the perplexity of the true next title is {after:.2f} after it, {before:.2f} before. "
        "Give it more tokens or another learning rate."
    ]


def _indifferent_csft(probed: Probed) -> list[str]:
    before, after = (one["random"] / one["true"] for one in probed.next_titles())
    if after > max(before, 1.0):
        return []
    return [
        f"CSFT did not learn who consumes what: a random next title has {after:.3f} times the perplexity of the "
        f"true one after it, {before:.3f} times before. Give it more tokens; look whether histories say anything "
        "of the next item."
    ]


def _csft_without_gain(probed: Probed) -> list[str]:
    pairs = list(zip(probed.preferred(_BACKBONES), probed.preferred(_CSFTS), strict=True))
    names = next((names for names in pairs if set(names) <= probed.vectors.keys()), None)
    if names is None:
        raise NothingToMeasure("no vectors of both the untrained and the CSFT model with the same attention")
    before, after = (probed.probe(name, "co_consumption_auc") for name in names)
    gain = probed.probe(names[1], "co_consumption_gain")
    if gain["value"] > 2 * (gain["error"] or 0.0):
        return []
    change = f"the co-consumption AUC is {after['value']:.3f} after CSFT and {before['value']:.3f} before"
    events = probed.vectors.get(DATA, {}).get("events_per_item")
    if events is not None and events["value"] < FEW_EVENTS_PER_ITEM:
        return [
            f"Too little interaction data for CSFT: {events['value']:.1f} training events an item, and {change}. "
            "Gather more events, drop rare items, or leave CSFT out."
        ]
    return [f"CSFT taught nothing measurable: {change}. Give it more tokens or another learning rate."]


def _collapse(probed: Probed) -> list[str]:
    final = probed.first_set([FINAL], "of the trained encoder")
    parent = probed.first_set(probed.preferred(_BEFORE_CONTRASTIVE), "from before the contrastive training")
    found = []
    before, after = (probed.probe(name, "uniformity")["value"] for name in (parent, final))
    if COLLAPSED_UNIFORMITY < after >= before:
        found.append(
            f"Contrastive collapse: all vectors point nearly the same way, uniformity {after:.2f} after and "
            f"{before:.2f} before (0 = one point). Lower the learning rate, stop earlier."
        )
    before, after = (probed.probe(name, "effective_rank")["value"] for name in (parent, final))
    if after < COLLAPSED_RANK * before:
        found.append(
            f"Contrastive collapse: the vectors use {after:.0f} directions, {before:.0f} before it. Lower the "
            "learning rate, raise the temperature, stop earlier."
        )
    return found


def _unused_order(probed: Probed) -> list[str]:
    if not probed.order:
        raise NothingToMeasure(probed.left_out.get(ORDER, "no recommender was asked"))
    users = probed.order["users"]
    if users < MINIMUM_USERS:
        raise NothingToMeasure(f"{users} test users with two different items in their history are too few")
    compared = probed.order["comparisons"]
    if any(result["verdict"] == WORSE for result in compared.values()):
        return []
    changes = " and ".join(
        f"{result['difference']:+.4f} ({result['low']:+.4f} to {result['high']:+.4f}) {order}"
        for order, result in compared.items()
    )
    return [
        f"The recommender does not use the order: NDCG@10 of {probed.order['row']} changes by {changes}, no "
        f"distinguishable fall over {users} users. Look whether the times of the log are real; a row that counts "
        "items (item-knn, ease) may do as well."
    ]


def _cold_items(probed: Probed) -> list[str]:
    cold = probed.probe(DATA, "cold_test_share")["value"]
    if cold <= COLD_SHARE:
        return []
    return [
        f"Cold items: {100 * cold:.0f} % of the test events ask for an item without training events. Rows over "
        "learned ids cannot rank those; look at the slice by item_training."
    ]


_FAILURES: dict[str, Callable[[Probed], list[str]]] = {
    "items that share their text": _shared_texts,
    "text that does not describe the item": _undescriptive_text,
    "a CSFT that did not learn to write titles": _unlearned_csft,
    "a CSFT that did not learn who consumes what": _indifferent_csft,
    "a CSFT without a gain in the vectors": _csft_without_gain,
    "a contrastive collapse": _collapse,
    "a recommender that does not use the order": _unused_order,
    "cold items": _cold_items,
}
