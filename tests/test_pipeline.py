"""The whole job on a toy world with a known answer, and what a user can do to a run folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref

import numpy
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import llm2rec as lr
from conftest import cyclic_log, printed
from llm2rec import artifacts, comparison, precision
from llm2rec.config import RecommenderConfig, SplitConfig
from llm2rec.data import sources
from llm2rec.data.embeddings import ItemEmbeddings
from llm2rec.data.sequences import TEST, VALIDATION, Sequences
from llm2rec.data.tables import Catalogue
from llm2rec.data.texts import item_texts
from llm2rec.display import show
from llm2rec.errors import ArtifactError, ConfigError, DataError
from llm2rec.evaluation import maps, protocol
from llm2rec.loading import load_recipe
from llm2rec.rec.average import ScoreAverage
from llm2rec.rows import Row
from llm2rec.runs import Run, create_run, write_resolved
from llm2rec.serve.recommender import load_scorer, load_vectors
from llm2rec.stages import judging
from llm2rec.stages.base import dtype_of, load_mixture
from llm2rec.stages.evaluation import evaluate_stages
from llm2rec.stages.judging import distinct_names, embedding_maps, ties_in_words
from llm2rec.stages.language import encode_texts
from llm2rec.stages.recommenders import unread_by

SMALL = (
    "model.source=tiny-random",
    "model.dtype=float32",
    "data.history_length=4",
    "csft.max_tokens=4000",
    "csft.batch_tokens=256",
    "csft.checkpoints=4",
    "iem.mntp.steps=8",
    "iem.mntp.checkpoints=4",
    "iem.contrastive.steps=8",
    "iem.contrastive.batch_size=8",
    "recommender.max_epochs=40",
    "recommender.patience=40",
    "recommender.dropout=0.0",
    "recommender.hidden_size=32",
    "recommender.learning_rate=0.01",
    "evaluation.k=[1, 5]",
    "evaluation.bootstrap_samples=200",
)


def overrides(folder):
    return (f"data.interactions={folder}/interactions.csv", f"data.items={folder}/items.csv", *SMALL)


def write_world(folder, **sizes):
    interactions, items = cyclic_log(**sizes)
    interactions.write_csv(folder / "interactions.csv")
    items.write_csv(folder / "items.csv")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The toy world's finished run; not to be changed."""
    return lr.run("demo", tmp_path_factory.mktemp("runs") / "toy", overrides(world))


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished.folder, tmp_path / "toy")
    return tmp_path / "toy"


def events(folder):
    return [
        (entry["stage"], entry["event"], entry.get("reasons"))
        for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    ]


def rerun(folder, world, *changes):
    before = len(events(folder))
    lr.run("demo", folder, overrides(world) + changes)
    return [(stage, reasons) for stage, event, reasons in events(folder)[before:] if event == "run"]


@pytest.mark.parametrize("row", ["sasrec-id", "markov"])
def test_a_certain_next_item_is_always_found(finished, row):
    assert finished.metrics()["rows"][row]["recall@1"]["mean"] == 1.0


def test_text_rows_learn_the_circle_from_titles(finished):
    assert finished.metrics()["rows"]["sasrec-llm2rec"]["recall@1"]["mean"] > 0.9


def test_popularity_does_not(finished):
    assert finished.metrics()["rows"]["popularity"]["recall@1"]["mean"] < 0.5


def test_shuffling_the_vectors_after_training_breaks_the_text_row(finished):
    sequences = Sequences.load(finished.data)
    scorer = load_scorer(finished.domain(), "sasrec-llm2rec", 0)
    scorer.items.frozen = scorer.items.frozen[torch.randperm(sequences.n_items)]
    ranked = protocol.evaluate(scorer, sequences, TEST, 4, description=None)
    assert protocol.mean_metric(ranked, "recall@1") < 0.5


def test_every_language_stage_changes_the_weights(finished):
    states = [
        load_file(folder / "model.safetensors")
        for folder in (finished.backbone, finished.csft, finished.mntp, finished.iem)
    ]
    layer = "layers.0.self_attn.q_proj.weight"
    weights = [next(value for name, value in state.items() if name.endswith(layer)) for state in states]
    assert all(not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False))


def test_a_causal_encoder_never_sees_what_comes_after(copied, world):
    from sentence_transformers import SentenceTransformer

    rerun(copied, world, "iem.attention=causal", "iem.mntp.steps=0", "encode.pooling=mean")
    run = lr.open_run(copied)
    assert lr.ItemEmbeddings.load(run.embeddings("llm2rec")).provenance["causal"] is True
    encoder = SentenceTransformer(str(run.iem))
    first, second = encoder.encode(["alpha beta", "alpha gamma"], output_value="token_embeddings")
    assert torch.allclose(first[0], second[0], atol=1e-5)


def test_the_run_folder_is_laid_out_as_documented(finished):
    root = finished.folder
    files = ["recipe.yaml", "resolved.json", "log.jsonl", "data/main/interactions.parquet"]
    files += ["data/main/catalogue.parquet", "csft/model.safetensors", "csft/tokenizer.json"]
    files += ["mntp/config.json", "iem/modules.json", "csft/metrics.jsonl"]
    files += [f"embeddings/main/{name}/embeddings.safetensors" for name in ("backbone", "csft", "llm2rec")]
    rows = ("sasrec-id", "sasrec-backbone", "sasrec-csft", "sasrec-llm2rec")
    files += [f"recommender/main/{row}/seed-0/model.safetensors" for row in rows]
    files += ["evaluation/metrics.json", "evaluation/per_user.parquet", "evaluation/report.html"]
    assert [file for file in files if not (root / file).is_file()] == []


def test_per_user_ranks_have_one_line_a_row_and_test_event(finished):
    table = pl.read_parquet(finished.evaluation / "per_user.parquet")
    assert table.columns == ["row", "seed", "user_id", "item_id", "rank"]
    assert table.group_by("row").len()["len"].to_list() == [40] * 6


def test_the_better_attention_on_validation_is_the_row(finished):
    choice = finished.metrics()["validation"]["sasrec-backbone"]
    assert choice["ndcg@10"][choice["chosen"]] == max(choice["ndcg@10"].values())
    kept = finished.recommender("sasrec-backbone", 0) / "model.safetensors"
    original = finished.recommender(choice["chosen"], 0) / "model.safetensors"
    assert kept.read_bytes() == original.read_bytes()


