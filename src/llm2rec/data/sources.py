"""Named public data sets and language models: fetched from the first good mirror into the cache, and checked.

A mirror counts only if its canonical content has the registered hash: different content, different name. Where
no hash is registered, the first download records its own and later ones must match it.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from llm2rec import artifacts
from llm2rec.data.mirrors import CONNECT_TIMEOUT_SECONDS, Mirror, Url
from llm2rec.data.registry import DATA, MODELS, TEXT_ENCODERS, Read, Source
from llm2rec.data.tables import ITEM, TIME, USER, Catalogue, Interactions
from llm2rec.errors import ArtifactError, ConfigError, DataError
from llm2rec.progress import say

CACHE_DIR = "LLM2REC_CACHE"
RECORD = "content.json"
Tables: TypeAlias = tuple[Interactions, Catalogue]
HASHED_ROWS = 1_000_000
T = TypeVar("T")
Keep: TypeAlias = Callable[[list[Path], Callable[..., Read] | None], T]


def cache_folder() -> Path:
    """Where downloads are kept: $LLM2REC_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_DIR) or Path(base) / "llm2rec")


def fetch_data(name: str) -> Tables:
    """The canonical tables of a named data set, from the cache or from its first good mirror.

    Raises:
        DataError: no such name, or no mirror has the registered (or once recorded) content.
    """
    source = _known(name, DATA, "data set")
    folder = cache_folder() / "data" / source.name
    return _fetched(
        source,
        lambda: _kept_tables(source, folder),
        lambda files, read: _keep_tables(source, files, read, folder),
    )


def left_out(name: str) -> dict[str, int]:
    """Reason -> rows of a fetched data set's files that its tables have not; none where its hash is registered.

    Raises:
        DataError: no such name, or its record in the cache is damaged.
    """
    return dict(_recorded(_known(name, DATA, "data set")).get("left_out", {}))


def fetch_model(name: str) -> Path:
    """The file of a named language model, from the cache or from its first good mirror.

    Raises:
        DataError: no such name, or no mirror has the registered content.
    """
    source = _known(name, MODELS, "language model")
    folder = cache_folder() / "models" / source.name
    return _fetched(
        source, lambda: _kept_file(source, folder), lambda files, _: _keep_file(source, files[0], folder)
    )


def fetch_text_encoder(name: str) -> Path:
    """The folder of a named text encoder, from the cache or from its first good mirror.

    Raises:
        DataError: no such name, or no mirror has the registered content.
    """
    source = _known(name, TEXT_ENCODERS, "text encoder")
    folder = cache_folder() / "text-encoders" / source.name
    return _fetched(
        source, lambda: _kept_folder(source, folder), lambda files, _: _keep_folder(source, files, folder)
    )


def is_of_a_run(source: str | Path) -> bool:
    """Whether a text encoder is a language model that a run trained: a folder `csft`, `mntp` or `iem`."""
    manifest = artifacts.read_manifest(Path(source)) if Path(source).is_dir() else None
    return manifest is not None and manifest.stage in ("csft", "iem")


def folder_hash(folder: Path) -> str:
    """SHA-256 of the names and contents of all files of a folder and its folders, without a run's manifest.

    Hidden files and folders (`.git`, the hub's `.cache`) are no part of a model, and change without it.
    """
    hashes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if name.name != artifacts.MANIFEST and not any(part.startswith(".") for part in name.parts):
            hashes[name.as_posix()] = artifacts.hash_file_once(path)
    return artifacts.hash_json(hashes)


def check_model(source: str) -> None:
    """Makes sure, before anything is computed, that a language model can be had: fetches a named one.

    Raises:
        DataError: no mirror of a named model has the registered content.
        ConfigError: no such file, a folder without a model, or a hub id that the hub does not know or that
            cannot be asked for.
    """
    if source in MODELS:
        fetch_model(source)
    elif not Path(source).is_file():
        _check_unnamed("model.source", source, MODELS, "config.json", "a folder or a GGUF file")


def check_text_encoder(name: str, source: str) -> None:
    """Makes sure, before anything is computed, that a text encoder can be had: fetches a publicly named one.

    Args:
        name: what the recipe calls it.

    Raises:
        DataError, ConfigError: as of `check_model`.
    """
    if source in TEXT_ENCODERS:
        fetch_text_encoder(source)
    elif not is_of_a_run(source):
        what = "a SentenceTransformer folder, or csft/ or iem/ of a run,"
        _check_unnamed(f"encode.text_encoders.{name}", source, TEXT_ENCODERS, "modules.json", what)


