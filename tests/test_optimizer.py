"""AdamW in blocks: the same numbers as in whole matrices, for every parameter that moves."""

import copy

import optimi
import pytest
import torch
from torch import nn

from llm2rec import optimizer
from llm2rec.optimizer import BlockedAdamW, adamw


def network(dtype=torch.bfloat16):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 3)).to(dtype)


def groups_of(model):
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def moved(model, optimiser, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimiser.step()
        optimiser.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}


def test_blocks_give_the_weights_of_whole_matrices_to_the_bit(monkeypatch):
    monkeypatch.setattr(optimizer, "BLOCK", 64)  # several blocks a matrix
    start, whole, blocked = network(), network(), network()
    one = moved(whole, optimi.AdamW(groups_of(whole), kahan_sum=True, **OPTIONS))
    other = moved(blocked, BlockedAdamW(groups_of(blocked), **OPTIONS))
    assert all(not torch.equal(a, b) for a, b in zip(one, start.parameters(), strict=True))  # premise
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_matrix_that_is_not_contiguous_moves_as_one():
    contiguous, turned = nn.Linear(6, 4, bias=False).bfloat16(), nn.Linear(6, 4, bias=False).bfloat16()
    turned.weight = nn.Parameter(contiguous.weight.detach().T.contiguous().T)
    assert not turned.weight.is_contiguous()  # premise
    one, other = (
        moved(model, BlockedAdamW([{"params": [model.weight]}], **OPTIONS)) for model in (contiguous, turned)
    )
    assert torch.equal(one[0], other[0])


def test_a_reloaded_state_goes_on_to_the_same_weights():
    whole, resumed = network(), network()
    expected = moved(whole, BlockedAdamW(groups_of(whole), **OPTIONS), steps=4)
    first = BlockedAdamW(groups_of(resumed), **OPTIONS)
    gradients = torch.Generator().manual_seed(1)
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(first.state_dict())
            first = BlockedAdamW(groups_of(resumed), **OPTIONS)
            first.load_state_dict(saved)
        for parameter in resumed.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=gradients).bfloat16()
        first.step()
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, torch.optim.AdamW), (torch.bfloat16, BlockedAdamW)], ids=str
)
def test_the_dtype_of_the_weights_decides(dtype, kind):
    assert type(adamw(network(dtype), {"0.weight"}, 1e-3, 0.1)) is kind


def test_only_the_decayed_parameters_decay():
    model = network(torch.float32)
    decays = {
        id(p): group["weight_decay"]
        for group in adamw(model, {"0.weight"}, 1e-3, 0.1).param_groups
        for p in group["params"]
    }
    assert {name for name, p in model.named_parameters() if decays[id(p)]} == {"0.weight"}
