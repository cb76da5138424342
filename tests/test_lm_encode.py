"""Encoding in shards: the same vectors, and a killed encoding goes on where it stopped."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from conftest import TITLES
from llm2rec.data.embeddings import ItemEmbeddings, write_embeddings
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.lm import encode as encoding
from llm2rec.lm.encode import encode, encode_by_text_encoder
from llm2rec.lm.pooling import Pooling

MANY = [*TITLES, *TITLES[3:7], *reversed(TITLES)]  # 44 items, 20 distinct titles


def run(folder, out, titles=MANY, **changes):
    options = {"causal": False, "dtype": torch.float32, "max_title_tokens": 16, "batch_tokens": 64, "name": "x"}
    ids = [str(number) for number in range(len(titles))]
    return encode(ids, titles, model=folder, out=out, **(options | changes))


def test_shards_give_the_vectors_of_one_piece(tiny_folder, tmp_path):
    for name, size in (("whole", 1000), ("shards", 7)):
        run(tiny_folder, tmp_path / name, shard_texts=size)
    whole, shards = (ItemEmbeddings.load(tmp_path / name) for name in ("whole", "shards"))
    assert whole.item_ids == shards.item_ids
    assert np.abs(whole.vectors - shards.vectors).max() < 1e-5
    assert not (tmp_path / "shards" / "checkpoints").exists()


def test_equal_titles_have_equal_vectors_across_items(tiny_folder, tmp_path):
    summary = run(tiny_folder, tmp_path, shard_texts=3)
    vectors = ItemEmbeddings.load(tmp_path).vectors
    assert (summary["items"], summary["distinct_titles"]) == (44, 20)
    for row, title in enumerate(MANY):
        assert np.array_equal(vectors[row], vectors[TITLES.index(title)])


class Killed(Exception):
    pass


def killed_after(monkeypatch, shards):
    """Makes encoding die after so many shards; returns how many texts are encoded from then on."""
    plain, encoded = encoding.encode_tokens, []

    def until_killed(lm, tokens, *rest):
        if len(encoded) == shards:
            raise Killed
        encoded.append(len(tokens))
        return plain(lm, tokens, *rest)

    monkeypatch.setattr(encoding, "encode_tokens", until_killed)
    return encoded


def resumed(monkeypatch, tiny_folder, out, **changes):
    """How many texts an encoding killed after two shards of 6 encodes when it is called again."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 2)
        run(tiny_folder, out, shard_texts=6)
    with monkeypatch.context() as patch:
        encoded = killed_after(patch, 1000)
        run(tiny_folder, out, **({"shard_texts": 6} | changes))
    return sum(encoded)


def test_a_killed_encoding_goes_on_with_the_first_missing_shard(monkeypatch, tiny_folder, tmp_path):
    assert resumed(monkeypatch, tiny_folder, tmp_path / "killed") == 20 - 2 * 6
    run(tiny_folder, tmp_path / "whole", shard_texts=6)
    files = [(tmp_path / name / "embeddings.safetensors").read_bytes() for name in ("killed", "whole")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "changes",
    [{"causal": True}, {"shard_texts": 7}, {"max_title_tokens": 5}, {"pooling": Pooling("last")}]
    + [{"titles": [f"{title}!" for title in MANY]}],
)
def test_shards_of_another_encoding_are_not_used(monkeypatch, tiny_folder, tmp_path, changes):
    assert resumed(monkeypatch, tiny_folder, tmp_path, **changes) == 20


def test_shards_of_another_training_are_not_used(monkeypatch, tiny, tiny_folder, tmp_path):
    from llm2rec.lm import backbone as backbones

    model = tmp_path / "model"
    backbones.save(tiny, model)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 2)
        run(model, tmp_path / "out", shard_texts=6)
    with torch.no_grad():
        tiny.model.get_input_embeddings().weight[3] += 1
    backbones.save(tiny, model)
    with monkeypatch.context() as patch:
        encoded = killed_after(patch, 1000)
        run(model, tmp_path / "out", shard_texts=6)
    assert sum(encoded) == 20


