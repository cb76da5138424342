"""The sign-flip test and the number of users."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm2rec.evaluation import significance
from llm2rec.evaluation.verdicts import too_few_users

DIFFERENCES = st.lists(st.integers(-4, 4).map(lambda value: value / 4), min_size=1, max_size=9)


def enumerated(differences):
    """Share of all sign patterns with a mean as far from 0 as the observed one; a user without one has two."""
    observed = abs(sum(differences))
    sums = [
        sum(sign * value for sign, value in zip(signs, differences, strict=True))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    return sum(abs(total) >= observed - 1e-9 for total in sums) / len(sums)


@given(DIFFERENCES)
def test_the_sign_flip_test_equals_exhaustive_enumeration(differences):
    assert significance.sign_flip_p(np.array(differences)) == pytest.approx(enumerated(differences))


def test_random_patterns_come_near_the_enumeration():
    differences = np.random.default_rng(1).normal(0.4, 1, 12)
    exact = significance.sign_flip_p(differences, samples=2**12)
    drawn = significance.sign_flip_p(differences, samples=4000)
    assert exact == enumerated(differences.tolist())
    assert drawn != exact and drawn == pytest.approx(exact, abs=4 * (exact / 4000) ** 0.5)


def test_the_sign_flip_test_does_not_depend_on_its_chunks(monkeypatch):
    differences = np.random.default_rng(1).normal(0.2, 1, 40)
    whole = significance.sign_flip_p(differences, samples=100)
    monkeypatch.setattr(significance, "CHUNK_BYTES", 1)
    assert significance.sign_flip_p(differences, samples=100) == whole


def test_random_patterns_never_give_a_p_of_zero():
    assert significance.sign_flip_p(np.ones(200), samples=99) == 1 / 100


def test_equal_rows_have_a_sign_flip_p_of_one():
    assert significance.sign_flip_p(np.zeros(50)) == 1.0


def test_the_sign_flip_test_keeps_its_level():
    generator = np.random.default_rng(0)
    found = [significance.sign_flip_p(generator.normal(0, 1, 40), samples=199) <= 0.05 for _ in range(400)]
    assert 0.02 < np.mean(found) < 0.09


def test_bootstrap_and_sign_flip_agree_on_many_users():
    generator = np.random.default_rng(3)
    base = generator.random(300)
    row = base + generator.normal(0.0, 0.3, 300)
    result = significance.compare_paired({"b": row}, {"b": base}, samples=4000, seed=0)["b"]
    assert 0.01 < result["p"] < 0.9
    assert result["p_sign_flip"] == pytest.approx(result["p"], abs=0.03)


def test_a_difference_that_few_users_make_is_no_verdict_though_the_bootstrap_rejects():
    differences = np.zeros(40)
    differences[:4] = 0.4
    result = significance.compare_paired({"b": differences}, {"b": np.zeros(40)}, samples=10_000, seed=0)["b"]
    assert result["p_holm"] < significance.SIGNIFICANCE < result["p_sign_flip_holm"]
    assert result["verdict"] == "not distinguishable"


def test_few_different_users_seldom_make_a_verdict_where_nothing_differs():
    generator = np.random.default_rng(0)
    rejected = 0
    for seed in range(200):
        differences = np.zeros(40)
        differences[:4] = generator.choice([-0.4, 0.4], 4)
        result = significance.compare_paired({"b": differences}, {"b": np.zeros(40)}, samples=500, seed=seed)["b"]
        rejected += result["verdict"] != "not distinguishable"
    assert rejected / 200 <= significance.SIGNIFICANCE


def test_users_without_a_value_count_though_they_are_not_drawn():
    values = np.zeros((400, 2))
    values[:100, 0] = 1.0
    values[50:60, 1] = 2.0
    means = significance.bootstrap_means(values, 4000, seed=0)
    errors = values.std(axis=0) / 400**0.5
    assert means.mean(axis=0) == pytest.approx(values.mean(axis=0), abs=4 * errors.max() / 4000**0.5)
    assert means.std(axis=0) == pytest.approx(errors, rel=0.05)
    assert not significance.bootstrap_means(np.zeros((40, 2)), 10, seed=0).any()


def test_the_sign_flip_p_values_of_a_table_are_corrected_together():
    generator = np.random.default_rng(3)
    base = generator.random(100)
    rows = {name: base + generator.normal(0.04, 0.2, 100) for name in "abc"}
    result = significance.compare_paired(rows, dict.fromkeys(rows, base), samples=500, seed=0)
    flipped = [one["p_sign_flip"] for one in result.values()]
    assert [one["p_sign_flip_holm"] for one in result.values()] == significance.holm(flipped) != flipped


def test_rows_that_are_their_base_take_no_power_from_the_others():
    generator = np.random.default_rng(0)
    base = generator.random(600)
    changed = base + generator.normal(0.03, 0.2, 600)
    alone = significance.compare_paired({"b": changed}, {"b": base}, samples=2000, seed=0)["b"]
    rows = {"b": changed, **{f"same {number}": base.copy() for number in range(4)}}
    beside = significance.compare_paired(rows, dict.fromkeys(rows, base), samples=2000, seed=0)
    assert alone["verdict"] == "better" and 5 * alone["p_holm"] > significance.SIGNIFICANCE
    found = beside.pop("b")
    assert all(found[name] == alone[name] for name in ("p_holm", "p_sign_flip_holm", "verdict"))
    assert all((one["p_holm"], one["p_sign_flip_holm"]) == (1.0, 1.0) for one in beside.values())
    assert {one["verdict"] for one in beside.values()} == {"not distinguishable"}


@pytest.mark.parametrize("rows", [1, 12, 300])
def test_a_verdict_is_possible_whatever_the_number_of_comparisons(rows):
    base = np.random.default_rng(0).random(60)
    better = {row: base + 1.0 for row in range(rows)}
    results = significance.compare_paired(better, dict.fromkeys(better, base), samples=100, seed=0)
    assert {result["verdict"] for result in results.values()} == {"better"}


def test_no_more_samples_are_drawn_than_asked_for_where_they_are_enough():
    assert significance.enough_samples(10_000, 250) == 10_000 < significance.enough_samples(10_000, 251)


def test_users_needed_by_hand():
    # (1.959964 + 0.841621) ** 2 = 7.848880 for a difference of one standard deviation; of a tenth: 100 times.
    assert significance.users_needed(1.0, 0.1) == 785
    assert significance.users_needed(1.0, -0.1) == 785


def test_the_users_needed_find_the_difference_in_four_of_five_samples():
    n_users = significance.users_needed(1.0, 0.25)
    samples = np.random.default_rng(0).normal(0.25, 1.0, (4000, n_users))
    found = samples.mean(axis=1) > 1.959964 / np.sqrt(n_users)
    assert found.mean() == pytest.approx(0.8, abs=0.02)


def test_no_number_of_users_finds_a_difference_of_zero():
    assert significance.users_needed(1.0, 0.0) is None


def test_users_needed_are_never_fewer_than_are_tested():
    assert significance.users_needed(0.1, 5.0) == 30


@pytest.mark.parametrize("deviation", [-1.0, float("nan"), float("inf")])
def test_a_deviation_that_is_none_is_refused(deviation):
    with pytest.raises(ValueError, match="standard deviation"):
        significance.users_needed(deviation, 0.1)


def test_the_warning_names_the_number_of_users():
    assert too_few_users(30) is None
    assert "Only 29 test users" in too_few_users(29) and "Only 1 test user:" in too_few_users(1)


def test_one_user_has_an_interval_but_no_deviation():
    result = significance.compare_paired({"b": np.array([0.5])}, {"b": np.array([0.25])}, samples=10, seed=0)["b"]
    assert (result["difference"], result["deviation"], result["users_needed"]) == (0.25, None, None)
