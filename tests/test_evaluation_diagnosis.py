"""Known failures, each planted."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from llm2rec.evaluation.diagnosis import BEFORE_CSFT, Probed, data_probes, diagnose
from llm2rec.evaluation.probes import co_consumption, co_consumption_gain, compare_pairs, vector_probes
from llm2rec.evaluation.verdicts import WITHIN_NOISE, WORSE

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


def probed(data=None, labels=LABELS, models=None, order=None, **sets):
    vectors, left_out = {"data": data_probes(COUNTS, NAMES, np.array([1, 2, 3])) if data is None else data}, {}
    for name, matrix in sets.items():
        vectors[name.replace("_", "-")], left_out, _ = vector_probes(matrix, PAIRS, COUNTS, labels)
    shares = {
        name.replace("_", "-"): co_consumption(compare_pairs(matrix, PAIRS, COUNTS))
        for name, matrix in sets.items()
    }
    for after, before in BEFORE_CSFT.items():
        if {after, before} <= shares.keys():
            vectors[after]["co_consumption_gain"] = co_consumption_gain(shares[before], shares[after])
    return Probed(vectors, models or {}, order or {}, left_out)


def found(*args, **parts):
    return diagnose(probed(*args, **parts))["found"]


def ordered(shuffled, reversed_, users=400):
    """An order probe with these verdicts."""
    one = {"difference": -0.001, "low": -0.003, "high": 0.001}
    compared = {"shuffled": one | {"verdict": shuffled}, "reversed": one | {"verdict": reversed_}}
    return {"row": "sasrec-id", "comparisons": compared, "users": users}


def test_a_healthy_run_has_no_failure():
    assert found(backbone=BACKBONE, csft=CSFT, llm2rec=vectors_of(consumption=1.0)) == []


def test_every_failure_is_found_or_not_found_or_not_looked_for():
    nothing = diagnose(Probed())
    assert nothing["found"] == nothing["not_found"] == [] and len(nothing["not_looked_for"]) == 8
    models = {"backbone": {"true": 20.0, "random": 21.0}, "csft": {"true": 12.0, "random": 21.0}}
    whole = {"llm2rec": vectors_of(consumption=1.0), "order": ordered(WORSE, WORSE), "models": models}
    everything = diagnose(probed(backbone=BACKBONE, csft=CSFT, **whole))
    assert everything["not_found"] == list(nothing["not_looked_for"]) and not everything["not_looked_for"]


def test_a_run_of_floors_says_what_could_not_be_looked_for():
    diagnosis = diagnose(replace(probed(), left_out={"order": "no row of this run is trained"}))
    assert diagnosis["not_found"] == ["items that share their text", "cold items"]
    assert diagnosis["not_looked_for"] == {
        "text that does not describe the item": "no vectors of the untrained model",
        "a CSFT that did not learn to write titles": "no CSFT model",
        "a CSFT that did not learn who consumes what": "no CSFT model",
        "a CSFT without a gain in the vectors": (
            "no vectors of both the untrained and the CSFT model with the same attention"
        ),
        "a contrastive collapse": "no vectors of the trained encoder",
        "a recommender that does not use the order": "no row of this run is trained",
    }


def test_what_a_probe_was_left_out_for_is_why_its_failure_is_not_looked_for():
    vectors, left_out, _ = vector_probes(BACKBONE, np.empty((0, 2), dtype=np.int64), COUNTS)
    missing = diagnose(Probed({"backbone": vectors, "csft": vectors}, left_out=left_out))["not_looked_for"]
    for failure in ("text that does not describe the item", "a CSFT without a gain in the vectors"):
        assert missing[failure] == "no test event follows an event of another item"


def test_causal_vectors_stand_in_where_there_are_no_others():
    same, text = vectors_of() + 0.01 * normal(4), vectors_of(text=0.0)
    assert found(backbone_causal=BACKBONE, csft_causal=CSFT) == []
    (taught,) = found(backbone_causal=BACKBONE, csft_causal=same)
    assert taught.startswith("CSFT taught nothing measurable")
    (described,) = found(backbone_causal=text)
    assert described.startswith("Text does not describe the item") and "backbone-causal" in described
    (collapsed,) = found(csft_causal=CSFT, llm2rec=np.ones(SIZE) + 0.01 * vectors_of(consumption=1.0))
    assert collapsed.startswith("Contrastive collapse")


def test_csft_is_compared_with_the_model_that_attends_as_it_does():
    (taught,) = found(backbone=vectors_of(text=2.0), backbone_causal=BACKBONE, csft_causal=vectors_of())
    assert taught.startswith("CSFT taught nothing measurable")
    missing = diagnose(probed(backbone=BACKBONE, csft_causal=CSFT))["not_looked_for"]
    assert missing["a CSFT without a gain in the vectors"].endswith("with the same attention")


def test_too_few_events_and_no_gain_are_too_little_data_for_csft():
    sparse = data_probes(np.full(N_ITEMS, 2), NAMES, np.array([1]))
    (said,) = found(sparse, backbone=BACKBONE, csft=vectors_of() + 0.01 * normal(4))
    assert said.startswith("Too little interaction data for CSFT: 2.0 training events an item")


def test_few_events_are_no_failure_where_csft_gained():
    sparse = data_probes(np.full(N_ITEMS, 2), NAMES, np.array([1]))
    assert found(sparse, backbone=BACKBONE, csft=CSFT) == []


def test_no_gain_in_spite_of_enough_events_is_said_so():
    (said,) = found(backbone=BACKBONE, csft=vectors_of() + 0.01 * normal(4))
    assert said.startswith("CSFT taught nothing measurable")


def test_a_small_gain_on_nearly_every_pair_is_none_of_chance():
    small = vectors_of(consumption=0.2)
    vectors = probed(backbone=BACKBONE, csft=small).vectors
    before, after = (vectors[name]["co_consumption_auc"] for name in ("backbone", "csft"))
    assert 0 < after["value"] - before["value"] < 2 * np.hypot(before["error"], after["error"])
    assert vectors["csft"]["co_consumption_gain"]["value"] == pytest.approx(after["value"] - before["value"])
    assert found(backbone=BACKBONE, csft=small) == []


def test_a_csft_that_leaves_the_perplexity_as_it_was_did_not_learn():
    models = {"backbone": {"true": 20.0, "random": 21.0}, "csft": {"true": 19.95, "random": 21.0}}
    (said,) = found(models=models)
    assert said.startswith("CSFT did not learn: the perplexity of the true next title is 19.95 after it, 20.00")
    assert found(models={**models, "csft": {"true": 12.0, "random": 21.0}}) == []
    assert found(models={"backbone": models["backbone"], "llm2rec": {"future_sensitivity": 1.0}}) == []


def test_a_csft_to_which_any_title_is_as_likely_as_the_true_one_did_not_learn_who_consumes_what():
    models = {"backbone": {"true": 20.0, "random": 21.0}, "csft": {"true": 10.0, "random": 10.4}}
    (said,) = found(models=models)
    assert said.startswith("CSFT did not learn who consumes what: a random next title has 1.040 times")
    assert "1.050 times before" in said
    assert found(models={**models, "csft": {"true": 10.0, "random": 10.6}}) == []
    models = {"backbone": {"true": 20.0, "random": 18.0}, "csft": {"true": 10.0, "random": 9.9}}
    assert found(models=models)[0].startswith("CSFT did not learn who consumes what")  # above before, not above 1


def test_perplexities_without_data_are_not_looked_for():
    models = dict.fromkeys(("backbone", "csft"), {"future_sensitivity": 0.0})
    diagnosis = diagnose(Probed(language_model=models, left_out={"perplexity": "no two titles"}))
    assert diagnosis["not_looked_for"]["a CSFT that did not learn to write titles"] == "no two titles"


def test_an_order_that_does_not_matter_is_named():
    (said,) = found(order=ordered(WITHIN_NOISE, WITHIN_NOISE))
    assert said.startswith("The recommender does not use the order: NDCG@10 of sasrec-id changes by -0.0010 (")
    assert found(order=ordered(WORSE, WITHIN_NOISE)) == found(order=ordered(WITHIN_NOISE, WORSE)) == []


def test_few_users_say_nothing_of_the_order():
    missing = diagnose(probed(order=ordered(WITHIN_NOISE, WITHIN_NOISE, users=29)))["not_looked_for"]
    assert missing["a recommender that does not use the order"].startswith("29 test users")


def test_a_backbone_without_categories_means_text_that_does_not_describe():
    (said,) = found(backbone=vectors_of(text=0.0))
    assert said.startswith("Text does not describe the item") and "of its category, chance is 0.25" in said


def test_without_categories_the_backbones_auc_tells():
    (said,) = found(labels=None, backbone=vectors_of(text=0.0))
    assert said.startswith("Text may not describe the item")


def test_shared_texts_do_not_describe():
    data = data_probes(COUNTS, ["same"] * 100 + NAMES[100:], np.array([1]))
    (said,) = found(data)
    assert "50 % of the items share their text with another" in said


def test_vectors_at_one_point_are_a_collapse():
    point = np.ones(SIZE) + 0.01 * vectors_of(consumption=1.0)
    (said,) = found(backbone=BACKBONE, csft=CSFT, llm2rec=point)
    assert said.startswith("Contrastive collapse: all vectors point nearly the same way")


def test_vectors_on_a_line_are_a_collapse():
    line = vectors_of(consumption=1.0)
    line[:, 1:] *= 0.01
    (said,) = found(backbone=BACKBONE, csft=CSFT, llm2rec=line)
    assert said.startswith("Contrastive collapse: the vectors use")


def test_a_narrow_backbone_that_stays_as_it_is_has_not_collapsed():
    narrow = np.ones(SIZE) + 0.01 * BACKBONE
    spread = np.ones(SIZE) + 0.011 * vectors_of(consumption=1.0)
    assert found(backbone=narrow, llm2rec=spread) == []


def test_cold_targets_are_named_with_their_share():
    counts = COUNTS.copy()
    counts[:3] = 0
    data = data_probes(counts, NAMES, np.array([1, 2, 3, 4, 5, 6]))
    (said,) = found(data)
    assert said.startswith("Cold items: 50 % of the test events")


def test_a_diagnosis_reads_what_was_written_to_json():
    readings = probed(backbone=vectors_of(text=0.0))
    assert diagnose(Probed(**json.loads(json.dumps(asdict(readings))))) == diagnose(readings)
    assert diagnose(readings)["found"]


def test_data_probes_by_hand():
    measured = data_probes(np.array([4, 0, 2]), ["a", "b", "a"], np.array([2, 1, 1, 3]))
    assert measured["events_per_item"]["value"] == 2
    assert measured["distinct_text_share"]["value"] == pytest.approx(1 / 3)
    assert measured["cold_test_share"]["value"] == 0.25


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 counts, 1 texts"):
        data_probes(np.array([1, 2]), ["a"], np.array([1]))


def test_a_causal_encoder_is_judged_by_the_vectors_that_were_read_causally():
    sets = {"backbone": CSFT, "csft": BACKBONE, "backbone_causal": BACKBONE, "csft_causal": CSFT}
    (said,) = found(**sets, llm2rec=vectors_of(consumption=1.0))
    assert said.startswith("CSFT taught nothing measurable")
    causal = {"llm2rec": {"future_sensitivity": 0.0}}
    assert found(**sets, llm2rec=vectors_of(consumption=1.0), models=causal) == []
