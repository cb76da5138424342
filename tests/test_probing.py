"""Verb `probe` on whole runs: what it finds, what it leaves out, what it refuses and what it writes."""

import copy
import json
import shutil
import weakref

import polars as pl
import pytest
import torch

import llm2rec as lr
from conftest import printed
from llm2rec import artifacts, probing, training
from llm2rec.errors import ArtifactError
from llm2rec.evaluation.findings import show_findings
from llm2rec.lm import backbone
from llm2rec.lm import probes as title_probes
from llm2rec.runs import RESOLVED
from llm2rec.stages.base import load_domain
from test_pipeline import overrides, write_world

LITTLE = ("recommender.max_epochs=1", "recommender.rows=[popularity, sasrec-backbone-causal]")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A toy run that hides known items; its last row is trained, but not the best on validation."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    rows = "recommender.rows=[markov, sasrec-id, sasrec-csft-causal, sasrec-llm2rec, gru4rec-backbone-causal]"
    language = ("csft.max_tokens=20000", "csft.learning_rate=0.01")  # enough to learn the circle
    plain = ("recommender.adapter=linear", "recommender.whitening=none")  # the default lets every row be perfect
    sizes = ("recommender.max_epochs=20", "recommender.seeds=2", "evaluation.mask_history=true")
    changes = (*sizes, *plain, *language, rows)
    run = lr.run("demo", folder / "run", (*overrides(folder), *changes))
    return run, lr.probe(run)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished[0].folder, tmp_path / "run")
    return lr.open_run(tmp_path / "run")


def little(folder, interactions, items, *changes):
    """A run of two rows over these tables, probed."""
    interactions.write_csv(folder / "interactions.csv")
    items.write_csv(folder / "items.csv")
    return lr.probe(lr.run("demo", folder / "run", (*overrides(folder), *LITTLE, *changes)))


def walks(histories):
    """Interactions of users who each consume the items of one history in its order."""
    return pl.DataFrame(
        [
            {"user_id": f"u{user:02d}", "item_id": f"i{item}", "timestamp": time}
            for user, items in enumerate(histories)
            for time, item in enumerate(items)
        ]
    )


def named(n):
    return pl.DataFrame([{"item_id": f"i{item}", "title": f"The boat {item}"} for item in range(n)])


def test_probes_see_what_the_toy_world_teaches(finished):
    found = finished[1]
    models = found["language_model"]
    assert models.keys() == {"backbone", "csft", "mntp", "llm2rec"}
    assert models["csft"]["future_sensitivity"] == 0 < models["llm2rec"]["future_sensitivity"]
    gain = {name: models[name]["random"] / models[name]["true"] for name in ("backbone", "csft")}
    assert gain["csft"] > gain["backbone"]  # the next title is certain here
    assert found["vectors"].keys() == {"data", "csft-causal", "llm2rec", "backbone-causal"}
    aucs = {
        name: found["vectors"][name]["co_consumption_auc"]["value"] for name in ("backbone-causal", "csft-causal")
    }
    gained = found["vectors"]["csft-causal"]["co_consumption_gain"]["value"]
    assert gained == pytest.approx(aucs["csft-causal"] - aucs["backbone-causal"])
    assert {result["verdict"] for result in found["order"]["comparisons"].values()} == {"worse"}


def test_the_order_is_probed_of_the_row_that_is_best_on_validation(finished):
    run, found = finished
    rows = ("sasrec-id", "sasrec-csft-causal", "sasrec-llm2rec", "gru4rec-backbone-causal")
    fits = {row: [artifacts.read_manifest(run.recommender(row, seed)) for seed in (0, 1)] for row in rows}
    validation = {row: sum(one.summary["validation_ndcg@10"] for one in both) for row, both in fits.items()}
    assert validation[rows[-1]] < max(validation.values())
    assert found["order"]["row"] == max(rows, key=validation.get)


def test_the_history_as_it_was_is_what_the_evaluation_measured(finished):
    run, found = finished
    assert run.recipe.evaluation.mask_history
    order = found["order"]
    assert order["ndcg@10"]["as it was"]["values"] == run.metrics()["rows"][order["row"]]["ndcg@10"]["values"]


