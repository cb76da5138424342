"""Recommenders from plain arguments, to a folder and back. No trainer, no transformers: serving uses this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llm2rec import artifacts
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.rec.items import FrozenItems, ItemTable, LearnedItems, checked_vectors, hash_vectors
from llm2rec.rec.sasrec import SASRec

ARCHITECTURES = {"sasrec": SASRec}
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT = 1

Recommender = SASRec


def build(
    *,
    architecture: str,
    n_items: int,
    vectors: np.ndarray | None,
    hidden_size: int,
    layers: int,
    heads: int,
    dropout: float,
    history_length: int,
    seed: int,
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
) -> Recommender:
    """An untrained recommender over learned ids, or over frozen `vectors` with a linear adapter.

    The weights depend on the arguments and `seed` alone; the global random state is left as it was.

    Args:
        architecture: a key of `ARCHITECTURES`.
        vectors: (N, D) raw vectors in the order of the catalogue, or None for learned ids.
        statistics: mean and scale (D,) that standardise `vectors`; None takes them from `vectors`.

    Raises:
        ConfigError: unknown architecture, or sizes that do not fit each other.
        ArtifactError: vectors of another number of items, or with NaN or infinite values.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"no recommender {architecture!r}; allowed: {', '.join(ARCHITECTURES)}")
    if hidden_size % heads:
        raise ConfigError(f"hidden_size {hidden_size} is not a multiple of heads {heads}; choose one that is")
    if history_length < 1:
        raise ConfigError(f"history_length is {history_length}; it must be at least 1")
    if vectors is not None and len(vectors) != n_items:
        raise ArtifactError(
            f"item vectors cover {len(vectors):,} items, the catalogue has {n_items:,}; run the encode stage again"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        items: ItemTable
        if vectors is None:
            items = LearnedItems(n_items, hidden_size)
        else:
            items = FrozenItems(vectors, hidden_size, statistics)
        return ARCHITECTURES[architecture](
            items,
            hidden_size=hidden_size,
            layers=layers,
            heads=heads,
            dropout=dropout,
            history_length=history_length,
        )


def save(model: Recommender, folder: Path) -> None:
    """Writes `config.json` and `model.safetensors`: trained weights and standardisation, not the vectors."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    name = next(name for name, kind in ARCHITECTURES.items() if type(model) is kind)
    config = {
        "format": FORMAT,
        "architecture": name,
        "n_items": model.n_items,
        "hidden_size": model.hidden_size,
        "layers": len(model.blocks),
        "heads": model.heads,
        "dropout": model.dropout,
        "history_length": model.history_length,
        "vectors_sha256": model.items.sha256 if isinstance(model.items, FrozenItems) else None,
    }
    artifacts.write_json(folder / CONFIG, config)


def load(folder: Path, vectors: np.ndarray | None = None) -> Recommender:
    """A saved recommender in eval mode, with the scores it was saved with.

    Args:
        folder: what `save` wrote.
        vectors: (N, D) raw vectors it was trained on, in the same order; None for learned ids.

    Raises:
        ArtifactError: files missing or damaged, or vectors missing, superfluous or not the ones of training.
    """
    config = artifacts.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.pop("format", None) != FORMAT:
        raise ArtifactError(f"{folder / CONFIG} is not a recommender of format {FORMAT}; run the fit stage again")
    _require_same_vectors(folder, config.pop("vectors_sha256"), vectors)
    try:
        weights = load_file(folder / WEIGHTS)
        statistics = None
        if vectors is not None:
            statistics = weights["items.mean"].numpy(), weights["items.scale"].numpy()
        model = build(**config, vectors=vectors, seed=0, statistics=statistics)
        model.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ArtifactError(
            f"{folder} does not hold a whole recommender ({error}); run the fit stage again"
        ) from error
    return model.eval()


def _require_same_vectors(folder: Path, expected: Any, vectors: np.ndarray | None) -> None:
    if expected is None and vectors is not None:
        raise ArtifactError(f"{folder} was trained over learned ids; load it without vectors")
    if expected is not None and vectors is None:
        raise ArtifactError(f"{folder} was trained over item vectors ({expected[:12]}...); load it with them")
    if vectors is not None and hash_vectors(checked_vectors(vectors)) != expected:
        raise ArtifactError(
            f"{folder} was trained over other item vectors (sha256 {expected[:12]}..., these are "
            f"{hash_vectors(vectors)[:12]}...); fit it again over these, or give it the vectors of training"
        )
