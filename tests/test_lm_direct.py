"""Titles ranked by their likelihood: equal to the plain way, whatever the batches."""

import numpy as np
import pytest
import torch

from conftest import TITLES, adding
from llm2rec.errors import ConfigError
from llm2rec.evaluation import ranking
from llm2rec.lm import backbone as backbones
from llm2rec.lm.csft import csft_texts
from llm2rec.lm.direct import TitleRanker, _log_probabilities
from llm2rec.lm.packing import gather_texts, pack

NAMES = [f"{title} and the night road" if number % 3 else title[4:] for number, title in enumerate(TITLES)]
HISTORIES = torch.tensor([[3, 1, 7], [5, 0, 0]])


def ranker(lm, **changes):
    return TitleRanker(lm, NAMES, **({"history_length": 3, "max_title_tokens": 16} | changes))


def plain_score(lm, history, item):
    """Log-likelihood of one title after a history, both in one causal pass without a cache."""
    texts = csft_texts(lm.tokenizer, NAMES, 16)
    tokens, _ = gather_texts(texts, np.array([*history, item]) - 1)
    tokens = np.append(np.array(texts.prefix, dtype=np.int64), tokens)
    title = len(texts[item - 1])
    with torch.no_grad():
        hidden = lm.hidden_states(pack(tokens, np.array([len(tokens)])))[0]
        log_probabilities = torch.log_softmax((hidden @ lm.head.T).float(), dim=-1)
    labels = torch.from_numpy(tokens[-title:])
    return float(log_probabilities[-title - 1 : -1].gather(1, labels[:, None]).sum())


@pytest.mark.parametrize("template", ["$A", "~ $A"])
def test_scores_are_the_log_likelihoods_of_the_plain_way(tiny, template):
    adding(tiny.tokenizer, template)
    scores = ranker(tiny, batch_titles=7).score(HISTORIES)
    assert scores.shape == (2, len(NAMES)) and scores.dtype == torch.float32
    lengths = csft_texts(tiny.tokenizer, NAMES, 16).lengths
    assert len(set(lengths.tolist())) > 1  # else all titles end at one level
    for row, history in ((0, [3, 1, 7]), (1, [5])):
        for item in range(1, len(NAMES) + 1):
            assert scores[row, item - 1] == pytest.approx(plain_score(tiny, history, item), abs=1e-3)


@pytest.mark.parametrize("batch_titles", [1, 1000])
def test_trees_do_not_change_the_scores(tiny, batch_titles):
    scores = ranker(tiny, batch_titles=batch_titles).score(HISTORIES)
    torch.testing.assert_close(scores, ranker(tiny, batch_titles=7).score(HISTORIES), atol=1e-4, rtol=1e-5)


def test_only_the_last_items_of_a_history_are_read(tiny):
    short = ranker(tiny, history_length=2)
    torch.testing.assert_close(short.score(HISTORIES[:1]), short.score(torch.tensor([[1, 7]])))
    assert not torch.allclose(short.score(HISTORIES[:1]), ranker(tiny).score(HISTORIES[:1]))


def test_an_empty_history_is_answered_without_one(tiny):
    scores = ranker(tiny).score(torch.tensor([[0, 0, 0]]))
    assert scores.isfinite().all() and scores.std() > 0


def test_items_of_one_title_tie(tiny):
    twice = TitleRanker(tiny, [*NAMES, NAMES[0]], history_length=3, max_title_tokens=16).score(HISTORIES)
    torch.testing.assert_close(twice[:, 0], twice[:, -1])


