"""Recommenders from plain arguments, to a folder and back. No trainer, no transformers: serving uses this."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm2rec import artifacts
from llm2rec.errors import ArtifactError, ConfigError, DataError
from llm2rec.rec.architecture import Architecture
from llm2rec.rec.context import ContextSASRec
from llm2rec.rec.esasrec import ESASRec
from llm2rec.rec.gru4rec import GRU4Rec
from llm2rec.rec.items import (
    TEXT_TABLES,
    Categories,
    CategorisedItems,
    DeltaItems,
    FrozenItems,
    ItemTable,
    LearnedItems,
)
from llm2rec.rec.sasrec import SASRec
from llm2rec.rec.sequential import SequentialRecommender
from llm2rec.rec.smoothing import Neighbours
from llm2rec.rec.vectors import Statistics, checked_vectors, freeze, hash_vectors

MODELS: dict[str, type[SequentialRecommender]] = {
    "sasrec": SASRec,
    "sasrec-context": ContextSASRec,
    "esasrec": ESASRec,
    "gru4rec": GRU4Rec,
}
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT = 2

Recommender = SequentialRecommender


def build(
    architecture: Architecture,
    *,
    n_items: int,
    seed: int,
    vectors: np.ndarray | None = None,
    categories: Categories | None = None,
    neighbours: Neighbours | None = None,
    statistics: Statistics | None = None,
    trainable: np.ndarray | None = None,
    added: np.ndarray | None = None,
    sha256: str | None = None,
) -> Recommender:
    """An untrained recommender.

    The weights depend on the arguments and `seed` alone; the global random state is left as it was.

    Args:
        n_items: N, of the catalogue.
        vectors: (N, D) raw vectors in the order of the catalogue; for every item table but `id`, and only there.
        categories: of the N items, for learned ids alone.
        neighbours: of the N items, where the architecture smooths their vectors, and only there.
        statistics: what transforms `vectors`; None measures it on them, at the `trainable` rows (N,) if given.
        added: (M, D) raw vectors of items beyond the N.
        sha256: of `vectors` that are checked and hashed already; None: they are not.

    Raises:
        ConfigError: the parts do not fit each other.
        ArtifactError: vectors missing, of another number of items, or with NaN or infinite values.
        DataError: categories of another number of items.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture.items == "id":
            if vectors is not None or added is not None:
                raise ArtifactError("a recommender over learned ids has no use for item vectors; leave them out")
            items = _learned(architecture, n_items, categories)
        else:
            if categories is not None:
                raise ConfigError(
                    f"categories go with items 'id', not with {architecture.items!r}; choose one of both"
                )
            items = _frozen(architecture, n_items, vectors, neighbours, statistics, trainable, added, sha256)
        return MODELS[architecture.name](items, architecture)


def save(model: Recommender, folder: Path, item_ids: Sequence[str] | None = None) -> None:
    """Writes `config.json` and `model.safetensors`: trained weights and statistics, not the vectors.

    Args:
        item_ids: the catalogue it was trained on, kept as a hash that `load` compares.

    Raises:
        ArtifactError: the recommender holds added items, which are no part of the training.
    """
    if model.items.n_added:
        raise ArtifactError("a recommender with added items is for serving; save the one it was loaded from")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    config = {
        "format": FORMAT,
        "architecture": asdict(model.architecture),
        "n_items": model.n_items,
        "vectors_sha256": model.items.sha256 if isinstance(model.items, FrozenItems) else None,
        "item_ids_sha256": None if item_ids is None else hash_item_ids(item_ids),
    }
    artifacts.write_json(folder / CONFIG, config)


def load(
    folder: Path,
    vectors: np.ndarray | None = None,
    *,
    added: np.ndarray | None = None,
    item_ids: Sequence[str] | None = None,
) -> Recommender:
    """A saved recommender in eval mode, with the scores it was saved with.

    Added items are numbered from N + 1, may stand in histories, and get the columns after the first N, which
    stay what they were.

    Args:
        folder: what `save` wrote.
        vectors: (N, D) raw vectors it was trained on, in the same order; None for learned ids.
        added: (M, D) raw vectors, by the same encoder, of items that the training did not know.
        item_ids: the catalogue (of the N) that the caller means; None compares nothing.

    Raises:
        ArtifactError: files missing or damaged; vectors missing, superfluous or not the ones of training;
            another catalogue; added items for learned ids, which cannot know them.
    """
    config = artifacts.read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ArtifactError(f"{folder / CONFIG} is not a recommender of format {FORMAT}; run the fit stage again")
    try:
        _require_same_catalogue(folder, config["n_items"], config["item_ids_sha256"], item_ids)
        vectors = _same_vectors(folder, config["vectors_sha256"], vectors, added)
        architecture = Architecture(**config["architecture"])
        weights = load_file(folder / WEIGHTS)
        model = build(
            architecture,
            n_items=config["n_items"],
            seed=0,
            vectors=vectors,
            categories=_categories(weights),
            neighbours=_neighbours(weights),
            statistics=None if vectors is None else _statistics(weights),
            added=added,
            sha256=config["vectors_sha256"],
        )
        model.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, ConfigError, DataError) as error:
        raise ArtifactError(
            f"{folder} does not hold a whole recommender ({error}); run the fit stage again"
        ) from error
    return model.eval()


