"""Items like an item, by cosine of one vector set. Imports no transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from llm2rec.data.tables import Catalogue
from llm2rec.errors import ConfigError
from llm2rec.evaluation.ranking import top_k
from llm2rec.rows import preferred_set
from llm2rec.runs import Domain, Run
from llm2rec.serve import added
from llm2rec.serve.recommender import (
    ScoredItem,
    added_vectors,
    index_of,
    is_new,
    listed,
    load_vectors,
    made_sets,
    opened,
    say_choice,
)


def similar(
    run: str | Path | Run, item: str, k: int = 10, vectors: str | None = None, domain: str | None = None
) -> list[ScoredItem]:
    """The `k` items nearest to an item by raw cosine of one vector set, best first, without the item.

    Args:
        vectors: None: `preferred_set` of those that the run has, llm2rec where it is one; any other is named in a
            note.

    Raises:
        DataError: the item is not in the catalogue.
        ConfigError: k < 1.
        ArtifactError: the run has no such vector set.
    """
    place = opened(run).domain(domain)
    catalogue = added.load_catalogue(place)
    index_of(catalogue, item)  # what is wrong with an id is said before any vectors are read
    return served_set(place, catalogue, vectors).similar(item, k)


def load_set(run: str | Path | Run, vectors: str | None = None, domain: str | None = None) -> ServedVectors:
    """A vector set of a run, loaded once for any number of lists. Arguments as in `similar`.

    Items added to the run later are known to it once it is loaded again.

    Raises:
        ArtifactError: the run has no such vector set.
    """
    place = opened(run).domain(domain)
    return served_set(place, added.load_catalogue(place), vectors)


def served_set(place: Domain, catalogue: Catalogue, vectors: str | None) -> ServedVectors:
    """What `load_set` gives, of a `catalogue` that is loaded already."""
    if vectors is None:
        vectors = preferred_set(made_sets(place) or ["llm2rec"])
        say_choice("vectors", vectors, "llm2rec")
    matrix = load_vectors(place, vectors, added.trained_catalogue(place))
    if (since := added_vectors(place, vectors)) is not None:
        matrix = np.concatenate([matrix, since])
    index = {item_id: number for number, item_id in enumerate(catalogue.item_ids, start=1)}
    return ServedVectors(place, vectors, catalogue, index, unit_length(matrix), is_new(place, len(matrix)))


@dataclass(frozen=True)
class ServedVectors:
    """A vector set of a run in memory, with the items that it lists; made by `load_set`.

    catalogue: the items trained on, then those added since. index: outside id -> item_index (1..N).
    unit: (N, D) float32, of length 1. new: (N,) bool, as `is_new` says.
    """

    domain: Domain
    name: str
    catalogue: Catalogue
    index: dict[str, int]
    unit: torch.Tensor
    new: torch.Tensor

    def similar(self, item: str, k: int = 10) -> list[ScoredItem]:
        """The `k` items nearest to an item, best first; errors as in `similar`."""
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        index = self.index.get(str(item)) or index_of(self.catalogue, item)
        return nearest(self.catalogue, self.unit, [index], k, self.new)[0]


def unit_length(vectors: np.ndarray) -> torch.Tensor:
    """(N, D) float32, each vector divided by its length."""
    return F.normalize(torch.from_numpy(np.array(vectors, dtype=np.float32)), dim=-1)


def nearest(
    catalogue: Catalogue, unit: torch.Tensor, indices: Sequence[int], k: int, new: torch.Tensor
) -> list[list[ScoredItem]]:
    """The `k` items with the highest cosine to each of `indices` (1..N), without itself.

    Args:
        unit: (N, D), of length 1. new: (N,) bool, as `is_new` says.
    """
    queries = torch.tensor(indices)
    items, values = top_k(unit[queries - 1] @ unit.T, k, exclude=queries[:, None])
    return [listed(catalogue, *best, new) for best in zip(items, values, strict=True)]
