"""The engine: what it optimises, and that a killed training goes on to the same weights."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from llm2rec import checkpoints, training
from llm2rec.batches import Batches
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.training import Optimizer, TrainSettings, stage_seed, train


class Numbers(Batches):
    """Regression batches of uneven size, in another order in every epoch."""

    epoch = 0

    def __init__(self, sizes=(1, 7, 4, 2, 6, 4)):
        generator = torch.Generator().manual_seed(0)
        self.batches = [torch.randn(size, 3, generator=generator) for size in sizes]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        batch = self.batches[(index + self.epoch) % len(self.batches)]
        return {"x": batch, "n_targets": len(batch)}

    def set_epoch(self, epoch):
        self.epoch = epoch


def squared_error(model, batch):
    x = batch["x"].to(next(model.parameters()).dtype)
    return ((model(x)[:, 0] - x.sum(1)) ** 2).sum()


def network(dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(3, 4), nn.Dropout(dropout), nn.Linear(4, 1))


def settings(**changes):
    return TrainSettings(**({"max_steps": 6, "learning_rate": 0.01, "seed": 1} | changes))


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_loss_is_averaged_over_the_targets_of_the_whole_step(tmp_path):
    models = []
    for number, (sizes, accumulation) in enumerate([((8, 16), 1), ((1, 7, 4, 12), 2)]):
        model, batches = network(), Numbers(sizes)
        everything = torch.cat(Numbers((8, 16)).batches)
        batches.batches = list(everything.split(list(sizes)))
        options = settings(max_steps=2, accumulation=accumulation)
        train(model, batches, squared_error, out=tmp_path / str(number), settings=options, description="x")
        models.append(weights(model))
    assert torch.allclose(models[0], models[1], atol=1e-6)


@pytest.mark.parametrize("name", ["_clip_grad_norm", "loss_is_scaled_for_ga"])
def test_a_release_whose_trainer_would_not_call_ours_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.delattr(transformers.Trainer, name)
    with pytest.raises(ConfigError, match=rf"has no {name}.*transformers>=5\.19"):
        train(network(), Numbers(), squared_error, out=tmp_path, settings=settings(), description="x")


def test_frozen_parameters_stay_and_the_others_move(tmp_path):
    model = network()
    model[0].weight.requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    train(model, Numbers(), squared_error, out=tmp_path, settings=settings(), description="x")
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [False, True, True, True]


def test_the_best_weights_win(tmp_path):
    model, values, seen = network(), iter([0.1, 0.5, 0.3, 0.2]), []

    def evaluate():
        seen.append(weights(model))
        return {"ndcg@10": next(values)}

    summary = train(
        model,
        Numbers(),
        squared_error,
        out=tmp_path,
        settings=settings(max_steps=4, evaluate_every=1),
        evaluate=evaluate,
        description="x",
    )
    assert (summary.best_step, summary.best_metric) == (2, 0.5)
    assert torch.equal(weights(model), seen[1])


def test_training_stops_when_validation_no_longer_gains(tmp_path):
    model, values = network(), iter([0.5, 0.4, 0.3, 0.9])
    summary = train(
        model,
        Numbers(),
        squared_error,
        out=tmp_path,
        settings=settings(max_steps=4, evaluate_every=1, patience=2),
        evaluate=lambda: {"ndcg@10": next(values)},
        description="x",
    )
    assert summary.steps == 3


def test_the_last_step_is_validated_though_the_steps_are_no_multiple(tmp_path):
    values = iter([0.5, 0.9])
    summary = train(
        network(),
        Numbers(),
        squared_error,
        out=tmp_path,
        settings=settings(max_steps=3, evaluate_every=2),
        evaluate=lambda: {"ndcg@10": next(values)},
        description="x",
    )
    assert summary.best_step == 3


def test_of_a_measure_that_should_fall_the_lowest_wins(tmp_path):
    model, values, seen = network(), iter([0.5, 0.2, 0.3, 0.4]), []

    def evaluate():
        seen.append(weights(model))
        return {"perplexity": next(values)}

    options = settings(max_steps=9, evaluate_every=1, patience=2, metric="perplexity", greater_is_better=False)
    summary = train(
        model, Numbers(), squared_error, out=tmp_path, settings=options, evaluate=evaluate, description="x"
    )
    assert (summary.steps, summary.best_step, summary.best_metric) == (4, 2, 0.2)
    assert torch.equal(weights(model), seen[1])


def learning_rates(folder, **changes):
    """The learning rate of each of ten steps, as shares of the peak."""
    train(
        network(),
        Numbers(),
        squared_error,
        out=folder,
        settings=settings(max_steps=10, **changes),
        description="x",
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [round(line["learning_rate"] / 0.01, 3) for line in lines if "learning_rate" in line]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1] * 10),
        ({"warmup_share": 0.3}, [0, 0.333, 0.667, *[1] * 7]),
        ({"schedule": "linear", "warmup_share": 0.2}, [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ({"schedule": "cosine"}, [1, 0.976, 0.905, 0.794, 0.655, 0.5, 0.345, 0.206, 0.095, 0.024]),
        (
            {"schedule": "wsd", "warmup_share": 0.2, "decay_share": 0.4, "decay": "linear"},
            [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25],
        ),
        ({"schedule": "wsd", "decay_share": 0.4}, [1, 1, 1, 1, 1, 1, 1, 0.5, 0.293, 0.134]),
    ],
    ids=["constant", "constant after warm-up", "linear", "cosine", "wsd linear", "wsd 1-sqrt"],
)
def test_the_learning_rate_takes_its_course(tmp_path, changes, expected):
    assert learning_rates(tmp_path, **changes) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, "constant, linear, cosine, wsd"),
        ({"decay": "exponential"}, "1-sqrt, linear"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm"),
        ({"warmup_share": 1.0}, "warmup_share"),
        ({"schedule": "wsd", "warmup_share": 0.6, "decay_share": 0.5}, "at most 1"),
    ],
)
def test_an_impossible_course_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Optimizer(**({"learning_rate": 0.1} | changes))


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [2, 5, 8, 11])
@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, killed_at, evaluates, dtype):
    def run(folder, model, objective):
        options = settings(max_steps=12, checkpoint_every=2, evaluate_every=2 * evaluates, patience=9)
        evaluate = (lambda: {"ndcg@10": float(weights(model).sum())}) if evaluates else None
        return train(model, Numbers(), objective, out=folder, settings=options, evaluate=evaluate, description="x")

    whole = network(dropout=0.5).to(dtype)
    expected = run(tmp_path / "whole", whole, squared_error)
    calls = iter(range(100))

    def until_killed(model, batch):
        if next(calls) == killed_at:
            raise Killed
        return squared_error(model, batch)

    with pytest.raises(Killed):
        run(tmp_path / "killed", network(dropout=0.5).to(dtype), until_killed)
    resumed = network(dropout=0.5).to(dtype)
    summary = run(tmp_path / "killed", resumed, squared_error)
    assert torch.equal(weights(whole), weights(resumed))
    assert summary.best_step == expected.best_step


def test_the_seconds_of_a_resumed_training_are_those_of_all_its_parts(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("llm2rec.training.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def objective(model, batch):  # a second each; killed in the sixth step, after the checkpoint of the fourth
        now[0] += 1
        if now[0] == 6:
            raise Killed
        return squared_error(model, batch)

    def run():
        options = settings(max_steps=8, checkpoint_every=4)
        return train(network(), Numbers(), objective, out=tmp_path, settings=options, description="x")

    with pytest.raises(Killed):
        run()
    assert run().seconds == 8
    assert run().seconds == 8  # finished: nothing is trained further


def test_a_checkpoint_that_was_not_written_whole_is_ignored(tmp_path):
    half = tmp_path / "checkpoints" / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "trainer_state.json").write_text("{")
    summary = train(network(), Numbers(), squared_error, out=tmp_path, settings=settings(), description="x")
    assert summary.steps == 6


def test_an_older_checkpoint_goes_only_once_the_newer_one_is_complete(tmp_path, monkeypatch):
    def complete():
        return sorted(path.parent.name for path in tmp_path.glob("checkpoints/*/complete"))

    seen = []
    delete = checkpoints._delete
    monkeypatch.setattr(checkpoints, "_delete", lambda folders: seen.append(complete()) or delete(folders))
    scores = iter([0.5, 0.9, 0.3, 0.4])
    train(
        network(),
        Numbers(),
        squared_error,
        out=tmp_path,
        settings=settings(max_steps=8, evaluate_every=2),
        evaluate=lambda: {"ndcg@10": next(scores)},
        description="x",
    )
    steps = [[f"checkpoint-{step}" for step in kept] for kept in ([], [2], [2, 4], [4, 6], [4, 6, 8])]
    assert seen == steps  # before each deletion; the best is step 4
    assert complete() == ["checkpoint-4", "checkpoint-8"]


def test_a_checkpoint_killed_while_it_was_deleted_is_not_resumed(tmp_path, monkeypatch):
    def killed(folder):
        raise Killed

    monkeypatch.setattr("llm2rec.checkpoints.shutil.rmtree", killed)
    options = settings(max_steps=6, checkpoint_every=2)
    with pytest.raises(Killed):
        train(network(), Numbers(), squared_error, out=tmp_path, settings=options, description="x")
    left = {path.name: (path / "complete").exists() for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"checkpoint-2": False, "checkpoint-4": True}


def test_a_finished_training_is_not_trained_further(tmp_path):
    options = settings(max_steps=4, checkpoint_every=2)
    first, second = network(), network()
    train(first, Numbers(), squared_error, out=tmp_path, settings=options, description="x")
    train(second, Numbers(), lambda model, batch: 1 / 0, out=tmp_path, settings=options, description="x")
    assert torch.equal(weights(first), weights(second))


def test_a_non_finite_loss_stops_keeps_the_checkpoint_and_names_the_batch(tmp_path):
    calls = iter(range(100))

    def broken(model, batch):
        return squared_error(model, batch) * (float("nan") if next(calls) == 4 else 1)

    options = settings(checkpoint_every=2)
    with pytest.raises(ArtifactError, match=r"loss is nan at step 5 \(batch 4 with 6 targets\)"):
        train(network(), Numbers(), broken, out=tmp_path, settings=options, description="x")
    assert (tmp_path / "checkpoints" / "checkpoint-4" / "complete").exists()


def test_a_non_finite_gradient_stops_before_the_weights_move(tmp_path):
    model, seen = network(), []

    def broken(model, batch):
        seen.append(weights(model))
        loss = squared_error(model, batch)
        if len(seen) == 3:
            loss = loss + model[0].weight.sub(model[0].weight.detach()).abs().sum().sqrt()  # finite, slope is not
        return loss

    with pytest.raises(ArtifactError, match="gradient is nan at step 3"):
        train(model, Numbers(), broken, out=tmp_path, settings=settings(), description="x")
    assert torch.equal(weights(model), seen[2])


def test_too_little_disk_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("llm2rec.artifacts.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ArtifactError, match="GB free"):
        train(
            network(),
            Numbers(),
            squared_error,
            out=tmp_path,
            settings=settings(checkpoint_every=2),
            description="x",
        )


def test_bfloat16_weights_keep_small_updates(tmp_path):
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 256.0)  # one step of 0.1 is far below bfloat16's resolution of 2

    class Ones(Batches):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            return {"x": torch.ones(1, 1, dtype=torch.bfloat16), "n_targets": 1}

    train(
        model,
        Ones(),
        lambda m, batch: m(batch["x"]).float().sum(),
        out=tmp_path,
        settings=settings(max_steps=100, learning_rate=0.1),
        description="x",
    )
    assert model.weight.item() == pytest.approx(246, abs=2)


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train(network(0.5), Numbers(), squared_error, out=tmp_path, settings=settings(), description="x")
    assert torch.equal(torch.rand(1), expected)


def test_logged_values_are_written_as_lines_of_json(tmp_path):
    train(network(), Numbers(), squared_error, out=tmp_path, settings=settings(), description="x")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 6), (1e6, 0)])
def test_freed_memory_is_given_back_now_and_then(tmp_path, monkeypatch, seconds, times):
    trimmed = []
    monkeypatch.setattr(training, "TRIM_SECONDS", seconds)
    monkeypatch.setattr(training.memory, "trim", lambda: trimmed.append(1))
    train(network(), Numbers(), squared_error, out=tmp_path, settings=settings(max_steps=6), description="x")
    assert len(trimmed) == times


def test_stages_have_seeds_of_their_own():
    assert stage_seed(0, "csft") == stage_seed(0, "csft")
    assert len({stage_seed(0, "csft"), stage_seed(0, "iem"), stage_seed(1, "csft")}) == 3
