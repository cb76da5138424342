"""A finished stage is a folder with `manifest.json`, written last and atomically.

The manifest holds the flat `inputs` that determined the stage (configuration keys, content hashes of files,
fingerprints of parent stages) and the outputs. A stage is kept when its expected inputs equal the recorded
ones and its outputs are still there; otherwise the keys that differ say why it runs again. A stage that was
started but not finished leaves `started.json` instead, so that a later call knows whether the checkpoints
in the folder belong to the same inputs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm2rec import progress
from llm2rec.errors import ArtifactError

MANIFEST = "manifest.json"
STARTED = "started.json"
CHECKPOINTS = "checkpoints"
STABLE = "stable"  # the checkpoint that a longer training may go on from
DROPPED = "checkpoints.dropped"  # on their way to deletion
SUPERSEDED = "superseded"
SCRATCH = ".unfinished"  # what is to appear all at once, while it is made
PROVENANCE = "provenance.json"
METRICS = "metrics.jsonl"
# No results: what a longer training goes on from, where vectors come from, and the course of a training, which
# is logged otherwise after a resume.
UNCOUNTED = (STABLE, PROVENANCE, METRICS)
UNCOUNTED_BEFORE = (STABLE, PROVENANCE)  # of manifests that do not say it: what was made from them is kept
FORMAT = 1
HASHED_UP_TO_BYTES = 16 * 2**20
SHOWN_REASONS = 3

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What a finished stage recorded: its name, inputs, outputs (path -> size and hash) and a summary.

    uncounted: outputs, or folders of them, that are no results.
    """

    stage: str
    inputs: Inputs
    outputs: dict[str, dict[str, Any]]
    summary: dict[str, Any]
    uncounted: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of the outputs that count: equal for equal results, whatever led to them."""
        counted = (path for path in sorted(self.outputs) if path.split("/")[0] not in self.uncounted)
        return hash_json({path: self.outputs[path]["sha256"] for path in counted})


@dataclass(frozen=True)
class Decision:
    """Whether a finished stage may be kept, and if not, the input keys (or files) that differ."""

    keep: bool
    reasons: tuple[str, ...] = ()

    @property
    def in_words(self) -> str:
        """The first reasons, and how many there are besides: short enough for a line."""
        more = len(self.reasons) - SHOWN_REASONS
        return ", ".join(self.reasons[:SHOWN_REASONS]) + (f" and {more} more" if more > 0 else "")


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_file_once(path: Path) -> str:
    """`hash_file` of large inputs, weights above all: a file is read again only where it was written since."""
    state = path.stat()
    return _hash_as_of(path, (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))


@lru_cache(maxsize=1024)
def _hash_as_of(path: Path, state: tuple[int, ...]) -> str:
    return hash_file(path)


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically: a reader sees the old file or the whole new one."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json` writes of a value."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """The JSON value of a file.

    Raises:
        ArtifactError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist; run the stage that writes it") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON ({error}); move it away and run again") from error


def flatten(prefix: str, value: Any) -> Inputs:
    """Nested mappings as dotted keys: `flatten('csft', {'a': {'b': 1}}) == {'csft.a.b': 1}`."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {key: leaf for name, inner in value.items() for key, leaf in flatten(f"{prefix}.{name}", inner).items()}


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished stage, or None where the stage is not finished.

    Raises:
        ArtifactError: the manifest is damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{path} is not a manifest of format {FORMAT}; move the folder away and run again")
    try:
        outputs = {
            path: {"bytes": int(one["bytes"]), "sha256": str(one["sha256"])}
            for path, one in content["outputs"].items()
        }
        uncounted = tuple(content.get("uncounted", UNCOUNTED_BEFORE))
        return Manifest(content["stage"], dict(content["inputs"]), outputs, dict(content["summary"]), uncounted)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r}); move its folder away and run again") from error


def require(folder: Path, stage: str, mend: str = "") -> Manifest:
    """The manifest of a finished stage whose outputs are as it left them.

    Args:
        mend: what to do where they are not; by default to run the stage.

    Raises:
        ArtifactError: the stage is not finished, or a file of it is missing or was changed.
    """
    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        if not mend:
            raise
        raise ArtifactError(f"{folder / MANIFEST} is damaged; {mend}") from error
    if manifest is None:
        mend = mend or f"run `llm2rec {stage}` first"
        raise ArtifactError(f"{folder} holds no finished '{stage}' stage; {mend}")
    damaged = _damaged(folder, manifest)
    if damaged:
        mend = mend or f"run `llm2rec {stage}` again"
        raise ArtifactError(f"{folder / damaged[0]} is missing or was changed; {mend}")
    return manifest


def require_writable(folder: Path) -> None:
    """Raises ArtifactError where no file can be made in a folder: said before what it is to hold is computed."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise ArtifactError(
            f"cannot write to {folder} ({error.strerror}); make it writable, or work on a copy of the run"
        ) from error


