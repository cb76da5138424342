"""Where the course of a training is shown besides the terminal and `metrics.jsonl`: tensorboard, wandb and such.

None of these packages is required. They are configured by their own environment variables (`WANDB_MODE`,
`MLFLOW_TRACKING_URI`, ...); what those leave open is set here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from llm2rec.errors import ConfigError

LoggerName = Literal["tensorboard", "trackio", "wandb", "mlflow"]
PROJECT = "llm2rec"


def require(names: Sequence[str]) -> None:
    """Raises ConfigError where the package of a logger is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"loggers: {missing[0]} is not installed; pip install {' '.join(missing)}, or leave it out there"
        )


@dataclass(frozen=True)
class Loggers:
    """The loggers of a run, by name; every training of the run is a run of its own to them.

    run_folder: tensorboard writes to `tensorboard/` in it; names are relative to it.
    """

    names: tuple[str, ...] = ()
    run_folder: Path = Path()

    def name_of(self, out: Path) -> str:
        """What a training whose stage folder is `out` is called: demo/recommender/main/sasrec-id/seed-0."""
        inside = out.is_relative_to(self.run_folder)
        return str(Path(self.run_folder.name) / out.relative_to(self.run_folder)) if inside else out.name

    @contextmanager
    def around(self, out: Path) -> Iterator[None]:
        """What the training in `out` must be surrounded with.

        transformers reads these settings from the environment alone; tensorboard's would lie in the checkpoints,
        and be deleted with them. Variables that are set already stay. A wandb run ends with its training.
        """
        folder = self.run_folder / "tensorboard" / Path(*Path(self.name_of(out)).parts[1:])
        wanted = {
            "WANDB_PROJECT": PROJECT,
            "MLFLOW_EXPERIMENT_NAME": PROJECT,
            "TENSORBOARD_LOGGING_DIR": str(folder),
        }
        added = {name: value for name, value in wanted.items() if self.names and name not in os.environ}
        os.environ |= added
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)
            if "wandb" in self.names and "wandb" in sys.modules:
                sys.modules["wandb"].finish()


NO_LOGGERS = Loggers()
