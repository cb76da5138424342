"""A whole run by two processes, as torchrun starts them, against the same run by one."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import llm2rec as lr
from conftest import cyclic_log
from llm2rec import artifacts, processes
from llm2rec.data.embeddings import ItemEmbeddings

SECONDS = 120
SETTINGS = (
    "model.source=tiny-random",
    "model.dtype=float32",
    "data.history_length=4",
    "csft.max_tokens=1500",
    "csft.batch_tokens=256",
    "csft.micro_batch_tokens=64",
    "iem.mntp.steps=3",
    "iem.mntp.batch_size=6",
    "iem.contrastive.steps=3",
    "iem.contrastive.batch_size=4",
    "iem.contrastive.positives=consumed-next",
    "iem.contrastive.dropout=0",
    "recommender.rows=[markov, sasrec-llm2rec]",
    "recommender.max_epochs=2",
    "recommender.hidden_size=16",
    "evaluation.k=[1, 5]",
    "evaluation.reference=markov",
    "evaluation.bootstrap_samples=100",
)

pytestmark = pytest.mark.slow  # whole runs, several processes: CI runs them


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launched(*arguments):
    """`llm2rec ARGUMENTS` in two processes."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command = [sys.executable, *torchrun, "--master-port", free_port(), "-m", "llm2rec.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finished(process):
    """Status, stdout and stderr of a launched command."""
    try:
        out, errors = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run of one process and of two, and what the latter printed."""
    root = tmp_path_factory.mktemp("processes")
    interactions, items = cyclic_log(users=12)
    interactions.write_csv(root / "interactions.csv")
    items.write_csv(root / "items.csv")
    files = (f"data.interactions={root}/interactions.csv", f"data.items={root}/items.csv")
    overrides = [part for override in (*files, *SETTINGS) for part in ("--set", override)]
    running = launched("run", "demo", "--out", str(root / "two"), *overrides)
    one = lr.run("demo", root / "one", (*files, *SETTINGS))
    status, out, errors = finished(running)
    assert status == 0, errors[-3000:]
    return one, lr.open_run(root / "two"), out, errors


def test_the_recipe_for_large_models_trains_in_two_processes_the_weights_of_one(runs, tmp_path):
    files = [f"data.{name}={runs[0].folder.parent}/{name}.csv" for name in ("interactions", "items")]
    settings = (*files, *SETTINGS)
    overrides = [part for override in settings for part in ("--set", override)]
    running = launched("run", "large", "--out", str(tmp_path / "two"), *overrides)
    whole = [f"{section}.shard=false" for section in ("csft", "iem.mntp", "iem.contrastive")]
    one = lr.run("large", tmp_path / "one", (*settings, *whole))
    status, _, errors = finished(running)
    assert status == 0, errors[-3000:]
    for stage in ("csft", "mntp", "iem"):
        weights = [load_file(tmp_path / way / stage / "model.safetensors") for way in ("one", "two")]
        assert all(torch.allclose(weights[0][name], weights[1][name], atol=2e-5) for name in weights[0])
    assert one.recipe.csft.gradient_checkpointing and not one.recipe.csft.shard
    assert lr.open_run(tmp_path / "two").recipe.csft.shard


@pytest.mark.parametrize("stage", ["csft", "mntp", "iem"])
def test_two_processes_train_the_weights_of_one(runs, stage):
    one, two = (load_file(run.folder / stage / "model.safetensors") for run in runs[:2])
    start = load_file(runs[0].backbone / "model.safetensors")
    assert (
        max((one[name] - start.get(name, start.get(f"model.{name}"))).abs().max() for name in one) > 1e-4
    )  # premise
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


def test_two_processes_encode_the_vectors_of_one(runs):
    one, two = (ItemEmbeddings.load(run.embeddings("llm2rec")) for run in runs[:2])
    assert one.item_ids == two.item_ids
    assert np.allclose(one.vectors, two.vectors, atol=1e-3)


def test_one_of_two_processes_keeps_the_log_and_the_manifests(runs):
    one, two = ([json.loads(line) for line in (run.folder / "log.jsonl").open()] for run in runs[:2])
    told = [[(entry["stage"], entry["event"]) for entry in log] for log in (one, two)]
    assert told[0] == told[1]
    stages = [artifacts.read_json(run.folder / "resolved.json")["stages"].keys() for run in runs[:2]]
    assert stages[0] == stages[1]


def test_one_of_two_processes_fits_and_evaluates(runs):
    rows = [run.metrics()["rows"] for run in runs[:2]]
    assert rows[0]["markov"] == rows[1]["markov"]
    assert rows[0].keys() == rows[1].keys()


def test_one_of_two_processes_speaks(runs):
    _, _, out, errors = runs
    assert out.count("report: ") == 1
    assert errors.count("done   csft") == 1


def test_an_error_of_the_main_process_ends_all_of_them_with_one_message(tmp_path):
    status, _, errors = finished(launched("csft", str(tmp_path / "nothing")))
    assert status != 0
    assert errors.count("is not a run folder") == 1


def test_a_single_process_agrees_with_itself_and_has_nobody_to_part_from(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    own = processes.processes()
    processes.part()
    assert own.agreed("x") == "x" and own.is_main


@pytest.mark.parametrize(
    ("count", "rank", "leads"), [(None, "1", True), ("1", "1", True), ("2", "0", True), ("2", "1", False)]
)
def test_only_of_several_processes_does_a_rank_make_one_follow(monkeypatch, count, rank, leads):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if count:
        monkeypatch.setenv("WORLD_SIZE", count)
    assert processes.is_main() == leads
