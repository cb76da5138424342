import numpy as np
import pytest
import torch

from conftest import TITLES, adding
from llm2rec.lm import packing
from llm2rec.lm.packing import added_tokens, gather_texts, pack, positions_within, token_budget_batches, tokenise


def packed_rows(texts, indices):
    tokens, lengths = gather_texts(texts, np.array(indices))
    return pack(tokens, lengths), lengths


def test_texts_are_tokenised_once_and_gathered_in_order(tiny):
    texts = tokenise(tiny.tokenizer, TITLES, 64, special_tokens=False)
    tokens, lengths = gather_texts(texts, np.array([3, 0, 3]))
    expected = [tiny.tokenizer(TITLES[i], add_special_tokens=False)["input_ids"] for i in (3, 0, 3)]
    assert tokens.tolist() == sum(expected, [])
    assert lengths.tolist() == [len(row) for row in expected]


def test_long_texts_are_truncated(tiny):
    assert tokenise(tiny.tokenizer, TITLES, 2, special_tokens=False).lengths.max() == 2


def test_what_a_tokenizer_adds_before_and_behind_a_text_is_known(tiny):
    assert added_tokens(tiny.tokenizer) == ((), ())
    begin, end = tiny.tokenizer.convert_tokens_to_ids(["~", "<eos>"])
    assert added_tokens(adding(tiny.tokenizer, "~ $A")) == ((begin,), ())
    assert added_tokens(adding(tiny.tokenizer, "~ $A <eos>")) == ((begin,), (end,))


def test_positions_restart_in_every_sequence():
    assert positions_within(np.array([2, 3, 1])).tolist() == [0, 1, 0, 1, 2, 0]


def test_batches_fit_the_budget_and_cover_everything_once():
    lengths = np.array([3, 4, 9, 1, 1, 5, 20, 2])
    batches = list(token_budget_batches(lengths, 8))
    assert np.concatenate(batches).tolist() == list(range(8))
    assert all(lengths[rows].sum() <= 8 or len(rows) == 1 for rows in batches)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_cannot_see_each_other(tiny, causal):
    tiny.set_causal(causal)
    texts = tokenise(tiny.tokenizer, TITLES, 64, special_tokens=False)
    with torch.no_grad():
        one, lengths = packed_rows(texts, [0, 1, 2])
        other, _ = packed_rows(texts, [0, 7, 2])
        first, second = tiny.hidden_states(one), tiny.hidden_states(other)
    assert torch.allclose(first[0, : lengths[0]], second[0, : lengths[0]], atol=1e-6)
    assert torch.allclose(first[0, -lengths[2] :], second[0, -lengths[2] :], atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_a_packed_row_equals_its_sequences_one_by_one(tiny, causal):
    tiny.set_causal(causal)
    texts = tokenise(tiny.tokenizer, TITLES, 64, special_tokens=False)
    packed, lengths = packed_rows(texts, range(6))
    with torch.no_grad():
        together = tiny.hidden_states(packed)[0].split(lengths.tolist())
        alone = [
            tiny.body(input_ids=torch.from_numpy(texts[i])[None], use_cache=False).last_hidden_state[0]
            for i in range(6)
        ]
    for packed_states, plain_states in zip(together, alone, strict=True):
        assert torch.allclose(packed_states, plain_states, atol=1e-5)


def padded(packed):
    """How many attention shares a row keeps, padding included."""
    return sum(
        len(block["gather"]) * block["gather"].shape[1] ** 2 for block in packed["segments"]["blocks"].values()
    )


def test_a_long_sequence_is_padded_apart_from_short_ones():
    lengths = np.array([95] * 8 + [500] + [95] * 8)
    packed = pack(np.arange(lengths.sum()), lengths)
    assert [len(block["members"]) for block in packed["segments"]["blocks"].values()] == [2, 15]
    assert padded(packed) < 17 * 500**2 / 6


@pytest.mark.parametrize("lengths", [[500], [500, 3, 3], [95, 96, 97, 98, 99], [1, 1, 1, 1]])
def test_few_sequences_or_like_ones_are_padded_together(lengths):
    packed = pack(np.arange(sum(lengths)), np.array(lengths))
    assert [block["members"].tolist() for block in packed["segments"]["blocks"].values()] == [
        list(range(len(lengths)))
    ]


@pytest.mark.parametrize("causal", [True, False])
def test_two_blocks_give_the_states_and_the_gradients_of_one(tiny, monkeypatch, causal):
    tiny.set_causal(causal)
    lengths = np.array([3, 30, 2, 5, 28, 4])
    tokens = np.random.default_rng(0).integers(0, 250, lengths.sum())
    found = []
    for share, blocks in ((packing.SHARE_OF_ONE_BLOCK, 2), (0, 1)):
        monkeypatch.setattr(packing, "SHARE_OF_ONE_BLOCK", share)
        packed = pack(tokens, lengths)
        assert len(packed["segments"]["blocks"]) == blocks
        tiny.model.zero_grad()
        hidden = tiny.hidden_states(packed)
        hidden.square().sum().backward()
        found.append([hidden.detach(), *(parameter.grad for parameter in tiny.body.parameters())])
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(*found, strict=True))


def test_the_attention_of_the_model_is_left_as_it_was(tiny):
    before = tiny.body.config._attn_implementation
    texts = tokenise(tiny.tokenizer, TITLES, 64, special_tokens=False)
    tiny.hidden_states(packed_rows(texts, [0])[0])
    assert tiny.body.config._attn_implementation == before