def test_the_attention_is_chosen_by_its_validation_over_all_seeds(copied, world):
    rerun(copied, world, "recommender.max_epochs=1", "recommender.seeds=2")
    run = lr.open_run(copied)
    choice = run.metrics()["validation"]["sasrec-backbone"]
    values = choice["ndcg@10"]
    assert len(set(values.values())) > 1  # else any choice would do
    assert values[choice["chosen"]] == max(values.values())
    for variant, value in values.items():
        fits = [artifacts.require(run.recommender(variant, seed), "fit").summary for seed in (0, 1)]
        assert value == pytest.approx(sum(fit["validation_ndcg@10"] for fit in fits) / 2)


def test_the_history_is_hidden_from_the_ranks_where_the_recipe_says_so(finished):
    ranks = pl.read_parquet(finished.evaluation / "per_user.parquet").filter(row="popularity")["rank"].to_list()
    scorer, sequences = load_scorer(finished.domain(), "popularity", 0), Sequences.load(finished.data)
    hidden, competing = (
        protocol.evaluate(scorer, sequences, TEST, 4, mask_history=mask)["rank"].to_list()
        for mask in (True, False)
    )
    assert ranks == hidden != competing


def test_resolved_json_holds_every_value_the_versions_and_the_parents(finished):
    resolved = artifacts.read_json(finished.folder / "resolved.json")
    assert resolved["recipe"]["recommender"]["heads"] == 2
    assert {"torch", "transformers", "llm2rec"} <= resolved["versions"].keys()
    assert resolved["stages"]["csft"] == artifacts.require(finished.csft, "csft").fingerprint


def fitted_weights(run):
    """Every trained recommender's file, by its place: metrics of this world are all 1, and tell nothing apart."""
    found = run.folder.glob("recommender/**/model.safetensors")
    return {path.relative_to(run.folder): path.read_bytes() for path in found}


def test_the_same_seed_gives_identical_weights_and_metrics(finished, world, tmp_path):
    again = lr.run("demo", tmp_path / "again", overrides(world))
    assert again.metrics()["rows"] == finished.metrics()["rows"]
    assert fitted_weights(again) == fitted_weights(finished) != {}


def test_an_unchanged_rerun_keeps_everything_and_imports_no_torch(copied, world):
    arguments = ["llm2rec", *command(world, copied)[3:]]
    probe = (
        "import sys, time; began = time.perf_counter(); from llm2rec import cli;"
        f"sys.argv = {arguments!r}\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules; print(time.perf_counter() - began)"
    )
    printed = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert float(printed.stdout.splitlines()[-1]) < 5
    assert "run " not in printed.stderr


def test_a_changed_recommender_key_reruns_the_trained_rows_only(copied, world):
    ran = rerun(copied, world, "recommender.max_epochs=2")
    assert {stage.split("/")[0] for stage, _ in ran} == {"recommender", "evaluation"}
    assert ("recommender/main/sasrec-id/seed-0", ["recommender.max_epochs"]) in ran


@pytest.mark.parametrize("change", ["recommender.whitening=none", "recommender.smoothing=0.5"])
def test_rows_over_ids_do_not_depend_on_what_is_made_of_vectors(change, copied, world):
    stages = [stage for stage, _ in rerun(copied, world, change, "recommender.max_epochs=40")]
    assert "recommender/main/sasrec-llm2rec/seed-0" in stages
    assert not [stage for stage in stages if "sasrec-id" in stage]


@pytest.mark.parametrize("change", ["delta_share=0.3", "negatives=17", "sampling=popularity", "calibration=0.5"])
def test_a_key_that_no_row_reads_trains_nothing_again(change, copied, world):
    assert rerun(copied, world, f"recommender.{change}") == []


def test_an_interrupted_training_goes_on_though_a_key_changes_that_it_does_not_read(copied, world):
    name = "recommender/main/sasrec-id/seed-0"
    inputs = artifacts.require(copied / name, "fit").inputs
    (copied / name / artifacts.MANIFEST).unlink()
    artifacts.write_json(copied / name / artifacts.STARTED, inputs)
    assert (name, ["interrupted"]) in rerun(copied, world, "recommender.negatives=17")
    assert not (copied / artifacts.SUPERSEDED).exists()


def test_what_a_training_reads_depends_on_row_and_settings():
    def unread(row, **settings):
        return {key.partition(".")[2] for key in unread_by(Row.parse(row), RecommenderConfig(**settings))}

    sampling = {"negatives", "sampling", "calibration"}
    assert unread("sasrec-llm2rec") == {"delta_share"} | sampling
    assert unread("sasrec-llm2rec+delta", loss="gbce") == set()
    assert unread("sasrec-llm2rec+delta", loss="sampled_softmax") == {"calibration"}
    assert unread("gru4rec-llm2rec+delta", adapter="linear") == {"adapter_size", "heads"} | sampling


def test_a_changed_evaluation_key_reruns_the_evaluation_only(copied, world):
    assert rerun(copied, world, "evaluation.k=[1, 3]") == [("evaluation", ["evaluation.k"])]


def test_another_seed_is_added_without_training_the_first_again(copied, world):
    ran = [stage for stage, _ in rerun(copied, world, "recommender.seeds=2", "recommender.max_epochs=40")]
    assert "recommender/main/sasrec-id/seed-1" in ran
    assert "recommender/main/sasrec-id/seed-0" not in ran


