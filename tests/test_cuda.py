"""The same on a GPU: states, losses and vectors of a CPU, and the whole job. Skipped where there is none."""

import copy

import numpy as np
import pytest
import torch

import llm2rec as lr
from conftest import TITLES, vectors_of
from llm2rec.lm import backbone as backbones
from llm2rec.lm.csft import TokenObjective
from llm2rec.lm.packing import pack, to_device
from llm2rec.optimizers import adamw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SMALL = (
    "model.source=tiny-random",
    "data.history_length=4",
    "csft.max_tokens=4000",
    "csft.batch_tokens=256",
    "iem.mntp.steps=8",
    "iem.contrastive.steps=8",
    "iem.contrastive.batch_size=8",
    "recommender.rows=[sasrec-id, gru4rec-llm2rec, esasrec-llm2rec+sum, sasrec-csft]",
    "recommender.max_epochs=40",
    "recommender.patience=40",
    "recommender.dropout=0.0",
    "recommender.hidden_size=32",
    "recommender.learning_rate=0.01",
    "evaluation.k=[1, 5]",
)


def batch():
    lengths = np.array([5, 9, 3])
    tokens = np.random.default_rng(0).integers(5, 250, lengths.sum())
    rows = np.arange(len(tokens) - 1)
    return {**pack(tokens, lengths), "rows": torch.from_numpy(rows), "labels": torch.from_numpy(tokens[1:])}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_losses_and_gradients_are_those_of_a_cpu(tiny, causal, compiled):
    found = []
    for device in ("cpu", "cuda"):
        lm = backbones.Backbone(copy.deepcopy(tiny.model).to(device), tiny.tokenizer)
        lm.set_causal(causal)
        if compiled and device == "cuda":
            lm.compile_layers()
        loss = TokenObjective(lm)(lm.model, to_device(batch(), torch.device(device)))
        loss.backward()
        found.append((loss.item(), [parameter.grad.cpu() for parameter in lm.body.parameters()]))
    (loss, gradients), (other_loss, others) = found
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert all(torch.allclose(one, other, atol=1e-3) for one, other in zip(gradients, others, strict=True))


def test_vectors_are_those_of_a_cpu(tiny_folder):
    found = []
    for device in ("cpu", "cuda"):
        lm = backbones.load(tiny_folder, torch.float32, head=False)
        lm.set_causal(False)
        lm.model.to(device)
        found.append(vectors_of(lm, TITLES, 100))
    assert np.abs(found[0] - found[1]).max() < 1e-3


def test_weights_are_stepped_as_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 32), (32,), (48, 32), (7,)]
    start = [(torch.randn(shape, generator=generator) * 0.02).bfloat16() for shape in shapes]
    slopes = [[torch.randn(shape, generator=generator).bfloat16() for shape in shapes] for _ in range(30)]
    found = []
    for device in ("cpu", "cuda"):
        weights = [torch.nn.Parameter(one.to(device)) for one in start]
        optimizer = adamw([{"params": weights, "weight_decay": 0.1}], 1e-3)
        for gradients in slopes:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.to(device)
            optimizer.step()
        found.append([weight.detach().cpu() for weight in weights])
    assert all(torch.allclose(one, other, rtol=0.01) for one, other in zip(*found, strict=True))  # a last bit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_job_runs_and_learns(cyclic_files, tmp_path, dtype):
    interactions, items = cyclic_files
    files = (f"data.interactions={interactions}", f"data.items={items}")
    settings = (f"model.dtype={dtype}", f"recommender.dtype={dtype}")
    run = lr.run("demo", tmp_path / "run", (*files, *SMALL, *settings))
    assert run.metrics()["rows"]["sasrec-id"]["recall@1"]["mean"] == 1.0
    assert lr.recommend(run, ["i03", "i04", "i05"], k=1, row="sasrec-id")[0].item_id == "i06"
