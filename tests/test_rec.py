"""Recommenders: baselines counted by hand, dropout, windows, fit; test_rec_conformance has what all share."""

import dataclasses
import tracemalloc

import numpy as np
import polars as pl
import pytest
import torch

from conftest import prepared_cycle
from llm2rec.data.sequences import TEST, TRAIN, Sequences, prepare
from llm2rec.data.splits import Split
from llm2rec.data.tables import Catalogue, Interactions
from llm2rec.errors import ConfigError, DataError
from llm2rec.evaluation import protocol
from llm2rec.rec import baselines
from llm2rec.rec import model as models
from llm2rec.rec.architecture import MODELS, Architecture
from llm2rec.rec.baselines import Ease, ItemKNN, Markov, Popularity
from llm2rec.rec.dropout import dropout
from llm2rec.rec.fit import NextItemObjective, Optimisation, WindowBatches, fit
from llm2rec.rec.items import Categories
from llm2rec.rec.losses import NegativeSampler

N, LENGTH = 12, 5
HISTORIES = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 0, 0, 0, 0]])


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    return prepared_cycle(tmp_path_factory.mktemp("rec"))[0]


def counted(items, users):
    frame = pl.DataFrame({"user_id": users, "item_id": items, "timestamp": range(len(items))})
    return Interactions.from_frame(frame, "x")


def test_floors_counted_by_hand(tmp_path):
    # Training events: u: a b a b, v: a b. Held out: the last two of each.
    log = counted(list("ababca") + list("abca"), ["u"] * 6 + ["v"] * 4)
    catalogue = Catalogue.from_frame(pl.DataFrame({"item_id": list("abc"), "title": list("xyz")}), "x")
    prepare(log, catalogue, split=Split(), short_histories="error", out=tmp_path)
    small = Sequences.load(tmp_path)
    history = torch.tensor([[1, 0], [2, 0]])
    assert Popularity(small).score(history).tolist() == [[3.0, 3.0, 0.0]] * 2
    assert Markov(small).score(history).floor().tolist() == [[0.0, 3.0, 0.0], [1.0, 0.0, 0.0]]


def test_markov_falls_back_to_popularity_where_nothing_followed(sequences):
    empty, popular = torch.zeros(1, 2, dtype=torch.int64), Popularity(sequences).score(HISTORIES[:1])[0]
    order = Markov(sequences).score(empty)[0].argsort(stable=True)
    assert popular.unique().numel() > 1  # premise: there is an order to fall back to
    assert (popular[order].diff() >= 0).all()


def users_by_items(sequences):
    """(U, N) float64: 1 where a user has the item among the training events, by a plain loop."""
    items, offsets = sequences.training()
    matrix = np.zeros((sequences.n_users, sequences.n_items))
    for user in range(sequences.n_users):
        matrix[user, items[offsets[user] : offsets[user + 1]] - 1] = 1.0
    return matrix


@pytest.mark.parametrize("neighbours", [3, 100])
def test_item_knn_equals_a_dense_count(sequences, neighbours):
    seen = users_by_items(sequences)
    together = seen.T @ seen
    counts = np.diag(together)
    similarity = together / (np.sqrt(np.outer(counts, counts)) + 10.0)
    np.fill_diagonal(similarity, 0.0)
    for row in similarity:
        row[np.argsort(-row, kind="stable")[neighbours:]] = 0.0
    expected = np.stack([similarity[[0, 1, 2]].sum(0), similarity[[3, 4, 5, 6, 7]].sum(0), similarity[8]])
    assert np.allclose(ItemKNN(sequences, neighbours=neighbours).score(HISTORIES), expected, atol=1e-6)