def test_a_corrected_title_leaves_the_id_row_alone(copied, world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    text = (tmp_path / "world" / "items.csv").read_text().replace("red boat", "green boat")
    (tmp_path / "world" / "items.csv").write_text(text)
    ran = [stage for stage, _ in rerun(copied, tmp_path / "world")]
    assert {"data/main", "csft", "embeddings/main/llm2rec", "evaluation"} <= set(ran)
    assert "recommender/main/sasrec-id/seed-0" not in ran


def test_validation_ranks_as_the_test_does(copied, world):
    short = "recommender.rows=[markov, sasrec-id]", "recommender.max_epochs=2"
    ran = rerun(copied, world, "evaluation.mask_history=false", *short)
    assert [stage for stage, _ in ran] == ["recommender/main/sasrec-id/seed-0", "evaluation"]
    run = lr.open_run(copied)
    sequences, scorer = Sequences.load(run.domain().data), load_scorer(run.domain(), "sasrec-id", 0)
    hidden, competing = (
        protocol.mean_metric(protocol.evaluate(scorer, sequences, VALIDATION, 4, mask_history=mask), "ndcg@10")
        for mask in (True, False)
    )
    best = artifacts.require(run.domain().recommender("sasrec-id", 0), "fit").summary["validation_ndcg@10"]
    assert competing == pytest.approx(best)
    assert competing < hidden


def test_a_stage_that_was_begun_and_left_by_the_recipe_is_put_aside(copied, world):
    shutil.rmtree(copied / "iem")
    aside = copied / "superseded" / "20260101-000000" / "recommender" / "main" / "sasrec-id" / "seed-7"
    for begun in (copied / "iem", aside):
        (begun / artifacts.CHECKPOINTS / "checkpoint-1").mkdir(parents=True)
        (begun / "started.json").write_text("{}")
    rerun(copied, world, "recommender.rows=[popularity, markov]")
    assert lr.open_run(copied).unfinished() is None
    assert list((copied / "superseded").rglob("iem/started.json"))
    assert (aside / "started.json").is_file()
    assert not list((copied / "superseded").rglob(artifacts.CHECKPOINTS)), "nothing goes on from them"


def test_what_rows_left_behind_is_not_shown(copied, world):
    rerun(copied, world, "recommender.rows=[markov, sasrec-backbone-causal]")
    shown = artifacts.read_json(copied / "evaluation" / "showcase.json")
    assert {name for sets in shown["neighbours"].values() for name in sets} == {"backbone-causal"}
    run = lr.open_run(copied)
    assert {cost["stage"] for cost in judging.stage_costs(run, run.domain())} == {
        "data/main",
        "backbone",
        "embeddings/main/backbone-causal",
        "recommender/main/sasrec-backbone-causal/seed-0",
    }


def test_the_commit_of_a_hub_model_is_recorded_and_another_one_is_said(copied, world, monkeypatch, capsys):
    few = "recommender.rows=[markov, sasrec-csft-causal]", "recommender.max_epochs=1", "csft.max_tokens=2000"
    monkeypatch.setattr(sources, "hub_commit", lambda source: "a" * 40)
    rerun(copied, world, *few)
    assert artifacts.read_manifest(copied / "csft").summary["hub"] == f"tiny-random@{'a' * 40}"
    assert "hub" not in artifacts.read_manifest(copied / "embeddings/main/csft-causal").summary
    assert "the hub now has" not in capsys.readouterr().err
    monkeypatch.setattr(sources, "hub_commit", lambda source: "b" * 40)
    more = "recommender.rows=[markov, sasrec-csft-causal, sasrec-backbone-causal]"
    shutil.rmtree(copied / "embeddings/main/backbone-causal")  # to be made again
    ran = [stage for stage, _ in rerun(copied, world, *few, more)]
    assert "csft" not in ran  # a commit alone costs no training
    said = capsys.readouterr().err
    assert f"csft was made from tiny-random@{'a' * 40}, the hub now has {'b' * 40}" in said


def test_titles_held_out_are_among_what_mntp_is_made_from(copied, world):
    changes = "csft.max_tokens=0", "recommender.rows=[sasrec-llm2rec]", "recommender.max_epochs=1"
    rerun(copied, world, *changes)
    ran = [stage for stage, _ in rerun(copied, world, *changes, "data.split.cold_items=0.2")]
    assert "mntp" in ran and "backbone" in ran


def test_a_rows_own_course_of_training_is_followed_by_that_row_alone(copied, world):
    ran = [stage for stage, _ in rerun(copied, world, "recommender.per_row.sasrec-id.max_epochs=2")]
    assert ran == ["recommender/main/sasrec-id/seed-0", "evaluation"]
    manifests = {
        row: artifacts.read_json(copied / "recommender" / "main" / row / "seed-0" / "manifest.json")
        for row in ("sasrec-id", "sasrec-llm2rec")
    }
    epochs = {row: manifest["summary"]["epochs"] for row, manifest in manifests.items()}
    assert epochs["sasrec-id"] == 2 < epochs["sasrec-llm2rec"]


def test_the_measured_number_format_stays_that_of_the_run(tmp_path, world, monkeypatch):
    changes = "model.dtype=auto", "csft.max_tokens=0", "recommender.rows=[sasrec-backbone-causal]"
    changes = *overrides(world), *changes, "recommender.max_epochs=1"
    monkeypatch.setattr(precision, "_faster", lambda: torch.float32)
    run = lr.run("demo", tmp_path / "run", changes)
    monkeypatch.setattr(precision, "_faster", lambda: torch.bfloat16)
    assert dtype_of(run, "auto") == "float32"
    assert dtype_of(run, "bfloat16") == "bfloat16"
    beside = lr.pipeline.run("demo", tmp_path / "beside", changes, siblings=[run.folder])
    assert dtype_of(beside, "auto") == "float32"


def test_superseded_results_are_kept_aside(copied, world):
    rerun(copied, world, "evaluation.k=[1, 3]")
    assert list((copied / "superseded").rglob("metrics.json"))


def test_fresh_reruns_every_stage(copied, world):
    before = len(events(copied))
    lr.run("demo", copied, overrides(world), fresh=True)
    assert "keep" not in {event for _, event, _ in events(copied)[before:]}


def test_an_average_has_the_weight_that_validation_chooses(copied, world):
    rows = "[sasrec-id, sasrec-llm2rec, sasrec-llm2rec+average]"
    rerun(copied, world, f"recommender.rows={rows}", "evaluation.reference=sasrec-id")
    choice = json.loads((copied / "evaluation/metrics.json").read_text())["validation"]["sasrec-llm2rec+average"]
    weights = choice["ndcg@10"]
    assert list(weights) == [f"{10 * step} % ids" for step in range(11)]
    assert weights[choice["chosen"]] == max(weights.values())
    weight = json.loads((copied / "recommender/main/sasrec-llm2rec+average/seed-0/average.json").read_text())[
        "weight"
    ]
    assert choice["chosen"] == f"{100 * weight:.0f} % ids"
    assert lr.recommend(copied, ["i03", "i04"], k=1, row="sasrec-llm2rec+average")[0].item_id == "i05"


def test_the_weight_that_every_seed_chooses_is_shown(copied, world, monkeypatch):
    weights = iter((0.3, 0.2))
    monkeypatch.setattr("llm2rec.rec.average.best_weight", lambda by_weight: next(weights))
    rows = "recommender.rows=[sasrec-id, sasrec-llm2rec, sasrec-llm2rec+average]"
    changes = "recommender.max_epochs=1", "recommender.seeds=2", "evaluation.reference=sasrec-id"
    rerun(copied, world, rows, *changes)
    run = lr.open_run(copied)
    choice = run.metrics()["validation"]["sasrec-llm2rec+average"]
    assert choice["chosen"] == "30 % ids, 20 % ids"
    fits = [artifacts.require(run.recommender("sasrec-llm2rec+average", seed), "fit").summary for seed in (0, 1)]
    by_seed = [fit["validation"]["30 % ids"] for fit in fits]
    assert by_seed[0] != by_seed[1] and choice["ndcg@10"]["30 % ids"] == pytest.approx(sum(by_seed) / 2)


def test_an_average_is_served_and_evaluated_with_its_saved_weight(copied, world, monkeypatch):
    monkeypatch.setattr("llm2rec.rec.average.best_weight", lambda by_weight: 0.3)
    rows = "recommender.rows=[sasrec-id, sasrec-llm2rec, sasrec-llm2rec+average]"
    rerun(copied, world, "recommender.max_epochs=1", rows, "evaluation.reference=sasrec-id")
    run = lr.open_run(copied)
    scorer = load_scorer(run.domain(), "sasrec-llm2rec+average", 0)
    assert scorer.weight == 0.3
    pair = [load_scorer(run.domain(), row, 0) for row in ("sasrec-id", "sasrec-llm2rec")]
    by_hand = protocol.evaluate(ScoreAverage(*pair, 0.3), Sequences.load(run.data), TEST, 4, mask_history=True)
    table = pl.read_parquet(run.evaluation / "per_user.parquet").filter(row="sasrec-llm2rec+average")
    assert table["rank"].to_list() == by_hand["rank"].to_list()


def test_recommend_serves_an_unseen_history_and_hides_all_of_it(finished):
    history = ["i00", "i01", "i02", "i03", "i04", "i05"]  # longer than the window of 4
    listed = lr.recommend(finished, history, k=12)
    assert listed[0].item_id == "i06"
    assert set(history).isdisjoint(item.item_id for item in listed)
    assert len(listed) == 6


def test_recommend_lists_the_history_where_it_is_asked_to(finished):
    listed = lr.recommend(finished, ["i03", "i04"], k=12, exclude_history=False)
    assert len(listed) == 12 and {"i03", "i04"} <= {item.item_id for item in listed}


@pytest.mark.parametrize("vectors", ["llm2rec", "backbone"])
def test_similar_leaves_the_item_out_and_sorts_by_cosine(finished, vectors):
    listed = lr.similar(finished.folder, "i03", k=5, vectors=vectors)
    table = ItemEmbeddings.load(finished.embeddings(vectors))
    unit = table.vectors / numpy.linalg.norm(table.vectors, axis=1, keepdims=True)
    cosines = dict(zip(table.item_ids, (unit @ unit[table.item_ids.index("i03")]).tolist(), strict=True))
    assert cosines.pop("i03") == pytest.approx(1, abs=1e-5)
    best = sorted(cosines, key=cosines.__getitem__, reverse=True)[:5]
    assert [item.item_id for item in listed] == best
    assert [item.score for item in listed] == pytest.approx([cosines[item] for item in best], abs=1e-5)


def test_a_run_without_the_usual_row_and_vectors_answers_by_those_it_has(finished, copied, world, capsys):
    rerun(copied, world, "recommender.rows=[popularity, sasrec-backbone-causal]")
    shutil.rmtree(copied / "embeddings" / "main" / "llm2rec")
    history = ["i01", "i02"]
    by_default = lr.recommend(copied, history), lr.similar(copied, "i03")
    assert "note: row sasrec-backbone-causal" in (said := capsys.readouterr().err)
    assert "note: vectors " in said
    named = re.search(r"note: vectors (\S+);", said)[1]
    assert by_default[0] == lr.recommend(copied, history, row="sasrec-backbone-causal")
    assert by_default[1] == lr.similar(copied, "i03", vectors=named)
    assert "note:" not in capsys.readouterr().err
    assert lr.recommend(finished.folder, history) == lr.recommend(finished.folder, history, row="sasrec-llm2rec")
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("split", ["{by: time}", "{by: users, ratio: [0.6, 0.2, 0.2]}"])
def test_a_whole_run_under_other_splits(world, tmp_path, split):
    rows = "recommender.rows=[popularity, markov, sasrec-id]"
    changes = (rows, "recommender.max_epochs=1", f"data.split={split}", "evaluation.reference=markov")
    run = lr.run("demo", tmp_path / "run", (*overrides(world), *changes))
    assert run.metrics()["rows"]["markov"]["recall@1"]["mean"] == 1.0
    assert lr.recommend(run, ["i03"], row="sasrec-id", k=3)


def test_recommending_after_an_unknown_item_names_it(finished):
    with pytest.raises(DataError, match="no item 'nope'"):
        lr.recommend(finished, ["i03", "nope"])


def test_an_unknown_row_is_refused_with_the_rows_of_the_run(finished):
    with pytest.raises(ConfigError, match="sasrec-llm2rec"):
        lr.recommend(finished, ["i03"], row="sasrec-magic")


def test_compare_finds_a_run_equal_to_itself(finished, copied):
    compared = lr.compare([finished.folder, copied])
    (rows,) = compared["comparisons"].values()
    assert {result["verdict"] for result in rows.values()} == {"not distinguishable"}


def test_compare_says_which_settings_differ(finished, copied, world):
    rerun(copied, world, "evaluation.bootstrap_samples=300")
    settings = lr.compare([finished.folder, copied])["settings"]
    assert {key: list(values.values()) for key, values in settings.items()} == {
        "evaluation.bootstrap_samples": [200, 300]
    }


def test_compare_refuses_ranks_with_and_without_the_history(finished, copied, world):
    rerun(copied, world, "evaluation.mask_history=false")
    with pytest.raises(ArtifactError, match=r"evaluation\.mask_history of .*: true, .*: false"):
        lr.compare([finished.folder, copied])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.filters.k_core=2", "data/main was made with data.filters.k_core 1, the recipe now says 2"),
        ("csft.learning_rate=0.5", "csft was made with csft.learning_rate "),
        ("iem.mntp.steps=0", "mntp was made with iem.mntp.steps "),
        ("model.source=smollm2-135m-instruct-q4", "was made with model.source another model, the recipe now"),
        ("model.source=Qwen/Qwen2.5-0.5B", "model.source another model, the recipe now says 'Qwen/Qwen2.5-0.5B'"),
        ("encode.pooling=last", "was made with encode.pooling 'mean', the recipe now says 'last'"),
        ("recommender.layers=7", "sasrec-.*/seed-0 was made with recommender.layers 2, the recipe now says 7"),
        ("recommender.smoothing=0.5", "was made with recommender.smoothing 0.0, the recipe now says 0.5"),
        ("recommender.per_row={sasrec-id: {dropout: 0.9}}", "sasrec-id/seed-0 was made with recommender.dropout "),
        ("recommender.seeds=3", "evaluation was made with recommender.seeds 1, the recipe now says 3"),
        ("evaluation.mask_history=false", "evaluation.mask_history True, the recipe now says False"),
    ],
)
def test_compare_refuses_settings_that_no_result_was_made_with(finished, world, change, said):
    recipe = load_recipe(finished.folder / "recipe.yaml", (*overrides(world), change))
    with pytest.raises(ArtifactError, match=said):
        lr.compare([Run(finished.folder, recipe)], against="markov")