def test_csft_is_diagnosed_by_causal_vectors_where_the_untrained_ones_are_causal(finished):
    diagnosis = finished[1]["diagnosis"]
    assert diagnosis["not_looked_for"] == {}


def test_language_models_and_vector_sets_are_probed_one_at_a_time(copied, monkeypatch):
    alive = []

    def alone(load):
        def loaded(*given, **named):
            assert all(other() is None for other in alive)
            found = copy.copy(load(*given, **named))
            alive.append(weakref.ref(found))
            return found

        return loaded

    monkeypatch.setattr(backbone, "load", alone(backbone.load))
    monkeypatch.setattr(probing, "load_vectors", alone(probing.load_vectors))
    lr.probe(copied)
    assert len(alive) == 4 + 3


def test_language_models_are_probed_on_the_device_that_trains(finished, monkeypatch):
    run, devices = finished[0], []
    monkeypatch.setattr(training, "default_device", lambda: torch.device("meta"))
    monkeypatch.setattr(backbone.Backbone, "set_causal", lambda *_: None)  # which measures, and here is nothing to
    monkeypatch.setattr(backbone, "future_sensitivity", lambda lm: devices.append(lm.body.device.type))
    monkeypatch.setattr(title_probes, "next_title_perplexity", lambda lm, *_, **__: {})
    probing._language_probes(run, run.domain(), load_domain(run, run.domain()))
    assert devices == ["meta"] * 4


def test_what_was_found_lies_beside_the_evaluation_and_leaves_it_as_it_is(finished):
    run, found = finished
    written = artifacts.read_json(run.evaluation / probing.PROBES)
    assert written == json.loads(json.dumps({key: value for key, value in found.items() if key != "page"}))
    assert found["page"] == str(run.evaluation / "probes.html")
    assert "llm2rec: run, probed" in (run.evaluation / "probes.html").read_text()
    artifacts.require(run.evaluation, "evaluate")


def test_an_equal_result_stays_and_another_one_is_moved_aside(copied, finished):
    before = (copied.evaluation / probing.PROBES).read_bytes()
    assert {**lr.probe(copied), "page": ""} == {**finished[1], "page": ""}
    assert (copied.evaluation / probing.PROBES).read_bytes() == before
    assert not (copied.folder / artifacts.SUPERSEDED).exists()
    (copied.evaluation / probing.PROBES).write_text("{}")
    lr.probe(copied)
    (old,) = (copied.folder / artifacts.SUPERSEDED).rglob(probing.PROBES)
    assert old.read_text() == "{}" and old.with_name("probes.html").is_file()
    assert (copied.evaluation / probing.PROBES).read_bytes() == before


@pytest.fixture
def nothing_computed(monkeypatch):
    def refuse(*args):
        raise AssertionError("computed before it was checked")

    monkeypatch.setattr(probing, "_measure", refuse)


@pytest.mark.parametrize("stage", ["csft", "mntp", "iem"])
def test_a_missing_language_model_is_said_before_any_is_loaded(copied, nothing_computed, stage):
    shutil.rmtree(copied.folder / stage)
    with pytest.raises(ArtifactError, match=rf"{stage} (holds no finished|is missing)"):
        lr.probe(copied)


def test_a_changed_evaluation_is_said_before_any_model_is_loaded(copied, nothing_computed):
    (copied.evaluation / "per_user.parquet").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"per_user\.parquet is missing or was changed"):
        lr.probe(copied)


def test_an_evaluation_of_another_recipe_is_not_probed(copied, nothing_computed):
    resolved = artifacts.read_json(copied.folder / RESOLVED)
    resolved["recipe"]["evaluation"]["mask_history"] = False
    artifacts.write_json(copied.folder / RESOLVED, resolved)
    with pytest.raises(ArtifactError, match=r"not up to date \(evaluation\.mask_history\); run `llm2rec evaluate"):
        lr.probe(copied.folder)


