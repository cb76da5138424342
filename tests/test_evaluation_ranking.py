import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm2rec.evaluation import ranking
from llm2rec.evaluation.ranking import measure, metric_names, ranks, ranks_of_products, top_k

SCORES = st.lists(st.lists(st.integers(-3, 3).map(float), min_size=5, max_size=5), min_size=1, max_size=6).map(
    torch.tensor
)


@given(SCORES, st.data())
def test_ranks_equal_a_brute_force_count(scores, data):
    targets = torch.tensor([data.draw(st.integers(1, 5)) for _ in scores])
    for row, target, rank in zip(scores.tolist(), targets.tolist(), ranks(scores, targets).tolist(), strict=True):
        others = [score for item, score in enumerate(row, 1) if item != target]
        assert rank == 1 + sum(score >= row[target - 1] for score in others)


def test_scores_that_differ_only_beyond_float32_tie():
    scores = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert scores[0, 0] != scores[0, 1]
    assert ranks(scores, torch.tensor([2])).tolist() == [2]


@pytest.mark.parametrize("target", [0, 3])
def test_a_target_outside_the_catalogue_raises(target):
    with pytest.raises(ValueError, match=f"item_index {target} is outside 1..2"):
        ranks(torch.zeros(1, 2), torch.tensor([target]))


def test_a_scorer_without_an_opinion_ranks_last():
    assert ranks(torch.zeros(1, 7), torch.tensor([3])).tolist() == [7]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_raises(bad):
    with pytest.raises(ValueError, match="not finite"):
        ranks(torch.tensor([[0.0, bad]]), torch.tensor([1]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("recall@5", [1, 1, 0]),
        ("ndcg@5", [1, 1 / math.log2(4), 0]),
        ("ndcg@10", [1, 1 / math.log2(4), 1 / math.log2(7)]),
        ("mrr", [1, 1 / 3, 1 / 6]),
        ("mrr@5", [1, 1 / 3, 0]),
        ("hit@5", [1, 1, 0]),
    ],
)
def test_metrics_counted_by_hand(name, expected):
    assert measure(torch.tensor([1, 3, 6]), name).tolist() == pytest.approx(expected)


@given(st.lists(st.integers(1, 100), min_size=1))
def test_metrics_lie_in_the_unit_interval_and_grow_with_k(values):
    rank = torch.tensor(values)
    for name in metric_names([5, 20]):
        assert ((measure(rank, name) >= 0) & (measure(rank, name) <= 1)).all()
    for base in ("recall", "ndcg", "mrr"):
        assert (measure(rank, f"{base}@5") <= measure(rank, f"{base}@20")).all()


@pytest.mark.parametrize("name", ["recall", "mrr@", "recall@0", "hits@5", "hit"])
def test_an_unknown_metric_is_refused(name):
    with pytest.raises(ValueError, match="no metric"):
        measure(torch.tensor([1]), name)


def test_top_k_hides_the_excluded_and_breaks_ties_by_index():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    items, values = top_k(scores, 2, exclude=torch.tensor([[2, 0]]))
    assert items.tolist() == [[3, 4]] and values.tolist() == [[3.0, 2.0]]
    assert top_k(scores, 2)[0].tolist() == [[2, 3]]


def test_top_k_gives_no_more_than_what_is_left():
    items, _ = top_k(torch.randn(1, 4), 10, exclude=torch.tensor([[1, 2]]))
    assert sorted(items[0].tolist()) == [3, 4]


@given(SCORES, st.integers(1, 7), st.data())
def test_top_k_equals_a_sort_by_score_and_index(scores, k, data):
    hidden = torch.tensor([data.draw(st.lists(st.integers(0, 5), min_size=3, max_size=3)) for _ in scores])
    items, values = top_k(scores, k, exclude=hidden)
    for row, excluded, found, best in zip(scores, hidden.tolist(), items.tolist(), values.tolist(), strict=True):
        left = sorted((-score, item) for item, score in enumerate(row.tolist(), 1) if item not in excluded)[:k]
        padding = len(found) - len(left)
        assert found == [item for _, item in left] + [0] * padding
        assert best == [-score for score, _ in left] + [-math.inf] * padding


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("levels", [3, 40, 10**6])  # many ties, some, hardly any
def test_top_k_of_many_columns_equals_a_stable_sort(k, levels, monkeypatch):
    monkeypatch.setattr(ranking, "FEWEST_GROUPS", 1)
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (30, 16 * 25 + 7), generator=generator).float()
    hidden = torch.randint(0, scores.shape[1] + 1, (30, 4), generator=generator)
    items, values = top_k(scores, k, exclude=hidden)
    left = scores.clone()
    for row, excluded in enumerate(hidden.tolist()):
        left[row, [item - 1 for item in excluded if item]] = -math.inf
    expected = left.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k]) and torch.equal(items, expected.indices[:, :k] + 1)


def test_top_k_leaves_the_scores_as_they_were():
    scores = torch.tensor([[1.0, 2.0]])
    top_k(scores, 1, exclude=torch.tensor([[2]]))
    assert scores.tolist() == [[1.0, 2.0]]