def test_compare_refuses_results_of_another_model_than_the_random_one(copied, world):
    manifest = artifacts.read_json(copied / "csft" / artifacts.MANIFEST)
    manifest["inputs"]["model.source"] = sources.MODELS["smollm2-135m-instruct-q4"].content_hash
    artifacts.write_json(copied / "csft" / artifacts.MANIFEST, manifest)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"csft was made with model\.source another .* 'tiny-random'"):
            lr.compare([copied], against="markov")
        shutil.rmtree(copied / "backbone", ignore_errors=True)


def test_compare_passes_over_where_a_model_lies(finished, world):
    recipe = load_recipe(finished.folder / "recipe.yaml", (*overrides(world), "model.source=/gone/model"))
    assert lr.compare([Run(finished.folder, recipe)], against="markov")["comparisons"]


def test_compare_passes_over_what_no_training_reads(finished, world):
    recipe = load_recipe(finished.folder / "recipe.yaml", (*overrides(world), "recommender.negatives=3"))
    assert recipe.recommender.loss == "full"
    assert lr.compare([Run(finished.folder, recipe)], against="markov")["comparisons"]


def test_compare_refuses_a_budget_of_a_stage_that_was_left_out(world, finished, tmp_path):
    rows = "recommender.rows=[popularity, sasrec-llm2rec]"
    without = (*overrides(world), rows, "recommender.max_epochs=1", "csft.max_tokens=0", "iem.mntp.steps=0")
    run = lr.run("demo", tmp_path / "run", without)
    assert lr.compare([run], against="popularity")["comparisons"]
    for change in ("iem.mntp.steps=2", "csft.max_tokens=4096"):
        recipe = load_recipe(run.folder / "recipe.yaml", (*without, change))
        with pytest.raises(
            ArtifactError, match=rf"iem was made with {change.partition('=')[0]} 0, the recipe now"
        ):
            lr.compare([Run(run.folder, recipe)], against="popularity")


