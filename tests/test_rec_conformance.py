"""What holds for every recommender: each architecture over each item table and scorer, and the baselines."""

import copy
import dataclasses
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from llm2rec.data.sequences import TEST, TRAIN, VALIDATION, Sequences
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.evaluation import protocol, ranking
from llm2rec.rec import average
from llm2rec.rec import fit as fitting
from llm2rec.rec import model as models
from llm2rec.rec.architecture import ITEM_TABLES, MODELS, Architecture
from llm2rec.rec.average import ScoreAverage
from llm2rec.rec.baselines import FLOORS, ItemKNN
from llm2rec.rec.fit import NextItemObjective, Optimisation, WindowBatches
from llm2rec.rec.items import Categories
from llm2rec.rec.losses import NegativeSampler

N, LENGTH = 12, 5
CATEGORISED = "categorised"
CASES = [
    pytest.param((name, items, temperature), id=f"{name}-{items}-{'dot' if temperature is None else 'cosine'}")
    for name in MODELS
    for items in (*ITEM_TABLES, CATEGORISED)
    for temperature in (None, 0.1)
]
HISTORIES = torch.tensor(
    [
        [1, 2, 3, 0, 0],
        [4, 5, 6, 7, 8],
        [9, 0, 0, 0, 0],
        [12, 1, 12, 1, 0],
        [2, 2, 2, 2, 2],
        [0, 0, 0, 0, 0],
        [10, 11, 0, 0, 0],
        [3, 7, 11, 4, 0],
    ]
)
ORDER = np.random.default_rng(1).permutation(N)
CATEGORIES = [["a", "b"], ["b"], [], ["c"], ["a", "b", "c"], ["c"], ["a"], [], ["b"], ["c", "a"], ["a"], ["b"]]


def vectors(items=N):
    return np.random.default_rng(0).normal(3.0, 2.0, (items, 6)).astype(np.float32)


def shape(name, items, temperature, **changes):
    values = {"name": name, "items": "id" if items == CATEGORISED else items, "temperature": temperature}
    values |= {"hidden_size": 8, "layers": 2, "heads": 2, "dropout": 0.0, "history_length": LENGTH}
    return Architecture(**values | changes)


