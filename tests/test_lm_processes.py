"""Two processes, as torchrun starts them, against one: the same curves, the same weights, one writer."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import TITLES, prepared_cycle, train_stage
from llm2rec import checkpoints
from llm2rec.data.embeddings import ItemEmbeddings
from llm2rec.data.sequences import Sequences
from llm2rec.data.tables import Catalogue
from llm2rec.errors import ConfigError
from llm2rec.lm import backbone as backbones
from llm2rec.lm.csft import csft
from llm2rec.lm.encode import encode
from llm2rec.lm.iem import MaskedBatches, TitleBatches, contrastive, distinct_texts, mntp
from llm2rec.lm.lora import Lora
from llm2rec.processes import Processes
from llm2rec.training import Optimizer, TrainSettings, train

pytestmark = pytest.mark.slow  # whole runs, several processes: CI runs them

SECONDS = 100


def work(root: Path, out: Path, shard: bool = False) -> None:
    """Every language stage from the prepared world in `root` into `out`; what each process runs."""
    sequences = Sequences.load(root / "data")
    items = Catalogue.read(root / "data" / "catalogue.parquet")
    shared = {"optimizer": Optimizer(learning_rate=3e-3), "shard": shard}
    train_stage(
        csft,
        sequences,
        items.titles,
        model=root / "tiny",
        history_length=4,
        max_tokens=1200,
        epochs=None,
        batch_tokens=256,
        micro_batch_tokens=64,
        checkpoints=0,
        evaluations=2,
        out=out / "csft",
        **shared,
    )
    options = {"steps": 4, "batch_size": 6}
    train_stage(
        mntp,
        items.titles,
        model=root / "tiny",
        mask_share=0.2,
        checkpoints=2,
        out=out / "mntp",
        **options,
        **shared,
    )
    train_stage(
        contrastive,
        sequences,
        items.titles,
        model=root / "tiny",
        temperature=0.1,
        dropout=0.0,
        evaluations=2,
        patience=5,
        micro_batch_tokens=20,
        positives="consumed-next",
        out=out / "iem",
        **(options | {"batch_size": 4}),
        **shared,
    )
    ids = [str(number) for number in range(len(TITLES))]
    shared = {"dtype": torch.float32, "max_title_tokens": 16, "batch_tokens": 64, "name": "x"}
    encode(ids, TITLES, model=root / "tiny", causal=False, shard_texts=6, out=out / "vectors", **shared)


def variants(root: Path, out: Path, shard: bool = False) -> None:
    """CSFT with adapters, with recomputed layers and with bfloat16 weights."""
    sequences = Sequences.load(root / "data")
    items = Catalogue.read(root / "data" / "catalogue.parquet")
    plain = {"checkpoints": 0, "shard": shard}
    plain |= {"history_length": 4, "max_tokens": 1200, "epochs": None, "optimizer": Optimizer(learning_rate=3e-3)}
    for name, options in VARIANTS.items():
        train_stage(
            csft,
            sequences,
            items.titles,
            model=root / "tiny",
            batch_tokens=256,
            micro_batch_tokens=64,
            out=out / name,
            **(plain | options),
        )


VARIANTS = {
    "adapters": {"lora": Lora(rank=4, alpha=8.0)},
    "recomputed": {"gradient_checkpointing": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def keep_all_checkpoints() -> None:
    """Makes this process delete none, so that a training can be taken back to an earlier one."""
    checkpoints._delete = lambda folders: None


def together(root, out, *, shard=False, task=work, keep_all=False):
    """`task` into `out` in two processes."""
    command = "import sys; from pathlib import Path; import test_lm_processes as tests; "
    command += "tests.keep_all_checkpoints(); " if keep_all else ""
    command += f"tests.{task.__name__}(*map(Path, sys.argv[1:]), shard={shard})"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    shared = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", command, str(root), str(out)],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module")
def world(tiny_folder, tmp_path_factory):
    """A folder with a prepared log, a model, and the results `one` of one process."""
    root = tmp_path_factory.mktemp("processes")
    prepared_cycle(root / "data", users=12)
    backbones.save(backbones.load(tiny_folder, torch.float32), root / "tiny")
    work(root, root / "one")
    return root


@pytest.fixture(scope="module", params=["two", "shared out"])
def folders(world, request):
    """The results of one process and of two, which keep every layer whole or share the layers out."""
    together(world, world / request.param, shard=request.param == "shared out")
    return world / "one", world / request.param


def logged(folder, name):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("stage", ["csft", "mntp", "iem"])
def test_two_processes_give_the_loss_curve_of_one(folders, stage):
    one, two = (logged(folder / stage, "loss") for folder in folders)
    assert len(one) >= 4 and max(one) - min(one) > 1e-3  # premise
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("stage", ["csft", "mntp", "iem"])
def test_two_processes_take_the_gradients_of_one(folders, stage):
    one, two = (logged(folder / stage, "grad_norm") for folder in folders)
    assert min(one) > 1e-2  # premise
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize(("stage", "measure"), [("csft", "eval_perplexity"), ("iem", "eval_auc")])
def test_two_processes_measure_what_one_measures(folders, stage, measure):
    one, two = (logged(folder / stage, measure) for folder in folders)
    assert len(one) == 2
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("stage", ["csft", "mntp", "iem"])
def test_two_processes_train_the_weights_of_one(folders, stage):
    one, two = (backbones.load(folder / stage, torch.float32, head=False).model.state_dict() for folder in folders)
    start = backbones.load(folders[0].parent / "tiny", torch.float32, head=False).model.state_dict()
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-3  # premise
    assert all(torch.allclose(one[name], two[name], atol=3e-4) for name in one)


def test_two_processes_encode_the_vectors_of_one(folders):
    one, two = (ItemEmbeddings.load(folder / "vectors") for folder in folders)
    assert one.item_ids == two.item_ids
    assert np.array_equal(one.vectors, two.vectors)


def test_two_processes_leave_the_files_of_one(folders):
    files = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if "rng_state" not in path.name}
        for folder in folders
    ]
    of_processes = {name for name in files[1] if name.endswith("optimizer-1.pt")}  # its part of what is shared out
    assert files[0] == files[1] - of_processes
    assert bool(of_processes) == (folders[1].name == "shared out")


@pytest.fixture
def interrupted(world, tmp_path):
    """A folder of stages that shared layers out and were killed between their last two checkpoints."""
    together(world, tmp_path / "killed", shard=True, keep_all=True)
    for stage in ("csft", "mntp", "iem"):
        (tmp_path / "killed" / stage / "model.safetensors").unlink()
        *earlier, last = sorted((tmp_path / "killed" / stage / "checkpoints").iterdir())
        assert earlier  # premise: there is something to go on from
        shutil.rmtree(last)
    return tmp_path / "killed"


@pytest.mark.parametrize("folders", ["shared out"], indirect=True)
def test_layers_that_are_shared_out_go_on_where_a_killed_training_stopped(folders, world, interrupted):
    together(world, interrupted, shard=True)
    for stage in ("csft", "mntp", "iem"):
        whole, resumed = (load_file(folder / stage / "model.safetensors") for folder in (folders[1], interrupted))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert logged(folders[1] / stage, "loss") == logged(interrupted / stage, "loss")


def test_a_checkpoint_shared_out_among_others_is_refused(world, interrupted):
    for checkpoint in (interrupted / "csft" / "checkpoints").iterdir():
        (checkpoint / "optimizer-2.pt").touch()
    with pytest.raises(AssertionError, match="shared out among 3 processes, these are 2"):
        together(world, interrupted, shard=True)


def test_layers_shared_out_take_adapters_recompute_and_round(world):
    variants(world, world / "variants one")
    together(world, world / "variants shared out", shard=True, task=variants)
    for name in VARIANTS:
        one, two = (
            load_file(world / f"variants {way}" / name / "model.safetensors") for way in ("one", "shared out")
        )
        start = load_file(world / "tiny" / "model.safetensors")
        tolerance = {"bfloat16": 6e-3}.get(name, 3e-4)
        assert max((one[key].float() - start[key]).abs().max() for key in one) > tolerance  # premise
        assert all(torch.allclose(one[key].float(), two[key].float(), atol=tolerance) for key in one), name


def test_one_process_has_nobody_to_share_layers_with(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    settings = TrainSettings(max_steps=1, learning_rate=0.1, seed=0)
    with pytest.raises(ConfigError, match="there is one: start several"):
        train(
            model,
            [1],
            lambda *_: 0,
            out=tmp_path,
            settings=settings,
            sharded=torch.nn.ModuleList(model),
            description="x",
        )


def test_micro_batches_that_cannot_be_shared_evenly_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("llm2rec.training.processes", lambda: Processes(0, 2))
    settings = TrainSettings(max_steps=1, learning_rate=0.1, seed=0, accumulation=3)
    with pytest.raises(ConfigError, match="3 micro-batches a step cannot be shared by 2 processes"):
        train(torch.nn.Linear(1, 1), [1], lambda *_: 0, out=tmp_path, settings=settings, description="x")


def test_fewer_titles_than_processes_are_refused(tiny):
    texts = distinct_texts(tiny.tokenizer, TITLES, 16, special_tokens=False)
    with pytest.raises(ConfigError, match="1 titles a step cannot be shared by 2"):
        MaskedBatches(texts, 0, 3, 1, 0.2, 0, parts=2)


def test_pairs_that_cannot_be_shared_evenly_are_refused(tiny):
    texts = distinct_texts(tiny.tokenizer, TITLES, 16, special_tokens=True)
    with pytest.raises(ConfigError, match="3 pairs of titles a step cannot be shared evenly by 2"):
        TitleBatches(texts, [np.arange(6).reshape(3, 2)], 1000, parts=2)


def test_the_parts_of_a_step_mask_what_the_whole_masks(tiny):
    texts = distinct_texts(tiny.tokenizer, TITLES, 16, special_tokens=False)
    whole, parts = (MaskedBatches(texts, 0, 3, 8, 0.2, 0, parts=parts) for parts in (1, 3))
    assert (len(whole), len(parts)) == (3, 9)
    for name in ("labels", "input_ids"):
        joined = torch.cat([parts[3 + part][name].flatten() for part in range(3)])
        assert torch.equal(joined, whole[1][name].flatten())