def require_disk(folder: Path, needed: int, what: str) -> None:
    """Makes a folder where `needed` bytes are free.

    Args:
        what: needs them, for the error.

    Raises:
        ArtifactError: fewer are free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ArtifactError(
            f"{folder} has {free / 1e9:.1f} GB free, {what} need up to {needed / 1e9:.1f} GB; "
            "free some space or choose another --out"
        )


def decide(folder: Path, inputs: Inputs, unread: frozenset[str] = frozenset()) -> Decision:
    """Keep or rerun: compares `inputs` with the manifest and checks that the outputs are intact.

    Args:
        unread: keys of the inputs that the stage does not look at, whatever their values were and are.
    """
    try:
        manifest = read_manifest(folder)
    except ArtifactError:
        return Decision(False, (f"damaged {MANIFEST}",))
    if manifest is None:
        return Decision(False, _unfinished(folder / STARTED, inputs, unread))
    differing = changed(manifest.inputs, inputs, unread)
    if differing:
        return Decision(False, differing)
    damaged = _damaged(folder, manifest)
    return Decision(not damaged, tuple(f"damaged {path}" for path in damaged))


_MISSING = object()


def changed(before: Inputs, inputs: Inputs, unread: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """The keys whose values differ, sorted, but those that nothing looks at."""
    keys = sorted((before.keys() | inputs.keys()) - unread)
    return tuple(key for key in keys if before.get(key, _MISSING) != inputs.get(key, _MISSING))


def _unfinished(started: Path, inputs: Inputs, unread: frozenset[str]) -> tuple[str, ...]:
    """Why a stage without a manifest runs: it never ran, or it was interrupted, perhaps with other inputs."""
    if not started.exists():
        return ("not run yet",)
    before = _inputs_at_start(started)
    return ("interrupted", *(() if before is None else changed(before, inputs, unread)))


def _damaged(folder: Path, manifest: Manifest) -> list[str]:
    return [path for path, output in manifest.outputs.items() if not _intact(folder / path, output)]


def _intact(path: Path, output: dict[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != output["bytes"]:
        return False
    return output["bytes"] > HASHED_UP_TO_BYTES or hash_file(path) == output["sha256"]


@contextmanager
def stage(
    folder: Path, name: str, inputs: Inputs, run_folder: Path, unread: frozenset[str] = frozenset()
) -> Iterator[dict[str, Any]]:
    """Runs a stage in `folder`: yields a summary to fill, writes the manifest when the block ends well.

    Of an interrupted stage with the same inputs, what it resumes from stays in `folder` (`checkpoints`, `stable`),
    and what it left half written is deleted. Anything else that lies there is moved to `run_folder/superseded`, an
    interrupted stage with its checkpoints, which are deleted once the stage is finished. A block that fails before
    it has written anything (its checks) leaves what was there: the finished stage, the interrupted one, or a stage
    that never ran.

    Args:
        unread: keys of the inputs that the stage does not look at: inputs that differ there are the same.
    """
    started = folder / STARTED
    aside = None
    before = None if (folder / MANIFEST).exists() else _inputs_at_start(started)
    if before is None or changed(before, inputs, unread):
        aside = move_aside(folder, run_folder)
        write_json(started, inputs)
    else:
        _delete_half_written(folder)
    summary: dict[str, Any] = {}
    began = time.perf_counter()
    try:
        yield summary
    except BaseException:
        with suppress(OSError):
            (folder / CHECKPOINTS).rmdir()  # the engine makes an empty one before it checks
        if list(folder.iterdir()) == [started]:
            started.unlink()
            if aside is not None:
                os.replace(aside, folder)  # over the empty folder
                progress.say(f"kept   {folder.relative_to(run_folder)}  as it was: what should replace it failed")
        raise
    summary.setdefault("seconds", round(time.perf_counter() - began, 2))
    write_manifest(folder, name, inputs, summary)
    tidy(folder, run_folder)  # last: a stage killed while checkpoints are deleted is finished all the same


def _delete_half_written(folder: Path) -> None:
    """Leaves of an interrupted stage what it resumes from: the rest would count among the outputs of the next."""
    for path in folder.iterdir():
        if path.name in (CHECKPOINTS, STABLE, STARTED):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def tidy(folder: Path, run_folder: Path) -> None:
    """Removes what a finished stage no longer needs; it may have been killed before it came to that.

    Those are its checkpoints, and those of the unfinished stages that were moved aside for it.
    """
    for aside in (run_folder / SUPERSEDED).glob("*"):
        _drop_checkpoints(aside / folder.relative_to(run_folder))
    _drop_checkpoints(folder)
    (folder / STARTED).unlink(missing_ok=True)


def tidy_superseded(run_folder: Path) -> None:
    """Removes the checkpoints of all that was moved aside: of a finished run no stage goes on from them."""
    for name in (CHECKPOINTS, DROPPED):
        for checkpoints in list((run_folder / SUPERSEDED).rglob(name)):
            _drop_checkpoints(checkpoints.parent)


def _drop_checkpoints(folder: Path) -> None:
    """Deletes the checkpoints of a stage, of which at no moment some are half there."""
    shutil.rmtree(folder / DROPPED, ignore_errors=True)
    if (folder / CHECKPOINTS).exists():
        os.replace(folder / CHECKPOINTS, folder / DROPPED)
        shutil.rmtree(folder / DROPPED, ignore_errors=True)


def _inputs_at_start(started: Path) -> Inputs | None:
    """What an unfinished stage was started with; None where that is not known: no such file, or a damaged one."""
    try:
        content = read_json(started)
    except ArtifactError:
        return None
    return content if isinstance(content, dict) else None


def write_manifest(folder: Path, name: str, inputs: Inputs, summary: dict[str, Any]) -> None:
    """Hashes everything in `folder` but checkpoints and writes the manifest last."""
    passing = (CHECKPOINTS, DROPPED, MANIFEST, STARTED)
    outputs = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in passing
    }
    content = {"format": FORMAT, "stage": name, "inputs": inputs, "outputs": outputs, "summary": summary}
    content["uncounted"] = UNCOUNTED
    write_json(folder / MANIFEST, content)


def move_aside(folder: Path, run_folder: Path) -> Path | None:
    """Moves a superseded stage folder to `run_folder/superseded/<time>/<its path>`: results are never deleted.

    A single file is moved in the same way.

    Returns:
        Where it lies now; None where there was nothing to move.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    base = run_folder / SUPERSEDED / time.strftime("%Y%m%d-%H%M%S")
    target = base / folder.relative_to(run_folder)
    number = 1
    while target.exists():
        target = base.with_name(f"{base.name}-{number}") / folder.relative_to(run_folder)
        number += 1
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(folder, target)
    progress.say(f"moved  {folder.relative_to(run_folder)}  to {target.relative_to(run_folder)}")
    return target


