"""Items that came after the training: their rows and vectors, as `add-items` keeps them beside a run."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import polars as pl

from llm2rec import artifacts
from llm2rec.artifacts import Inputs
from llm2rec.data.embeddings import ItemEmbeddings
from llm2rec.data.tables import ITEM, Catalogue
from llm2rec.errors import ArtifactError, DataError
from llm2rec.runs import Domain

CATALOGUE = "catalogue.parquet"
_AGAIN = "give `add-items` their table again, which encodes them anew"


def inputs(domain: Domain, sets: SequenceOf[str]) -> Inputs:
    """What added items were encoded with: the fingerprints of the vector sets that they stand beside."""
    return {name: artifacts.require(domain.embeddings(name), "encode").fingerprint for name in sets}


def items(domain: Domain) -> Catalogue | None:
    """The added items of a domain, whichever model made their vectors; None where there are none.

    Raises:
        ArtifactError: a file of theirs is missing or was changed.
    """
    if not domain.added.exists():
        return None
    _manifest(domain)
    return Catalogue.read(domain.added / CATALOGUE)


def current_sets(domain: Domain, sets: SequenceOf[str]) -> list[str]:
    """Which of a domain's vector sets have vectors of the added items by the same model."""
    made = _manifest(domain).inputs
    return [name for name, now in inputs(domain, sets).items() if made.get(name) == now]


def still_new(since: Catalogue, trained: Catalogue) -> Catalogue | None:
    """Those of the added items that no training took in since, None where it took in all."""
    left = since.frame.filter(~pl.col(ITEM).is_in(trained.frame[ITEM].implode()))
    return Catalogue(left) if len(left) else None


def load(domain: Domain, with_vectors: bool = True) -> Catalogue | None:
    """The added items of a domain that no training took in since, None where there are none.

    Args:
        with_vectors: their vectors will be read; else it is no matter which model made them.

    Raises:
        ArtifactError: a file of theirs is missing or was changed, or the run was encoded anew since.
    """
    since = items(domain)
    if since is None:
        return None
    still_there = [name for name in _manifest(domain).inputs if artifacts.read_manifest(domain.embeddings(name))]
    if with_vectors and current_sets(domain, still_there) != still_there:
        raise ArtifactError(f"the items in {domain.added} were encoded by an earlier model of this run; {_AGAIN}")
    return still_new(since, trained_catalogue(domain))


def _manifest(domain: Domain) -> artifacts.Manifest:
    return artifacts.require(domain.added, "add-items", f"move {domain.added} away and add the items again")


def load_catalogue(domain: Domain, with_vectors: bool = True) -> Catalogue:
    """The items that were trained on, and after them those added since; arguments and errors as in `load`."""
    trained, since = trained_catalogue(domain), load(domain, with_vectors)
    return trained if since is None else joined(trained, since)


def trained_catalogue(domain: Domain) -> Catalogue:
    """The items that the recommenders were trained on."""
    artifacts.require(domain.data, "prepare")
    return Catalogue.read(domain.data / CATALOGUE)


def joined(first: Catalogue, second: Catalogue) -> Catalogue:
    """The items of two tables, one after the other; a column that one of them lacks is empty there.

    A column has the type that it has in the first, where that loses nothing of the second, else one for both.

    Raises:
        DataError: a column has types that do not go together.
    """
    kinds = first.frame.schema
    alike = [_as(column, kinds[column.name]) for column in second.frame if column.name in kinds]
    try:
        return Catalogue(pl.concat([first.frame, second.frame.with_columns(alike)], how="diagonal_relaxed"))
    except pl.exceptions.PolarsError as error:
        raise other_types(first, second) from error


def other_types(first: Catalogue, second: Catalogue) -> DataError:
    """What to raise where columns of two tables do not go together: names them and their types in both."""
    types = {
        name: (first.frame.schema[name], kind)
        for name, kind in second.frame.schema.items()
        if name in first.frame.columns and first.frame.schema[name] != kind
    }
    return DataError(
        f"the columns of the new items have other types than those of the run: {types}; write them as the run's "
        "items have them"
    )


def _as(column: pl.Series, kind: pl.DataType) -> pl.Series:
    """The column in another type, or as it is where that would change a value; NaN is none.

    Beside text, too, whole numbers are written without a point: they became floats where a value is missing. Dates
    and numbers are never read as each other.
    """
    if column.dtype.is_temporal() != kind.is_temporal():
        return column.cast(pl.String) if column.dtype.is_numeric() or kind.is_numeric() else column
    if column.dtype.is_float() and not kind.is_float():
        column = column.fill_nan(None)
        if kind == pl.String:
            column = _as(column, pl.Int64())
    try:
        cast = column.cast(kind)
        return cast if cast.cast(column.dtype).equals(column) else column
    except pl.exceptions.PolarsError:
        return column


def load_vectors(domain: Domain, name: str) -> ItemEmbeddings:
    """The vectors of the added items in one vector set.

    Raises:
        ArtifactError: they were added when no row needed that set.
    """
    if not (domain.added / name).is_dir():
        raise ArtifactError(
            f"the items in {domain.added} have no vectors {name!r}, which no row needed when they were added; "
            f"{_AGAIN}"
        )
    return ItemEmbeddings.load(domain.added / name)
