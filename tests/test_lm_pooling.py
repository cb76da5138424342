"""One vector a title: each way of pooling against its definition, packed rows against single ones, export."""

import numpy as np
import pytest
import torch

from conftest import TITLES, vectors_of
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.lm import export as exporting
from llm2rec.lm.export import export
from llm2rec.lm.pooling import Pooling, pool_last, pool_mean, pool_weighted_mean

HIDDEN = torch.tensor([[[1.0], [3.0], [8.0], [10.0]]])
SEQUENCE = torch.tensor([0, 0, 0, 1])
POOLINGS = [Pooling("mean"), Pooling("last"), Pooling("weighted-mean"), Pooling("mean", 1), Pooling("last", 0)]


def test_pool_mean_averages_each_sequence():
    assert pool_mean(HIDDEN, SEQUENCE, 2).tolist() == [[4.0], [10.0]]


def test_pool_last_takes_the_last_token_of_each_sequence():
    assert pool_last(HIDDEN, SEQUENCE, 2).tolist() == [[8.0], [10.0]]


def test_pool_weighted_mean_weighs_later_tokens_more():
    weights = torch.tensor([1, 2, 3, 1])
    assert pool_weighted_mean(HIDDEN, SEQUENCE, 2, weights).flatten().tolist() == pytest.approx([31 / 6, 10.0])


def by_hand(lm, title, pooling):
    """The vector of one title by its definition, alone and unpacked."""
    ids = torch.tensor([lm.tokenizer(title)["input_ids"]])
    with torch.no_grad():
        states = lm.body(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[pooling.layer][0]
    weights = {"mean": torch.ones(len(states)), "weighted-mean": torch.arange(1.0, len(states) + 1)}
    if pooling.mode == "last":
        return states[-1]
    weight = weights[pooling.mode]
    return (states * weight[:, None]).sum(0) / weight.sum()


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_vectors_equal_those_of_single_titles(tiny, pooling, causal):
    tiny.set_causal(causal)
    vectors = vectors_of(tiny, TITLES, 100_000, pooling)
    expected = torch.stack([by_hand(tiny, title, pooling) for title in TITLES]).numpy()
    assert np.abs(vectors - expected).max() < 1e-5


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_a_batch_of_one_equals_a_batch_of_all(tiny, pooling):
    titles = [f"{title} {number}" for number in range(4) for title in TITLES][:64]
    one = vectors_of(tiny, titles, 1, pooling)
    many = vectors_of(tiny, titles, 100_000, pooling)
    assert np.abs(one - many).max() < 1e-5


def test_poolings_differ(tiny):
    vectors = [vectors_of(tiny, TITLES, pooling=pooling) for pooling in POOLINGS]
    for number, one in enumerate(vectors):
        assert all(np.abs(one - other).max() > 1e-3 for other in vectors[:number])


@pytest.mark.parametrize("mode", ["mean", "last", "weighted-mean"])
def test_the_exported_folder_pools_alike(tiny, tmp_path, mode):
    from sentence_transformers import SentenceTransformer

    tiny.set_causal(False)
    export(tiny, TITLES, 64, tmp_path / "encoder", Pooling(mode))
    theirs = SentenceTransformer(str(tmp_path / "encoder"), device="cpu").encode(TITLES, show_progress_bar=False)
    ours = vectors_of(tiny, TITLES, pooling=Pooling(mode))
    assert np.abs(ours - theirs).max() < 1e-4


def test_a_folder_that_reads_otherwise_than_it_was_trained_is_refused(tiny, tmp_path, monkeypatch):
    plain = exporting.encode_tokens

    def as_a_causal_model(lm, *arguments):
        lm.set_causal(True)
        return plain(lm, *arguments)

    tiny.set_causal(False)
    monkeypatch.setattr(exporting, "encode_tokens", as_a_causal_model)
    with pytest.raises(ArtifactError, match="gives other vectors than the trained one"):
        export(tiny, TITLES, 64, tmp_path / "encoder")


def test_a_folder_that_cannot_express_the_pooling_is_not_written(tiny, tmp_path):
    with pytest.raises(ArtifactError, match="cannot express the mean of layer 1"):
        export(tiny, TITLES, 64, tmp_path / "encoder", Pooling("mean", 1))
    assert not (tmp_path / "encoder").exists()


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ConfigError, match="mean, last, weighted-mean"):
        Pooling("max")


def test_the_last_layer_comes_after_the_final_norm_by_either_number(tiny):
    last, by_number, before = (vectors_of(tiny, TITLES, pooling=Pooling("mean", layer)) for layer in (-1, 2, 1))
    assert np.array_equal(last, by_number) and np.abs(last - before).max() > 0.1


@pytest.mark.parametrize("layer", [3, -2])
def test_a_layer_that_the_model_does_not_have_is_refused(tiny, layer):
    with pytest.raises(ConfigError, match="0 .* to 2"):
        Pooling("mean", layer).check_layer(tiny)
