"""Items that came after the training: their rows and vectors, as `add-items` keeps them beside a run."""

from __future__ import annotations

import polars as pl

from llm2rec import artifacts
from llm2rec.artifacts import Inputs
from llm2rec.data.embeddings import ItemEmbeddings
from llm2rec.data.tables import Catalogue
from llm2rec.errors import ArtifactError, DataError
from llm2rec.runs import Domain

CATALOGUE = "catalogue.parquet"
_AGAIN = "add the items again"


def inputs(domain: Domain, sets: list[str]) -> Inputs:
    """What added items were encoded with: the fingerprints of the vector sets that they stand beside."""
    return {name: artifacts.require(domain.embeddings(name), "encode").fingerprint for name in sets}


def load(domain: Domain) -> Catalogue | None:
    """The added items of a domain, None where there are none.

    Raises:
        ArtifactError: a file of theirs is missing or was changed, or the run was encoded anew since.
    """
    if not domain.added.exists():
        return None
    manifest = artifacts.require(domain.added, "add-items", f"move {domain.added} away and {_AGAIN}")
    still_there = [name for name in manifest.inputs if artifacts.read_manifest(domain.embeddings(name))]
    if any(manifest.inputs[name] != now for name, now in inputs(domain, still_there).items()):
        raise ArtifactError(
            f"the items in {domain.added} were encoded by an earlier model of this run; move that folder away "
            f"and {_AGAIN}"
        )
    return Catalogue.read(domain.added / CATALOGUE)


def load_catalogue(domain: Domain) -> Catalogue:
    """The items that were trained on, and after them those added since."""
    artifacts.require(domain.data, "prepare")
    trained = Catalogue.read(domain.data / CATALOGUE)
    since = load(domain)
    return trained if since is None else joined(trained, since)


def joined(first: Catalogue, second: Catalogue) -> Catalogue:
    """The items of two tables, one after the other; a column that one of them lacks is empty there.

    Raises:
        DataError: a column has types that do not go together.
    """
    try:
        return Catalogue(pl.concat([first.frame, second.frame], how="diagonal_relaxed"))
    except pl.exceptions.PolarsError as error:
        types = {
            name: (first.frame.schema[name], kind)
            for name, kind in second.frame.schema.items()
            if name in first.frame.columns and first.frame.schema[name] != kind
        }
        raise DataError(f"the columns of the new items have other types than those of the run: {types}") from error


def load_vectors(domain: Domain, name: str) -> ItemEmbeddings:
    """The vectors of the added items in one vector set.

    Raises:
        ArtifactError: they were added when no row needed that set.
    """
    if not (domain.added / name).is_dir():
        raise ArtifactError(
            f"the items in {domain.added} have no vectors {name!r}, which no row needed when they were added; "
            f"move that folder away and {_AGAIN}"
        )
    return ItemEmbeddings.load(domain.added / name)