def take_over(source: Path, folder: Path, run_folder: Path) -> None:
    """Makes `folder` the finished stage that `source` is; what lay there is moved aside.

    Files are hard links where the file system has them, else copies. Sharing them is safe: a finished stage is
    moved aside as a whole before it runs again, its files are never written to.

    Raises:
        ArtifactError: `source` is not finished.
    """
    manifest = read_manifest(source)
    if manifest is None:
        raise ArtifactError(f"{source} holds no finished stage to take over")
    with scratch(run_folder) as taken:
        for path in (*manifest.outputs, MANIFEST):
            (taken / path).parent.mkdir(parents=True, exist_ok=True)
            link(source / path, taken / path)
        move_aside(folder, run_folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(taken, folder)  # the manifest appears with everything else, or not at all
        tidy(folder, run_folder)


@contextmanager
def scratch(run_folder: Path) -> Iterator[Path]:
    """An empty folder inside a run's for what is moved to its place when it is whole; what is left of it goes.

    It has one name, so that what a killed process left goes with the next use.
    """
    folder = run_folder / SCRATCH
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def link(source: str | Path, target: str | Path) -> None:
    """A hard link to a file that is never written to again, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def turn(lock: Path) -> Iterator[None]:
    """Waits until no other process is inside `turn` with the same file, then keeps others waiting.

    On a file system without locks (Lustre or NFS, often) nobody waits, which is said.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"waiting for another process, which holds {lock}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            progress.say(
                f"note: {lock.parent} is on a file system without locks ({error.strerror}); "
                "start other processes when this one has what it fetches or converts"
            )
        yield


@contextmanager
def run_lock(run_folder: Path) -> Iterator[None]:
    """Holds the operating system's lock on a run folder; a killed process leaves none behind.

    Raises:
        ArtifactError: another live process holds it, or the file system knows no locks.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    with (run_folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(
                f"another llm2rec process is working in {run_folder}; wait for it, or choose another --out"
            ) from error
        except OSError as error:
            raise ArtifactError(
                f"{run_folder} cannot be locked: its file system has no locks ({error.strerror}); choose an --out "
                "on a local disk"
            ) from error
        yield
