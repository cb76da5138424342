"""A linear map over a frozen table: the result and gradients of `F.linear`, in few rows at a time."""

import pytest
import torch
import torch.nn.functional as F

from llm2rec.rec import table_linear
from llm2rec.rec.table_linear import TableLinear

N, K, H = 23, 5, 3


def layer_and_table(dtype):
    generator = torch.Generator().manual_seed(0)
    layer = TableLinear(K, H)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer, torch.randn(N, K, generator=generator).to(dtype), torch.randn(N, H, generator=generator)


@pytest.mark.parametrize("rows", [4, 23, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradients_are_those_of_a_linear_layer(dtype, rows, monkeypatch):
    monkeypatch.setattr(table_linear, "ROWS", rows)
    layer, table, upstream = layer_and_table(dtype)
    mapped = layer(table)
    expected = F.linear(table.float(), layer.weight, layer.bias)
    assert mapped.dtype == torch.float32 and torch.allclose(mapped, expected, atol=1e-6)
    found = torch.autograd.grad(mapped, list(layer.parameters()), upstream)
    wanted = torch.autograd.grad(expected, list(layer.parameters()), upstream)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_under_autocast_the_result_has_its_dtype_and_the_gradients_are_close():
    layer, table, upstream = layer_and_table(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mapped = layer(table)
    assert mapped.dtype == torch.bfloat16
    assert torch.allclose(mapped.float(), layer(table), rtol=2e-2, atol=2e-2)
    found = torch.autograd.grad(mapped, list(layer.parameters()), upstream.bfloat16())
    wanted = torch.autograd.grad(layer(table), list(layer.parameters()), upstream)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32 and torch.allclose(one, other, rtol=3e-2, atol=5e-2)


def test_a_table_that_takes_a_gradient_gets_one():
    layer, table, upstream = layer_and_table(torch.float32)
    table.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(table), table, upstream)
    assert torch.allclose(gradient, upstream @ layer.weight, atol=1e-6)