def test_compare_needs_neither_the_raw_data_nor_the_weights(copied, tmp_path):
    resolved = json.loads((copied / "resolved.json").read_text())
    resolved["recipe"]["data"]["interactions"] = str(tmp_path / "gone.csv")
    (copied / "resolved.json").write_text(json.dumps(resolved))
    for stage in ("backbone", "csft", "mntp", "iem"):
        shutil.rmtree(copied / stage)
    assert lr.compare([copied], against="markov")["comparisons"]


def test_compare_says_where_a_history_competes_as_the_evaluation_does(copied, world):
    rerun(copied, world, "evaluation.mask_history=false")
    ranking = lr.compare([copied], against="markov")["ranking"]
    assert "though no user of this log consumes one twice" in ranking


def test_a_list_looks_at_as_many_events_as_the_training_did(copied, world):
    run, history = lr.open_run(copied), ["i01", "i02", "i03", "i04"]
    data = run.recipe.data.model_copy(update={"history_length": 1})
    edited = Run(run.folder, run.recipe.model_copy(update={"data": data}))
    assert edited.domain().config.history_length == 1
    assert lr.recommend(edited, history, row="sasrec-id") == lr.recommend(run, history, row="sasrec-id")


def test_compare_refuses_a_run_whose_rerun_was_interrupted(finished, copied):
    (copied / "csft" / "started.json").write_text("{}")
    with pytest.raises(ArtifactError, match="csft was begun and not finished"):
        lr.compare([finished.folder, copied])


def test_recommending_from_a_half_rerun_run_says_so(finished, copied, capsys):
    expected = lr.recommend(finished, ["i03"])
    assert "note" not in capsys.readouterr().err
    (copied / "csft" / "started.json").write_text("{}")
    assert lr.recommend(copied, ["i03"]) == expected
    assert "csft was begun and not finished" in " ".join(capsys.readouterr().err.split())


def test_a_run_without_its_resolved_recipe_is_not_guessed(copied, world):
    (copied / "resolved.json").unlink()
    with pytest.raises(ArtifactError, match=r"resolved\.json is missing.*the same --set"):
        lr.recommend(copied, ["i03"])
    assert not (copied / "resolved.json").exists()
    before = len(events(copied))
    lr.run("demo", copied, overrides(world))
    assert {event for _, event, _ in events(copied)[before:]} == {"keep"}


def test_compare_names_data_of_other_content_at_the_same_place(tmp_path):
    interactions, items = cyclic_log()
    items.write_csv(tmp_path / "items.csv")
    first_event = (pl.col("user_id") == "u000") & (pl.col("timestamp") == 0)
    runs = []
    for name, log in {"whole": interactions, "shorter": interactions.filter(~first_event)}.items():
        log.write_csv(tmp_path / "interactions.csv")
        changes = (*overrides(tmp_path), "recommender.rows=[popularity]")
        runs.append(lr.run("demo", tmp_path / name, changes))
    content = lr.compare(runs)["settings"]["content of the data"]
    assert len(set(content.values())) == 2


def test_compare_shows_the_difference_with_its_interval(finished, copied):
    shown = printed(comparison.comparison_table(lr.compare([finished.folder, copied])), width=200)
    assert "+0.0000, +0.0 % (+0.0000 to +0.0000, p 1.000)" in shown and "95 % interval" in shown


def test_the_rows_of_one_run_are_compared_with_any_of_them(finished, tmp_path):
    compared = lr.compare([finished.folder], against="popularity", page=tmp_path / "page.html")
    (tested,) = compared["comparisons"].values()
    assert set(tested) == set(finished.metrics()["rows"]) - {"popularity"}
    reference = finished.metrics()["reference"]
    again = lr.compare([finished.folder], against=reference)["comparisons"][str(finished.folder)]
    assert again == finished.metrics()["comparisons"]
    page = " ".join((tmp_path / "page.html").read_text().split())
    assert "Against popularity of run 1" in page and ", the reference" not in page
    assert "every row against popularity" in printed(comparison.comparison_table(compared), width=200)


def test_a_row_of_the_first_run_is_what_rows_of_others_are_compared_with(finished, copied):
    compared = lr.compare([finished.folder, copied], against="popularity")["comparisons"]
    first, other = compared.values()
    assert other["popularity"]["difference"] == 0 and "popularity" not in first
    assert {row: result["difference"] for row, result in first.items()} == {
        row: result["difference"] for row, result in other.items() if row != "popularity"
    }


