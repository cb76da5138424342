"""Item vectors: a matrix, the item of each row, and where they came from. Joined by id, never by row."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llm2rec import artifacts
from llm2rec.errors import ArtifactError, first_few

MATRIX, ITEMS, PROVENANCE = "embeddings.safetensors", "items.parquet", "provenance.json"


@dataclass(frozen=True)
class ItemEmbeddings:
    """Raw vectors (N, D) float32, finite, with the item id of each row.

    Raises:
        ArtifactError: not a matrix, another number of ids, repeated ids, or a value that is not finite.
    """

    vectors: np.ndarray
    item_ids: list[str]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.item_ids):
            raise ArtifactError(f"vectors of shape {self.vectors.shape} do not fit {len(self.item_ids)} items")
        if len(set(self.item_ids)) != len(self.item_ids):
            raise ArtifactError("the vectors name an item twice; encode the catalogue again")
        broken = np.flatnonzero(~np.isfinite(self.vectors).all(axis=1))
        if len(broken):
            names = first_few([self.item_ids[row] for row in broken])
            raise ArtifactError(f"the vectors of {len(broken)} items are not finite: {names}; encode again")

    def save(self, folder: Path) -> None:
        """Writes `embeddings.safetensors`, `items.parquet` and `provenance.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": np.ascontiguousarray(self.vectors, dtype=np.float32)}, folder / MATRIX)
        rows = np.arange(len(self.item_ids), dtype=np.int64)
        pl.DataFrame({"row": rows, "item_id": self.item_ids}).write_parquet(folder / ITEMS)
        artifacts.write_json(folder / PROVENANCE, self.provenance)

    @classmethod
    def load(cls, folder: Path) -> ItemEmbeddings:
        """The vectors that `save` wrote.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        try:
            vectors = load_file(folder / MATRIX)["embeddings"]
            item_ids = pl.read_parquet(folder / ITEMS).sort("row")["item_id"].to_list()
        except (OSError, SafetensorError, KeyError, pl.exceptions.PolarsError) as error:
            raise ArtifactError(
                f"no readable vectors in {folder} ({error}); run the encode stage again"
            ) from error
        return cls(vectors, item_ids, artifacts.read_json(folder / PROVENANCE))

    def aligned_to(self, item_ids: list[str]) -> np.ndarray:
        """The vectors of `item_ids` in that order, (N, D) float32.

        Raises:
            ArtifactError: an item has no vector; names the first.
        """
        rows = {item_id: row for row, item_id in enumerate(self.item_ids)}
        missing = [item_id for item_id in item_ids if item_id not in rows]
        if missing:
            raise ArtifactError(
                f"embeddings cover {len(rows):,} items, {len(missing):,} of the catalogue's {len(item_ids):,} "
                f"are missing: {first_few(missing)}; run the encode stage again"
            )
        return self.vectors[[rows[item_id] for item_id in item_ids]]
