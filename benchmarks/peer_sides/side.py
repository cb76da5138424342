"""What the sides of `peers.py` share: the log they read, the sizes they build, and how they answer.

A side is a process in an interpreter of its own, `python with_NAME.py LOG ROUND_TARGETS`. It reads the log, builds
its model and says what it is on one line of JSON. Then it measures on demand, a line of JSON in and one out:
`{"what": "training", "batch": 128}`, `{"count": 32768, "seconds": 2.5}`. Only numpy and torch are imported here,
because the interpreters of the peers have no llm2rec.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HIDDEN, LAYERS, HEADS, LENGTH, DROPOUT, LEARNING_RATE = 128, 2, 2, 10, 0.3, 1e-3
CUTOFF = 10
TRAINING, RANKS, LISTS = "training", "ranks", "lists"
Done = tuple[int, float]  # targets or users, seconds


@dataclass(frozen=True)
class Log:
    """Sequences as plain arrays; a user's last event is test, the one before validation, the others training.

    items: (E,) item index 1..N; offsets: (U + 1,), user u owns `items[offsets[u]:offsets[u + 1]]`.
    window_items, window_offsets: the training events cut into windows of up to LENGTH + 1 events, each beginning
    with the last event of the one before, so that every event but a user's first is a target once.
    """

    items: np.ndarray
    offsets: np.ndarray
    window_items: np.ndarray
    window_offsets: np.ndarray
    n_items: int

    @classmethod
    def load(cls, path: Path) -> Log:
        """What `save` wrote."""
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files} | {"n_items": int(arrays["n_items"])})

    def save(self, path: Path) -> None:
        """Writes an npz."""
        np.savez(path, **vars(self))

    @property
    def n_users(self) -> int:
        """Users, each with one test event."""
        return len(self.offsets) - 1

    @property
    def targets(self) -> int:
        """Training targets of an epoch."""
        return len(self.window_items) - (len(self.window_offsets) - 1)


@dataclass(frozen=True)
class Side:
    """One side, ready to be measured.

    version: of the library. n_items: that it scores. measures: what is measured -> a call that takes a batch.
    batches: what is measured -> the batches to choose from.
    """

    version: str
    n_items: int
    measures: dict[str, Callable[[int], Done]]
    batches: dict[str, tuple[int, ...]]


def share_of(batches: int, log: Log, targets: int) -> int:
    """How many of an epoch's batches hold about as many targets as a round asks for."""
    return max(1, min(batches, round(batches * targets / log.targets)))


def serve(make: Callable[[Log, int], Side]) -> None:
    """Answers requests; whatever the libraries print goes to standard error instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    side = make(Log.load(Path(sys.argv[1])), int(sys.argv[2]))
    _say(answers, {"version": side.version, "n_items": side.n_items, "batches": side.batches})
    for line in sys.stdin:
        request = json.loads(line)
        count, seconds = side.measures[request["what"]](request["batch"])
        _say(answers, {"count": count, "seconds": seconds})


def _say(answers, what: dict) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()