def test_compare_refuses_a_single_run_and_a_row_that_it_lacks(finished):
    with pytest.raises(ConfigError, match="--against"):
        lr.compare([finished.folder])
    with pytest.raises(ConfigError, match="no row 'sasrec-magic'; its rows: popularity"):
        lr.compare([finished.folder], against="sasrec-magic")


def test_lists_are_no_longer_than_the_catalogue(copied, world):
    rerun(copied, world, "evaluation.k=[5, 1000]")
    lists = json.loads((copied / "evaluation" / "metrics.json").read_text())["lists"]
    assert all(list(metrics)[0] == "coverage@5" and len(metrics) == 4 for metrics in lists.values())


def test_compare_refuses_metrics_that_were_edited(finished, copied):
    (copied / "evaluation" / "metrics.json").write_text('{"rows": 3}')
    with pytest.raises(ArtifactError, match=r"metrics\.json .*was changed"):
        lr.compare([finished.folder, copied])


def test_a_damaged_manifest_reruns_its_stage(copied, world):
    (copied / "evaluation" / "manifest.json").write_text("{")
    assert rerun(copied, world) == [("evaluation", ["damaged manifest.json"])]


def test_a_stage_verb_refuses_a_parent_that_was_changed(copied):
    (copied / "data" / "main" / "catalogue.parquet").write_bytes(b"")
    with pytest.raises(ArtifactError, match="catalogue"):
        lr.fit(copied)


def test_an_evaluation_that_fails_leaves_the_old_one(copied, finished, world, monkeypatch):
    def gone(*args, **kwargs):
        raise ArtifactError("the vectors are gone")

    with monkeypatch.context() as patched, pytest.raises(ArtifactError, match="vectors are gone"):
        patched.setattr("llm2rec.stages.judging.load_scorer", gone)
        rerun(copied, world, "evaluation.k=[1, 3]")
    assert lr.open_run(copied).metrics() == finished.metrics()
    assert rerun(copied, world, "evaluation.k=[1, 3]") == [("evaluation", ["evaluation.k"])]


def test_a_stage_verb_refuses_to_go_on_from_a_stage_whose_data_changed(copied, world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    lr.run("demo", copied, overrides(tmp_path / "world"))
    text = (tmp_path / "world" / "interactions.csv").read_text()
    (tmp_path / "world" / "interactions.csv").write_text(text.replace("u000,i00,0\n", "u000,i05,0\n"))
    lr.prepare(copied)
    with pytest.raises(ArtifactError, match="not up to date .*sequences"):
        lr.evaluate(copied)


def test_a_recipe_edited_in_its_run_folder_is_heeded(copied):
    recipe = copied / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "recommender: {weight_decay: 0.5}\n")
    assert lr.open_run(copied).recipe.recommender.weight_decay == 0.5
    assert lr.open_run(copied).recipe.data.interactions.is_file()  # overrides are kept


def test_paths_given_by_set_mean_the_same_wherever_a_run_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_run("demo", tmp_path / "run", ("data.interactions=a.csv", "data.items=b.csv"))
    monkeypatch.chdir("/")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "# a remark\n")
    for _ in range(2):
        assert lr.open_run(tmp_path / "run").recipe.data.interactions == tmp_path / "a.csv"


def test_paths_of_a_recipe_that_is_a_link_stay_those_beside_the_link(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "recipe.yaml").write_text(
        "data: {interactions: log.csv, items: items.csv}\nmodel: {source: tiny-random}\n"
        "csft: {max_tokens: 5000}\niem: {mntp: {steps: 2}, contrastive: {steps: 2}}\n"
    )
    (tmp_path / "b" / "recipe.yaml").symlink_to(tmp_path / "a" / "recipe.yaml")
    run = create_run(tmp_path / "b" / "recipe.yaml", tmp_path / "run")
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "# a remark\n")
    expected = tmp_path / "b" / "log.csv"
    assert run.recipe.data.interactions == lr.open_run(run.folder).recipe.data.interactions == expected


def test_a_recipe_edited_while_it_ran_is_heeded_by_the_next_verb(tmp_path):
    run = create_run("demo", tmp_path / "run", ("data.interactions=a.csv", "data.items=b.csv"))
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 7"))
    assert lr.open_run(run.folder).recipe.seed == 7  # as by a verb that looks while the run goes on
    write_resolved(run)  # as at the end of every verb
    assert lr.open_run(run.folder).recipe.seed == 7


def test_opening_a_run_writes_nothing(tmp_path):
    run = create_run("demo", tmp_path / "run", ("data.interactions=a.csv", "data.items=b.csv"))
    (run.folder / "recipe.yaml").write_text((run.folder / "recipe.yaml").read_text() + "# a remark\n")
    before = (run.folder / "resolved.json").read_bytes()
    assert lr.open_run(run.folder) == run
    assert (run.folder / "resolved.json").read_bytes() == before
    (run.folder / "resolved.json").unlink()
    lr.open_run(run.folder)  # of a recipe alone
    assert [path.name for path in run.folder.iterdir()] == ["recipe.yaml"]


def test_a_verb_that_is_refused_records_nothing_of_an_edited_recipe(tmp_path):
    run = create_run("demo", tmp_path / "run", ("data.interactions=a.csv", "data.items=b.csv"))
    (run.folder / "recipe.yaml").write_text((run.folder / "recipe.yaml").read_text().replace("seed: 0", "seed: 7"))
    with artifacts.run_lock(run.folder), pytest.raises(ArtifactError, match="another llm2rec process"):
        lr.prepare(run.folder)
    assert artifacts.read_json(run.folder / "resolved.json")["recipe"]["seed"] == 0


def test_a_run_that_is_refused_stays_what_it_was(copied, world):
    with pytest.raises(ConfigError, match="/no/such/model"):
        rerun(copied, world, "model.source=/no/such/model", "data.history_length=2")
    assert lr.open_run(copied).recipe.data.history_length == 4


def test_repeated_titles_are_told_apart_by_their_id():
    catalogue = Catalogue.from_frame(
        pl.DataFrame({"item_id": ["1", "2", "3"], "title": ["Emma", "Emma", "Persuasion"]}), "books"
    )
    assert distinct_names(catalogue) == {"1": "Emma [1]", "2": "Emma [2]", "3": "Persuasion"}