@pytest.mark.parametrize("floor", [ItemKNN, Ease])
def test_pairs_of_items_are_counted_some_at_a_time_with_the_same_result(floor, monkeypatch):
    items = np.concatenate([np.arange(400), np.arange(0, 400, 3), np.arange(0, 400, 7)]).astype(np.int32) + 1
    offsets, parts = np.array([0, 400, 534, 592]), np.full(592, TRAIN, dtype=np.uint8)
    devoted = Sequences(items, offsets, parts, [str(item) for item in range(400)], pl.Series(range(3)))
    at_once = floor(devoted).score(HISTORIES)
    monkeypatch.setattr(baselines, "_PAIRS_AT_ONCE", 4_000)
    tracemalloc.start()
    scorer = floor(devoted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 4 * 400**2  # bytes; all pairs at once take three dense matrices, sorted 15
    assert torch.equal(scorer.score(HISTORIES), at_once)


def test_an_item_twice_in_the_window_speaks_twice_for_its_neighbours(sequences):
    once, twice = (ItemKNN(sequences).score(torch.tensor([row])) for row in ([3, 0], [3, 3]))
    assert torch.equal(twice, 2 * once)


def test_ease_equals_the_closed_form(sequences):
    seen = users_by_items(sequences)
    inverse = np.linalg.inv(seen.T @ seen + 20.0 * np.eye(N))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    expected = np.stack([weights[[0, 1, 2]].sum(0), weights[[3, 4, 5, 6, 7]].sum(0), weights[8]])
    assert np.allclose(Ease(sequences, regularisation=20.0).score(HISTORIES), expected, atol=1e-5)


def test_ease_looks_at_the_set_of_items_alone(sequences):
    scorer = Ease(sequences)
    assert torch.allclose(scorer.score(torch.tensor([[5, 2, 5]])), scorer.score(torch.tensor([[2, 5, 0]])))


def test_ease_refuses_a_catalogue_that_it_cannot_invert(sequences, monkeypatch):
    monkeypatch.setattr(baselines, "LARGEST_EASE", N - 1)
    with pytest.raises(
        ConfigError, match=r"ease on 12 items: its weights are N\^2 floats.*N\^3; leave it out above 11"
    ):
        Ease(sequences)


@pytest.mark.parametrize(
    ("floor", "options"),
    [(ItemKNN, {"neighbours": 0}), (ItemKNN, {"shrinkage": -1.0}), (Ease, {"regularisation": 0.0})],
)
def test_a_baseline_refuses_numbers_out_of_range(sequences, floor, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        floor(sequences, **options)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_dropout_zeroes_its_share_and_keeps_the_mean(share):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = dropout(torch.ones(100_003), share, training=True)
    assert (dropped == 0).float().mean().item() == pytest.approx(share, abs=0.006)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    assert len(dropped.unique()) == 2


def test_dropout_zeroes_the_gradient_where_it_zeroes_the_value():
    values = torch.randn(7, 9, requires_grad=True)
    with torch.random.fork_rng():
        dropped = dropout(values, 0.5, training=True)
    dropped.sum().backward()
    assert torch.allclose(values.grad * values, dropped)


def test_every_training_target_is_in_one_batch_an_epoch(sequences):
    batches = WindowBatches(sequences, 3, 7, seed=0)
    items, offsets = sequences.training()
    expected = np.sort(np.concatenate([items[a + 1 : b] for a, b in zip(offsets, offsets[1:], strict=False)]))
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        found = np.concatenate([batches[index]["targets"].numpy() + 1 for index in range(len(batches))])
        assert np.array_equal(np.sort(found), expected)


def test_targets_last_gives_every_target_its_whole_window_and_supervises_its_end(sequences):
    batches = WindowBatches(sequences, 3, 7, seed=0, targets="last")
    items, offsets = sequences.training()
    users = [items[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]
    expected = sorted((user[max(0, at - 3) : at], user[at]) for user in users for at in range(1, len(user)))
    found = []
    for batch in (batches[index] for index in range(len(batches))):
        rows, width = batch["rows"], batch["histories"].shape[1]
        assert torch.equal(rows // width, torch.arange(len(rows)))  # one place a window
        lengths = (batch["histories"] > 0).sum(1)
        assert torch.equal(rows % width, lengths - 1)  # its end
        for history, length, target in zip(batch["histories"], lengths, batch["targets"], strict=True):
            found.append((history[:length].tolist(), int(target) + 1))
    assert sorted(found) == expected


def test_times_in_a_batch_are_those_of_its_histories(sequences):
    times = np.asarray(sequences.items).astype(np.int64) * 1_000  # the time tells the item
    batches = WindowBatches(dataclasses.replace(sequences, times=times), 3, 7, seed=0, with_times=True)
    for batch in (batches[index] for index in range(len(batches))):
        assert torch.equal(batch["times"], batch["histories"] * 1_000)


def test_negatives_depend_on_seed_epoch_and_batch_alone(sequences):
    sampler = NegativeSampler(np.ones(N), 6, "uniform")
    one, two = (WindowBatches(sequences, 3, 7, seed=0, sampler=sampler) for _ in range(2))
    one[3]
    assert torch.equal(one[0]["negatives"], two[0]["negatives"])
    assert not torch.equal(one[0]["negatives"], one[1]["negatives"])
    two.set_epoch(1)
    assert not torch.equal(one[0]["negatives"], two[0]["negatives"])


def test_a_cyclic_world_is_learnt_completely(sequences, tmp_path):
    summary = fit(sequences, architecture(), optimisation(), seed=0, out=tmp_path)
    ranked = protocol.evaluate(models.load(tmp_path), sequences, TEST, 4, description=None)
    assert protocol.mean_metric(ranked, "recall@1") == 1.0
    assert (summary.best_metric, summary.dtype) == (1.0, "float32")


def test_fitting_twice_gives_the_same_weights(sequences, tmp_path):
    for name in ("one", "two"):
        fit(sequences, architecture(dropout=0.3), optimisation(max_epochs=2), seed=0, out=tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def architecture(**changes):
    sizes = {"name": "sasrec", "items": "id", "hidden_size": 16, "layers": 2, "heads": 2, "dropout": 0.0}
    return Architecture(**sizes | {"history_length": 4} | changes)


def optimisation(**changes):
    numbers = {"learning_rate": 0.01, "weight_decay": 0.0, "batch_size": 16, "max_epochs": 25, "patience": 25}
    return Optimisation(**numbers | changes)


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ({"name": "gru4rec"}, {}),
        ({"name": "esasrec"}, {"loss": "sampled_softmax", "negatives": 6}),
        ({"temperature": 0.1}, {"loss": "sampled_softmax", "negatives": 6, "sampling": "popularity"}),
        ({}, {"loss": "gbce", "negatives": 6}),
        ({}, {"targets": "last", "batch_size": 64}),
    ],
    ids=["gru4rec", "esasrec", "cosine", "gbce", "last"],
)
def test_every_way_of_training_learns_a_cyclic_world(sequences, tmp_path, shape, numbers):
    fit(sequences, architecture(**shape), optimisation(**numbers), seed=0, out=tmp_path)
    loaded = models.load(tmp_path, item_ids=sequences.item_ids)
    ranked = protocol.evaluate(loaded, sequences, TEST, 4, description=None)
    assert protocol.mean_metric(ranked, "recall@1") == 1.0


def test_items_that_are_not_trainable_are_no_wrong_answers(sequences, tmp_path):
    trainable = np.arange(N) != 3
    batch = {"histories": torch.tensor([[1, 2]]), "rows": torch.tensor([1]), "targets": torch.tensor([4])}
    model = models.build(architecture(), n_items=N, seed=0)
    NextItemObjective(model, None, trainable)(model, batch).backward()
    gradient = model.items.weight.grad.abs().sum(dim=1)
    assert gradient[3] == 0 and (gradient[trainable] > 0).all()


@pytest.mark.parametrize("items", ["id", "sum", "concatenation"])
def test_nothing_is_learned_of_items_that_are_not_trainable(sequences, tmp_path, items):
    larger = dataclasses.replace(sequences, item_ids=[*sequences.item_ids, "held out"])
    vectors = None if items == "id" else np.random.default_rng(0).normal(size=(N + 1, 6)).astype(np.float32)
    numbers = optimisation(max_epochs=2, weight_decay=0.1)
    fit(
        larger,
        architecture(items=items),
        numbers,
        vectors=vectors,
        trainable=np.arange(N + 1) < N,
        seed=0,
        out=tmp_path,
    )
    learned = models.load(tmp_path, vectors).items.weight.abs().sum(dim=1)
    assert learned[N] == 0 and (learned[:N] > 0).all()


def test_items_that_are_not_trainable_are_never_drawn():
    sampler = NegativeSampler(np.ones(N), 6, "uniform", np.arange(N) < 2)
    generator = np.random.default_rng(0)
    assert set(torch.cat([sampler.draw(generator)[0] for _ in range(20)]).tolist()) == {0, 1}


def test_a_context_recommender_learns_from_categories_and_times(sequences, tmp_path):
    times = np.tile(np.arange(8), sequences.n_users) * 3_600
    categories = Categories.of([["even" if item % 2 else "odd"] for item in range(N)])
    timed = dataclasses.replace(sequences, times=times)
    shape = architecture(name="sasrec-context")
    summary = fit(timed, shape, optimisation(), categories=categories, seed=0, out=tmp_path)
    assert summary.best_metric == 1.0
    loaded = models.load(tmp_path)
    walk = torch.tensor([[1, 2, 3, 4]])
    assert loaded.score(walk, torch.arange(4)[None] * 3_600).argmax() == 4


def test_times_that_fall_are_refused_before_training(sequences, tmp_path):
    falling = dataclasses.replace(sequences, times=-np.arange(len(sequences.items)))
    with pytest.raises(DataError, match="times fall"):
        fit(falling, architecture(name="sasrec-context"), optimisation(), seed=0, out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "bpr"}, "no loss 'bpr'; allowed: full, sampled_softmax, gbce"),
        ({"targets": "first"}, "no targets 'first'; allowed: all, last"),
        ({"sampling": "hard"}, "no sampling 'hard'"),
        ({"negatives": 0}, "negatives is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"calibration": 1.5}, "calibration is 1.5"),
        ({"loss": "gbce", "sampling": "popularity"}, "gbce corrects for uniform"),
    ],
)
def test_an_optimisation_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        optimisation(**changes)


def test_more_negatives_than_items_are_refused_before_training(sequences, tmp_path):
    numbers = optimisation(loss="sampled_softmax", negatives=12)
    with pytest.raises(ConfigError, match="12 negatives of 12 items; take fewer"):
        fit(sequences, architecture(), numbers, seed=0, out=tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_off_when_scoring(name):
    shape = architecture(name=name, dropout=0.5, history_length=LENGTH)
    model, times = models.build(shape, n_items=N, seed=0).eval(), torch.zeros_like(HISTORIES)
    assert torch.equal(model.score(HISTORIES, times), model.score(HISTORIES, times))
    assert not torch.equal(model.train().score(HISTORIES, times), model.score(HISTORIES, times))  # premise
