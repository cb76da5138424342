"""Compiled layers: the vectors, losses and gradients of the plain ones, in few graphs."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from conftest import TITLES, vectors_of
from llm2rec.errors import ConfigError
from llm2rec.lm import attention
from llm2rec.lm import backbone as backbones
from llm2rec.lm.csft import TokenObjective
from llm2rec.lm.packing import pack
from llm2rec.lm.pooling import embed

with_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)


def batch(lengths):
    tokens = np.random.default_rng(len(lengths)).integers(0, 250, sum(lengths))
    rows = np.arange(sum(lengths) - 1)
    packed = pack(tokens, np.array(lengths))
    return {
        **packed,
        "rows": torch.from_numpy(rows),
        "labels": torch.from_numpy(tokens[1:]),
        "n_targets": len(rows),
    }


def gradients(lm, packed):
    lm.model.zero_grad()
    loss = TokenObjective(lm)(lm.model, packed)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in lm.body.parameters()]


@pytest.fixture
def traced(monkeypatch):
    """Layers are traced and differentiated as for compiling, but run as they are: seconds instead of minutes."""
    compile_module = nn.Module.compile
    traced = partial(compile_module, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: traced(module, **options))
    monkeypatch.setattr("llm2rec.lm.backbone.shutil.which", lambda name: name)


@pytest.mark.parametrize("causal", [True, False])
def test_traced_layers_give_the_loss_and_the_gradients_of_plain_ones_in_few_graphs(tiny_folder, traced, causal):
    plain = backbones.load_for_training(tiny_folder, torch.float32, causal=causal)
    compiled = backbones.load_for_training(tiny_folder, torch.float32, causal=causal, compiled=True)
    torch._dynamo.utils.counters.clear()
    for lengths in ([5, 9, 3], [12, 4], [2, 2, 7, 6, 20], [30, 8, 3, 11]):
        one, other = (gradients(lm, batch(lengths)) for lm in (plain, compiled))
        assert torch.allclose(one[0], other[0], rtol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one[1], other[1], strict=True))
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@torch._dynamo.config.patch(recompile_limit=1)
def test_more_kinds_of_rows_are_compiled_than_torch_allows_by_itself(tiny_folder, traced):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = backbones.load_for_training(tiny_folder, torch.float32, causal=True, compiled=True)
    for lengths in ([5, 9, 3], [3] * 12 + [30, 40], [8, 7, 7, 2], [4] * 15 + [50, 60]):
        gradients(compiled, batch(lengths))
    frames = torch._dynamo.utils.counters["frames"]
    assert (frames["total"], frames["ok"]) == (2, 2), "one graph for rows of one block, one for rows of two"


@pytest.mark.slow
@with_compiler
def test_compiled_layers_give_the_loss_and_the_gradients_of_plain_ones(tiny_folder):
    plain = backbones.load_for_training(tiny_folder, torch.float32, causal=True)
    compiled = backbones.load_for_training(tiny_folder, torch.float32, causal=True, compiled=True)
    one, other = (gradients(lm, batch([5, 9, 3])) for lm in (plain, compiled))
    assert torch.allclose(one[0], other[0], rtol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.slow
@with_compiler
def test_compiled_layers_give_the_vectors_of_plain_ones(tiny_folder):
    plain, compiled = (backbones.load(tiny_folder, torch.float32, head=False) for _ in range(2))
    for lm in (plain, compiled):
        lm.set_causal(False)
    compiled.compile_layers()
    one, other = (vectors_of(lm, TITLES, 100) for lm in (plain, compiled))
    assert np.abs(one - other).max() < 1e-5


@pytest.mark.slow
@with_compiler
def test_compiled_layers_drop_out_the_same_with_and_without_gradients(tiny_folder):
    lm = backbones.load_for_training(tiny_folder, torch.float32, causal=False, head=False, compiled=True)
    lm.model.train()

    def vectors(seed, gradients):  # a contrastive step encodes a chunk without gradients, then again with them
        torch.manual_seed(seed)
        with torch.set_grad_enabled(gradients):
            return embed(lm, batch([5, 9, 3])).detach()

    with attention.dropout(lm.model, 0.5):
        first, other = (vectors(seed, gradients=False) for seed in (0, 1))
        assert not torch.allclose(first, other, atol=1e-2)  # premise: there is dropout
        assert torch.allclose(first, vectors(0, gradients=True), atol=1e-5)


def test_compiled_layers_are_saved_as_plain_ones(tiny_folder, tmp_path, traced):
    compiled = backbones.load(tiny_folder, torch.float32)
    compiled.compile_layers()
    backbones.save(compiled, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()


def test_without_a_compiler_it_is_refused(tiny, monkeypatch):
    monkeypatch.setattr("llm2rec.lm.backbone.shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        tiny.compile_layers()


def test_together_with_gradient_checkpointing_it_is_refused(tiny):
    tiny.checkpoint_gradients()
    with pytest.raises(ConfigError, match="exclude each other"):
        tiny.compile_layers()
