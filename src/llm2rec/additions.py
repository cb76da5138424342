"""Verb `add-items`: items that came after the training get vectors, so that text rows can rank and read them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from llm2rec import artifacts
from llm2rec.data import readers
from llm2rec.data.embeddings import ItemEmbeddings
from llm2rec.data.tables import Catalogue
from llm2rec.data.texts import item_texts
from llm2rec.errors import ArtifactError, ConfigError, DataError, first_few
from llm2rec.runs import Domain, Run, open_run
from llm2rec.serve import added
from llm2rec.stages.base import vector_sets
from llm2rec.stages.language import encode_stages, encode_texts


class Additions(NamedTuple):
    """What `add_items` made of a table: how many items it added, and how many the run knew already."""

    added: int
    known: int

    @property
    def in_words(self) -> str:
        """Both counts, and what follows."""
        if not self.added:
            return f"nothing added: the run knows all {self.known:,} items"
        known = f", {self.known:,} known" if self.known else ""
        return f"{self.added:,} added{known}; rows over text rank them from now on"


def add_items(run: str | Path | Run, items: str | Path, domain: str | None = None) -> Additions:
    """Encodes the items of a table and keeps them beside the run, where `recommend` and `similar` find them.

    Nothing is trained. Rows over text rank them by their vectors; rows over learned ids cannot know them. Called
    again it adds more; the table has the columns of the run's items (`data.columns` is heeded). Items that the run
    knows with the same text are skipped, so the table may be the whole catalogue, grown.

    Returns:
        How many items were added, and how many were known.

    Raises:
        DataError: the table is not valid, or gives an item that the run knows another text.
        ConfigError: the run has no row over text; several domains and none named.
        ArtifactError: the run is not encoded, or not as its recipe now says; another process works in it.
    """
    run = run if isinstance(run, Run) else open_run(run)
    place = run.domain(domain)
    sets = vector_sets(run)
    if not sets:
        raise ConfigError("no row of this run reads item texts, so items cannot be added without training")
    with artifacts.run_lock(run.folder):
        _require_current(run, [place.embeddings(name) for name in sets])
        new = readers.read_items(Path(items), place.config.columns.of_items(), at_least=1)
        unknown, texts = _unknown(added.load_catalogue(place), new, place.config.text, str(items))
        counts = Additions(len(unknown), len(new) - len(unknown))
        if not unknown:
            return counts
        with tempfile.TemporaryDirectory(dir=run.folder) as made:
            _write(run, place, sets, unknown, texts, Path(made) / "items")
            artifacts.move_aside(place.added, run.folder)
            place.added.parent.mkdir(exist_ok=True)
            os.replace(Path(made) / "items", place.added)
    return counts


def _unknown(known: Catalogue, new: Catalogue, template: str, origin: str) -> tuple[Catalogue, list[str]]:
    """The items of a table that the run does not know, and the text of each.

    Raises:
        DataError: an item that the run knows has another text in the table.
    """
    whole = added.joined(known, new)  # a column that one of the tables lacks is empty there
    texts = item_texts(whole, template)
    before = dict(zip(known.item_ids, texts, strict=False))
    now = dict(zip(new.item_ids, texts[len(known) :], strict=True))
    changed = [item for item, text in now.items() if before.get(item, text) != text]
    if changed:
        first = changed[0]
        raise DataError(
            f"{origin}: {len(changed)} items that the run knows have another text here: {first_few(changed)}; "
            f"{first!r} is {before[first]!r} in the run, {now[first]!r} here. Give an item that changed a new id, "
            "or leave it out"
        )
    fresh = pl.Series([item not in before for item in new.item_ids], dtype=pl.Boolean)
    return Catalogue(new.frame.filter(fresh)), [text for item, text in now.items() if item not in before]


def _require_current(run: Run, folders: list[Path]) -> None:
    """Raises ArtifactError where vectors were made otherwise than those of new items would be."""
    for stage in encode_stages(run):
        if stage.folder in folders:
            decision = artifacts.decide(stage.folder, stage.inputs())
            if not decision.keep:
                raise ArtifactError(
                    f"{stage.folder} is not up to date ({decision.in_words}), and new items must be encoded as "
                    f"the others are; run the recipe again, at least `llm2rec encode {run.folder}`"
                )


def _write(run: Run, domain: Domain, sets: list[str], new: Catalogue, texts: list[str], folder: Path) -> None:
    """The items added so far and the new ones, with the vectors of each set, as a finished stage in `folder`."""
    before = added.load(domain)
    table = new if before is None else added.joined(before, new)
    folder.mkdir()
    table.write(folder / added.CATALOGUE)
    for name in sets:
        encode_texts(run, name, new.item_ids, texts, folder / name)
        if before is not None:
            own, fresh = added.load_vectors(domain, name), ItemEmbeddings.load(folder / name)
            vectors = np.concatenate([own.vectors, fresh.vectors])
            ItemEmbeddings(vectors, [*own.item_ids, *fresh.item_ids], fresh.provenance).save(folder / name)
    artifacts.write_manifest(folder, "add-items", added.inputs(domain, sets), {"items": len(table)})
