"""Stage `encode`: titles to vectors, each distinct title once, sorted by tokens, by token budget."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2rec import progress
from llm2rec.data.embeddings import ItemEmbeddings
from llm2rec.lm import backbone as backbones
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.csft import to_device
from llm2rec.lm.objectives import pool_mean
from llm2rec.lm.packing import Packed, TokenisedTexts, gather_texts, pack, token_budget_batches, tokenise
from llm2rec.lm.text import item_texts, template_hash
from llm2rec.training import default_device


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
) -> dict[str, Any]:
    """Writes the mean-pooled vectors of a whole catalogue to `out`, raw, one row an item.

    Args:
        item_ids, titles: (N,) in the order of the catalogue.
        model: a decoder or an item encoder (their folders have the same layout).
        causal: whether a title's token may see only the tokens before it.
        name: what the vector set is called.

    Returns:
        Summary: vectors, dimensions, distinct titles, titles per second.
    """
    lm = backbones.load(model, dtype, head=False)
    lm.set_causal(causal)
    lm.model.to(default_device())
    began = time.perf_counter()
    vectors, distinct = encode_titles(lm, titles, max_title_tokens, batch_tokens, name)
    seconds = time.perf_counter() - began
    provenance = {"name": name, "model": str(model), "causal": causal, "pooling": "mean"}
    provenance |= {"dtype": str(dtype).removeprefix("torch."), "template": template_hash()}
    ItemEmbeddings(vectors, item_ids, provenance).save(out)
    return {
        "items": len(item_ids),
        "dimensions": vectors.shape[1],
        "distinct_titles": distinct,
        "titles_per_second": round(distinct / seconds, 1),
    }


def encode_titles(
    lm: Backbone, titles: list[str], max_title_tokens: int, batch_tokens: int, description: str = "titles"
) -> tuple[np.ndarray, int]:
    """Vectors (N, D) float32 of `titles`, and how many distinct texts there were.

    Equal to `SentenceTransformer.encode` of the exported folder up to rounding.
    """
    texts, first = np.unique(np.array(item_texts(titles), dtype=object), return_inverse=True)
    tokens = tokenise(lm.tokenizer, texts.tolist(), max_title_tokens, special_tokens=True)
    return encode_tokens(lm, tokens, batch_tokens, description)[first], len(texts)


def encode_tokens(lm: Backbone, texts: TokenisedTexts, batch_tokens: int, description: str) -> np.ndarray:
    """Mean-pooled vectors of tokenised texts, (N, D) float32, in their order."""
    order = np.argsort(-texts.lengths, kind="stable")  # longest first: memory peaks at once
    vectors = np.empty((len(texts), lm.body.config.hidden_size), dtype=np.float32)
    batches = list(token_budget_batches(texts.lengths[order], batch_tokens))
    lm.model.eval()
    with torch.no_grad(), progress.bar(f"encode {description}", len(texts)) as running:
        for rows in batches:
            chosen = order[rows]
            packed = to_device(pack(*gather_texts(texts, chosen)), lm.body.device)
            vectors[chosen] = embed(lm, packed).cpu().numpy()
            running.advance(len(chosen))
    return vectors


def embed(lm: Backbone, packed: Packed) -> torch.Tensor:
    """Mean-pooled vectors of the sequences of a packed row, (S, D) float32."""
    segments = packed["segments"]
    return pool_mean(lm.hidden_states(packed), segments["sequence"], len(segments["gather"]))
