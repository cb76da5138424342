"""Vectors smoothed over what is consumed together: what counts as a neighbour, the sums, and what is refused."""

import json

import numpy as np
import pytest
import torch

from llm2rec.data.sequences import TEST, TRAIN, VALIDATION, Sequences
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.rec import model as models
from llm2rec.rec import smoothing as smoothing_module
from llm2rec.rec.smoothing import Neighbours, smoothed
from llm2rec.rec.vectors import freeze
from test_rec_conformance import HISTORIES, N, random_sequences, vectors
from test_rec_items import ADDED, architecture


def log(*users, items=N):
    """Sequences of events given as (item_index, part)."""
    events = [event for user in users for event in user]
    indices = np.array([item for item, _ in events], np.int32)
    parts = np.array([part for _, part in events], np.uint8)
    offsets = np.cumsum([0, *map(len, users)])
    names = [f"i{item}" for item in range(items)], [f"u{user}" for user in range(len(users))]
    return Sequences(indices, offsets, parts, *names)


def trained(*items):
    return [(item, TRAIN) for item in items]


def counted(sequences):
    """{(item, neighbour): count}, both item_index."""
    neighbours = Neighbours.of(sequences)
    items = np.repeat(np.arange(N), np.diff(neighbours.offsets)) + 1
    return dict(
        zip(zip(items.tolist(), (neighbours.indices + 1).tolist(), strict=True), neighbours.counts, strict=True)
    )


def by_hand(matrix, sequences, share):
    """The definition, item by item; NaN where it has no neighbours."""
    own = matrix - matrix.mean(axis=0)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    beside = [[] for _ in range(len(matrix))]
    before, after = sequences.successions()
    for one, other in zip(before - 1, after - 1, strict=True):
        if one != other:
            beside[one].append(own[other])
            beside[other].append(own[one])
    return np.stack(
        [
            (1 - share) * vector + share * np.mean(found, axis=0) if found else np.full(6, np.nan)
            for vector, found in zip(own, beside, strict=True)
        ]
    )


class TestNeighbours:
    def test_they_are_counted_in_both_directions_and_never_across_users(self):
        expected = {(1, 2): 2, (2, 1): 2, (2, 3): 1, (3, 2): 1}
        assert counted(log(trained(1, 2, 3), trained(2, 1), trained(5))) == expected

    def test_an_item_is_no_neighbour_of_itself(self):
        assert counted(log(trained(4, 4, 6))) == {(4, 6): 1, (6, 4): 1}

    def test_held_out_events_do_not_count(self):
        assert counted(log([*trained(1, 2), (3, VALIDATION), (4, TEST)])) == {(1, 2): 1, (2, 1): 1}

    def test_a_log_without_successions_has_none(self):
        neighbours = Neighbours.of(log(trained(1), trained(2)))
        assert len(neighbours.indices) == 0 and neighbours.shares().shape == (N, N)

    def test_shares_of_an_item_sum_to_one(self):
        sums = Neighbours.of(random_sequences()).shares().sum(axis=1)
        assert np.allclose(sums, 1)
        assert Neighbours.of(log(trained(1, 2))).shares().sum(axis=1).tolist() == [1, 1] + [0] * (N - 2)


def smooth(matrix, sequences, share, added=None):
    added = matrix[:0] if added is None else added
    return smoothed(matrix, matrix.mean(axis=0), Neighbours.of(sequences), share, added)


