import io

import pytest
import torch
from torch import nn

from llm2rec import optimizers
from llm2rec.optimizers import RoundedAdamW, adamw


def weights(dtype, rows=48):
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter((torch.randn(rows, 32, generator=generator) * 0.02).bfloat16().to(dtype))


def optimizer_of(weight, decay=0.0):
    return adamw([{"params": [weight], "weight_decay": decay}], 1e-3)


def take(optimizer, weight, steps, start=0):
    """Steps along gradients that fall like the square root of the steps, the same for every dtype."""
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(weight.shape, generator=generator)
        weight.grad = ((0.2 + noise) / (1 + step) ** 0.5).bfloat16().to(weight.dtype)
        optimizer.step()
    return optimizer.state[weight]["exp_avg_sq"]


def test_float32_weights_have_the_fused_one_of_torch():
    assert type(optimizer_of(weights(torch.float32))) is torch.optim.AdamW


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_bfloat16_weights_go_where_float32_ones_go(decay):
    rounded, exact = weights(torch.bfloat16), weights(torch.float32)
    seconds = [take(optimizer_of(weight, decay), weight, 1500) for weight in (rounded, exact)]
    assert torch.allclose(seconds[0], seconds[1], rtol=1e-4)
    moved = exact - weights(torch.float32)
    assert (rounded.float() - exact).norm() < 0.01 * moved.norm()


def test_decay_shrinks_bfloat16_weights_as_it_does_float32_ones():
    shrunk = []
    for dtype in (torch.bfloat16, torch.float32):
        kept, decayed = weights(dtype), weights(dtype)
        take(optimizer_of(kept), kept, 300)
        take(optimizer_of(decayed, decay=0.1), decayed, 300)
        shrunk.append((kept.float().norm() - decayed.float().norm()).item())
    assert shrunk[0] == pytest.approx(shrunk[1], rel=0.05)
    assert shrunk[1] > 0


def test_parts_are_stepped_as_the_whole(monkeypatch):
    whole, parted = weights(torch.bfloat16), weights(torch.bfloat16)
    take(optimizer_of(whole), whole, 20)
    monkeypatch.setattr(optimizers, "CHUNK", {"cpu": 100, "cuda": 100})
    take(optimizer_of(parted), parted, 20)
    assert torch.equal(whole, parted)


def test_a_saved_state_goes_on_to_the_bit():
    through, stopped = weights(torch.bfloat16), weights(torch.bfloat16)
    take(optimizer_of(through), through, 40)
    first = optimizer_of(stopped)
    take(first, stopped, 25)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optimizer_of(stopped)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert isinstance(second, RoundedAdamW)
    assert take(second, stopped, 15, start=25).dtype == torch.float32
    assert torch.equal(through, stopped)


def test_float32_weights_beside_bfloat16_ones_are_stepped_as_by_torch():
    ours, theirs = weights(torch.float32), weights(torch.float32)
    beside = weights(torch.bfloat16)
    take(adamw([{"params": [ours, beside], "weight_decay": 0.1}], 1e-3), ours, 30)
    take(optimizer_of(theirs, decay=0.1), theirs, 30)
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_gradients_are_left_as_they_were():
    weight = weights(torch.float32)
    optimizer = RoundedAdamW([{"params": [weight]}], 1e-3)
    weight.grad = torch.ones_like(weight).T.contiguous().T
    optimizer.step()
    assert torch.equal(weight.grad, torch.ones_like(weight))