def test_long_titles_are_cut_by_characters_and_told_apart_where_the_cut_makes_them_equal():
    long = ["書" * 100, "a b " * 30 + "first", "a b " * 30 + "second", "界" * 80]
    catalogue = Catalogue.from_frame(pl.DataFrame({"item_id": ["1", "2", "3", "4"], "title": long}), "books")
    names = distinct_names(catalogue)
    assert names["1"] == "書" * 76 + " ..." and names["4"] == "界" * 80
    assert names["2"].endswith("a b ... [2]") and names["3"] == names["2"].replace("[2]", "[3]")


def test_maps_are_coloured_by_counts_of_training_events(finished):
    domain = finished.domain()
    chart = embedding_maps(finished, domain, Sequences.load(domain.data))[0]
    assert chart.colour_name == "training events" and set(map(type, chart.colours)) == {int}
    assert sum(chart.colours) == 40 * 6  # of 40 users, all but the last two events


def test_a_map_holds_the_items_that_a_page_shows_and_says_of_how_many(finished, monkeypatch):
    domain, sequences = finished.domain(), Sequences.load(finished.data)
    whole = embedding_maps(finished, domain, sequences)[0]
    monkeypatch.setattr(maps, "MAX_POINTS", 5)
    chart = embedding_maps(finished, domain, sequences)[0]
    assert len(chart.x) == 5 < chart.n_items == whole.n_items == len(whole.x)
    places = maps.shown_places(whole.n_items)
    assert list(chart.x) == pytest.approx([whole.x[place] for place in places])
    assert [chart.titles, chart.colours] == [
        [values[place] for place in places] for values in (whole.titles, whole.colours)
    ]


def test_vector_sets_are_shown_one_at_a_time(finished, monkeypatch):
    loaded = []

    def load(*place):
        assert all(vectors() is None for vectors in loaded)
        found = load_vectors(*place).copy()
        loaded.append(weakref.ref(found))
        return found

    monkeypatch.setattr(judging, "load_vectors", load)
    domain, sequences = finished.domain(), Sequences.load(finished.data)
    shown = judging.showcase(finished, domain, sequences)
    assert shown == artifacts.read_json(finished.evaluation / "showcase.json")
    charts = embedding_maps(finished, domain, sequences)
    assert len(loaded) == 2 * len(charts) > 4


def test_a_folder_that_is_not_a_run_is_refused(world, tmp_path):
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(ArtifactError, match=r"holiday\.jpg"):
        lr.run("demo", tmp_path, overrides(world))


def test_a_stage_verb_needs_the_stages_before_it(world, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"data: {{interactions: {world}/interactions.csv, items: {world}/items.csv}}\n"
        "model: {source: tiny-random}\ncsft: {max_tokens: 5000}\n"
        "iem: {mntp: {steps: 2}, contrastive: {steps: 2}}\n"
    )
    with pytest.raises(ArtifactError, match="prepare"):
        lr.fit(tmp_path)
    lr.prepare(tmp_path)
    assert (tmp_path / "data" / "main" / "manifest.json").exists()


def test_a_run_without_text_rows_needs_no_language_model(world, tmp_path):
    run = lr.run("demo", tmp_path / "ids", (*overrides(world), "recommender.rows=[popularity, sasrec-id]"))
    assert not run.csft.exists()
    assert set(run.metrics()["rows"]) == {"popularity", "sasrec-id"}


def test_the_data_are_checked_once_for_all_trainings(world, tmp_path, monkeypatch):
    changes = "recommender.rows=[popularity, sasrec-id]", "recommender.seeds=2", "recommender.max_epochs=1"
    run = lr.prepare(create_run("demo", tmp_path / "run", (*overrides(world), *changes)))
    checked = []
    monkeypatch.setattr("llm2rec.data.sequences.check_leakage", lambda *data, **options: checked.append(data))
    lr.fit(run)
    assert not checked
    lr.evaluate(run)
    assert len(checked) == 1


def over_text_encoder(finished):
    """Overrides for a run over a ready text encoder, for which the trained encoder of another run will do."""
    return "recommender.rows=[popularity, sasrec-other]", f"encode.text_encoders.other={finished.iem}"


def test_a_row_over_a_text_encoder_needs_no_language_model(finished, world, tmp_path):
    changes = (*over_text_encoder(finished), "model.source=./no/such/model", "recommender.max_epochs=2")
    run = lr.run("demo", tmp_path / "run", (*overrides(world), *changes))
    assert not run.csft.exists() and not run.backbone.exists()
    theirs, ours = (
        ItemEmbeddings.load(one.embeddings(name)) for one, name in ((run, "other"), (finished, "llm2rec"))
    )
    assert numpy.allclose(theirs.vectors, ours.aligned_to(theirs.item_ids), atol=1e-4)
    assert "sasrec-other" in run.metrics()["rows"]


def test_another_text_encoder_leaves_the_vectors_of_the_language_model(copied, finished, world):
    assert rerun(copied, world, f"encode.text_encoders.other={finished.iem}") == []
    ran = rerun(copied, world, *over_text_encoder(finished))
    assert [stage for stage, _ in ran] == [
        "embeddings/main/other",
        "recommender/main/sasrec-other/seed-0",
        "evaluation",
    ]


def test_a_change_inside_a_text_encoder_encodes_again(copied, finished, world, tmp_path):
    encoder = tmp_path / "encoder"
    shutil.copytree(finished.iem, encoder)
    rows = "recommender.rows=[popularity, sasrec-other]", f"encode.text_encoders.other={encoder}"
    rerun(copied, world, *rows)
    pooling = encoder / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text() + " ")
    with pytest.raises(ArtifactError, match="1_Pooling.*was changed; .*remove manifest.json"):
        rerun(copied, world, *rows)
    (encoder / "manifest.json").unlink()  # from here on it is any SentenceTransformer
    rerun(copied, world, *rows)
    pooling.write_text(pooling.read_text() + " ")
    assert "embeddings/main/other" in [stage for stage, _ in rerun(copied, world, *rows)]


@pytest.mark.parametrize(("folder", "name"), [("csft", "csft-causal"), ("iem", "llm2rec")])
def test_an_encoder_of_another_run_gives_that_run_s_vectors(finished, world, tmp_path, folder, name):
    rows = "recommender.rows=[popularity, sasrec-other]", f"encode.text_encoders.other={finished.folder / folder}"
    run = create_run("demo", tmp_path / "run", (*overrides(world), *rows))
    for verb in (lr.prepare, lr.encode):
        verb(run)
    ours = ItemEmbeddings.load(run.embeddings("other"))
    catalogue = Catalogue.read(finished.data / "catalogue.parquet")
    theirs = tmp_path / "theirs"
    encode_texts(finished, name, catalogue.item_ids, item_texts(catalogue, "{title}"), theirs)
    assert (ours.vectors == ItemEmbeddings.load(theirs).vectors).all()


