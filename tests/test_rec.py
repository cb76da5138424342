"""Recommenders: a hand-computed forward, invariances, floors counted by hand, save and load, fit."""

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from conftest import cyclic_log
from llm2rec.data.sequences import TEST, Sequences, prepare
from llm2rec.data.splits import Split
from llm2rec.data.tables import Catalogue, Interactions
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.evaluation import protocol
from llm2rec.rec import model as models
from llm2rec.rec.baselines import Markov, Popularity
from llm2rec.rec.dropout import dropout
from llm2rec.rec.fit import NextItemObjective, WindowBatches, fit
from llm2rec.rec.items import FrozenItems

N, LENGTH = 12, 5
SIZES = {"architecture": "sasrec", "hidden_size": 8, "layers": 2, "heads": 2, "dropout": 0.0}
HISTORIES = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 0, 0, 0, 0]])


def vectors(items=N, dimensions=6):
    return np.random.default_rng(0).normal(3.0, 2.0, (items, dimensions)).astype(np.float32)


def built(text, **changes):
    sizes = SIZES | {"n_items": N, "history_length": LENGTH, "seed": 0} | changes
    return models.build(vectors=vectors() if text else None, **sizes).eval()


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rec")
    log, items = cyclic_log()
    catalogue = Catalogue.from_frame(items, "items")
    prepare(Interactions.from_frame(log, "log"), catalogue, split=Split(), short_histories="error", out=folder)
    return Sequences.load(folder)


def test_a_forward_pass_computed_by_hand():
    model = built(text=False, layers=1, heads=1)
    table, block = model.items.weight, model.blocks[0]
    x = table[torch.tensor([2, 6])] * 8**0.5 + model.positions[:2]  # items 3 and 7

    def norm(values, layer):
        centred = values - values.mean(-1, keepdim=True)
        variance = values.var(-1, unbiased=False, keepdim=True)
        return centred / (variance + layer.eps).sqrt() * layer.weight + layer.bias

    query, key, value = block.query_key_value(norm(x, block.attention_norm)).chunk(3, dim=-1)
    weights = (query @ key.T / 8**0.5).masked_fill(torch.ones(2, 2).triu(1).bool(), -torch.inf).softmax(-1)
    x = x + block.attention_out(weights @ value)
    inner = block.feed_forward_in(norm(x, block.feed_forward_norm)).clamp(min=0)
    x = norm(x + block.feed_forward_out(inner), model.norm)
    assert torch.allclose(model.score(torch.tensor([[3, 7]])), (x[-1:] @ table.T), atol=1e-5)


