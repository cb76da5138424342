import math

import pytest
import torch
import torch.nn.functional as F

from llm2rec.lm.objectives import cached_gradient_loss, contrastive_loss, token_loss


def test_token_loss_reads_the_next_token_at_supervised_positions_only():
    hidden, head = torch.randn(1, 5, 4), torch.randn(7, 4)
    rows, labels = torch.tensor([1, 3]), torch.tensor([2, 6])
    expected = F.cross_entropy(hidden[0, rows] @ head.T, labels, reduction="sum")
    assert torch.allclose(token_loss(hidden, head, rows, labels), expected, atol=1e-5)


def test_contrastive_loss_of_indistinct_items_is_log_of_the_batch():
    same = torch.ones(8, 3)
    assert contrastive_loss(same, same, 0.1).item() == pytest.approx(math.log(8), abs=1e-5)


def test_contrastive_loss_of_orthogonal_items_is_near_zero():
    views = torch.eye(6)
    assert contrastive_loss(views, views, 0.05).item() < 1e-6


@pytest.mark.parametrize(
    ("first", "second", "temperature"),
    [(torch.ones(2, 3), torch.ones(3, 3), 0.1), (torch.ones(1, 3), torch.ones(1, 3), 0.1)]
    + [(torch.eye(2), torch.eye(2), 0.0)],
)
def test_contrastive_loss_refuses_what_it_cannot_compare(first, second, temperature):
    with pytest.raises(ValueError, match="views|temperature"):
        contrastive_loss(first, second, temperature)


def gradients(chunked):
    """Gradients of a dropout network's contrastive loss, in one piece or in cached chunks."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 4))
    inputs = torch.randn(12, 5).split(4)
    torch.manual_seed(1)

    def encode(number):
        return network(inputs[number]), network(inputs[number])

    if chunked:
        loss = cached_gradient_loss(encode, 3, lambda a, b: contrastive_loss(a, b, 0.1))
    else:
        views = [encode(number) for number in range(3)]
        loss = contrastive_loss(*(torch.cat(view) for view in zip(*views, strict=True)), 0.1)
    (2 * loss).backward()
    return loss.item(), [parameter.grad for parameter in network.parameters()]


def test_cached_gradients_equal_the_plain_ones_with_dropout():
    plain_loss, plain = gradients(chunked=False)
    cached_loss, cached = gradients(chunked=True)
    assert cached_loss == pytest.approx(plain_loss, abs=1e-6)
    assert max(gradient.abs().max() for gradient in plain) > 1e-3  # premise: there is something to compare
    for one, other in zip(plain, cached, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
