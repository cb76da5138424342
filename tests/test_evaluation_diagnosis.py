"""Known failures, each planted."""

import json

import numpy as np
import pytest

from llm2rec.evaluation.diagnosis import data_probes, diagnose
from llm2rec.evaluation.probes import vector_probes

N_ITEMS, SIZE = 200, 16
LABELS = [str(place % 4) for place in range(N_ITEMS)]
# Items 1 and 5, 9 and 13, ... of one category are consumed together.
PAIRS = np.array([[first, first + 4] for block in range(0, N_ITEMS, 8) for first in range(block + 1, block + 5)])
COUNTS = np.full(N_ITEMS, 20)
NAMES = [f"item {place}" for place in range(N_ITEMS)]


def normal(seed):
    return np.random.default_rng(seed).normal(size=(N_ITEMS, SIZE))


def vectors_of(text=1.0, consumption=0.0):
    """Vectors that know the category by `text` and what is consumed together by `consumption`."""
    categories = normal(1)[[int(label) for label in LABELS]]
    partners = normal(2)
    partners[PAIRS[:, 1] - 1] = partners[PAIRS[:, 0] - 1]
    return text * categories + consumption * partners + 0.5 * normal(3)


BACKBONE, CSFT = vectors_of(), vectors_of(consumption=0.5)


def probed(data=None, **sets):
    readings = {name: vector_probes(vectors, PAIRS, COUNTS, LABELS) for name, vectors in sets.items()}
    return {"data": data_probes(COUNTS, NAMES, np.array([1, 2, 3])) if data is None else data, **readings}


def test_a_healthy_run_has_no_failure():
    assert diagnose(probed(backbone=BACKBONE, csft=CSFT, llm2rec=vectors_of(consumption=1.0))) == []


def test_nothing_measured_has_no_failure():
    assert diagnose({}) == []


def test_too_few_events_and_no_gain_are_too_little_data_for_csft():
    sparse = data_probes(np.full(N_ITEMS, 2), NAMES, np.array([1]))
    (found,) = diagnose(probed(sparse, backbone=BACKBONE, csft=vectors_of() + 0.01 * normal(4)))
    assert found.startswith("Too little interaction data for CSFT: 2.0 training events an item")


def test_few_events_are_no_failure_where_csft_gained():
    sparse = data_probes(np.full(N_ITEMS, 2), NAMES, np.array([1]))
    assert diagnose(probed(sparse, backbone=BACKBONE, csft=CSFT)) == []


def test_no_gain_in_spite_of_enough_events_is_said_so():
    (found,) = diagnose(probed(backbone=BACKBONE, csft=vectors_of() + 0.01 * normal(4)))
    assert found.startswith("CSFT taught nothing measurable")


def test_a_csft_that_leaves_the_perplexity_as_it_was_did_not_learn():
    healthy = probed(backbone=BACKBONE, csft=CSFT)
    models = {"backbone": {"true": 20.0, "random": 21.0}, "csft": {"true": 19.95, "random": 21.0}}
    (found,) = diagnose(healthy, models)
    assert found.startswith("CSFT did not learn: the perplexity of the true next title is 19.95 after it, 20.00")
    assert diagnose(healthy, {**models, "csft": {"true": 12.0, "random": 21.0}}) == []
    assert diagnose(healthy, {"backbone": models["backbone"], "llm2rec": {"future_sensitivity": 1.0}}) == []


def test_a_backbone_without_categories_means_text_that_does_not_describe():
    (found,) = diagnose(probed(backbone=vectors_of(text=0.0)))
    assert found.startswith("Text does not describe the item") and "same category, chance is 0.25" in found


def test_without_categories_the_backbones_auc_tells():
    readings = {"backbone": vector_probes(vectors_of(text=0.0), PAIRS, COUNTS)}
    (found,) = diagnose(readings)
    assert found.startswith("Text may not describe the item")


def test_shared_texts_do_not_describe():
    data = data_probes(COUNTS, ["same"] * 100 + NAMES[100:], np.array([1]))
    (found,) = diagnose({"data": data})
    assert "50 % of the items share their text with another" in found


def test_vectors_at_one_point_are_a_collapse():
    point = np.ones(SIZE) + 0.01 * vectors_of(consumption=1.0)
    (found,) = diagnose(probed(backbone=BACKBONE, csft=CSFT, llm2rec=point))
    assert found.startswith("Contrastive collapse: all vectors point nearly the same way")


def test_vectors_on_a_line_are_a_collapse():
    line = vectors_of(consumption=1.0)
    line[:, 1:] *= 0.01
    (found,) = diagnose(probed(backbone=BACKBONE, csft=CSFT, llm2rec=line))
    assert found.startswith("Contrastive collapse: the vectors use")


def test_a_narrow_backbone_that_stays_as_it_is_has_not_collapsed():
    narrow = np.ones(SIZE) + 0.01 * BACKBONE
    spread = np.ones(SIZE) + 0.011 * vectors_of(consumption=1.0)
    assert diagnose(probed(backbone=narrow, llm2rec=spread)) == []


def test_cold_targets_are_named_with_their_share():
    counts = COUNTS.copy()
    counts[:3] = 0
    data = data_probes(counts, NAMES, np.array([1, 2, 3, 4, 5, 6]))
    (found,) = diagnose({"data": data})
    assert found.startswith("Cold items: 50 % of the test events")


def test_a_diagnosis_reads_what_was_written_to_json():
    readings = probed(backbone=vectors_of(text=0.0))
    assert diagnose(json.loads(json.dumps(readings))) == diagnose(readings) != []


def test_data_probes_by_hand():
    found = data_probes(np.array([4, 0, 2]), ["a", "b", "a"], np.array([2, 1, 1, 3]))
    assert found["events_per_item"]["value"] == 2
    assert found["distinct_text_share"]["value"] == pytest.approx(1 / 3)
    assert found["cold_test_share"]["value"] == 0.25


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 counts, 1 texts"):
        data_probes(np.array([1, 2]), ["a"], np.array([1]))
