"""Losses against plain dense ones: values, gradients, what sampling estimates."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm2rec import softmax
from llm2rec.rec.losses import NegativeSampler, gbce, gbce_beta, sampled_softmax

M, N, H = 7, 11, 4
NEGATIVES = torch.tensor([0, 3, 3, 9, 10])  # one drawn twice; 3 and 9 are targets as well
TARGETS = torch.tensor([3, 1, 9, 3, 0, 5, 7])
SHARES = np.arange(1, N + 1) / np.arange(1, N + 1).sum()


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, H, generator=generator).to(dtype).requires_grad_() for rows in (M, N)]


def with_gradients(loss_of):
    queries, candidates = inputs()
    loss = loss_of(queries, candidates)
    (0.5 * loss).backward()
    return loss.item(), queries.grad, candidates.grad


def assert_equal(found, expected):
    assert expected[1].abs().max() > 0.1 and expected[2].abs().max() > 0.1  # premise: there is one to miss
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert torch.allclose(found[1], expected[1], atol=1e-5)
    assert torch.allclose(found[2], expected[2], atol=1e-5)


def log_expected(negatives=NEGATIVES):
    return torch.from_numpy(np.log(len(negatives) * SHARES).astype(np.float32))[negatives]


def plain_sampled_softmax(queries, candidates):
    total = torch.zeros(())
    for query, target in zip(queries, TARGETS, strict=True):
        scores = candidates @ query
        partition = scores[target].exp()
        for one in NEGATIVES.tolist():
            if one != target:
                partition = partition + scores[one].exp() / (len(NEGATIVES) * SHARES[one])
        total = total + partition.log() - scores[target]
    return total


def test_sampled_softmax_equals_a_plain_loop():
    found = with_gradients(lambda q, c: sampled_softmax(q, c, TARGETS, NEGATIVES, log_expected()))
    assert_equal(found, with_gradients(plain_sampled_softmax))


def test_sampled_softmax_over_every_item_equals_the_full_one():
    everything, certain = torch.arange(N), torch.zeros(N)
    found = with_gradients(lambda q, c: sampled_softmax(q, c, TARGETS, everything, certain))
    assert_equal(found, with_gradients(lambda q, c: F.cross_entropy(q @ c.T, TARGETS, reduction="sum")))
    assert_equal(found, with_gradients(lambda q, c: softmax.linear_cross_entropy(q, c, TARGETS)))


@pytest.mark.parametrize(
    "loss_of",
    [lambda q, c, t, n: sampled_softmax(q, c, t, n, torch.zeros(2)), lambda q, c, t, n: gbce(q, c, t, n, 0.0)],
)
def test_a_row_whose_samples_are_all_its_target_costs_nothing(loss_of):
    targets, negatives = torch.tensor([3]), torch.tensor([3, 3])
    loss, *gradients = with_gradients(lambda q, c: loss_of(q[:1], c, targets, negatives))
    assert loss == pytest.approx(0, abs=1e-6)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_the_sampled_partition_function_is_unbiased(sampling):
    queries, candidates = (values.detach() for values in inputs())
    sampler = NegativeSampler(np.arange(N) ** 2, 200_000, sampling)
    negatives, expected = sampler.draw(np.random.default_rng(0))
    scores = queries @ candidates.T
    losses = torch.stack(
        [
            sampled_softmax(queries[row, None], candidates, TARGETS[row, None], negatives, expected)
            for row in range(M)
        ]
    )
    positives = scores.gather(1, TARGETS[:, None])[:, 0]
    assert torch.allclose((losses + positives).exp(), scores.exp().sum(1), rtol=0.02)


@pytest.mark.parametrize(("sampling", "weights"), [("uniform", np.ones(4)), ("popularity", [1, 2, 4, 9])])
def test_negatives_are_drawn_as_often_as_their_correction_says(sampling, weights):
    sampler = NegativeSampler(np.array([0, 1, 3, 8]), 100_000, sampling)
    negatives, expected = sampler.draw(np.random.default_rng(0))
    found = np.bincount(negatives, minlength=4)
    assert found == pytest.approx(np.asarray(weights) / np.sum(weights) * 100_000, rel=0.05)
    assert found[negatives[:20]] == pytest.approx(expected[:20].exp(), rel=0.05)


def plain_gbce(queries, candidates, beta=0.4):
    total = torch.zeros(())
    for query, target in zip(queries, TARGETS, strict=True):
        scores = candidates @ query
        loss = -beta * scores[target].sigmoid().log()
        for one in NEGATIVES.tolist():
            if one != target:
                loss = loss - (1 - scores[one].sigmoid()).log()
        total = total + loss / (len(NEGATIVES) + 1)
    return total


def test_gbce_equals_a_plain_loop():
    assert_equal(with_gradients(lambda q, c: gbce(q, c, TARGETS, NEGATIVES, 0.4)), with_gradients(plain_gbce))


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda q, c: sampled_softmax(q, c, TARGETS, NEGATIVES, log_expected()),
        lambda q, c: gbce(q, c, TARGETS, NEGATIVES, 0.4),
    ],
    ids=["sampled softmax", "gbce"],
)
def test_of_bfloat16_products_a_loss_is_summed_in_float32(loss_of):
    queries, candidates = inputs(torch.bfloat16)
    loss = loss_of(queries, candidates)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_of(queries.float(), candidates.float()).item(), rel=2e-3)


@pytest.mark.parametrize("calibration", [0.0, 0.3, 0.75, 1.0])
def test_beta_is_the_formula_of_the_paper(calibration):
    alpha = 16 / (101 - 1)
    expected = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    assert gbce_beta(16, 101, calibration) == pytest.approx(expected)


def test_full_calibration_is_the_sampling_rate_and_none_the_plain_loss():
    assert gbce_beta(25, 101, 1.0) == pytest.approx(0.25)
    assert gbce_beta(25, 101, 0.0) == 1.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("columns", [1, 3, N])
def test_chunks_along_the_items_change_neither_loss_nor_gradients(monkeypatch, dtype, tolerance, columns):
    monkeypatch.setattr(softmax, "CHUNK_LOGITS", {"cpu": M * columns})
    monkeypatch.setattr(softmax, "FEWEST_ROWS", 10**6)
    results = []
    for loss_of in (
        softmax.linear_cross_entropy,
        lambda q, c, t: F.cross_entropy((q @ c.T).float(), t, reduction="sum"),
    ):
        queries, candidates = inputs(dtype)
        loss = loss_of(queries, candidates, TARGETS)
        (0.5 * loss).backward()
        results.append((loss.item(), queries.grad, candidates.grad))
    found, expected = results
    assert found[0] == pytest.approx(expected[0], rel=1e-2 if dtype is torch.bfloat16 else 1e-5)
    assert found[1].dtype == found[2].dtype == dtype
    assert torch.allclose(found[1], expected[1], atol=tolerance)
    assert torch.allclose(found[2], expected[2], atol=tolerance)


def test_chunks_along_the_items_are_taken_where_rows_would_be_too_few(monkeypatch):
    taken = []
    for way in ("_ByRows", "_ByColumns"):
        apply = getattr(softmax, way).apply
        monkeypatch.setattr(
            getattr(softmax, way), "apply", lambda *a, _way=way, _apply=apply: taken.append(_way) or _apply(*a)
        )
    queries, candidates = (torch.randn(60, H), torch.randn(N, H))
    softmax.linear_cross_entropy(queries, candidates, torch.zeros(60, dtype=torch.int64))
    monkeypatch.setattr(softmax, "CHUNK_LOGITS", {"cpu": N * (softmax.FEWEST_ROWS - 1)})
    softmax.linear_cross_entropy(queries, candidates, torch.zeros(60, dtype=torch.int64))
    assert taken == ["_ByRows", "_ByColumns"]


def test_chunks_along_the_items_keep_scores_that_would_overflow(monkeypatch):
    monkeypatch.setattr(softmax, "CHUNK_LOGITS", {"cpu": 1})
    queries, candidates = torch.full((3, 1), 100.0), torch.tensor([[1.0], [2.0], [-5.0]])
    loss = softmax.linear_cross_entropy(queries, candidates, torch.tensor([0, 1, 2]))
    assert loss.item() == pytest.approx(100 + 0 + 700)
    assert math.isfinite(loss.item())
