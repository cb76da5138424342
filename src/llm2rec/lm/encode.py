"""Stage `encode`: titles to vectors, each distinct title once, by token budget, in shards on disk.

A shard is a run of distinct titles in sorted order; its vectors are written whole to `checkpoints/` before the
next one begins. So the memory is that of one shard, a killed encoding goes on with the first missing shard,
and several processes share the shards out.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2rec import artifacts, progress
from llm2rec.data.embeddings import write_embeddings
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.lm import backbone as backbones
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.packing import TokenisedTexts, gather_texts, pack, to_device, token_budget_batches, tokenise
from llm2rec.lm.pooling import MEAN, Pooling, embed
from llm2rec.lm.text import item_texts
from llm2rec.processes import processes
from llm2rec.training import default_device

SHARD_TEXTS = 65_536
ROWS_AT_ONCE = 16_384
TEXTS_AT_ONCE = 512  # of a text encoder, which sorts and batches them itself
WHAT = "encoding.json"

VectorsOf = Callable[[list[str]], np.ndarray]  # (n,) distinct texts -> (n, D) float32


def encode(
    item_ids: list[str],
    titles: list[str],
    *,
    model: str | Path,
    causal: bool,
    dtype: torch.dtype,
    max_title_tokens: int,
    batch_tokens: int,
    name: str,
    out: Path,
    pooling: Pooling = MEAN,
    shard_texts: int = SHARD_TEXTS,
    compiled: bool = False,
) -> dict[str, Any]:
    """Writes the pooled vectors of a whole catalogue to `out`, raw, one row an item.

    Args:
        item_ids, titles: (N,) in the order of the catalogue.
        model: a decoder or an item encoder (their folders have the same layout).
        causal: whether a title's token may see only the tokens before it.
        name: what the vector set is called.
        shard_texts: distinct titles of a shard; what is in memory, and what a killed encoding loses.
        compiled: see `Backbone.compile_layers`.

    Returns:
        Summary: vectors, dimensions, distinct titles, titles per second (of the shards made by this call).

    Raises:
        ConfigError: a title longer than the model's context, or a layer that the model does not have.
        ArtifactError: too little disk, or a vector that is not finite.
    """
    lm = backbones.load(model, dtype, head=False)
    lm.set_causal(causal)
    lm.model.to(default_device())
    if compiled:
        lm.compile_layers()
    pooling.check_layer(lm)
    provenance = {"name": name, "model": str(model), "causal": causal, "pooling": str(pooling)}
    provenance |= {"dtype": str(dtype).removeprefix("torch.")}

    def vectors_of(texts: list[str]) -> np.ndarray:
        tokens = tokenise(lm.tokenizer, texts, max_title_tokens, special_tokens=True)
        return encode_tokens(lm, tokens, batch_tokens, name, pooling)

    what = provenance | {"max_title_tokens": max_title_tokens, "weights": _sum_of_weights(lm.body)}
    width = lm.body.config.hidden_size
    return _encode_in_shards(item_ids, titles, vectors_of, width, provenance, what, out, shard_texts)


def encode_by_text_encoder(
    item_ids: list[str],
    titles: list[str],
    *,
    model: str | Path,
    name: str,
    out: Path,
    shard_texts: int = SHARD_TEXTS,
) -> dict[str, Any]:
    """Writes what a ready text encoder makes of a whole catalogue to `out`: its pooling, length and normalisation.

    Args:
        model: a SentenceTransformer, hub id or folder.
        item_ids, titles, name, shard_texts: as for `encode`.

    Returns:
        Summary, as of `encode`.

    Raises:
        ConfigError: it cannot be loaded.
        ArtifactError: too little disk, or a vector that is not finite.
    """
    from sentence_transformers import SentenceTransformer

    try:
        encoder = SentenceTransformer(str(model), device=str(default_device()))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"encode.text_encoders.{name}: {model} is no SentenceTransformer ({error})") from error
    provenance = {"name": name, "model": str(model)}

    def vectors_of(texts: list[str]) -> np.ndarray:
        order = np.argsort([-len(text) for text in texts], kind="stable")
        vectors = np.empty((len(texts), width), dtype=np.float32)
        with progress.bar(f"encode {name}", len(texts)) as running:
            for begin in range(0, len(texts), TEXTS_AT_ONCE):
                chosen = order[begin : begin + TEXTS_AT_ONCE]
                vectors[chosen] = encoder.encode([texts[row] for row in chosen], show_progress_bar=False)
                running.advance(len(chosen))
        return vectors

    width = int(encoder.encode(["width"], show_progress_bar=False).shape[1])
    what = provenance | {"weights": _sum_of_weights(encoder)}
    return _encode_in_shards(item_ids, titles, vectors_of, width, provenance, what, out, shard_texts)


def _sum_of_weights(model: torch.nn.Module) -> float:
    """A number that another training of the same model hardly shares."""
    return float(sum(parameter.detach().double().sum() for parameter in model.parameters()))


def _encode_in_shards(
    item_ids: list[str],
    titles: list[str],
    vectors_of: VectorsOf,
    width: int,
    provenance: dict[str, Any],
    what: dict[str, Any],
    out: Path,
    shard_texts: int,
) -> dict[str, Any]:
    """Writes the vectors of a catalogue, each distinct text once; `what` decides which shards may be gone on from.

    Returns:
        Summary: see `encode`.
    """
    texts, first = np.unique(np.array(item_texts(titles), dtype=object), return_inverse=True)
    shard_texts = min(shard_texts, -(-len(texts) // processes().count))  # every process has a share
    artifacts.require_disk(out, (len(texts) + len(item_ids)) * width * 4, "its vectors, while they are made,")
    shards = out / artifacts.CHECKPOINTS
    if processes().is_main:
        _start(shards, what | {"shard_texts": shard_texts, "texts": artifacts.hash_json(texts.tolist())})
    processes().wait()
    began = time.perf_counter()
    encoded = _encode_shards(vectors_of, texts, shards, shard_texts)
    seconds = time.perf_counter() - began
    processes().wait()
    if processes().is_main:
        rows = _rows(shards, len(texts), shard_texts, first)
        write_embeddings(out, rows, width, item_ids, provenance)
        shutil.rmtree(shards)
    processes().wait()
    return {
        "items": len(item_ids),
        "dimensions": width,
        "distinct_titles": len(texts),
        "titles_per_second": round(encoded / seconds, 1),
    }


def _start(shards: Path, what: dict[str, Any]) -> None:
    """Keeps shards that a killed encoding of the same thing left, and removes others."""
    if not (shards / WHAT).exists() or artifacts.read_json(shards / WHAT) != what:
        shutil.rmtree(shards, ignore_errors=True)
        artifacts.write_json(shards / WHAT, what)


def _encode_shards(vectors_of: VectorsOf, texts: np.ndarray, shards: Path, shard_texts: int) -> int:
    """Writes the missing shards among this process's share of them; how many texts they hold."""
    encoded, own = 0, processes()
    for number, begin in enumerate(range(0, len(texts), shard_texts)):
        path = _shard(shards, number)
        if number % own.count != own.rank or path.exists():
            continue
        chosen = texts[begin : begin + shard_texts].tolist()
        vectors = vectors_of(chosen)
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise ArtifactError(
                f"the vector of {chosen[broken[0]]!r} is not finite; check the model, or use float32"
            )
        partial = path.with_suffix(".partial.npy")
        np.save(partial, vectors)
        os.replace(partial, path)
        encoded += len(chosen)
    return encoded


