"""Checkpoints of a training: what marks one complete, which are kept, and what is read back from them.

The training engine writes them; here it is decided which of them count. Any kill leaves a complete one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm2rec import artifacts
from llm2rec.errors import ArtifactError
from llm2rec.processes import processes
from llm2rec.sharding import parts_of

STATE = "trainer_state.json"
_COMPLETE = "complete"
_MOMENTS = "optimizer-{}.pt"  # of layers that are shared out, by rank; the main process's is `optimizer.pt`


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; half-written ones (killed while saving) are deleted."""
    found = _all(folder)
    complete = [one for one in found if (one / _COMPLETE).exists()]
    if processes().is_main:
        _delete([one for one in found if one not in complete])
    return max(complete, key=lambda one: int(one.name.rpartition("-")[2]), default=None)


def seconds_before(checkpoint: Path) -> float:
    """Seconds of training until a complete checkpoint."""
    return float(artifacts.read_json(checkpoint / _COMPLETE)["seconds"])


def processes_of(checkpoint: Path) -> int:
    """How many processes trained until a complete checkpoint; as many as now, where an old one does not say."""
    return int(artifacts.read_json(checkpoint / _COMPLETE).get("processes", processes().count))


def complete(checkpoint: Path, seconds: float, keep: set[str]) -> None:
    """Marks a checkpoint as complete; then, not before, all others are deleted but those named in `keep`."""
    artifacts.write_json(checkpoint / _COMPLETE, {"seconds": seconds, "processes": processes().count})
    _delete([one for one in _all(checkpoint.parent) if one.name not in keep | {checkpoint.name}])


def name_of(step: int) -> str:
    """The folder of the checkpoint after a step."""
    return f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(artifacts.read_json(checkpoint / STATE)["global_step"])


def keep_stable(out: Path, step: int) -> None:
    """Keeps the checkpoint after `step` of a finished training, if one was written, as `out/stable`."""
    found = out / artifacts.CHECKPOINTS / name_of(step)
    if processes().is_main and found.exists():
        os.replace(found, out / artifacts.STABLE)


def go_on_from(stable: Path, out: Path, intervals: dict[str, int]) -> None:
    """Puts the kept checkpoint of another training under the checkpoints of `out`, unless there is one already.

    Args:
        intervals: of the training that goes on, `TrainSettings.intervals`; its checkpoints hold them.
    """
    folder = out / artifacts.CHECKPOINTS
    if last_complete(folder) is None and processes().is_main:
        copy = folder / name_of(step_of(stable))
        apart = shutil.ignore_patterns(_COMPLETE, STATE)
        shutil.copytree(stable, copy, ignore=apart, copy_function=artifacts.link)
        artifacts.write_json(copy / STATE, artifacts.read_json(stable / STATE) | intervals)
        artifacts.link(stable / _COMPLETE, copy / _COMPLETE)  # last: before, it does not count
    processes().wait()


def _all(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoint-*"))


def _delete(checkpoints: list[Path]) -> None:
    """Deletes checkpoints; one that a kill leaves half deleted counts as incomplete."""
    for one in checkpoints:
        (one / _COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(one)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Puts the weights of a checkpoint into a model, of layers that are shared out this process's part.

    Raises:
        ArtifactError: there are none, or they are another model's.
    """
    weights: dict[str, Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        weights |= load_file(file)
    _, unexpected = model.load_state_dict(parts_of(weights, model), strict=False)  # tied weights are stored once
    if unexpected or not weights:
        raise ArtifactError(f"{checkpoint} does not hold this model's weights; run again with --fresh")


def save_moments(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Writes this process's part of the optimizer's state, where layers are shared out."""
    checkpoint.mkdir(parents=True, exist_ok=True)  # the main process may not have come so far
    torch.save(optimizer.state_dict(), checkpoint / _MOMENTS.format(processes().rank))


def load_moments(optimizer: torch.optim.Optimizer, checkpoint: Path, device: torch.device) -> None:
    """Reads this process's part back; the main process has its own already.

    Raises:
        ArtifactError: another number of processes wrote the checkpoint.
    """
    count, parts = processes().count, 1 + len(list(checkpoint.glob(_MOMENTS.format("*"))))
    if parts != count:
        raise ArtifactError(
            f"{checkpoint} was shared out among {parts} processes, these are {count}; "
            f"start {parts}, or run again with --fresh"
        )
    if not processes().is_main:
        own = torch.load(checkpoint / _MOMENTS.format(processes().rank), map_location=device, weights_only=True)
        optimizer.load_state_dict(own)


def require_disk(model: nn.Module, out: Path) -> None:
    """Raises ArtifactError where `out` has too little space for the checkpoints of a training of `model`."""
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # bytes of either optimizer
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    needed = 4 * (weights + moments)  # up to three kept and one being written
    artifacts.require_disk(out, needed, "checkpoints of this stage")
