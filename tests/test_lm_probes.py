"""Probes that need the language model: what it expects next."""

import numpy as np
import pytest

from conftest import prepared_cycle
from llm2rec.evaluation.probes import NothingToMeasure
from llm2rec.lm.probes import next_title_perplexity, other_targets


def test_a_random_title_is_never_the_true_one_nor_one_that_reads_alike():
    titles = ["a", "b", "a", "c"]
    targets = [1, 2, 3, 4] * 20
    drawn = other_targets(targets, titles, np.random.default_rng(0))
    assert all(titles[other - 1] != titles[own - 1] for own, other in zip(targets, drawn, strict=True))


def test_random_titles_are_the_true_ones_dealt_out_anew():
    targets = [1] * 90 + [2] * 9 + [3] + [4] * 100
    dealt = [other_targets(targets, ["a", "b", "c", "d", "e"], np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1] != dealt[2]
    assert sorted(dealt[0]) == targets and set(dealt[0][-100:]) == {1, 2, 3}


def test_a_title_that_comes_next_for_most_is_answered_by_the_others():
    assert other_targets([1] * 5 + [2], ["a", "b"], np.random.default_rng(0)) == [2] * 5 + [1]


def test_one_title_alone_has_no_other_to_compare_with():
    for targets in ([], [1, 3]):
        with pytest.raises(NothingToMeasure, match="fewer than two different titles"):
            other_targets(targets, ["a", "b", "a"], np.random.default_rng(0))


def test_both_perplexities_repeat_with_their_seed(tiny, tmp_path):
    sequences, titles = prepared_cycle(tmp_path, users=12, items=12, events=6)
    options = {"history_length": 3, "max_title_tokens": 16}
    first, again, other = (next_title_perplexity(tiny, sequences, titles, **options, seed=s) for s in (0, 0, 1))
    assert first == again and first["random"] != other["random"] and min(first.values()) >= 1
