"""Vectors belong to items by id, never by row."""

import numpy as np
import pytest

from llm2rec.data.embeddings import ItemEmbeddings
from llm2rec.errors import ArtifactError


@pytest.fixture
def embeddings():
    return ItemEmbeddings(np.arange(6, dtype=np.float32).reshape(3, 2), ["a", "b", "c"], {"model": "tiny"})


def test_embeddings_survive_saving_and_loading(embeddings, tmp_path):
    embeddings.save(tmp_path / "set")
    loaded = ItemEmbeddings.load(tmp_path / "set")
    assert np.array_equal(loaded.vectors, embeddings.vectors)
    assert (loaded.item_ids, loaded.provenance) == (["a", "b", "c"], {"model": "tiny"})


def test_equal_embeddings_are_saved_as_equal_bytes(embeddings, tmp_path):
    for name in ("first", "second"):
        embeddings.save(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["embeddings.safetensors", "items.parquet", "provenance.json"]
    assert all((tmp_path / "first" / n).read_bytes() == (tmp_path / "second" / n).read_bytes() for n in names)


def test_alignment_follows_the_ids_not_the_rows(embeddings):
    assert embeddings.aligned_to(["c", "a"]).tolist() == [[4.0, 5.0], [0.0, 1.0]]


def test_permuting_rows_and_ids_together_changes_nothing(embeddings):
    turned = ItemEmbeddings(embeddings.vectors[::-1].copy(), ["c", "b", "a"])
    ids = ["b", "c", "a"]
    assert np.array_equal(turned.aligned_to(ids), embeddings.aligned_to(ids))


def test_aligned_vectors_are_float32(embeddings):
    assert embeddings.aligned_to(["a"]).dtype == np.float32


def test_an_item_without_a_vector_is_named(embeddings):
    with pytest.raises(ArtifactError, match="'B00X'"):
        embeddings.aligned_to(["a", "B00X"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_item(bad):
    vectors = np.zeros((2, 2), np.float32)
    vectors[1, 0] = bad
    with pytest.raises(ArtifactError, match="'b'"):
        ItemEmbeddings(vectors, ["a", "b"])


@pytest.mark.parametrize("ids", [["a"], ["a", "a"]], ids=["one id for two rows", "repeated id"])
def test_ids_that_do_not_fit_the_rows_are_refused(ids):
    with pytest.raises(ArtifactError):
        ItemEmbeddings(np.zeros((2, 2), np.float32), ids)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere"):
        ItemEmbeddings.load(tmp_path / "nowhere")


def test_a_damaged_file_is_refused(embeddings, tmp_path):
    embeddings.save(tmp_path)
    (tmp_path / "embeddings.safetensors").write_bytes(b"half")
    with pytest.raises(ArtifactError, match="encode"):
        ItemEmbeddings.load(tmp_path)