@given(SCORES, st.data())
def test_ranks_without_the_excluded_equal_a_brute_force_count(scores, data):
    targets = torch.tensor([data.draw(st.integers(1, 5)) for _ in scores])
    hidden = torch.tensor([data.draw(st.lists(st.integers(0, 5), min_size=3, max_size=3)) for _ in scores])
    found = ranks(scores, targets, exclude=hidden).tolist()
    for row, target, excluded, rank in zip(scores.tolist(), targets.tolist(), hidden.tolist(), found, strict=True):
        others = [score for item, score in enumerate(row, 1) if item != target and item not in excluded]
        assert rank == 1 + sum(score >= row[target - 1] for score in others)


@pytest.mark.parametrize("few", [0, 64])  # by blocks, and as a whole
@pytest.mark.parametrize("scores_a_block", [1, 12, 10_000])  # one item, three items, all 20 at a time
@pytest.mark.parametrize("exclude", [None, torch.tensor([[1, 1, 0], [20, 5, 3], [0, 0, 0], [7, 8, 9]])])
def test_ranks_of_products_equal_the_ranks_of_the_scores(scores_a_block, few, exclude, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_SCORES", scores_a_block)
    monkeypatch.setattr(ranking, "FEW_QUERIES", few)
    generator = torch.Generator().manual_seed(0)
    queries, items = (torch.randint(-2, 3, (rows, 3), generator=generator).float() for rows in (4, 20))
    scores = queries @ items.T
    assert (scores.sort(dim=1).values.diff(dim=1) == 0).any(dim=1).all()  # ties in every row
    for target in range(1, 21):
        targets = torch.tensor([target, 5, 21 - target, 7])
        expected = ranks(scores, targets, exclude)
        assert ranks_of_products(queries, items, targets, exclude).tolist() == expected.tolist()


@pytest.mark.parametrize("n_queries", [1, 3, 7, 64])
def test_an_equal_item_ties_with_the_target_however_few_are_asked(n_queries):
    generator = torch.Generator().manual_seed(0)
    half, queries = (torch.randn(rows, 128, generator=generator) for rows in (841, n_queries))
    targets = torch.arange(1, n_queries + 1)
    alone = ranks_of_products(queries, half, targets)
    doubled = ranks_of_products(queries, half.repeat(2, 1), targets)  # every item stands twice
    assert doubled.tolist() == (2 * alone).tolist()


def test_an_equal_item_in_the_last_block_ties_with_the_target():
    generator = torch.Generator().manual_seed(0)
    items, queries = (torch.randn(rows, 128, generator=generator) for rows in (4097, 256))  # one more than a block
    items[-1] = items[0]
    first, last = (ranks_of_products(queries, items, torch.full((256,), target)) for target in (1, 4097))
    assert torch.equal(first, last)


@pytest.mark.parametrize("few", [0, 64])
def test_a_product_that_is_not_finite_is_named(few, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 2)
    monkeypatch.setattr(ranking, "FEW_QUERIES", few)
    items = torch.ones(5, 2)
    items[3, 0] = torch.nan
    with pytest.raises(ValueError, match="in row 0 for item_index 4"):
        ranks_of_products(torch.ones(2, 2), items, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("targets", "exclude", "words"),
    [
        (torch.tensor([6, 1]), None, "target item_index 6 is outside 1..5"),
        (torch.tensor([1]), None, r"expected \(2,\)"),
        (torch.tensor([1, 1]), torch.tensor([[1]]), r"expected \(2, L\)"),
        (torch.tensor([1, 1]), torch.tensor([[1], [-1]]), "excluded item_index -1"),
    ],
)
def test_what_does_not_fit_the_products_is_refused(targets, exclude, words):
    with pytest.raises(ValueError, match=words):
        ranks_of_products(torch.ones(2, 2), torch.ones(5, 2), targets, exclude)


def test_an_excluded_target_still_competes():
    scores = torch.tensor([[5.0, 4.0, 3.0]])
    assert ranks(scores, torch.tensor([2]), exclude=torch.tensor([[1, 2]])).tolist() == [1]


def test_ranks_leave_the_scores_as_they_were():
    scores = torch.tensor([[1.0, 2.0]])
    ranks(scores, torch.tensor([1]), exclude=torch.tensor([[1, 2]]))
    assert scores.tolist() == [[1.0, 2.0]]


def test_the_hit_rate_is_not_listed_beside_recall():
    assert metric_names([5]) == ["recall@5", "ndcg@5", "mrr@5", "recall@10", "ndcg@10", "mrr@10", "mrr"]


def test_metrics_equal_those_of_ranx():
    ranx = pytest.importorskip("ranx", reason="ranx is not installed: parity is checked against loops alone")
    scores = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(1, 21)
    relevant = ranx.Qrels({f"q{q}": {f"i{item}": 1} for q, item in enumerate(targets.tolist())})
    run = ranx.Run(
        {f"q{q}": {f"i{i}": score for i, score in enumerate(row, 1)} for q, row in enumerate(scores.tolist())}
    )
    ours = ranks(scores, targets)
    for name, theirs in (("recall@5", "recall@5"), ("ndcg@10", "ndcg@10"), ("mrr", "mrr"), ("mrr@5", "mrr@5")):
        assert float(measure(ours, name).mean()) == pytest.approx(ranx.evaluate(relevant, run, theirs))