def test_models_of_another_recipe_are_not_probed(copied, nothing_computed):
    resolved = artifacts.read_json(copied.folder / RESOLVED)
    resolved["recipe"]["csft"]["weight_decay"] = 0.5
    artifacts.write_json(copied.folder / RESOLVED, resolved)
    with pytest.raises(
        ArtifactError, match=r"csft was made with csft\.weight_decay 0\.0, the recipe now says 0\.5"
    ):
        lr.probe(copied.folder)


def test_a_run_that_cannot_be_written_to_is_said_first(copied, nothing_computed, monkeypatch):
    def denied(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(artifacts.tempfile, "TemporaryFile", denied)
    with pytest.raises(ArtifactError, match=r"cannot write to .*run \(Permission denied\); make it writable"):
        lr.probe(copied)


def test_a_run_in_which_another_process_works_is_not_probed(copied, nothing_computed):
    with artifacts.run_lock(copied.folder), pytest.raises(ArtifactError, match="another llm2rec process"):
        lr.probe(copied)


def test_a_csft_of_samples_has_the_perplexity_that_its_stage_measured(tmp_path):
    log = walks([[(user + step) % 6 for step in range(6)] for user in range(12)])
    changes = ("recommender.rows=[popularity, sasrec-csft-causal]", "csft.mode=tree", "csft.max_tokens=6000")
    found = little(tmp_path, log, named(6), *changes)
    measured = artifacts.read_manifest(tmp_path / "run" / "csft").summary["perplexity_after"]
    assert found["language_model"]["csft"]["true"] == pytest.approx(measured, rel=1e-3)


def test_where_every_test_event_repeats_the_one_before_pairs_are_left_out(tmp_path):
    log = walks([[*((user + step) % 6 for step in range(5)), (user + 4) % 6] for user in range(12)])
    found = little(tmp_path, log, named(6))
    for name in ("co_consumption_auc", "pair_separation", "alignment"):
        assert found["left_out"][name] == "no test event follows an event of another item"
        assert name not in found["vectors"]["backbone-causal"]
    assert "uniformity" in found["vectors"]["backbone-causal"]
    said = " ".join(printed(*show_findings(found)).split())
    assert "left out: alignment (no test event follows an event of another item)" in said


@pytest.mark.parametrize("n", [2, 3])
def test_tiny_catalogues_are_probed_as_far_as_they_go(tmp_path, n):
    log = walks([[(user * 2 + step * (1 + user % 2)) % n for step in range(6)] for user in range(12)])
    found = little(tmp_path, log, named(n))
    assert found["left_out"]["co_consumption_auc"].startswith("no pair has a random item")
    assert "effective_rank" in found["vectors"]["backbone-causal"]


def test_a_column_with_one_category_is_left_out(tmp_path):
    log = walks([[(user + step) % 6 for step in range(6)] for user in range(12)])
    items = named(6).with_columns(genre=pl.Series(["crime", *[None] * 5]))
    found = little(tmp_path, log, items, "data.categories=genre")
    assert found["left_out"]["same_category_share"] == "1 of 6 items have a category; it takes at least 2"
    assert "co_consumption_auc" in found["vectors"]["backbone-causal"]


def test_a_run_of_floors_is_probed_and_says_what_could_not_be_looked_for(tmp_path):
    log = walks([[(user + step) % 6 for step in range(6)] for user in range(12)])
    found = little(tmp_path, log, named(6), "recommender.rows=[popularity, markov]")
    assert found["language_model"] == found["order"] == {}
    assert found["left_out"]["order"] == "no row of this run is trained"
    assert found["diagnosis"]["not_looked_for"]["a contrastive collapse"] == "no vectors of the trained encoder"
    page = (tmp_path / "run" / "evaluation" / "probes.html").read_text()
    assert "Not looked for (no row of this run is trained): a recommender that does not use the order." in page


def test_the_slow_parts_are_announced(copied, capsys):
    lr.probe(copied)
    said = capsys.readouterr().err
    for part in ("vectors of 12 items: ", "language model csft", "order of the history: "):
        assert f"probe  {part}" in said
