"""A longer CSFT that goes on from what a shorter one had before its decay."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import llm2rec as lr
from conftest import cyclic_log
from llm2rec import artifacts
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.lm import csft as module
from llm2rec.loading import load_recipe
from llm2rec.stages.base import AUTO, DTYPE

SMALL = (
    "model.source=tiny-random",
    "model.dtype=float32",
    "data.history_length=4",
    "csft.batch_tokens=256",
    "csft.micro_batch_tokens=128",
    "csft.schedule=wsd",
    "csft.warmup_share=0.1",
    "csft.learning_rate=0.01",
    "csft.checkpoints=2",
    "recommender.rows=[sasrec-csft-causal]",
)


def overrides(world, *changes):
    return (f"data.interactions={world}/interactions.csv", f"data.items={world}/items.csv", *SMALL, *changes)


def train(place, world, *changes):
    return lr.csft(lr.prepare(lr.runs.create_run("demo", place, overrides(world, *changes))))


def weights(run):
    return load_file(run.csft / "model.safetensors")


def steps(run):
    return artifacts.require(run.csft, "csft").summary["steps"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    interactions, items = cyclic_log()
    interactions.write_csv(folder / "interactions.csv")
    items.write_csv(folder / "items.csv")
    return folder


@pytest.fixture(scope="module")
def short(world, tmp_path_factory):
    """2,560 tokens; the warm-up is one step of ten."""
    return train(tmp_path_factory.mktemp("short") / "run", world, "csft.max_tokens=2560")


def test_an_extended_training_ends_as_one_that_took_every_step_itself(short, world, tmp_path, caplog, capsys):
    assert artifacts.read_json(short.csft / "stable" / "trainer_state.json")["global_step"] < steps(short)
    through = train(tmp_path / "through", world, "csft.max_tokens=5120", "csft.warmup_share=0.05")
    assert steps(through) > steps(short)
    extended = train(tmp_path / "extended", world, "csft.max_tokens=5120", f"csft.extends={short.folder}")
    assert all(torch.equal(one, weights(through)[name]) for name, one in weights(extended).items())
    assert "do not match" not in caplog.text + capsys.readouterr().err
    further = train(tmp_path / "further", world, "csft.max_tokens=7680", f"csft.extends={extended.folder}")
    assert steps(further) > steps(extended)
    assert artifacts.require(short.csft, "csft")  # what was extended is as it was


def test_it_repeats_no_step(short, world, tmp_path, monkeypatch):
    seen = []
    loss = module.TokenObjective.__call__

    def counted(self, model, batch):
        seen.extend([batch["index"]] if "index" in batch else [])  # held-out batches have no number
        return loss(self, model, batch)

    monkeypatch.setattr(module.TokenObjective, "__call__", counted)
    extended = train(tmp_path / "run", world, "csft.max_tokens=5120", f"csft.extends={short.folder}")
    taken = artifacts.read_json(short.csft / "stable" / "trainer_state.json")["global_step"]
    assert len(seen) == 2 * (steps(extended) - taken)  # two micro-batches a step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["csft.learning_rate=0.02", "csft.max_tokens=5120"], "trained with other csft.learning_rate"),
        (["data.history_length=3", "csft.max_tokens=5120"], "trained with other data.history_length"),
        (["csft.max_tokens=1024"], "steps before its decay, this training only"),
        (["csft.max_tokens=5120", "csft.schedule=cosine"], "set schedule wsd"),
    ],
)
def test_a_training_that_cannot_be_extended_is_refused(short, world, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", world, f"csft.extends={short.folder}", *changes)


@pytest.mark.parametrize(("processes", "refused"), [(2, False), (3, True)])
def test_a_number_of_processes_that_makes_other_micro_batches_is_refused(
    short, world, tmp_path, monkeypatch, processes, refused
):
    assert module.processes_of(short.csft / "stable") == 1
    monkeypatch.setattr(module, "processes_of", lambda checkpoint: processes)
    longer = tmp_path / "run", world, "csft.max_tokens=5120", f"csft.extends={short.folder}"
    if not refused:  # two take one of the two micro-batches of a step each
        assert steps(train(*longer)) > steps(short)
        return
    with pytest.raises(ArtifactError, match="stable was trained by 3 processes, and 1 would cut"):
        train(*longer)


def test_the_run_that_is_extended_is_found_from_the_recipe_s_folder(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {source: movielens-100k}\nmodel: {source: tiny-random}\n"
        "csft: {max_tokens: 8192, schedule: wsd, extends: runs/short}\n"
        "iem: {mntp: {steps: 1}, contrastive: {steps: 1}}\n"
    )
    assert load_recipe(recipe).csft.extends == str(tmp_path / "runs/short")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(recipe, ["csft.extends=other"]).csft.extends == str(tmp_path / "other")
    assert load_recipe(recipe, ["csft.extends=null"]).csft.extends is None


def test_a_training_that_validation_stops_keeps_nothing_to_go_on_from(world, tmp_path):
    run = train(tmp_path / "run", world, "csft.max_tokens=2560", "csft.evaluations=2")
    assert not (run.csft / "stable").exists()


def test_a_run_without_checkpoints_cannot_be_extended(world, tmp_path):
    short = train(tmp_path / "short", world, "csft.max_tokens=2560", "csft.checkpoints=0")
    with pytest.raises(ConfigError, match="train it with checkpoints"):
        # `checkpoints` may differ, what it left may not be missing
        train(tmp_path / "long", world, "csft.max_tokens=5120", f"csft.extends={short.folder}")


def test_the_run_that_is_extended_must_stay(short, world, tmp_path):
    gone = tmp_path / "short"
    shutil.copytree(short.folder, gone)
    train(tmp_path / "run", world, "csft.max_tokens=5120", f"csft.extends={gone}")
    shutil.rmtree(gone)
    with pytest.raises(ArtifactError, match="holds no finished 'csft' stage"):
        train(tmp_path / "run", world, "csft.max_tokens=5120", f"csft.extends={gone}")


def bound_to(folder, world, dtype):
    """A run folder that has measured the faster number format already."""
    run = lr.runs.create_run("demo", folder, overrides(world))
    artifacts.write_json(folder / DTYPE, {AUTO: dtype})
    return run.folder


def test_a_training_is_not_extended_in_another_number_format(world, tmp_path):
    auto = ("model.dtype=auto", "csft.max_tokens=2560")
    short = train(bound_to(tmp_path / "short", world, "float32"), world, *auto)
    longer = ("model.dtype=auto", "csft.max_tokens=5120", f"csft.extends={short.folder}")
    with pytest.raises(ConfigError, match="was trained in float32, .* works in bfloat16"):
        train(bound_to(tmp_path / "other", world, "bfloat16"), world, *longer)
    train(tmp_path / "fresh", world, *longer)  # whatever this machine is faster in
    assert artifacts.read_json(tmp_path / "fresh" / DTYPE) == {AUTO: "float32"}
