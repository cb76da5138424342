"""From what a recipe names to the two canonical tables: a source, a folder in a published layout, or files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llm2rec import artifacts
from llm2rec.config import DataConfig
from llm2rec.data import readers, sources
from llm2rec.data.files import names_of
from llm2rec.data.layouts import read_folder, validated
from llm2rec.data.layouts.authors import CSFT_FOLDERS
from llm2rec.data.registry import Read
from llm2rec.data.tables import PART, RATING
from llm2rec.errors import ConfigError, DataError


def read(config: DataConfig) -> Read:
    """The validated tables of a recipe's data, and reason -> rows that reading left out.

    Raises:
        DataError, ConfigError: whatever is wrong with the input.
    """
    needed = [RATING] if config.filters.min_rating is not None else []
    needed += [PART] if config.split.by == "given" else []
    if config.source:
        tables: Read = (*sources.fetch_data(config.source), sources.left_out(config.source))
    elif config.folder:
        tables = validated(read_folder(config.folder, config.layout), str(config.folder))
    else:
        assert config.interactions and config.items
        log = readers.read_interactions(config.interactions, config.columns.of_interactions(), needed)
        tables = log, readers.read_items(config.items, config.columns.of_items()), {}
    lacking = [name for name in needed if name not in tables[0].frame.columns]
    if lacking:
        what = "filters.min_rating" if lacking[0] == RATING else "split.by: given"
        raise ConfigError(f"data.{what} needs a {lacking[0]} of each event, which this log has not")
    return tables


def content_hash(config: DataConfig) -> dict[str, str]:
    """What the data are: the registered hash of a source, or the hash of every file that may be read.

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
    return {
        name: _hash(path, _layout_files if name == "folder" else readers.files_below)
        for name, path in given.items()
    }


def _layout_files(folder: Path) -> list[Path]:
    """The files that a layout may open; what lies deeper beside the data, such as runs, is none of them."""
    places = [folder, *(folder / name for name in CSFT_FOLDERS if (folder / name).is_dir())]
    return [place / name for place in places for name in names_of(place) if not name.startswith((".", "_"))]


def _hash(path: Path, files_of: Callable[[Path], list[Path]]) -> str:
    if path.is_file():
        return artifacts.hash_file(path)
    files = files_of(path)
    if not files:
        raise DataError(f"{path} is an empty folder")
    return artifacts.hash_json({str(file.relative_to(path)): artifacts.hash_file(file) for file in files})
