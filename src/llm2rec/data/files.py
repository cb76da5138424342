"""Files of a folder by their published names, and their bytes: plain, gzip or zstd, whatever they are called."""

from __future__ import annotations

import gzip
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn, cast

import polars as pl

from llm2rec.errors import DataError, first_few

PACKED = r"(\.gz|\.zst)?"
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHUNK_BYTES = 16 * 2**20
SHOWN_CHARACTERS = 80
NO_SEPARATOR = "\x1f"  # never printed, and not allowed inside a JSON text


def names_of(folder: Path) -> list[str]:
    """Names of the files that lie directly in `folder`, sorted.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def matching(folder: Path, pattern: str) -> list[Path]:
    """The files of `folder` whose whole name fits the regular expression, sorted by name.

    Raises:
        DataError: there is no such folder.
    """
    return [folder / name for name in names_of(folder) if re.fullmatch(pattern, name)]


def the_one(folder: Path, pattern: str, wanted: str) -> Path:
    """The one file of `folder` whose name fits; `wanted` is the published name that messages show.

    Raises:
        DataError: there is none, or more than one.
    """
    found = matching(folder, pattern)
    if not found:
        refuse_missing(folder, wanted)
    if len(found) > 1:
        names = first_few([path.name for path in found])
        raise DataError(f"{folder} holds several files of the kind {wanted}: {names}; keep one in the folder")
    return found[0]


def refuse_missing(folder: Path, wanted: str) -> NoReturn:
    """Raises the DataError of a missing file, with what the folder holds instead."""
    names = names_of(folder)
    raise DataError(f"{folder} has no {wanted}; it holds {first_few(names, 12) if names else 'no files'}")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file; its first bytes say how it is packed, not its name.

    gzip is unpacked while it is read. Python 3.11 has no zstd and polars unpacks it for tables only, so a zstd
    file is first unpacked by polars, line by line, into a temporary file (UTF-8 only).

    Raises:
        DataError: it cannot be read, or the packed data are damaged or cut off.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    try:
        with raw:
            magic = raw.read(4)
            raw.seek(0)
            if magic[:2] == GZIP_MAGIC:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield cast(IO[bytes], stream)
            elif magic == ZSTD_MAGIC:
                with tempfile.TemporaryDirectory() as folder:
                    plain = Path(folder) / "lines"
                    _unpack_zstd(path, plain)
                    with plain.open("rb") as unpacked:
                        yield unpacked
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or cut off ({error}); fetch it again") from error


def _unpack_zstd(path: Path, plain: Path) -> None:
    try:
        lines = pl.scan_csv(
            path, has_header=False, separator=NO_SEPARATOR, quote_char=None, infer_schema=False, glob=False
        )
        lines.sink_csv(plain, include_header=False, separator=NO_SEPARATOR, quote_style="never")
    except (pl.exceptions.PolarsError, OSError) as error:  # polars raises OSError for a cut-off frame
        raise DataError(f"{path} is damaged or cut off ({first_line(error)}); fetch it again") from error


def line_chunks(path: Path, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, bytes]]:
    """Whole lines in chunks of about `chunk_bytes`, each with the number of its first line (from 1).

    A byte-order mark is left out; the last line need not end with a line feed.

    Raises:
        DataError: the file is empty, cannot be read, or is damaged.
    """
    number, rest, empty = 1, b"", True
    with opened(path) as stream:
        while block := stream.read(chunk_bytes):
            if empty:
                block, empty = block.removeprefix(BYTE_ORDER_MARK), False
            whole, feed, tail = (rest + block).rpartition(b"\n")
            rest = tail
            if feed:
                yield number, whole + feed
                number += whole.count(b"\n") + 1
    if rest:
        yield number, rest
    if empty:
        raise DataError(f"{path} is empty (zero bytes)")


def read_text(path: Path, encoding: str) -> str:
    """The whole text of a small file, without a byte-order mark.

    Raises:
        DataError: it cannot be read, is damaged, is empty, or is not of that encoding.
    """
    content = b"".join(chunk for _, chunk in line_chunks(path))
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        refuse_line(path, line, content[error.start : error.start + SHOWN_CHARACTERS], f"is not {encoding}")


def refuse_line(
    path: Path, number: int, line: str | bytes, what: str, mend: str = "mend or remove it"
) -> NoReturn:
    """Raises the DataError of one line, with its number, its first characters and what to do about it."""
    text = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
    start = text.strip("\r\n")[:SHOWN_CHARACTERS]
    raise DataError(f"{path}: line {number} {what}: {start!r}; {mend}")


def refuse_not_utf_8(path: Path, number: int, line: bytes) -> NoReturn:
    """Raises the DataError of a line in another encoding, which the whole file will have."""
    refuse_line(path, number, line, "is not UTF-8", "save the whole file as UTF-8")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
