"""Files over HTTP: a broken-off download leaves `<file>.part` and goes on there, a finished one is checked."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import ssl
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llm2rec.errors import DataError, first_few
from llm2rec.progress import bar

CONNECT_TIMEOUT_SECONDS = 5
BLOCK_BYTES = 2**20
PARTIAL, NOT_SATISFIABLE = 206, 416
NETWORK_ERRORS = (
    *(urllib.error.URLError, http.client.HTTPException),
    *(TimeoutError, ConnectionError, ssl.SSLError, ValueError),  # ValueError: an address that is none
)


@dataclass(frozen=True)
class RemoteFile:
    """A file behind an address, with the MD5 that its publisher prints (None: none is printed).

    members: what to take out of a zip archive, by last name; empty: the file is kept as it is.
    """

    address: str
    md5: str | None = None
    members: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's name: the end of the address."""
        return self.address.rpartition("/")[2]


def fetch(remote: RemoteFile, folder: Path) -> list[Path]:
    """The file, or the members of the archive, in `folder`; what already lies there is not fetched again.

    Raises:
        DataError: the address does not answer, the transfer broke off (it goes on when called again), the
            content has another MD5 than the published one, or the archive lacks a member.
    """
    target = folder / remote.name
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{remote.name}.part"
        while not _transferred(remote, part):
            pass
        _require_md5(remote, part)
        os.replace(part, target)
        _validator_of(part).unlink(missing_ok=True)
    return _unpack(target, remote.members) if remote.members else [target]


def _transferred(remote: RemoteFile, part: Path) -> bool:
    """Whether the file has come whole; False where the transfer broke off but had brought something."""
    before = _size(part)
    try:
        _transfer(remote, part)
    except DataError:
        if _size(part) <= before:
            raise
        return False
    return True


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _transfer(remote: RemoteFile, part: Path) -> None:
    """Fills `part`, from where it ends if the server still has the same file, else from the start."""
    have, validator = _resumable(part)
    headers = {"Range": f"bytes={have}-", "If-Range": validator} if have else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(remote.address, headers=headers), timeout=CONNECT_TIMEOUT_SECONDS
        ) as response:
            start = _start_of(response) if response.status == PARTIAL else 0
            if start not in (0, have):
                raise DataError(f"{remote.address} sent bytes from {start} instead of {have}; try again")
            if start == 0:
                _remember_validator(part, response)
            _copy(response, part, start, remote)
    except urllib.error.HTTPError as error:
        if error.code != NOT_SATISFIABLE or not have:
            raise DataError(f"{remote.address} does not answer: {error}") from error
        part.unlink()  # longer than the file is now: begin again
        _transfer(remote, part)
    except NETWORK_ERRORS as error:
        raise DataError(f"{remote.address} does not answer: {error}{_kept(part)}") from error


def _copy(response: http.client.HTTPResponse, part: Path, start: int, remote: RemoteFile) -> None:
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    with part.open("ab" if start else "wb") as sink, bar(remote.name, (total or 0) // BLOCK_BYTES) as running:
        running.move_to(start // BLOCK_BYTES)
        while block := response.read(BLOCK_BYTES):
            sink.write(block)
            running.advance(note="MiB")
        size = sink.tell()
    if total is not None and size != total:
        raise DataError(f"{remote.address} broke off after {size:,} of {total:,} bytes{_kept(part)}")


def _kept(part: Path) -> str:
    size = _size(part)
    return f"; {size:,} bytes are kept, the same command goes on there" if size else ""


def _start_of(response: http.client.HTTPResponse) -> int:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found.group(1)) if found else -1


def _validator_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _remember_validator(part: Path, response: http.client.HTTPResponse) -> None:
    """Keeps what tells this version of the file from a later one: parts of two versions must not be joined."""
    part.unlink(missing_ok=True)
    validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
    _validator_of(part).write_text(validator or "", encoding="utf-8")


def _resumable(part: Path) -> tuple[int, str]:
    """Bytes to go on after and the version they are of; 0 where that is not known."""
    known = _validator_of(part)
    validator = known.read_text(encoding="utf-8") if known.is_file() else ""
    return (_size(part) if validator else 0), validator


def _require_md5(remote: RemoteFile, part: Path) -> None:
    if remote.md5 is None:
        return
    with part.open("rb") as stream:
        found = hashlib.file_digest(stream, "md5").hexdigest()
    if found != remote.md5:
        part.unlink()
        raise DataError(
            f"{remote.address} has MD5 {found}, {remote.md5} is published; it is damaged or another version, "
            "and was deleted"
        )


def _unpack(archive: Path, members: tuple[str, ...]) -> list[Path]:
    """The members under their last names beside the archive: paths inside it can lead nowhere else."""
    targets = [archive.with_name(name) for name in members]
    try:
        with zipfile.ZipFile(archive) as content:
            held = {Path(entry.filename).name: entry for entry in content.infolist() if not entry.is_dir()}
            missing = [name for name in members if name not in held]
            if missing:
                raise DataError(f"{archive} does not hold {first_few(missing)}; it holds {first_few([*held], 12)}")
            for name, target in zip(members, targets, strict=True):
                if target.is_file() and target.stat().st_size == held[name].file_size:
                    continue
                with content.open(held[name]) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, BLOCK_BYTES)
    except (zipfile.BadZipFile, EOFError) as error:
        archive.unlink()
        raise DataError(f"{archive} is no zip archive ({error}) and was deleted; fetch it again") from error
    return targets