def built(case, seed=0, order=None, **changes):
    """A recommender in eval mode, over the catalogue in its own order or in another."""
    name, items, temperature = case
    order = np.arange(N) if order is None else order
    has_vectors = items not in ("id", CATEGORISED)
    model = models.build(
        shape(name, items, temperature, **changes),
        n_items=N,
        seed=seed,
        vectors=vectors()[order] if has_vectors else None,
        categories=Categories.of([CATEGORIES[row] for row in order]) if items == CATEGORISED else None,
    )
    if items == "delta":  # which begins at zero, where it would hide mistakes
        torch.nn.init.normal_(model.items.delta, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def times_of(histories):
    """Any times that never fall: each event comes a while after the one before it."""
    steps = torch.arange(histories.shape[1])
    return (1_700_000_000 + 3_000 * steps**2) * (histories > 0)


def score(scorer, histories):
    if getattr(scorer, "needs_times", False):
        return scorer.score(histories, times_of(histories))
    return scorer.score(histories)


def moved(histories, order):
    """The same histories where the item in row order[j] of the catalogue now stands in row j."""
    rows = torch.from_numpy(np.argsort(order))
    return torch.where(histories > 0, rows[(histories - 1).clamp(min=0)] + 1, 0)


def random_sequences(order=None):
    """30 users of 5 to 12 random events, the last two held out; under another order of the catalogue on demand."""
    generator = np.random.default_rng(3)
    counts = generator.integers(5, 13, 30)
    items = generator.choice(N, counts.sum(), p=np.arange(1, N + 1) / np.arange(1, N + 1).sum())
    if order is not None:
        items = np.argsort(order)[items]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    parts = np.full(counts.sum(), TRAIN, dtype=np.uint8)
    parts[offsets[1:] - 2], parts[offsets[1:] - 1] = VALIDATION, TEST
    users = [f"u{user}" for user in range(30)]
    return Sequences((items + 1).astype(np.int32), offsets, parts, [f"i{item}" for item in range(N)], users)


@pytest.mark.parametrize("case", CASES)
def test_some_items_have_the_vectors_and_gradients_that_they_have_among_all(case):
    rows = torch.tensor([11, 2, 7, 2])
    slopes = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for chosen in (lambda items: items.vectors(rows), lambda items: items.vectors()[rows]):
        items = built(case).items
        some = chosen(items)
        (some * slopes).sum().backward()
        found.append([some.detach(), *(one.grad for one in items.parameters())])
    for ours, of_all in zip(*found, strict=True):
        assert of_all.abs().max() > 0  # premise
        assert torch.allclose(ours, of_all, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", ["sampled_softmax", "gbce"])
def test_a_sampled_loss_looks_at_the_wanted_items_alone(case, loss, monkeypatch):
    model, sequences = built(case), random_sequences()
    sequences = replace(sequences, times=np.arange(len(sequences.items)))
    settings = Optimisation(0.1, 0.0, 4, 1, 1, loss=loss, negatives=3)
    sampler = NegativeSampler(np.ones(N), 3, "uniform")
    batch = WindowBatches(sequences, LENGTH, 4, 0, with_times=model.needs_times, sampler=sampler)[0]
    objective = NextItemObjective(model, settings)
    ours = objective(model, batch)
    monkeypatch.setattr(fitting, "_of_wanted_items", lambda batch: (None, batch))
    assert ours.item() == pytest.approx(objective(model, batch).item(), rel=1e-5)


def test_the_conformance_suite_covers_every_architecture():
    assert set(models.MODELS) == set(MODELS)


@pytest.mark.parametrize("case", CASES)
class TestEveryRecommender:
    def test_a_score_an_item_of_the_catalogue(self, case):
        scores = score(built(case), HISTORIES)
        assert scores.shape == (len(HISTORIES), N) and scores.dtype == torch.float32
        assert scores.std(dim=1).min() > 0

    def test_an_unknown_item_is_refused(self, case):
        with pytest.raises(ValueError, match="item_index 13"):
            score(built(case), torch.tensor([[13]]))

    def test_padding_before_an_item_is_refused(self, case):
        with pytest.raises(ValueError, match="align them left"):
            score(built(case), torch.tensor([[0, 1]]))

    def test_an_empty_history_gets_finite_scores(self, case):
        assert score(built(case), torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()

    def test_more_padding_changes_nothing(self, case):
        model = built(case)
        padded = torch.nn.functional.pad(HISTORIES[:, :4], (0, 4))
        assert torch.allclose(score(model, padded), score(model, HISTORIES[:, :4]), atol=1e-5)

    def test_a_batch_of_one_equals_a_batch_of_eight(self, case):
        model = built(case)
        alone = [score(model, row[None]) for row in HISTORIES]
        assert torch.allclose(score(model, HISTORIES), torch.cat(alone), atol=1e-5)

    def test_only_the_window_of_a_long_history_counts(self, case):
        model = built(case)
        long, window = torch.tensor([[11, 12, 4, 5, 6, 7, 8]]), torch.tensor([[4, 5, 6, 7, 8]])
        if model.needs_times:
            times = times_of(long)
            assert torch.equal(model.score(long, times), model.score(window, times[:, 2:]))
        else:
            assert torch.equal(model.score(long), model.score(window))

    def test_a_later_item_leaves_earlier_states_alone(self, case):
        model, other = built(case), HISTORIES.clone()
        other[1, -1] = 12
        first, second = (model(one, times=times_of(one)) for one in (HISTORIES, other))
        assert torch.allclose(first[1, :-1], second[1, :-1], atol=1e-6)
        assert not torch.allclose(first[1, -1], second[1, -1], atol=1e-6)

    def test_its_ranks_are_those_of_its_scores(self, case, monkeypatch):
        monkeypatch.setattr(ranking, "BLOCK_SCORES", 5 * len(HISTORIES))  # three blocks
        model = built(case)
        times = [times_of(HISTORIES)] if model.needs_times else []
        exclude = HISTORIES[:, :2]
        for target in range(1, N + 1):
            targets = torch.full((len(HISTORIES),), target)
            expected = ranking.ranks(score(model, HISTORIES), targets, exclude)
            assert torch.equal(model.ranks(targets, exclude, HISTORIES, *times), expected)

    def test_permuting_the_items_permutes_the_scores(self, case):
        model, permuted = built(case), built(case, order=ORDER)
        own = ("items.category_indices", "items.category_offsets")
        weights = {
            name: value[ORDER] if name in ("items.weight", "items.delta") else value
            for name, value in model.state_dict().items()
            if name not in own
        }
        permuted.load_state_dict(weights, strict=False)
        expected = score(model, HISTORIES)[:, ORDER]
        assert torch.allclose(score(permuted, moved(HISTORIES, ORDER)), expected, atol=1e-4)

    def test_saving_and_loading_keeps_the_scores(self, case, tmp_path):
        model = built(case)
        models.save(model, tmp_path)
        loaded = models.load(tmp_path, None if case[1] in ("id", CATEGORISED) else vectors())
        assert torch.equal(score(loaded, HISTORIES), score(model, HISTORIES))

    def test_every_trainable_parameter_gets_gradient_and_the_frozen_table_none(self, case):
        model, sequences = built(case, dropout=0.1).train(), random_sequences()
        timed = dataclasses.replace(sequences, times=np.arange(len(sequences.items)) * 1_000)
        batch = WindowBatches(timed, LENGTH, 64, 0, with_times=model.needs_times)[0]
        NextItemObjective(model)(model, batch).backward()
        still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert still == []
        assert [name for name, _ in model.named_parameters() if "frozen" in name] == []
        assert [name for name, buffer in model.named_buffers() if buffer.requires_grad] == []

    def test_the_same_seed_gives_the_same_weights(self, case):
        first, second, other = (built(case, seed).state_dict() for seed in (4, 4, 5))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_building_leaves_the_global_random_state_alone(self, case):
        before = torch.get_rng_state()
        built(case)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", FLOORS)
class TestEveryBaseline:
    def test_a_score_an_item_of_the_catalogue(self, name):
        scores = FLOORS[name](random_sequences()).score(HISTORIES)
        assert scores.shape == (len(HISTORIES), N) and scores.dtype == torch.float32

    def test_an_unknown_item_is_refused(self, name):
        with pytest.raises(ValueError, match="item_index 13"):
            FLOORS[name](random_sequences()).score(torch.tensor([[13]]))

    def test_padding_before_an_item_is_refused(self, name):
        with pytest.raises(ValueError, match="align them left"):
            FLOORS[name](random_sequences()).score(torch.tensor([[0, 1]]))

    def test_an_empty_history_gets_finite_scores(self, name):
        scores = FLOORS[name](random_sequences()).score(torch.zeros(2, 3, dtype=torch.int64))
        assert scores.isfinite().all()

    def test_a_batch_of_one_equals_a_batch_of_eight(self, name):
        scorer = FLOORS[name](random_sequences())
        alone = torch.cat([scorer.score(row[None]) for row in HISTORIES])
        assert torch.allclose(scorer.score(HISTORIES), alone, atol=1e-6)

    def test_permuting_the_items_permutes_the_scores(self, name):
        scores = FLOORS[name](random_sequences()).score(HISTORIES)
        permuted = FLOORS[name](random_sequences(ORDER)).score(moved(HISTORIES, ORDER))
        assert scores.std() > 0  # premise
        assert torch.allclose(permuted, scores[:, ORDER], atol=1e-5)

    def test_held_out_events_are_not_counted(self, name):
        sequences = random_sequences()
        other = np.where(sequences.parts == TRAIN, sequences.items, 1).astype(np.int32)
        assert not np.array_equal(other, sequences.items)  # premise
        scores = [FLOORS[name](one).score(HISTORIES) for one in (sequences, replace(sequences, items=other))]
        assert torch.equal(*scores)


def test_every_item_of_a_long_history_speaks_for_its_neighbours():
    scorer = ItemKNN(random_sequences())
    rest = torch.tensor([[1 + place % 8 for place in range(20)]])
    assert not torch.equal(scorer.score(torch.cat([torch.tensor([[9]]), rest], dim=1)), scorer.score(rest))


class TestScoreAverage:
    ids, text = ("sasrec", "id", None), ("gru4rec", "text", 0.1)

    def test_half_of_each_standardised_score(self):
        first, second = built(self.ids), built(self.text)
        expected = np.zeros((len(HISTORIES), N))
        for one in (first.score(HISTORIES).numpy(), second.score(HISTORIES).numpy()):
            expected += 0.5 * (one - one.mean(1, keepdims=True)) / one.std(1, keepdims=True)
        assert np.allclose(ScoreAverage(first, second).score(HISTORIES), expected, atol=1e-4)

    @pytest.mark.parametrize(("weight", "winner"), [(1.0, 0), (0.0, 1)])
    def test_a_whole_weight_ranks_as_that_recommender(self, weight, winner):
        pair = built(self.ids), built(self.text)
        found = ScoreAverage(*pair, weight=weight).score(HISTORIES).argsort(dim=1)
        assert torch.equal(found, pair[winner].score(HISTORIES).argsort(dim=1))

    def test_of_an_item_that_the_ids_do_not_know_the_text_predicts_their_score(self):
        ids, text = built(self.ids), built(self.text)
        ids.items.blank(torch.arange(N) == 4)
        assert ids.known.tolist() == [row != 4 for row in range(N)] and text.known.all()
        found = ScoreAverage(ids, text).score(HISTORIES).numpy()
        for row, one, other in zip(
            found, ids.score(HISTORIES).numpy(), text.score(HISTORIES).numpy(), strict=True
        ):
            known = np.delete(one, 4)
            other = (other - other.mean()) / other.std()
            one = (one - known.mean()) / known.std()
            correlation = np.delete(one * other, 4).mean()
            assert row[4] == pytest.approx(0.5 * (1 + correlation) * other[4], abs=1e-4)
            assert np.allclose(np.delete(row, 4), np.delete(0.5 * (one + other), 4), atol=1e-4)

    @pytest.mark.parametrize("hide", [False, True])
    def test_validation_of_each_weight_is_that_of_the_average_with_it(self, hide):
        pair, sequences = (built(self.ids), built(self.text)), random_sequences()
        found = average.validation_by_weight(ScoreAverage(*pair), sequences, LENGTH, mask_history=hide)
        assert list(found) == [step / 10 for step in range(11)] and len(set(found.values())) > 2
        for weight, value in found.items():
            ranked = protocol.evaluate(
                ScoreAverage(*pair, weight), sequences, VALIDATION, LENGTH, description=None, mask_history=hide
            )
            assert protocol.mean_metric(ranked, "ndcg@10") == pytest.approx(value, abs=1e-6)

    @pytest.mark.parametrize(
        ("by_weight", "best"), [({0.2: 0.1, 0.5: 0.1, 0.7: 0.3}, 0.7), ({0.0: 0.1, 0.4: 0.1, 1.0: 0.1}, 0.4)]
    )
    def test_the_best_weight_is_the_one_nearest_to_an_equal_say(self, by_weight, best):
        assert average.best_weight(by_weight) == best

    def test_it_scores_as_the_two_do_one_history_or_eight(self):
        both = ScoreAverage(built(self.ids), built(self.text))
        alone = torch.cat([both.score(row[None]) for row in HISTORIES])
        assert torch.allclose(both.score(HISTORIES), alone, atol=1e-4)

    def test_scoring_with_gradients_on_holds_no_graph_of_the_catalogue(self):
        ids, text = built(self.ids), built(self.text)
        assert torch.is_grad_enabled() and text.items.vectors().grad_fn is not None  # premise
        ScoreAverage(ids, text).score(HISTORIES)
        assert text._kept.catalogue.vectors.grad_fn is None
        assert text.known is text.known  # kept, not computed again

    def test_recommenders_of_different_catalogues_are_refused(self):
        small = models.build(shape("sasrec", "id", None), n_items=5, seed=0).eval()
        with pytest.raises(ArtifactError, match="5 and of 12"):
            ScoreAverage(small, built(self.text))

    def test_a_weight_above_one_is_refused(self):
        with pytest.raises(ConfigError, match=r"weight is 1\.5"):
            ScoreAverage(built(self.ids), built(self.text), 1.5)


def numpy_norm(values, layer):
    centred = values - values.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + layer.eps)
    return scaled * layer.weight.numpy() + layer.bias.numpy()


def numpy_linear(values, layer):
    product = values @ layer.weight.numpy().T
    return product if layer.bias is None else product + layer.bias.numpy()


def numpy_attention(values, layer, heads=2):
    query, key, value = np.split(numpy_linear(values, layer), 3, axis=-1)
    mixed, width = [], query.shape[1] // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = query[:, part] @ key[:, part].T / np.sqrt(width)
        logits[np.triu_indices(len(values), 1)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ value[:, part])
    return np.concatenate(mixed, axis=1)


def numpy_sigmoid(values):
    return 1 / (1 + np.exp(-values))


def loud(model):
    """The model with weights large enough that no part of it can be left out unnoticed."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return model


@torch.no_grad()
def test_a_forward_pass_of_sasrec_computed_by_hand():
    model = loud(built(("sasrec", "id", None)))
    table = model.items.weight.numpy()
    x = table[[2, 6, 0]] * 8**0.5 + model.positions.numpy()[:3]  # items 3, 7 and 1
    for block in model.blocks:
        attended = numpy_attention(numpy_norm(x, block.attention_norm), block.query_key_value)
        x = x + numpy_linear(attended, block.attention_out)
        inner = np.maximum(numpy_linear(numpy_norm(x, block.feed_forward_norm), block.feed_forward_in), 0)
        x = x + numpy_linear(inner, block.feed_forward_out)
    expected = numpy_norm(x, model.norm)[-1] @ table.T
    assert np.allclose(model.score(torch.tensor([[3, 7, 1, 0]]))[0], expected, atol=1e-3)


@torch.no_grad()
def test_a_forward_pass_of_esasrec_computed_by_hand():
    model = loud(built(("esasrec", "id", None)))
    table = model.items.weight.numpy()
    x = table[[2, 6, 0]] * 8**0.5 + model.positions.numpy()[:3]
    for block in model.blocks:
        attended = numpy_attention(numpy_norm(x, block.attention_norm), block.query_key_value)
        gate = numpy_sigmoid(numpy_linear(x, block.attention_gate))
        x = x + gate * numpy_linear(attended, block.attention_out)
        bent, straight = np.split(
            numpy_linear(numpy_norm(x, block.feed_forward_norm), block.feed_forward_in), 2, axis=1
        )
        gate = numpy_sigmoid(numpy_linear(x, block.feed_forward_gate))
        x = x + gate * numpy_linear(bent * numpy_sigmoid(bent) * straight, block.feed_forward_out)
    scores = model.score(torch.tensor([[3, 7, 1, 0]]))[0].numpy()
    assert np.allclose(scores, x[-1] @ table.T, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_cosine_scores_are_cosines_divided_by_the_temperature():
    dot, cosine = (built(("sasrec", "text", temperature)) for temperature in (None, 0.1))
    states = dot(HISTORIES)[1, -1].numpy()
    items = dot.items.vectors().numpy()
    expected = items @ states / (np.linalg.norm(items, axis=1) * np.linalg.norm(states)) / 0.1
    assert np.allclose(cosine.score(HISTORIES)[1], expected, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_scores_follow_the_weights_though_the_catalogue_is_kept(case):
    model, other = built(case), built(case, seed=1)
    before = score(model, HISTORIES)
    assert torch.equal(score(model, HISTORIES), before)
    model.load_state_dict(other.state_dict())
    assert torch.equal(score(model, HISTORIES), score(other, HISTORIES))
    with torch.no_grad():
        for parameter in model.items.parameters():
            parameter.mul_(2.0)
    assert not torch.equal(score(model, HISTORIES), score(other, HISTORIES))


KEPT = [("sasrec", "text", None), ("gru4rec", "sum", 0.1), ("esasrec", "delta", None), ("sasrec", "id", 0.1)]


@pytest.mark.parametrize("case", KEPT)
def test_a_copy_and_a_pickle_do_without_the_kept_catalogue(case):
    model = built(case)
    size = len(pickle.dumps(model))
    before = score(model, HISTORIES)
    assert len(pickle.dumps(model)) == size
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(score(other, HISTORIES), before)
        with torch.no_grad():
            for parameter in other.items.parameters():
                parameter.mul_(-0.5)
        assert not torch.equal(score(other, HISTORIES), before)
    assert torch.equal(score(model, HISTORIES), before)


@pytest.mark.parametrize("case", KEPT)
def test_scores_are_those_outside_of_autocast_and_inference_mode(case):
    expected = score(built(case), HISTORIES)
    model = built(case)
    with torch.autocast("cpu", torch.bfloat16):
        inside = score(model, HISTORIES)
    assert inside.dtype == torch.float32 and torch.equal(inside, expected)
    assert torch.equal(score(model, HISTORIES), expected)
    with torch.inference_mode():
        other = built(case)
        assert torch.allclose(score(other, HISTORIES), expected, atol=1e-5)  # a GRU rounds otherwise there
        for parameter in other.items.parameters():
            parameter.mul_(-0.5)
        assert not torch.allclose(score(other, HISTORIES), expected, atol=1e-3)


def test_scores_follow_a_conversion_there_and_back():
    # Of this size: converted weights then lie where they had lain before, and count as many changes.
    wide = shape("sasrec", "id", 0.1, hidden_size=32, layers=1)
    model, fresh = (models.build(wide, n_items=500, seed=0).eval() for _ in range(2))
    before = score(model, HISTORIES)
    model.bfloat16().float()
    assert torch.equal(score(model, HISTORIES), score(fresh.bfloat16().float(), HISTORIES))
    assert not torch.equal(score(model, HISTORIES), before)  # premise: there was something to round


def test_scores_follow_a_table_that_takes_the_place_of_another():
    case = ("sasrec", "text", None)
    model, turned = built(case), built(case, order=np.arange(N)[::-1].copy())
    score(model, HISTORIES)
    model.items.frozen = model.items.frozen.flip(0)
    assert torch.allclose(score(model, HISTORIES), score(turned, HISTORIES), atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_products_change_a_gradient_by_rounding_alone(case):
    exact, rounded = gradients(case, "float32"), gradients(case, "bfloat16")
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        assert torch.cosine_similarity(rounded[name].flatten(), gradient.flatten(), dim=0) > 0.97 or (
            gradient.abs().max() < 1e-2 * max(one.abs().max() for one in exact.values())
        ), name


def gradients(case, dtype):
    model, sequences = built(case).train(), random_sequences()
    timed = dataclasses.replace(sequences, times=np.arange(len(sequences.items)) * 1_000)
    batch = WindowBatches(timed, LENGTH, 64, 0, with_times=model.needs_times)[0]
    loss = NextItemObjective(model, Optimisation(1e-3, 0.0, 64, 1, 1, dtype=dtype))(model, batch)
    loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