def _check_unnamed(key: str, source: str, named: dict[str, Source], mark: str, else_: str) -> None:
    """A folder must hold the file `mark`, a hub id be known to the hub; what looks like a path must be there."""
    path = Path(source)
    known = f"models known by name: {', '.join(named)}; {else_} does as well"
    if path.is_dir():
        if not (path / mark).is_file():
            raise ConfigError(f"{key}: {path} holds no model (there is no {path / mark})")
    elif looks_like_a_path(source):
        raise ConfigError(f"{key}: there is no file or folder {source!r}; {known}")
    else:
        _check_hub(key, source, known)


def looks_like_a_path(source: str) -> bool:
    """Whether a model is named by a file or folder, there or not, rather than by a hub id."""
    return source.endswith(".gguf") or source.count("/") > 1 or source.startswith((".", "/", "~"))


def _check_hub(key: str, name: str, known: str) -> None:
    """One question to the hub, without retries, unless its answer is in the hub's cache already.

    Addresses that the hub sends on to are not shown the token of who is logged in: their 401 says nothing.
    """
    from huggingface_hub import constants, get_token, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        address = hf_hub_url(name, "config.json")
    except HFValidationError as error:
        raise ConfigError(f"{key}: {name!r} is no file, no folder and no possible hub id; {known}") from error
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{key}: {name!r} is not in the cache and HF_HUB_OFFLINE is set; {known}")
    say(f"fetch  {name} from the hub, once")
    question, token = urllib.request.Request(address, method="HEAD"), get_token()
    if token:
        question.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        urllib.request.urlopen(question, timeout=CONNECT_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code in (403, 404) or (error.code == 401 and not token):
            raise ConfigError(
                f"{key}: the hub gives no model {name!r} (status {error.code}); for a private or gated one log in "
                f"(`hf auth login`) or set HF_TOKEN, of an account that may read it; {known}"
            ) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise ConfigError(f"{key}: the hub cannot be asked for {name!r} ({error}); {known}") from error


def hub_commit(source: str) -> str | None:
    """The commit of a hub id that the hub's cache holds: what was loaded last. None of what is no hub id."""
    from huggingface_hub import try_to_load_from_cache

    if source in {**MODELS, **TEXT_ENCODERS} or Path(source).exists():
        return None
    held = try_to_load_from_cache(source, "config.json")
    return Path(held).parent.name if isinstance(held, str) else None


def data_content_hash(name: str) -> str:
    """The content hash of a data set: the registered one (nothing is read), else the recorded one.

    Where neither is known yet, the data set is fetched, which records it.

    Raises:
        DataError: no such name, or it must be fetched and cannot be.
    """
    source = _known(name, DATA, "data set")
    return _expected_hash(source) or tables_hash(*fetch_data(name))


def tables_hash(interactions: Interactions, catalogue: Catalogue) -> str:
    """SHA-256 of the canonical columns written as tab-separated text: the same for every file format."""
    digest = hashlib.sha256()
    for frame in (interactions.frame.select(USER, ITEM, TIME), catalogue.frame):
        for number, rows in enumerate(frame.iter_slices(HASHED_ROWS)):  # a large log is never one text
            text = rows.write_csv(separator="\t", quote_style="always", include_header=number == 0)
            digest.update(text.encode())
    return digest.hexdigest()


def _known(name: str, registry: dict[str, Source], kind: str) -> Source:
    if name not in registry:
        raise DataError(f"there is no {kind} named {name!r}; known: {', '.join(registry)}")
    return registry[name]


def _record_of(source: Source) -> Path:
    return cache_folder() / "data" / source.name / RECORD


def _expected_hash(source: Source) -> str | None:
    """The registered hash, else the one that the first download recorded, else None."""
    return source.content_hash or _recorded(source).get("content_hash")


def _recorded(source: Source) -> dict[str, Any]:
    """What the first download of a data set without a registered hash recorded; empty before it."""
    record = _record_of(source)
    if source.content_hash or not record.is_file():
        return {}
    try:
        content = artifacts.read_json(record)
        return {"content_hash": str(content["content_hash"]), "left_out": dict(content.get("left_out", {}))}
    except (ArtifactError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{record} is damaged ({error}); delete it, and the next download records its hash anew"
        ) from error


def _fetched(source: Source, kept: Callable[[], T | None], keep: Keep[T]) -> T:
    """What the cache holds, else what a mirror brings: one process asks the mirrors, others wait for it."""
    found = kept()
    if found is not None:
        return found
    try:
        with artifacts.turn(cache_folder() / "locks" / f"{source.name}.lock"):
            found = kept()  # another process may have fetched it meanwhile
            return _from_mirrors(source, keep) if found is None else found
    except OSError as error:  # the network is a DataError: this is the disk
        raise DataError(
            f"{source.name} cannot be stored ({error}); free space, or set {CACHE_DIR} (now "
            f"{cache_folder()}) and TMPDIR (now {tempfile.gettempdir()}) to writable folders"
        ) from error


def _from_mirrors(source: Source, keep: Keep[T]) -> T:
    failures = []
    for number, (mirror, read) in enumerate(source.mirrors):
        try:
            with _workplace(source, number, mirror) as folder:
                return keep(mirror.fetch(folder), read)
        except DataError as error:
            failures.append(f"{mirror}: {error}")
    raise DataError(
        f"{source.name} cannot be had from any of its mirrors:\n  "
        + "\n  ".join(failures)
        + f"\nCheck the network, or give files of your own (cache: {cache_folder()})"
    )


@contextmanager
def _workplace(source: Source, number: int, mirror: Mirror) -> Iterator[Path]:
    """Where a mirror puts its files: those of the network stay in the cache until they were read and kept."""
    if not isinstance(mirror, Url):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    downloads = cache_folder() / "downloads" / source.name / str(number + 1)
    size = f"about {source.size_bytes / 1e6:,.0f} MB" if source.size_bytes else "size not known"
    say(f"{source.name}: downloading ({size}) to {downloads}; licence: {source.licence}")
    try:
        yield downloads
    except DataError as error:
        finished = downloads.is_dir() and not any(downloads.glob("*.part")) and any(downloads.iterdir())
        hint = f"; the files are kept in {downloads}, delete them to download them again" if finished else ""
        raise DataError(f"{error}{hint}") from error
    shutil.rmtree(downloads, ignore_errors=True)


def _kept_tables(source: Source, folder: Path) -> Tables | None:
    """The tables of the cache; None where they are missing, damaged or of another content."""
    paths = folder / "interactions.parquet", folder / "items.parquet"
    wanted = _expected_hash(source)
    if not wanted or not all(path.is_file() for path in paths):
        return None
    try:
        tables = Interactions.read(paths[0]), Catalogue.read(paths[1])
    except ArtifactError:
        return None
    return tables if tables_hash(*tables) == wanted else None


def _keep_tables(source: Source, files: list[Path], read: Callable[..., Read] | None, folder: Path) -> Tables:
    assert read is not None
    interactions, catalogue, left = read(*files)
    found = tables_hash(interactions, catalogue)
    wanted = _expected_hash(source)
    _require_hash(source, found, wanted or found)
    folder.mkdir(parents=True, exist_ok=True)
    for table, name in ((interactions, "interactions"), (catalogue, "items")):
        table.write(folder / f".{name}.tmp")
        os.replace(folder / f".{name}.tmp", folder / f"{name}.parquet")
    if wanted is None:
        artifacts.write_json(_record_of(source), {"content_hash": found, "left_out": left})
        say(
            f"{source.name}: no content hash is registered for it, so what came cannot be checked. Its hash "
            f"{found[:16]}... is recorded in {_record_of(source)}; later downloads must match it"
        )
    return interactions, catalogue


def _kept_file(source: Source, folder: Path) -> Path | None:
    files = sorted(folder.glob("*.gguf"))
    return next((path for path in files if artifacts.hash_file_once(path) == source.content_hash), None)


def _keep_file(source: Source, file: Path, folder: Path) -> Path:
    _require_hash(source, artifacts.hash_file(file), source.content_hash)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / f".{file.name}.tmp")
    return (folder / f".{file.name}.tmp").replace(folder / file.name)


def _kept_folder(source: Source, folder: Path) -> Path | None:
    return folder if folder.is_dir() and folder_hash(folder) == source.content_hash else None


def _keep_folder(source: Source, files: list[Path], folder: Path) -> Path:
    arrived = Path(os.path.commonpath(files))
    _require_hash(source, folder_hash(arrived), source.content_hash)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        shutil.copytree(arrived, Path(beside, folder.name))
        if folder.exists():
            folder.rename(Path(beside, "old"))
        return Path(beside, folder.name).rename(folder)


def _require_hash(source: Source, found: str, wanted: str | None) -> None:
    if found != wanted:
        raise DataError(
            f"the content has hash {found[:16]}..., {source.name} must have {str(wanted)[:16]}...; "
            "it is another version and needs another name"
        )