@pytest.mark.parametrize("text", [False, True])
class TestEveryRecommender:
    """What holds for learned ids and for text vectors alike."""

    def test_a_later_item_leaves_earlier_states_alone(self, text):
        model, other = built(text), HISTORIES.clone()
        other[1, -1] = 12
        assert torch.allclose(model(HISTORIES)[1, :-1], model(other)[1, :-1])
        assert not torch.allclose(model(HISTORIES)[1, -1], model(other)[1, -1])

    def test_padding_and_batch_size_change_nothing(self, text):
        model = built(text)
        together = model.score(HISTORIES)
        alone = [model.score(row[row > 0][None]) for row in HISTORIES]
        assert torch.allclose(together, torch.cat(alone), atol=1e-6)

    def test_only_the_last_items_of_a_long_history_count(self, text):
        model = built(text)
        long = torch.tensor([[11, 12, 4, 5, 6, 7, 8]])
        assert torch.equal(model.score(long), model.score(HISTORIES[1:2]))

    def test_permuting_the_items_permutes_the_scores(self, text):
        model, order = built(text), torch.randperm(N, generator=torch.Generator().manual_seed(1))
        before = model.score(HISTORIES)
        table = model.items.frozen if text else model.items.weight.data
        table.copy_(table[order].clone())
        moved = torch.where(HISTORIES > 0, torch.argsort(order)[(HISTORIES - 1).clamp(min=0)] + 1, 0)
        assert torch.allclose(model.score(moved), before[:, order], atol=1e-5)

    def test_saving_and_loading_keeps_the_scores(self, text, tmp_path):
        model = built(text)
        models.save(model, tmp_path)
        loaded = models.load(tmp_path, vectors() if text else None)
        assert torch.equal(loaded.score(HISTORIES), model.score(HISTORIES))

    def test_one_step_moves_every_trainable_parameter(self, text, sequences):
        model = built(text, dropout=0.1).train()
        before = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
        frozen = model.items.frozen.clone() if text else None
        optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
        NextItemObjective(model)(model, WindowBatches(sequences, LENGTH, 64, 0)[0]).backward()
        optimizer.step()
        assert [n for n, p in model.named_parameters() if torch.equal(before[n], p)] == []
        assert frozen is None or torch.equal(frozen, model.items.frozen)

    def test_an_item_outside_the_catalogue_is_refused(self, text):
        with pytest.raises(ValueError, match="item_index 13"):
            built(text).score(torch.tensor([[13]]))

    def test_an_empty_history_gets_finite_scores(self, text):
        assert built(text).score(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()

    def test_the_same_seed_gives_the_same_weights(self, text):
        assert torch.equal(built(text).score(HISTORIES), built(text).score(HISTORIES))
        assert not torch.equal(built(text).score(HISTORIES), built(text, seed=1).score(HISTORIES))


def test_text_vectors_are_standardised_and_constant_dimensions_survive():
    matrix = vectors()
    matrix[:, 0] = 7.0
    frozen = FrozenItems(matrix, 4).frozen
    assert torch.allclose(frozen.mean(0), torch.zeros(6), atol=1e-5)
    assert torch.allclose(frozen[:, 1:].std(0, unbiased=False), torch.ones(5), atol=1e-5)


def test_a_saved_text_recommender_refuses_other_vectors(tmp_path):
    models.save(built(text=True), tmp_path)
    with pytest.raises(ArtifactError, match="other item vectors"):
        models.load(tmp_path, vectors() + 1)
    with pytest.raises(ArtifactError, match="load it with them"):
        models.load(tmp_path)


def test_the_vectors_are_not_written_with_the_model(tmp_path):
    from safetensors.torch import load_file

    models.save(built(text=True), tmp_path)
    assert not [name for name, value in load_file(tmp_path / "model.safetensors").items() if value.shape == (N, 6)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused_before_training(bad):
    matrix = vectors()
    matrix[3, 2] = bad
    with pytest.raises(ArtifactError, match="row 3"):
        models.build(vectors=matrix, n_items=N, history_length=LENGTH, seed=0, **SIZES)


def test_vectors_that_do_not_cover_the_catalogue_are_refused():
    with pytest.raises(ArtifactError, match="11 items, the catalogue has 12"):
        models.build(vectors=vectors(11), n_items=N, history_length=LENGTH, seed=0, **SIZES)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="multiple"):
        built(text=False, heads=3)


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


def test_padding_before_an_item_is_refused():
    with pytest.raises(ValueError, match="align them left"):
        built(text=False).score(torch.tensor([[0, 1]]))


def test_added_items_are_standardised_with_the_statistics_of_training():
    grown = np.concatenate([vectors(), np.full((1, 6), 100.0, dtype=np.float32)])
    before = FrozenItems(vectors(), 4)
    after = FrozenItems(grown, 4, statistics=(before.mean.numpy(), before.scale.numpy()))
    assert torch.equal(after.frozen[:N], before.frozen)
    assert not torch.allclose(FrozenItems(grown, 4).frozen[:N], before.frozen)  # premise


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


def run_fit(sequences, out, **changes):
    options = SIZES | {"learning_rate": 0.01, "weight_decay": 0.0, "batch_size": 16, "hidden_size": 16}
    options |= {"max_epochs": 25, "patience": 25, "history_length": 4, "seed": 0} | changes
    return fit(sequences, None, out=out, **options)


def test_a_cyclic_world_is_learnt_completely(sequences, tmp_path):
    summary = run_fit(sequences, tmp_path)
    ranked = protocol.evaluate(models.load(tmp_path), sequences, TEST, 4, description=None)
    assert protocol.mean_metric(ranked, "recall@1") == 1.0
    assert summary.best_metric == 1.0


def test_fitting_twice_gives_the_same_weights(sequences, tmp_path):
    for name in ("one", "two"):
        run_fit(sequences, tmp_path / name, max_epochs=2, dropout=0.3)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_dropout_is_off_when_scoring():
    model = built(text=False, dropout=0.5)
    assert torch.equal(model.score(HISTORIES), model.score(HISTORIES))
    assert F.dropout(torch.ones(1000), 0.5, True).min() == 0  # premise
