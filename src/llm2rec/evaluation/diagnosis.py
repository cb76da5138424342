"""A diagnosis in words: which known failures of the method the probes and the data show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llm2rec.evaluation.probes import HIGHER, NEITHER, Probe, reading

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
_BEFORE_CONTRASTIVE = ("mntp", "csft", "backbone")


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
    _, copies = np.unique(np.asarray(texts, dtype=object).astype(str), return_inverse=True)
    distinct = np.bincount(copies)[copies] == 1
    cold = counts[test_targets - 1] == 0
    return {
        "events_per_item": reading(counts.mean(), None, 0.0, None, len(counts), HIGHER),
        "distinct_text_share": reading(distinct.mean(), None, 0.0, 1.0, len(counts), HIGHER),
        "cold_test_share": reading(cold.mean(), None, 0.0, 1.0, len(test_targets), NEITHER),
    }


def diagnose(
    probes: Mapping[str, Mapping[str, Probe]], language_model: Mapping[str, Mapping[str, float]] | None = None
) -> list[str]:
    """The known failures that the probes show, a sentence or two each; empty where they show none.

    Named are: text that does not describe the item, a CSFT that did not learn, too little interaction data for
    CSFT (or a CSFT that taught nothing although there is enough), a contrastive collapse, and cold items. A
    failure whose probes are missing is not looked for.

    Args:
        probes: `data` -> `data_probes`, and vector set (`backbone`, `csft`, `mntp`, `llm2rec`) ->
            `vector_probes`; as written to JSON. Any of them may be absent.
        language_model: `backbone` and `csft` -> perplexity of the `true` next title, as `probing.probe` gives it.
    """
    of_csft = _unlearned_csft(language_model or {}) or _csft_without_gain(probes)
    return [*_undescriptive_text(probes), *of_csft, *_collapse(probes), *_cold_items(probes)]


def _undescriptive_text(probes: Mapping[str, Mapping[str, Probe]]) -> list[str]:
    found = []
    distinct = _probe_of(probes, DATA, "distinct_text_share")
    if distinct is not None and distinct["value"] < DISTINCT_TEXTS:
        found.append(
            f"Text does not describe the item: {100 * (1 - distinct['value']):.0f} % of the items share their "
            "text with another, and no encoder can tell them apart. Add columns to the text."
        )
    share, auc = (_probe_of(probes, BACKBONE, name) for name in ("same_category_share", "co_consumption_auc"))
    chance = 0.0 if share is None else share["chance"] or 0.0
    if share is not None and share["value"] < chance + CATEGORY_GAIN * (1 - chance):
        found.append(
            f"Text does not describe the item: {share['value']:.2f} of the backbone's nearest items are of the "
            f"same category, chance is {chance:.2f}. Look at the titles; add columns to the text."
        )
    elif share is None and auc is not None and auc["value"] < CHANCE_AUC:
        found.append(
            f"Text may not describe the item: the backbone's co-consumption AUC is {auc['value']:.3f}, chance is "
            "0.5. Look at the titles and the neighbours; add columns to the text."
        )
    return found


def _unlearned_csft(language_model: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not {BACKBONE, CSFT} <= language_model.keys():
        return []
    before, after = (language_model[name]["true"] for name in (BACKBONE, CSFT))
    if after <= LEARNED_PERPLEXITY * before:
        return []
    return [
        f"CSFT did not learn: the perplexity of the true next title is {after:.2f} after it, {before:.2f} before. "
        "Give it more tokens or another learning rate."
    ]


def _csft_without_gain(probes: Mapping[str, Mapping[str, Probe]]) -> list[str]:
    before, after = (_probe_of(probes, name, "co_consumption_auc") for name in (BACKBONE, CSFT))
    if before is None or after is None:
        return []
    noise = 2 * float(np.hypot(before["error"] or 0.0, after["error"] or 0.0))
    if after["value"] > before["value"] + noise:
        return []
    change = f"the co-consumption AUC is {after['value']:.3f} after CSFT and {before['value']:.3f} before"
    events = _probe_of(probes, DATA, "events_per_item")
    if events is not None and events["value"] < FEW_EVENTS_PER_ITEM:
        return [
            f"Too little interaction data for CSFT: {events['value']:.1f} training events an item, and {change}. "
            "Gather more events, drop rare items, or leave CSFT out."
        ]
    return [f"CSFT taught nothing measurable: {change}. Give it more tokens or another learning rate."]


def _collapse(probes: Mapping[str, Mapping[str, Probe]]) -> list[str]:
    parent = next((name for name in _BEFORE_CONTRASTIVE if name in probes), None)
    if parent is None:
        return []
    found = []
    before, after = (_probe_of(probes, name, "uniformity") for name in (parent, FINAL))
    if before and after and COLLAPSED_UNIFORMITY < after["value"] >= before["value"]:
        found.append(
            f"Contrastive collapse: all vectors point nearly the same way, uniformity {after['value']:.2f} after "
            f"and {before['value']:.2f} before (0 = one point). Lower the learning rate, stop earlier."
        )
    before, after = (_probe_of(probes, name, "effective_rank") for name in (parent, FINAL))
    if before and after and after["value"] < COLLAPSED_RANK * before["value"]:
        found.append(
            f"Contrastive collapse: the vectors use {after['value']:.0f} directions, {before['value']:.0f} before "
            "it. Lower the learning rate, raise the temperature, stop earlier."
        )
    return found


def _cold_items(probes: Mapping[str, Mapping[str, Probe]]) -> list[str]:
    cold = _probe_of(probes, DATA, "cold_test_share")
    if cold is None or cold["value"] <= COLD_SHARE:
        return []
    return [
        f"Cold items: {100 * cold['value']:.0f} % of the test events ask for an item without training events. "
        "Rows over learned ids cannot rank those; look at the slice by item_training."
    ]


def _probe_of(probes: Mapping[str, Mapping[str, Probe]], where: str, name: str) -> Probe | None:
    return probes[where].get(name) if where in probes else None
