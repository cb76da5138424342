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


def log(*users):
    """Sequences of events given as (item_index, part), of N items."""
    events = [event for user in users for event in user]
    items, parts = (
        np.array([item for item, _ in events], np.int32),
        np.array([part for _, part in events], np.uint8),
    )
    offsets = np.cumsum([0, *map(len, users)])
    names = [f"i{item}" for item in range(N)]
    return Sequences(items, offsets, parts, names, [f"u{user}" for user in range(len(users))])


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
    """The definition, item by item."""
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
            (1 - share) * vector + share * np.mean(found, axis=0) if found else vector
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


class TestSmoothed:
    @pytest.mark.parametrize("sequences", [random_sequences(), log(trained(1, 2, 1, 3), trained(3, 2, 2))])
    @pytest.mark.parametrize("columns", [64, 4])
    def test_vectors_are_those_of_the_definition(self, sequences, columns, monkeypatch):
        monkeypatch.setattr(smoothing_module, "_BLOCK_COLUMNS", columns)
        found = smoothed(vectors(), vectors().mean(axis=0), Neighbours.of(sequences), 0.3)
        assert found.dtype == np.float32
        assert np.allclose(found, by_hand(vectors(), sequences, 0.3), atol=1e-6)

    def test_a_vector_that_is_the_mean_stays_there(self):
        matrix = np.concatenate([vectors(N - 1), vectors(N - 1).mean(axis=0, keepdims=True)])
        found = smoothed(matrix, matrix[-1], Neighbours.of(log(trained(1, 2))), 0.5)
        assert found[-1].tolist() == [0] * 6 and np.isfinite(found).all()


class TestFrozen:
    def test_added_items_have_no_neighbours_and_change_nothing(self):
        neighbours = Neighbours.of(log(trained(1, 2, 3), trained(2, 5)))
        alone = freeze(vectors(), smoothing=0.5, neighbours=neighbours)
        grown = freeze(vectors(), smoothing=0.5, neighbours=neighbours, added=vectors()[[10, 0]])
        assert torch.equal(grown.values[:N], alone.values) and grown.sha256 == freeze(vectors()).sha256
        assert torch.allclose(grown.values[N], alone.values[10], atol=1e-2)  # item 11 has no neighbours either
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
