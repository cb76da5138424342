"""Loggers by name: what they are told, where it lies, and what happens without their package."""

import json
import os
import sys
from types import ModuleType

import pytest
import torch

import llm2rec as lr
from llm2rec import loggers
from llm2rec.errors import ConfigError
from llm2rec.loading import parse_recipe
from llm2rec.loggers import Loggers
from llm2rec.training import train
from test_training import Numbers, network, settings, squared_error


@pytest.fixture
def tensorboard(monkeypatch):
    """A stand-in for tensorboard's writer that remembers what it is told: folder -> [(name, value, step)]."""
    told = {}

    class SummaryWriter:
        def __init__(self, log_dir):
            self.scalars = told.setdefault(str(log_dir), [])

        def add_text(self, *_):
            pass

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            pass

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    return told


def test_a_training_tells_its_logger_what_it_writes_to_its_metrics(tmp_path, tensorboard):
    out = tmp_path / "demo" / "recommender" / "sasrec-id"
    logged = settings(loggers=Loggers(("tensorboard",), tmp_path / "demo"))
    train(network(), Numbers(), squared_error, out=out, settings=logged, description="x")
    (folder,) = tensorboard
    assert folder == str(tmp_path / "demo" / "tensorboard" / "recommender" / "sasrec-id")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["loss"], line["step"]) for line in lines if "loss" in line]
    assert [(value, step) for name, value, step in tensorboard[folder] if name == "train/loss"] == losses


def test_without_loggers_nobody_is_told(tmp_path, tensorboard):
    train(network(), Numbers(), squared_error, out=tmp_path, settings=settings(), description="x")
    assert tensorboard == {}


def test_settings_of_the_environment_stay_and_ours_are_taken_back(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    with Loggers(("wandb",), tmp_path).around(tmp_path / "csft"):
        assert (os.environ["WANDB_PROJECT"], os.environ["MLFLOW_EXPERIMENT_NAME"]) == ("mine", "llm2rec")
    assert "MLFLOW_EXPERIMENT_NAME" not in os.environ


def test_every_training_is_a_wandb_run_of_its_own(tmp_path, monkeypatch):
    finished = []
    module = ModuleType("wandb")
    module.finish = lambda: finished.append(1)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with Loggers(("wandb",), tmp_path).around(tmp_path / "csft"):
        assert finished == []
    assert finished == [1]


def test_a_training_is_called_by_its_place_in_the_run(tmp_path):
    named = Loggers((), tmp_path / "demo").name_of(tmp_path / "demo" / "recommender" / "main")
    assert named == "demo/recommender/main"


def test_a_missing_package_is_named_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == "trackio" else object())
    (tmp_path / "recipe.yaml").write_text(
        "data: {interactions: none.csv, items: none.csv}\nmodel: {source: tiny-random}\ncsft: {epochs: 1}\n"
        "iem: {mntp: {steps: 1}, contrastive: {steps: 1}}\nloggers: [wandb, trackio]\n"
    )
    with pytest.raises(ConfigError, match="trackio is not installed; pip install trackio"):
        lr.run(tmp_path / "recipe.yaml", tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


def test_an_unknown_logger_is_refused_with_the_known_ones():
    content = {"data": {"source": "x"}, "model": {"source": "x"}, "csft": {"epochs": 1}}
    content |= {"iem": {"mntp": {"steps": 1}, "contrastive": {"steps": 1}}, "loggers": ["neptune"]}
    with pytest.raises(ConfigError, match=r"loggers\.0.*tensorboard"):
        parse_recipe(content, "recipe")


def test_a_finished_training_leaves_no_time_in_its_metrics(tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(0)
        train(network(), Numbers(), squared_error, out=tmp_path / name, settings=settings(), description="x")
    assert (tmp_path / "one" / "metrics.jsonl").read_bytes() == (tmp_path / "two" / "metrics.jsonl").read_bytes()
