"""Low-rank adapters: trained alone, merged without a change of the vectors, refused where they match nothing."""

import importlib.util
import sys

import numpy as np
import pytest
import torch

from conftest import TITLES, train_stage, vectors_of
from llm2rec.errors import ConfigError
from llm2rec.lm import backbone as backbones
from llm2rec.lm.iem import mntp
from llm2rec.lm.lora import Lora, attach

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed (pip install 'llm2rec[lora]')"
)
LORA = Lora(rank=2, alpha=8.0, targets=("q_proj", "mlp.up_proj"))


def test_targets_that_match_nothing_are_refused_with_those_that_there_are(tiny):
    with pytest.raises(ConfigError, match=r"'query'.*'k_proj'"):
        attach(tiny, Lora(targets=("q_proj", "query")), seed=0)


def test_the_head_is_no_target(tiny):
    with pytest.raises(ConfigError, match="'lm_head' matches no"):
        attach(tiny, Lora(targets=("lm_head",)), seed=0)


@pytest.mark.parametrize("changes", [{"rank": 0}, {"alpha": 0.0}, {"targets": ()}])
def test_impossible_sizes_are_refused(changes):
    with pytest.raises(ConfigError, match="rank >= 1"):
        Lora(**changes)


def test_without_peft_the_extra_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"llm2rec\[lora\]"):
        attach(tiny, LORA, seed=0)


@needs_peft
def test_fresh_adapters_change_nothing(tiny):
    before = vectors_of(tiny, TITLES)
    attach(tiny, LORA, seed=0)
    after = vectors_of(tiny, TITLES)
    assert np.abs(before - after).max() < 1e-6


@needs_peft
def test_merged_vectors_equal_those_of_the_adapters(tiny):
    before = vectors_of(tiny, TITLES)
    merge = attach(tiny, LORA, seed=0)
    with torch.no_grad():
        for name, parameter in tiny.model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    adapted = vectors_of(tiny, TITLES)
    merge()
    merged = vectors_of(tiny, TITLES)
    assert np.abs(adapted - before).max() > 1e-2  # premise
    assert np.abs(adapted - merged).max() < 1e-4
    assert not any("lora" in name for name, _ in tiny.model.named_modules())


@needs_peft
def test_only_the_targets_change_in_a_training_with_adapters(tiny_folder, tmp_path):
    budget = {"steps": 3, "batch_size": 8, "mask_share": 0.2, "checkpoints": 1}
    train_stage(mntp, TITLES, model=tiny_folder, out=tmp_path, lora=LORA, **budget)
    before, after = (
        dict(backbones.load(folder, torch.float32).model.named_parameters()) for folder in (tiny_folder, tmp_path)
    )
    changed = {name.split(".", 3)[-1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"self_attn.q_proj.weight", "mlp.up_proj.weight"}
