"""Coverage, Gini, novelty and popularity lift of recommended lists."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm2rec.evaluation.ranking import coverage, gini, list_metrics, novelty, popularity_lift

N_ITEMS = 6
LISTS = st.lists(st.lists(st.integers(0, N_ITEMS), min_size=4, max_size=4), min_size=1, max_size=6)
COUNTS = st.lists(st.integers(0, 9), min_size=N_ITEMS, max_size=N_ITEMS)
CUTOFF = st.integers(1, 4)


def test_coverage_counted_by_hand():
    assert coverage(torch.tensor([[1, 2, 3], [2, 1, 4]]), 2, 8) == 2 / 8


def test_gini_counted_by_hand():
    lists = torch.tensor([[1], [1], [1], [2]])  # times recommended, rising: 0, 0, 1, 3
    assert gini(lists, 1, 4) == pytest.approx((1 * 1 + 3 * 3) / (4 * 4))


def test_gini_of_equal_shares_is_zero_and_of_one_item_the_most():
    assert gini(torch.tensor([[1, 2], [3, 4]]), 2, 4) == 0
    assert gini(torch.tensor([[3], [3]]), 1, 4) == pytest.approx(1 - 1 / 4)


def test_novelty_counted_by_hand():
    counts = torch.tensor([3, 0, 1])  # smoothed shares 4/7, 1/7, 2/7
    lists = torch.tensor([[1, 2], [3, 0]])
    assert novelty(lists, 2, counts) == pytest.approx(
        ((math.log2(7 / 4) + math.log2(7)) / 2 + math.log2(7 / 2)) / 2
    )


def test_popularity_lift_counted_by_hand():
    counts = torch.tensor([8, 2, 0])
    lists, histories = torch.tensor([[1, 2], [1, 3]]), torch.tensor([[2, 0], [1, 3]])
    assert popularity_lift(lists, histories, 2, counts) == pytest.approx((5 + 4) / (2 + 4) - 1)


def test_users_without_a_history_have_no_say_in_the_lift():
    counts = torch.tensor([8, 2])
    assert popularity_lift(torch.tensor([[2], [1]]), torch.tensor([[2], [0]]), 1, counts) == 0


@given(LISTS, CUTOFF)
def test_coverage_equals_a_set(lists, k):
    seen = {item for row in lists for item in row[:k]} - {0}
    assert coverage(torch.tensor(lists), k, N_ITEMS) == pytest.approx(len(seen) / N_ITEMS)


@given(LISTS, CUTOFF)
def test_gini_equals_the_mean_absolute_difference(lists, k):
    flat = [item for row in lists for item in row[:k] if item]
    if not flat:
        with pytest.raises(ValueError, match="recommend nothing"):
            gini(torch.tensor(lists), k, N_ITEMS)
        return
    times = [flat.count(item) for item in range(1, N_ITEMS + 1)]
    pairs = sum(abs(one - other) for one in times for other in times)
    assert gini(torch.tensor(lists), k, N_ITEMS) == pytest.approx(pairs / (2 * N_ITEMS * sum(times)))


@given(LISTS, COUNTS, CUTOFF)
def test_novelty_equals_a_loop_and_stays_in_its_range(lists, counts, k):
    rows = [[item for item in row[:k] if item] for row in lists]
    bits = [
        sum(-math.log2((counts[item - 1] + 1) / (sum(counts) + N_ITEMS)) for item in row) / len(row)
        for row in rows
        if row
    ]
    if not bits:
        with pytest.raises(ValueError, match="recommend nothing"):
            novelty(torch.tensor(lists), k, torch.tensor(counts))
        return
    found = novelty(torch.tensor(lists), k, torch.tensor(counts))
    assert found == pytest.approx(sum(bits) / len(bits))
    assert 0 <= found <= math.log2(sum(counts) + N_ITEMS) + 1e-9


@given(LISTS, COUNTS, CUTOFF, st.data())
def test_the_lift_equals_a_loop(lists, counts, k, data):
    size = st.lists(st.integers(0, N_ITEMS), min_size=3, max_size=3)
    histories = [data.draw(size) for _ in lists]
    pairs = [
        ([counts[item - 1] for item in row[:k] if item], [counts[item - 1] for item in past if item])
        for row, past in zip(lists, histories, strict=True)
    ]
    pairs = [(sum(row) / len(row), sum(past) / len(past)) for row, past in pairs if row and past]
    arguments = (torch.tensor(lists), torch.tensor(histories), k, torch.tensor(counts))
    if not sum(past for _, past in pairs):
        with pytest.raises(ValueError, match="no base"):
            popularity_lift(*arguments)
        return
    expected = sum(row for row, _ in pairs) / sum(past for _, past in pairs) - 1
    assert popularity_lift(*arguments) == pytest.approx(expected)


def test_recommending_the_history_lifts_nothing():
    histories = torch.tensor([[1, 2, 3], [2, 3, 4]])
    assert popularity_lift(histories, histories, 3, torch.tensor([5, 9, 1, 0])) == 0


def test_more_popular_lists_are_less_novel():
    counts = torch.tensor([90, 9, 1])
    popular, rare = torch.tensor([[1]]), torch.tensor([[3]])
    assert novelty(popular, 1, counts) < novelty(rare, 1, counts)


def test_every_list_metric_is_there_at_every_cutoff():
    lists = torch.tensor([[1, 2], [2, 3]])
    found = list_metrics(lists, lists, torch.tensor([3, 2, 1]), cutoffs=(2, 1))
    assert list(found) == [
        f"{name}@{k}" for k in (1, 2) for name in ("coverage", "gini", "novelty", "popularity_lift")
    ]
    assert found["coverage@1"] == coverage(lists, 1, 3)


@pytest.mark.parametrize("k", [0, 3])
def test_a_cutoff_that_the_lists_do_not_reach_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}"):
        coverage(torch.tensor([[1, 2]]), k, 4)


def test_an_item_outside_the_catalogue_is_refused():
    with pytest.raises(ValueError, match="listed item_index 5 is outside 0..4"):
        coverage(torch.tensor([[5]]), 1, 4)


def test_histories_of_other_users_are_refused():
    with pytest.raises(ValueError, match="2 histories for 1 lists"):
        popularity_lift(torch.tensor([[1]]), torch.tensor([[1], [1]]), 1, torch.tensor([1]))
