"""Item vectors: a matrix, the item of each row, and where they came from. Joined by id, never by row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open

from llm2rec import artifacts
from llm2rec.artifacts import PROVENANCE
from llm2rec.errors import ArtifactError, first_few

MATRIX, ITEMS = "embeddings.safetensors", "items.parquet"
KEY = "embeddings"
CHECKED_ROWS = 65_536


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
        finite = np.empty(len(self.vectors), dtype=bool)
        for row in range(0, len(finite), CHECKED_ROWS):
            finite[row : row + CHECKED_ROWS] = np.isfinite(self.vectors[row : row + CHECKED_ROWS]).all(axis=1)
        broken = np.flatnonzero(~finite)
        if len(broken):
            names = first_few([self.item_ids[row] for row in broken])
            raise ArtifactError(f"the vectors of {len(broken)} items are not finite: {names}; encode again")

    def save(self, folder: Path) -> None:
        """Writes `embeddings.safetensors`, `items.parquet` and `provenance.json`."""
        write_embeddings(folder, [self.vectors], self.vectors.shape[1], self.item_ids, self.provenance)

    @classmethod
    def load(cls, folder: Path) -> ItemEmbeddings:
        """The vectors that `save` wrote, memory-mapped and read-only: rows are read when they are used.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        try:
            vectors = _mapped(folder / MATRIX)
            item_ids = pl.read_parquet(folder / ITEMS, glob=False).sort("row")["item_id"].to_list()
        except (OSError, SafetensorError, KeyError, ValueError, pl.exceptions.PolarsError) as error:
            raise ArtifactError(
                f"no readable vectors in {folder} ({error}); run the encode stage again"
            ) from error
        return cls(vectors, item_ids, artifacts.read_json(folder / PROVENANCE))

    def aligned_to(self, item_ids: list[str]) -> np.ndarray:
        """The vectors of `item_ids` in that order, (N, D) float32; no copy where it is that of the rows.

        Raises:
            ArtifactError: an item has no vector; names the first.
        """
        if item_ids == self.item_ids:
            return np.asarray(self.vectors)
        rows = {item_id: row for row, item_id in enumerate(self.item_ids)}
        missing = [item_id for item_id in item_ids if item_id not in rows]
        if missing:
            raise ArtifactError(
                f"embeddings cover {len(rows):,} items, {len(missing):,} of the catalogue's {len(item_ids):,} "
                f"are missing: {first_few(missing)}; run the encode stage again (of items that `add-items` added "
                "the vectors lie below `added/` of the run)"
            )
        return np.asarray(self.vectors[[rows[item_id] for item_id in item_ids]])


def write_embeddings(
    folder: Path, blocks: Iterable[np.ndarray], dimensions: int, item_ids: list[str], provenance: dict[str, Any]
) -> None:
    """Writes `embeddings.safetensors`, `items.parquet` and `provenance.json`, the matrix block by block.

    Args:
        blocks: runs of rows (b, D), together one row an item, in the order of `item_ids`.
        dimensions: D.

    Raises:
        ArtifactError: the blocks do not hold one row of D values an item.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = len(item_ids) * dimensions * 4
    layout = {KEY: {"dtype": "F32", "shape": [len(item_ids), dimensions], "data_offsets": [0, size]}}
    header = json.dumps(layout, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    partial = folder / f".{MATRIX}.tmp"  # the matrix that it replaces may be mapped
    with partial.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        written = sum(stream.write(np.ascontiguousarray(block, dtype="<f4").data.cast("B")) for block in blocks)
    if written != size:
        raise ArtifactError(
            f"{written:,} bytes of vectors do not fit {len(item_ids):,} items of {dimensions} values"
        )
    os.replace(partial, folder / MATRIX)
    rows = np.arange(len(item_ids), dtype=np.int64)
    pl.DataFrame({"row": rows, "item_id": item_ids}).write_parquet(folder / ITEMS)
    artifacts.write_json(folder / PROVENANCE, provenance)


def _mapped(path: Path) -> np.ndarray:
    """The matrix of a safetensors file that `write_embeddings` wrote, memory-mapped."""
    with safe_open(path, framework="numpy") as opened:  # checks the header against the file's size
        shape = opened.get_slice(KEY).get_shape()
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return np.memmap(path, dtype="<f4", mode="r", offset=8 + header, shape=tuple(shape))
