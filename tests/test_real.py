"""The real small language model and real data; skipped, with the reason, where they cannot be had."""

import os

import numpy as np
import pytest
import torch

from conftest import train_stage, vectors_of
from llm2rec.data import mirrors, sources
from llm2rec.data.sequences import Sequences, prepare
from llm2rec.data.splits import Split
from llm2rec.errors import DataError
from llm2rec.lm import backbone as backbones
from llm2rec.lm.csft import csft
from llm2rec.lm.export import export
from llm2rec.precision import resolve_dtype
from llm2rec.training import Optimizer

pytestmark = pytest.mark.slow


def had(fetch, name):
    try:
        return fetch(name)
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def movielens():
    return had(sources.fetch_data, "movielens-100k")


@pytest.fixture(scope="module")
def smollm2():
    return had(sources.fetch_model, "smollm2-135m-instruct-q4")


def test_movielens_is_what_is_published(movielens):
    interactions, catalogue = movielens
    assert (len(interactions), len(catalogue)) == (100_000, 1682)
    assert interactions.frame["user_id"].n_unique() == 943
    assert catalogue.titles[catalogue.item_ids.index("50")] == "Star Wars (1977)"


@pytest.mark.parametrize("name", ["amazon-games", "amazon-industrial"])
def test_local_sets_have_the_registered_content(name):
    if not os.environ.get(mirrors.DATA_DIR):
        pytest.skip(f"{mirrors.DATA_DIR} is not set")
    interactions, catalogue = had(sources.fetch_data, name)
    assert sources.tables_hash(interactions, catalogue) == sources.data_content_hash(name)


def test_the_real_model_attends_both_ways_and_exports_its_vectors(smollm2, movielens, tmp_path):
    titles = movielens[1].titles[:64]
    lm = backbones.load(smollm2, torch.float32, head=False)
    lm.set_causal(True)
    causal = vectors_of(lm, titles, 2048)
    lm.set_causal(False)
    bidirectional = vectors_of(lm, titles, 2048)
    cosine = (
        (causal * bidirectional).sum(1) / np.linalg.norm(causal, axis=1) / np.linalg.norm(bidirectional, axis=1)
    )
    assert cosine.max() < 0.999
    for dtype in (torch.float32, torch.bfloat16):
        lm.model.to(dtype)
        export(lm, titles, 64, tmp_path / str(dtype))  # raises where sentence-transformers gives other vectors
        assert (tmp_path / str(dtype) / "modules.json").exists()


def test_a_few_csft_steps_lower_the_perplexity_of_held_out_titles(smollm2, movielens, tmp_path):
    prepare(*movielens, split=Split(), short_histories="error", out=tmp_path / "data")
    summary = train_stage(
        csft,
        Sequences.load(tmp_path / "data"),
        movielens[1].titles,
        model=smollm2,
        dtype=resolve_dtype("auto"),
        history_length=3,
        max_title_tokens=32,
        max_tokens=8192,
        epochs=None,
        batch_tokens=1024,
        micro_batch_tokens=1024,
        optimizer=Optimizer(learning_rate=2e-4, warmup_share=0.1, schedule="cosine"),
        checkpoints=0,
        seed=0,
        out=tmp_path / "csft",
    )
    assert summary["perplexity_after"] < 0.8 * summary["perplexity_before"]