def told_apart(lm):
    """The ranker of a model that finds some titles far likelier than others, and its scores."""
    with torch.no_grad():
        lm.head.mul_(40)
    direct = ranker(lm, batch_titles=7)
    return direct, direct.score(HISTORIES)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_log_probabilities_of_bfloat16_are_those_of_its_logits_and_never_above_zero(monkeypatch, at_once):
    generator = torch.Generator().manual_seed(0)
    head = (torch.randn(500, 64, generator=generator) / 8).bfloat16()
    rows, tokens = torch.arange(200) // 2, torch.randint(500, (200,), generator=generator)
    towards = torch.nn.functional.normalize(head[tokens[::2]].float(), dim=1)
    states = (torch.randn(100, 64, generator=generator) + 12 * towards).bfloat16()
    monkeypatch.setattr("llm2rec.lm.direct.LOGITS_BYTES", at_once * 4 * len(head))
    found = _log_probabilities(states, head, rows, tokens)
    assert found[::2].exp().mean() > 0.5  # else none comes near 0
    assert found.max() <= 0
    expected = (states @ head.T).float().log_softmax(dim=1)[rows, tokens]
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)  # rounded otherwise by another batch


@pytest.mark.parametrize("exclude", [None, torch.tensor([[1, 7, 7], [2, 0, 0]])])
def test_ranks_are_those_of_the_scores(tiny, exclude):
    direct, scores = told_apart(tiny)
    for target in range(1, len(NAMES) + 1):
        targets = torch.tensor([target, 3])
        expected = ranking.ranks(scores, targets, exclude)
        assert direct.ranks(targets, exclude, HISTORIES).tolist() == expected.tolist()


def test_titles_that_cannot_be_likely_enough_are_not_read_to_their_end(tiny, monkeypatch):
    direct, scores = told_apart(tiny)
    read = []
    forward = tiny.body.forward
    monkeypatch.setattr(
        tiny.body, "forward", lambda **inputs: read.append(inputs["input_ids"].numel()) or forward(**inputs)
    )
    direct.score(HISTORIES[:1])
    whole, read[:] = sum(read), []
    best = int(scores[0].argmax()) + 1
    assert direct.ranks(torch.tensor([best]), None, HISTORIES[:1]).tolist() == [1]
    assert sum(read) < 0.6 * whole


def test_items_of_the_targets_title_count_against_it(tiny):
    direct, _ = told_apart(tiny)
    twice = TitleRanker(tiny, [*NAMES, NAMES[0], NAMES[0]], history_length=3, max_title_tokens=16)
    alone, among = (one.ranks(torch.tensor([1, 1]), None, HISTORIES) for one in (direct, twice))
    assert (among - alone).tolist() == [2, 2]


def test_a_model_without_its_head_is_refused(tiny_folder):
    with pytest.raises(ConfigError, match="head"):
        ranker(backbones.load(tiny_folder, torch.float32, head=False))


def test_histories_beyond_the_context_are_refused_before_anything_is_ranked(tiny, monkeypatch):
    direct = ranker(tiny, history_length=3)
    lengths = csft_texts(tiny.tokenizer, NAMES, 16).lengths
    longest = max(int(lengths[row[row > 0] - 1].sum()) for row in HISTORIES) + int(lengths.max())
    assert longest < 4 * lengths.max()  # premise: no history holds the longest titles alone
    tiny.body.config.max_position_embeddings = longest
    direct.score(HISTORIES)
    tiny.body.config.max_position_embeddings = longest - 1
    monkeypatch.setattr(direct, "_read", lambda history: 1 / 0)
    for ask in (direct.score, lambda histories: direct.ranks(torch.tensor([1, 2]), None, histories)):
        with pytest.raises(ConfigError, match=f"has {longest} tokens, the model reads at most {longest - 1}"):
            ask(HISTORIES.flip(0))


def test_a_catalogue_is_refused_for_histories_that_are_asked_for_not_for_those_that_might_be(tiny):
    assert ranker(tiny, history_length=100_000).score(HISTORIES).isfinite().all()


def test_a_title_beyond_the_context_is_refused_at_once(tiny):
    tiny.body.config.max_position_embeddings = 8
    with pytest.raises(ConfigError, match="reads at most 8"):
        ranker(tiny)