@pytest.mark.parametrize(
    ("rows", "reference"),
    [
        (["popularity", "sasrec-id"], "sasrec-id"),
        (["sasrec-id", "popularity"], None),
        (["popularity", "markov"], None),
    ],
)
def test_an_evaluation_against_a_floor_of_before_is_not_kept(finished, world, rows, reference):
    recipe = load_recipe(finished.folder / "recipe.yaml", (*overrides(world), f"recommender.rows={rows}"))
    (stage,) = evaluate_stages(Run(finished.folder, recipe))
    assert stage.inputs().get("reference") == reference


@pytest.fixture(scope="module")
def floors(world, tmp_path_factory):
    """A run of floors alone, a fifth of the items held out."""
    changes = ("recommender.rows=[popularity, markov]", "data.split.cold_items=0.2")
    return lr.run("demo", tmp_path_factory.mktemp("floors") / "run", (*overrides(world), *changes))


@pytest.mark.parametrize("verb", ["csft", "iem", "encode", "fit"])
def test_a_verb_without_anything_to_do_says_so(floors, capsys, verb):
    getattr(lr, verb)(floors)
    assert f"skip   {verb}  (no row of this run needs it: popularity, markov)" in capsys.readouterr().err


def test_what_orders_events_of_equal_time_is_said_as_it_is():
    assert ties_in_words(SplitConfig()).endswith("equal time are ordered by item_id")
    assert ties_in_words(SplitConfig(by="given")).endswith("ordered by part, then item_id")


def test_held_out_items_have_a_table_of_their_own_in_the_terminal(floors, finished):
    assert "Targets never trained on: " in printed(*show(floors))
    assert "Targets never trained on" not in printed(*show(finished))


def command(world, folder):
    parts = [sys.executable, "-m", "llm2rec.cli", "run", "demo", "--out", str(folder)]
    return parts + [part for override in overrides(world) for part in ("--set", override)]


def wait_for(folder, pattern, process):
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "moment",
    ["data/main/started.json", "csft/checkpoints/checkpoint-*", "mntp/started.json"]
    + ["iem/checkpoints/checkpoint-4", "recommender/main/sasrec-id/seed-0/checkpoints/checkpoint-*"],
)
def test_a_killed_run_goes_on_to_the_same_result(finished, world, tmp_path, moment):
    process = subprocess.Popen(command(world, tmp_path / "run"), stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run", moment, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = lr.run("demo", tmp_path / "run", overrides(world))
    for stage in ("csft", "mntp", "iem"):
        weights = [load_file(run.folder / stage / "model.safetensors") for run in (finished, resumed)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        manifests = [artifacts.require(run.folder / stage, "csft") for run in (finished, resumed)]
        assert manifests[0].fingerprint == manifests[1].fingerprint
    assert fitted_weights(resumed) == fitted_weights(finished)
    assert resumed.metrics()["rows"] == finished.metrics()["rows"]


def test_a_second_live_run_in_the_folder_is_refused(world, tmp_path):
    process = subprocess.Popen(command(world, tmp_path / "run"), stderr=subprocess.PIPE, text=True)
    try:
        wait_for(tmp_path / "run", "data/main/started.json", process)
        with pytest.raises(ArtifactError, match="another llm2rec process"):
            lr.run("demo", tmp_path / "run", overrides(world))
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def three_domains(tmp_path_factory):
    """A run over three domains that share a language model, one of them never trained on."""
    folder = tmp_path_factory.mktemp("domains")
    sections = {}
    for name, options in (("films", "weight: 2"), ("books", "weight: 1"), ("songs", "role: out")):
        interactions, items = cyclic_log(users=12, items=8, events=6)
        interactions.write_csv(folder / f"{name}-log.csv")
        items.with_columns(pl.format(f"{name} {{}}", "title").alias("title")).write_csv(
            folder / f"{name}-items.csv"
        )
        sections[name] = f"{{interactions: {name}-log.csv, items: {name}-items.csv, history_length: 4, {options}}}"
    (folder / "recipe.yaml").write_text(
        "domains:\n"
        + "".join(f"  {name}: {section}\n" for name, section in sections.items())
        + "model: {source: tiny-random, dtype: float32}\n"
        "csft: {max_tokens: 2000, batch_tokens: 256}\n"
        "iem: {mntp: {steps: 2}, contrastive: {steps: 2, batch_size: 4}}\n"
        "recommender: {rows: [markov, sasrec-llm2rec], max_epochs: 2}\n"
        "evaluation: {k: [1], reference: markov, bootstrap_samples: 100}\n"
    )
    return lr.run(folder / "recipe.yaml", folder / "run")


def test_each_domain_has_its_own_recommender_and_evaluation(three_domains):
    for name in ("films", "books", "songs"):
        domain = three_domains.domain(name)
        assert (domain.recommender("sasrec-llm2rec", 0) / "model.safetensors").is_file()
        assert three_domains.metrics(name)["rows"]["markov"]["recall@1"]["mean"] == 1.0
        assert lr.recommend(three_domains, ["i03"], row="markov", domain=name)[0].item_id == "i04"


def test_metrics_of_several_domains_are_keyed_by_domain(three_domains):
    metrics = artifacts.read_json(three_domains.folder / "evaluation" / "metrics.json")
    assert list(metrics) == ["films", "books", "songs"]


def test_of_a_domain_with_role_out_no_title_is_trained_on(three_domains):
    mixture = load_mixture(three_domains)
    assert not [text for text in mixture.texts if text.startswith("songs")]
    assert len(mixture.training_texts) == 16
    assert set(artifacts.require(three_domains.csft, "csft").inputs) >= {"films.catalogue", "books.weight"}
    assert not [key for key in artifacts.require(three_domains.csft, "csft").inputs if key.startswith("songs")]


def test_the_settings_of_each_domain_are_those_that_its_results_were_made_with(three_domains):
    for name in ("films", "books", "songs"):
        assert lr.compare([three_domains], domain=name, against="markov")["comparisons"]
    domains = three_domains.recipe.domains
    books = domains["books"].model_copy(update={"weight": 7.0})
    recipe = three_domains.recipe.model_copy(update={"domains": {**domains, "books": books}})
    with pytest.raises(ArtifactError, match=r"was made with books\.weight .*, the recipe now says 7\.0"):
        lr.compare([Run(three_domains.folder, recipe)], domain="songs", against="markov")


def test_several_domains_must_be_named(three_domains):
    with pytest.raises(ConfigError, match="name one: films, books, songs"):
        lr.recommend(three_domains, ["i03"], row="markov")