def test_too_little_disk_is_refused_before_anything_is_encoded(monkeypatch, tiny_folder, tmp_path):
    monkeypatch.setattr("llm2rec.artifacts.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    monkeypatch.setattr(encoding, "encode_tokens", lambda *args: 1 / 0)
    with pytest.raises(ArtifactError, match="GB free"):
        run(tiny_folder, tmp_path)


def test_a_vector_that_is_not_finite_is_refused_with_its_title(monkeypatch, tiny_folder, tmp_path):
    def broken(lm, tokens, *rest):
        vectors = np.zeros((len(tokens), 16), np.float32)
        vectors[2, 5] = np.nan
        return vectors

    monkeypatch.setattr(encoding, "encode_tokens", broken)
    with pytest.raises(ArtifactError, match=f"{sorted(TITLES)[2][:-6]}"):
        run(tiny_folder, tmp_path)


def test_the_way_of_pooling_is_recorded(tiny_folder, tmp_path):
    run(tiny_folder, tmp_path / "mean")
    run(tiny_folder, tmp_path / "layer", pooling=Pooling("last", 1))
    names = [ItemEmbeddings.load(tmp_path / name).provenance["pooling"] for name in ("mean", "layer")]
    assert names == ["mean", "last of layer 1"]


def test_where_vectors_come_from_is_recorded_with_them(tiny_folder, tmp_path):
    run(tiny_folder, tmp_path)
    recorded = {"name": "x", "model": str(tiny_folder), "causal": False, "pooling": "mean", "dtype": "float32"}
    assert ItemEmbeddings.load(tmp_path).provenance == recorded


def test_a_missing_layer_is_refused(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="layer 9"):
        run(tiny_folder, tmp_path, pooling=Pooling("mean", 9))


def test_blocks_are_written_as_one_safetensors_matrix(tmp_path):
    matrix = np.arange(12, dtype=np.float32).reshape(4, 3)
    write_embeddings(tmp_path, iter([matrix[:1], matrix[1:]]), 3, list("abcd"), {})
    save_file({"embeddings": matrix}, tmp_path / "plain.safetensors")
    assert (tmp_path / "embeddings.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_too_few_blocks_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="do not fit 3 items"):
        write_embeddings(tmp_path, [np.zeros((2, 3), np.float32)], 3, list("abc"), {})


def test_vectors_are_read_when_they_are_used(tmp_path):
    write_embeddings(tmp_path, [np.ones((2, 3), np.float32)], 3, ["a", "b"], {})
    loaded = ItemEmbeddings.load(tmp_path)
    assert isinstance(loaded.vectors, np.memmap)
    aligned = loaded.aligned_to(["b", "a"])
    aligned[0, 0] = 7  # a copy of its own
    assert loaded.vectors[1, 0] == 1


@pytest.fixture(scope="module")
def sentence_transformer(tiny_folder, tmp_path_factory):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    modules = [Transformer(str(tiny_folder), max_seq_length=16), Pooling(64, pooling_mode="mean"), Normalize()]
    folder = tmp_path_factory.mktemp("encoder")
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


def test_a_text_encoder_gives_its_own_vectors_by_item(sentence_transformer, tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr(encoding, "TEXTS_AT_ONCE", 6)
    ids = [str(number) for number in range(len(MANY))]
    arguments = {"model": sentence_transformer, "name": "mine", "out": tmp_path, "shard_texts": 7}
    summary = encode_by_text_encoder(ids, MANY, **arguments)
    expected = SentenceTransformer(str(sentence_transformer), device="cpu").encode(MANY)
    found = ItemEmbeddings.load(tmp_path)
    assert found.item_ids == ids and np.allclose(found.vectors, expected, atol=1e-5)
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)  # as it comes: normalised
    assert (summary["dimensions"], summary["distinct_titles"]) == (expected.shape[1], 20)


def test_a_folder_that_is_no_text_encoder_is_refused(tmp_path):
    (tmp_path / "modules.json").write_text("[]x")
    with pytest.raises(ConfigError, match=r"encode\.text_encoders\.mine"):
        encode_by_text_encoder(["1"], ["One"], model=tmp_path, name="mine", out=tmp_path / "out")