def hash_item_ids(item_ids: Sequence[str]) -> str:
    """SHA-256 of the ids in order, as hex: what a saved recommender knows its catalogue by."""
    return hashlib.sha256(json.dumps(list(item_ids)).encode()).hexdigest()


def _learned(architecture: Architecture, n_items: int, categories: Categories | None) -> ItemTable:
    if categories is None:
        return LearnedItems(n_items, architecture.hidden_size)
    if categories.n_items != n_items:
        raise DataError(f"categories cover {categories.n_items:,} items, the catalogue has {n_items:,}")
    return CategorisedItems(categories, architecture.hidden_size)


def _frozen(
    architecture: Architecture,
    n_items: int,
    vectors: np.ndarray | None,
    neighbours: Neighbours | None,
    statistics: Statistics | None,
    trainable: np.ndarray | None,
    added: np.ndarray | None,
    sha256: str | None,
) -> ItemTable:
    if vectors is None:
        raise ArtifactError(
            f"items {architecture.items!r} need the vectors of the items; give them, or choose 'id'"
        )
    if len(vectors) != n_items:
        raise ArtifactError(
            f"item vectors cover {len(vectors):,} items, the catalogue has {n_items:,}; run the encode stage again"
        )
    if (neighbours is not None) != (architecture.smoothing > 0):
        raise ConfigError(
            f"smoothing is {architecture.smoothing:g}: "
            + (
                "leave the neighbours out"
                if architecture.smoothing == 0
                else "it needs the neighbours of the items"
            )
        )
    frozen = freeze(
        vectors,
        smoothing=architecture.smoothing,
        neighbours=neighbours,
        whitening=architecture.whitening,
        dimensions=architecture.dimensions,
        statistics=statistics,
        trainable=trainable,
        added=added,
        sha256=sha256,
    )
    sizes = architecture.hidden_size, architecture.adapter, architecture.adapter_size or architecture.hidden_size
    if architecture.items == "delta":
        return DeltaItems(frozen, *sizes, architecture.delta_share)
    return TEXT_TABLES[architecture.items](frozen, *sizes)


def _categories(weights: dict[str, Tensor]) -> Categories | None:
    if "items.category_indices" not in weights:
        return None
    return Categories(weights["items.category_indices"].numpy(), weights["items.category_offsets"].numpy())


def _neighbours(weights: dict[str, Tensor]) -> Neighbours | None:
    parts = {field.name: weights.get(f"items.neighbour_{field.name}") for field in fields(Neighbours)}
    if parts["indices"] is None:
        return None
    return Neighbours(**{name: values.numpy() for name, values in parts.items() if values is not None})


def _statistics(weights: dict[str, Tensor]) -> Statistics:
    projection, longest = weights.get("items.projection"), weights.get("items.longest_trained")
    return Statistics(
        weights["items.mean"].numpy(),
        weights["items.scale"].numpy(),
        None if projection is None else projection.numpy(),
        None if longest is None else float(longest),
    )


def _require_same_catalogue(
    folder: Path, n_items: int, expected: str | None, item_ids: Sequence[str] | None
) -> None:
    if item_ids is None:
        return
    if len(item_ids) != n_items:
        raise ArtifactError(
            f"{folder} was trained on a catalogue of {n_items:,} items, this one has {len(item_ids):,}; fit again"
        )
    if expected is not None and hash_item_ids(item_ids) != expected:
        raise ArtifactError(
            f"{folder} was trained on a catalogue of other items, or in another order; fit it again"
        )


def _same_vectors(
    folder: Path, expected: Any, vectors: np.ndarray | None, added: np.ndarray | None
) -> np.ndarray | None:
    """The vectors, checked and of the hash of training; None for learned ids."""
    if expected is None and added is not None:
        raise ArtifactError(
            f"{folder} was trained over learned ids, which added items do not have; fit it again with them, or "
            "load a recommender over text"
        )
    if expected is None and vectors is not None:
        raise ArtifactError(f"{folder} was trained over learned ids; load it without vectors")
    if expected is not None and vectors is None:
        raise ArtifactError(f"{folder} was trained over item vectors ({expected[:12]}...); load it with them")
    if vectors is None:
        return None
    vectors = checked_vectors(vectors)
    if (found := hash_vectors(vectors)) != expected:
        raise ArtifactError(
            f"{folder} was trained over other item vectors (sha256 {expected[:12]}..., these are {found[:12]}...);"
            " fit it again over these, or give it the vectors of training"
        )
    return vectors