class TestSmoothed:
    @pytest.mark.parametrize("sequences", [random_sequences(), log(trained(1, 2, 1, 3), trained(3, 2, 2))])
    @pytest.mark.parametrize("block", [64, 4])
    def test_vectors_of_items_with_neighbours_are_those_of_the_definition(self, sequences, block, monkeypatch):
        monkeypatch.setattr(smoothing_module, "_BLOCK_COLUMNS", block)
        monkeypatch.setattr(smoothing_module, "_BLOCK_ROWS", block)
        found, _ = smooth(vectors(), sequences, 0.3)
        expected = by_hand(vectors(), sequences, 0.3)
        known = np.isfinite(expected).all(axis=1)
        assert found.dtype == np.float32 and np.isfinite(found).all()
        assert known.sum() in (3, N) and np.allclose(found[known], expected[known], atol=1e-6)

    def test_items_without_neighbours_get_those_that_their_text_lets_expect(self):
        matrix = np.random.default_rng(1).normal(size=(400, 5)).astype(np.float32)
        # Every item but the last 100 stands beside the one that is most like its mirror image.
        own = matrix - matrix.mean(axis=0)
        nearest = (-own[:300] @ own[:300].T / np.linalg.norm(own[:300], axis=1)).argmax(axis=1)
        users = [trained(item + 1, int(other) + 1) for item, other in enumerate(nearest) if item != other]
        neighbours = Neighbours.of(log(*users, items=400))
        found, added = smoothed(matrix, matrix.mean(axis=0), neighbours, 0.5, matrix[300:] + 0.1)
        unit = own / np.linalg.norm(own, axis=1, keepdims=True)
        lent = 2 * found[300:] - unit[300:]
        cosines = (lent * -unit[300:]).sum(axis=1) / np.linalg.norm(lent, axis=1)
        assert cosines.mean() > 0.9
        assert np.allclose(added, found[300:], atol=0.15) and not np.allclose(added, found[300:], atol=1e-3)

    def test_items_without_neighbours_are_not_longer_than_the_others(self):
        matrix = np.random.default_rng(1).normal(size=(600, 5)).astype(np.float32)
        pairs = np.random.default_rng(2).integers(1, 501, (3000, 2))
        neighbours = Neighbours.of(log(*(trained(*pair) for pair in pairs.tolist()), items=600))
        found, added = smoothed(matrix, matrix.mean(axis=0), neighbours, 0.5, 9 * matrix[500:])
        known, alone, new = (np.linalg.norm(one, axis=1).mean() for one in (found[:500], found[500:], added))
        assert alone < 1.05 * known and new < 1.05 * known

    def test_without_any_neighbours_all_vectors_have_one_length(self):
        found, _ = smooth(vectors(), log(trained(1), trained(2)), 0.5)
        assert np.allclose(np.linalg.norm(found, axis=1), 0.5)

    def test_a_vector_that_is_the_mean_stays_there(self):
        matrix = np.concatenate([vectors(N - 1), vectors(N - 1).mean(axis=0, keepdims=True)])
        neighbours = Neighbours.of(log(trained(1, 2)))
        found, _ = smoothed(matrix, matrix[-1], neighbours, 0.5, matrix[:0])
        assert found[-1].tolist() == [0] * 6 and np.isfinite(found).all()


class TestFrozen:
    def test_added_items_have_no_neighbours_and_change_nothing(self):
        neighbours = Neighbours.of(log(trained(1, 2, 3), trained(2, 5)))
        alone = freeze(vectors(), smoothing=0.5, neighbours=neighbours)
        grown = freeze(vectors(), smoothing=0.5, neighbours=neighbours, added=vectors()[[10, 0]])
        assert torch.equal(grown.values[:N], alone.values) and grown.sha256 == freeze(vectors()).sha256
        assert torch.allclose(grown.values[N], alone.values[10], atol=2e-2)  # item 11 has no neighbours either
        assert not torch.allclose(grown.values[N + 1], alone.values[0], atol=0.1)

    def test_a_saved_recommender_scores_added_items(self, tmp_path):
        neighbours = Neighbours.of(random_sequences())
        model = models.build(
            architecture(smoothing=0.5), n_items=N, seed=0, vectors=vectors(), neighbours=neighbours
        ).eval()
        models.save(model, tmp_path)
        grown = models.load(tmp_path, vectors(), added=ADDED)
        assert torch.equal(grown.score(HISTORIES)[:, :N], model.score(HISTORIES))

    def test_a_recommender_of_before_smoothing_is_loaded(self, tmp_path):
        model = models.build(architecture(), n_items=N, seed=0, vectors=vectors()).eval()
        models.save(model, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        del config["architecture"]["smoothing"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert torch.equal(models.load(tmp_path, vectors()).score(HISTORIES), model.score(HISTORIES))

    def test_smoothing_without_neighbours_is_refused(self):
        with pytest.raises(ConfigError, match=r"smoothing is 0\.5: it needs the neighbours"):
            models.build(architecture(smoothing=0.5), n_items=N, seed=0, vectors=vectors())

    def test_neighbours_without_smoothing_are_refused(self):
        neighbours = Neighbours.of(random_sequences())
        with pytest.raises(ConfigError, match="smoothing is 0: leave the neighbours out"):
            models.build(architecture(), n_items=N, seed=0, vectors=vectors(), neighbours=neighbours)

    def test_neighbours_of_another_catalogue_are_refused(self):
        neighbours = Neighbours.of(random_sequences())
        with pytest.raises(ArtifactError, match="neighbours of 12 items do not fit 11"):
            freeze(vectors(11), smoothing=0.5, neighbours=neighbours)
