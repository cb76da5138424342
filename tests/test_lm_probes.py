"""Probes that need the language model: what it expects next."""

import numpy as np
import pytest
import torch

from conftest import prepared_cycle, train_stage
from llm2rec.evaluation.probes import NothingToMeasure
from llm2rec.lm import backbone as backbones
from llm2rec.lm.csft import Form, csft
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
    form = Form("packed", 3, 16, False)
    first, again, other = (next_title_perplexity(tiny, sequences, titles, form, seed) for seed in (0, 0, 1))
    assert first == again and first["random"] != other["random"] and min(first.values()) >= 1


@pytest.mark.parametrize(("mode", "separator"), [("packed", False), ("paper", True), ("tree", False)])
def test_csft_is_probed_in_the_layout_that_it_was_trained_in(tiny_folder, tmp_path, mode, separator):
    sequences, titles = prepared_cycle(tmp_path / "world", users=12, items=12, events=6)
    options = {"mode": mode, "paper_separator": separator, "history_length": 3, "checkpoints": 0}
    options |= {"max_tokens": 6000, "epochs": None, "batch_tokens": 256, "micro_batch_tokens": 256}
    out = tmp_path / "csft"
    summary = train_stage(csft, sequences, titles, model=tiny_folder, out=out, **options)
    lm = backbones.load(out, torch.float32)
    found = next_title_perplexity(lm, sequences, titles, Form(mode, 3, 16, separator), seed=0)
    assert found["true"] == pytest.approx(summary["perplexity_after"], abs=1e-3)
