"""Pairs consumed next to each other, as positives of contrastive learning."""

import numpy as np
import pytest
import torch

from conftest import TITLES, prepared_cycle, train_stage
from llm2rec.data.sequences import TEST, TRAIN, VALIDATION, Sequences
from llm2rec.errors import ConfigError
from llm2rec.lm import backbone as backbones
from llm2rec.lm.iem import ContrastiveObjective, TitleBatches, contrastive, distinct_texts
from llm2rec.lm.positives import consumed_next, distinct_batches


def sequences_of(users, held_out=2):
    """Sequences whose last `held_out` events a user are not for training."""
    items = np.concatenate(users).astype(np.int32)
    parts = [[TRAIN] * (len(user) - held_out) + [VALIDATION, TEST][:held_out] for user in users]
    offsets = np.concatenate([[0], np.cumsum([len(user) for user in users])])
    ids = [str(number) for number in range(1, items.max() + 1)]
    return Sequences(
        items, offsets, np.concatenate(parts).astype(np.uint8), ids, [str(u) for u in range(len(users))]
    )


def test_pairs_are_neighbours_in_one_users_training_events():
    sequences = sequences_of([[1, 2, 3, 4, 5], [6, 7, 8, 9]])
    assert (consumed_next(sequences, np.arange(9)) + 1).tolist() == [[1, 2], [2, 3], [6, 7]]


@pytest.mark.parametrize("parts", [2, 4])
def test_every_process_has_as_many_chunks_whatever_its_titles_are_long(tiny, parts):
    titles = [" ".join(["boat"] * (1 + 3 * (number // 8))) for number in range(16)] + TITLES[:16]
    texts = distinct_texts(tiny.tokenizer, [f"{t} {n}" for n, t in enumerate(titles)], 64, special_tokens=True)
    pairs = np.arange(32).reshape(16, 2)
    shared = [TitleBatches(texts, [pairs], 40, parts)[part]["chunks"] for part in range(parts)]
    alone = [len(TitleBatches(texts, [own], 40)[0]["chunks"]) for own in np.split(pairs, parts)]
    assert len(set(alone)) > 1  # else there is nothing to make equal
    assert {len(chunks) for chunks in shared} == {max(alone)}
    counted = sum(len(chunk["segments"]["lengths"]) for chunks in shared for chunk in chunks.values())
    assert counted == pairs.size


def test_a_user_without_training_events_pairs_nothing():
    sequences = sequences_of([[1, 2, 3, 4], [5, 6], [7, 8, 9, 5]])
    assert (consumed_next(sequences, np.arange(9)) + 1).tolist() == [[1, 2], [7, 8]]


def test_items_of_one_title_are_no_pair():
    sequences = sequences_of([[1, 2, 3, 4, 4]])
    assert consumed_next(sequences, np.array([0, 0, 1, 2])).tolist() == [[0, 1]]
    with pytest.raises(ConfigError, match="positives=dropout"):
        consumed_next(sequences, np.zeros(4, dtype=int))


def test_no_title_stands_twice_in_a_batch_of_pairs():
    pairs = np.array([[a, b] for a in range(8) for b in range(8) if a != b])
    batches = distinct_batches(pairs, 20, 3, seed=0)
    assert len(batches) == 20
    assert all(len(np.unique(batch)) == 6 for batch in batches)
    assert {tuple(pair) for batch in batches for pair in batch} <= {tuple(pair) for pair in pairs}


class Counted(np.ndarray):
    """Pairs that count those of them that are read one by one."""

    read = 0

    def __getitem__(self, place):
        Counted.read += isinstance(place, int | np.integer)
        return super().__getitem__(place)


def test_no_pair_is_read_once_the_batches_are_made():
    pairs = np.random.default_rng(0).permutation(2_000).reshape(1_000, 2).view(Counted)  # all fit into batches
    batches = distinct_batches(pairs, 10, 4, seed=0)
    assert Counted.read == 40
    assert np.array_equal(batches, distinct_batches(pairs, 250, 4, seed=0)[:10])


def test_pairs_that_fill_no_batch_are_refused():
    with pytest.raises(ConfigError, match="fill 1 places of a batch of 2"):
        distinct_batches(np.array([[0, 1], [0, 2], [0, 3]]), 5, 2, seed=0)


def gradients(tiny, micro_batch_tokens):
    texts = distinct_texts(tiny.tokenizer, TITLES, 64, special_tokens=True)
    pairs = np.arange(16).reshape(8, 2)
    batch = TitleBatches(texts, [pairs], micro_batch_tokens)[0]
    tiny.model.zero_grad()
    loss = ContrastiveObjective(tiny, 0.1)(tiny.model, batch)
    loss.backward()
    return (
        len(batch["chunks"]),
        loss.item(),
        [p.grad.clone() for p in tiny.body.parameters() if p.grad is not None],
    )


def test_chunks_of_pairs_give_the_gradients_of_the_whole(tiny):
    tiny.set_causal(False)
    chunks, whole_loss, whole = gradients(tiny, 100_000)
    many, loss, chunked = gradients(tiny, 40)
    assert (chunks, many > 2) == (1, True)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert max(gradient.abs().max() for gradient in whole) > 1e-3  # premise
    for one, other in zip(whole, chunked, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_chunk_holds_its_first_titles_and_then_their_partners(tiny):
    texts = distinct_texts(tiny.tokenizer, TITLES, 64, special_tokens=True)
    pairs = np.array([[3, 9], [1, 0]])
    chunk = TitleBatches(texts, [pairs], 100_000)[0]["chunks"]["chunk0"]
    rows = [chunk["input_ids"][0][chunk["segments"]["sequence"] == row].tolist() for row in range(4)]
    found = [[rows[0], rows[2]], [rows[1], rows[3]]]
    expected = [[texts[a].tolist(), texts[b].tolist()] for a, b in pairs]
    assert sorted(found) == sorted(expected)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return prepared_cycle(tmp_path_factory.mktemp("world"))


def run(world, model, out, **changes):
    sequences, titles = world
    options = {"steps": 30, "batch_size": 4, "temperature": 0.1, "dropout": 0.0, "evaluations": 3, "patience": 3}
    options |= {"micro_batch_tokens": 4096, "model": model, "out": out}
    return train_stage(contrastive, sequences, titles, **(options | changes))


def test_items_consumed_next_to_each_other_come_to_be_neighbours(world, tiny_folder, tmp_path):
    summary = run(world, tiny_folder, tmp_path, positives="consumed-next")
    assert summary["auc_after"] > summary["auc_before"] + 0.1
    assert not backbones.load(tmp_path, torch.float32, head=False).is_causal


def test_unknown_positives_are_refused(world, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="dropout or consumed-next"):
        run(world, tiny_folder, tmp_path, positives="clicked")
