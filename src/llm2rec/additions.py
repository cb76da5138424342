"""Verb `add-items`: items that came after the training get vectors, so that text rows can rank and read them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from llm2rec import artifacts, progress
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
    knows with the same text are skipped, so the table may be the whole catalogue, grown. Items added before get
    new vectors where the run's were made anew, or where a row came that needs another set.

    Returns:
        How many items were added, and how many were known.

    Raises:
        DataError: the table is not valid, gives an item that the run knows another text, or has columns of other
            types than the run's items.
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
        since, kept = _added_before(run, place, sets)
        trained = added.trained_catalogue(place)
        known = trained if since is None else added.joined(trained, since)
        unknown, texts = _unknown(known, trained, new, place.config.text, str(items))
        outdated = len(since) if since is not None and kept != sets else 0
        if outdated:
            progress.say(f"note: {outdated:,} items added before are encoded anew for rows that need it")
        if len(unknown) or outdated:
            table = unknown if since is None else added.joined(since, unknown)
            _replace(run, place, table, [texts[item] for item in table.item_ids], kept)
    return Additions(len(unknown), len(new) - len(unknown))


def _added_before(run: Run, domain: Domain, sets: list[str]) -> tuple[Catalogue | None, list[str]]:
    """What was added before and is still new, None where nothing is, and the vector sets that its vectors keep.

    What a training since then took in is new no more; where nothing else had been added all is put aside.
    """
    before = added.items(domain)
    if before is None:
        return None, []
    since = added.still_new(before, added.trained_catalogue(domain))
    if since is None:
        artifacts.move_aside(domain.added, run.folder)
        return None, []
    return since, added.current_sets(domain, sets) if len(since) == len(before) else []


def _unknown(
    known: Catalogue, trained: Catalogue, new: Catalogue, template: str, origin: str
) -> tuple[Catalogue, dict[str, str]]:
    """The items of a table that the run does not know, and the text of every item, by its id.

    Args:
        trained: the items trained on, the first of `known`, from which alone the run made their texts.

    Raises:
        DataError: an item that the run knows has another text in the table, or a column of it has another type,
            beside which the items trained on would read otherwise.
    """
    whole = added.joined(known, new)  # a column that one of the tables lacks is empty there
    texts = item_texts(whole, template)
    if texts[: len(trained)] != item_texts(trained, template):
        raise added.other_types(known, new)
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
    return Catalogue(whole.frame[len(known) :].filter(fresh)), before | now


def _require_current(run: Run, folders: list[Path]) -> None:
    """Raises ArtifactError where vectors were made otherwise than those of new items would be."""
    for stage in encode_stages(run):
        if stage.folder in folders:
            decision = stage.decide()
            if not decision.keep:
                raise ArtifactError(
                    f"{stage.folder} is not up to date ({decision.in_words}), and new items must be encoded as "
                    f"the others are; run the recipe again, at least `llm2rec encode {run.folder}`"
                )


def _replace(run: Run, domain: Domain, table: Catalogue, texts: list[str], kept: list[str]) -> None:
    """Writes all added items (M) with their texts' vectors, in place of those added before.

    Args:
        kept: vector sets whose vectors of the items added before, the first of the table, are taken over.
    """
    with artifacts.scratch(run.folder) as folder:
        table.write(folder / added.CATALOGUE)
        sets = vector_sets(run)
        for name in sets:
            before = added.load_vectors(domain, name) if name in kept else None
            _encode(run, name, table.item_ids, texts, before, folder / name)
        artifacts.write_manifest(folder, "add-items", added.inputs(domain, sets), {"items": len(table)})
        artifacts.move_aside(domain.added, run.folder)
        domain.added.parent.mkdir(exist_ok=True)
        os.replace(folder, domain.added)


def _encode(
    run: Run, name: str, item_ids: list[str], texts: list[str], before: ItemEmbeddings | None, out: Path
) -> None:
    """Writes one vector set of all added items, of which the first may have their vectors already (`before`)."""
    if before is None:
        encode_texts(run, name, item_ids, texts, out)
    elif len(before.item_ids) == len(item_ids):
        before.save(out)
    else:
        start = len(before.item_ids)
        encode_texts(run, name, item_ids[start:], texts[start:], out)
        fresh = ItemEmbeddings.load(out)
        ItemEmbeddings(np.concatenate([before.vectors, fresh.vectors]), item_ids, fresh.provenance).save(out)
