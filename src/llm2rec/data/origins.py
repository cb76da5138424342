"""From what a recipe names to the two canonical tables: a source, a folder in a published layout, or files."""

from __future__ import annotations

from pathlib import Path

from llm2rec import artifacts
from llm2rec.config import DataConfig
from llm2rec.data import readers, sources
from llm2rec.data.tables import PART, RATING, Catalogue, Interactions, RawTables
from llm2rec.errors import ConfigError, DataError

Read = tuple[Interactions, Catalogue, dict[str, int]]


def read(config: DataConfig) -> Read:
    """The validated tables of a recipe's data, and reason -> rows that reading left out.

    Raises:
        DataError, ConfigError: whatever is wrong with the input.
    """
    if config.source:
        interactions, catalogue = sources.fetch_data(config.source)
        return interactions, catalogue, {}
    if config.folder:
        from llm2rec.data import layouts

        return _validated(layouts.read(config.folder, config.layout), str(config.folder), further(config))
    assert config.interactions and config.items
    log = readers.read_interactions(config.interactions, config.columns.of_interactions(), further(config))
    return log, readers.read_items(config.items, config.columns.of_items()), {}


def further(config: DataConfig) -> list[str]:
    """Columns that the recipe needs beside user, item and time."""
    needed = [RATING] if config.filters.min_rating is not None else []
    return [*needed, PART] if config.split.by == "given" else needed


def _validated(raw: RawTables, origin: str, columns: list[str]) -> Read:
    return (
        Interactions.from_frame(raw.events, origin, columns),
        Catalogue.from_frame(raw.items, origin),
        raw.dropped,
    )


def content_hash(config: DataConfig) -> dict[str, str]:
    """What the data are: the registered hash of a source, or the hash of every file.

    Raises:
        ConfigError: there is no such file or folder.
    """
    if config.source:
        return {"source": sources.data_content_hash(config.source)}
    paths = {"folder": config.folder, "interactions": config.interactions, "items": config.items}
    given = {name: path for name, path in paths.items() if path is not None}
    for name, path in given.items():
        if not path.exists():
            raise ConfigError(f"data.{name}: there is no file or folder {path}")
    return {name: _hash(path) for name, path in given.items()}


def _hash(path: Path) -> str:
    if path.is_file():
        return artifacts.hash_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise DataError(f"{path} is an empty folder")
    return artifacts.hash_json({str(file.relative_to(path)): artifacts.hash_file(file) for file in files})