def _shard(shards: Path, number: int) -> Path:
    return shards / f"shard-{number:05d}.npy"


def _rows(shards: Path, texts: int, shard_texts: int, first: np.ndarray) -> Iterator[np.ndarray]:
    """The vectors of the items, (b, D) at a time; item i has that of distinct text `first[i]`."""
    parts = [np.load(_shard(shards, number), mmap_mode="r") for number in range(-(-texts // shard_texts))]
    for begin in range(0, len(first), ROWS_AT_ONCE):
        chosen = first[begin : begin + ROWS_AT_ONCE]
        block = np.empty((len(chosen), parts[0].shape[1]), dtype=np.float32)
        for number in np.unique(chosen // shard_texts):
            own = chosen // shard_texts == number
            block[own] = parts[number][chosen[own] % shard_texts]
        yield block


def encode_tokens(
    lm: Backbone, texts: TokenisedTexts, batch_tokens: int, description: str, pooling: Pooling = MEAN
) -> np.ndarray:
    """Pooled vectors of tokenised texts, (N, D) float32, in their order.

    Raises:
        ConfigError, ArtifactError: the model cannot read them (`Backbone.check_readable`).
    """
    lm.check_readable(texts, int(texts.lengths.max()))
    order = np.argsort(-texts.lengths, kind="stable")  # longest first: memory peaks at once
    vectors = np.empty((len(texts), lm.body.config.hidden_size), dtype=np.float32)
    batches = list(token_budget_batches(texts.lengths[order], batch_tokens))
    lm.model.eval()
    with torch.no_grad(), progress.bar(f"encode {description}", len(texts)) as running:
        for rows in batches:
            chosen = order[rows]
            packed = to_device(pack(*gather_texts(texts, chosen)), lm.body.device)
            vectors[chosen] = embed(lm, packed, pooling).cpu().numpy()
            running.advance(len(chosen))
    return vectors
