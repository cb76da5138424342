import pytest
import torch
import torch.nn.functional as F

from llm2rec import softmax
from llm2rec.softmax import linear_cross_entropy


def gradients(loss_of, dtype, upstream=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).to(dtype).requires_grad_()
    loss = loss_of(hidden, weight, torch.randint(0, 50, (23,), generator=generator))
    (upstream * loss).backward()
    return loss.item(), hidden.grad.float(), weight.grad.float()


def plain(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("chunk_rows", [None, 1, 5, 23])
def test_loss_and_gradients_equal_the_plain_ones(dtype, tolerance, chunk_rows):
    expected = gradients(plain, dtype, upstream=0.5)
    found = gradients(lambda *a: linear_cross_entropy(*a, chunk_rows=chunk_rows), dtype, upstream=0.5)
    assert expected[1].abs().max() > 0.1  # premise: there is a gradient to miss
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    assert torch.allclose(found[1], expected[1], atol=tolerance)
    assert torch.allclose(found[2], expected[2], atol=tolerance)


def test_rows_at_a_time_give_the_gradients_of_whole_matrices_to_the_bit(monkeypatch):
    found = []
    for values in (7 * 8, 1000 * 8):  # of 50 rows, 8 wide
        monkeypatch.setattr(softmax, "CACHED_VALUES", values)
        found.append(gradients(lambda *a: linear_cross_entropy(*a, chunk_rows=5), torch.bfloat16, upstream=0.3))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][2], found[1][2])


def test_a_frozen_head_receives_no_gradient():
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(9, 8)
    linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 3])).backward()
    assert hidden.grad is not None and weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_pass_is_refused_rather_than_scaled_twice(dtype):
    hidden, weight = (torch.randn(rows, 8, dtype=dtype, requires_grad=True) for rows in (4, 9))
    loss = 0.5 * linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, 3]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("vocabulary", [3_000, 70_000])
def test_bfloat16_shares_of_a_large_vocabulary_are_those_of_a_softmax_in_another_place(vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, vocabulary, generator=generator)).bfloat16()
    targets = torch.randint(0, vocabulary, (5,), generator=generator)
    expected = torch.softmax(logits.float(), dim=1)
    slopes, sums, loss = softmax._rounded_slopes(logits.clone(), targets)
    assert torch.equal(sums, torch.ones_like(sums))
    slopes, rows = slopes.float(), torch.arange(5)
    assert torch.allclose(slopes[rows, targets] + 1, expected[rows, targets], atol=2**-8)
    slopes[rows, targets] = expected[rows, targets]
    assert torch.allclose(slopes, expected, rtol=2**-8, atol=0)
    assert loss.item() == pytest.approx(F.cross_entropy(logits.float(), targets, reduction="sum").item(), abs=0.02)


def test_no_row_costs_nothing():
    assert linear_cross_entropy(torch.empty(0, 8), torch.randn(9, 8), torch.empty(0, dtype=torch.int64)) == 0


@pytest.mark.parametrize(
    ("hidden", "targets"),
    [(torch.randn(4, 7), 4), (torch.randn(4, 8), 3), (torch.randn(4, 8, dtype=torch.float64), 4)],
)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(hidden, targets):
    with pytest.raises(ValueError, match="must be|is torch"):
        linear_cross_entropy(hidden, torch.randn(9, 8), torch.zeros(targets, dtype=torch.int64))
