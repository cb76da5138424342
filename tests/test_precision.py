"""Which number format is taken, and that it stays the same one."""

import pytest
import torch

from llm2rec import precision


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Nothing measured before, on a machine without an accelerator."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    precision._faster.cache_clear()
    yield
    precision._faster.cache_clear()


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_named_format_is_taken_without_measuring(name, monkeypatch):
    monkeypatch.setattr(precision, "_matmul_seconds", lambda dtype: pytest.fail("measured"))
    assert precision.resolve_dtype(name) == getattr(torch, name)


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_auto_takes_the_faster_and_keeps_to_it_on_a_machine_that_becomes_busy(faster, monkeypatch):
    monkeypatch.setattr(precision, "_matmul_seconds", lambda dtype: 1.0 if dtype == faster else 2.0)
    assert precision.resolve_dtype("auto") == faster
    monkeypatch.setattr(precision, "_matmul_seconds", lambda dtype: 2.0 if dtype == faster else 1.0)
    assert precision.resolve_dtype("auto") == faster


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_auto_measures_an_accelerator_too_as_some_only_emulate_bfloat16(faster, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision, "_matmul_seconds", lambda dtype: 1.0 if dtype == faster else 2.0)
    assert precision.resolve_dtype("auto") == faster


def test_a_product_on_an_accelerator_is_waited_for(monkeypatch):
    ones, waited = torch.ones, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    monkeypatch.setattr(torch, "ones", lambda *size, device, dtype: ones(2, 2, dtype=dtype))
    assert precision._matmul_seconds(torch.float32, repeats=3) > 0
    assert len(waited) == 4
