"""What the benchmarks share: sides that take turns, the figures that come of it, and a log in memory."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm2rec.data.sequences import Sequences, prepare
from llm2rec.data.splits import Split
from llm2rec.data.tables import Catalogue, Interactions

Run = Callable[[], float]


@dataclass(frozen=True)
class Figure:
    """One line of the table: a side at its best batch, and how many times the last side it is."""

    what: str
    side: str
    batch: str
    unit: str
    median: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float

    def line(self) -> str:
        """As a row of the table."""
        spread = f"{self.low:,.4g}–{self.high:,.4g}"
        ratio = f"{self.ratio:.3g}x ({self.ratio_low:.3g}–{self.ratio_high:.3g})"
        return (
            f"| {self.what} | {self.side} | {self.batch} | {self.median:,.4g} {self.unit} | {spread} | {ratio} |"
        )


def compare(what: str, unit: str, sides: dict[str, dict[str, Run]], rounds: int) -> list[Figure]:
    """Each side at the fastest of its batches, in turn; ratios are taken within a round, against the last side."""
    best: dict[str, str] = {}
    for side, by_batch in sides.items():
        next(iter(by_batch.values()))()  # warm
        first = {batch: run() for batch, run in by_batch.items()}
        best[side] = max(first, key=lambda batch: first[batch])
    found = {side: [] for side in sides}
    for _ in range(rounds):
        for side, batch in best.items():
            found[side].append(sides[side][batch]())
    base = list(found.values())[-1]
    figures = []
    for side, values in found.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        speeds = statistics.median(values), min(values), max(values)
        shares = statistics.median(ratios), min(ratios), max(ratios)
        figures.append(Figure(what, side, best[side], unit, *speeds, *shares))
        print(figures[-1].line(), flush=True)
    return figures


def timed(count: int, work: Callable[[], object]) -> Run:
    """How many of `count` a second `work` does."""

    def run() -> float:
        began = time.perf_counter()
        work()
        return count / (time.perf_counter() - began)

    return run


def prepared(interactions: Interactions, catalogue: Catalogue) -> Sequences:
    """The sequences of two tables in memory, leave-one-out."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(interactions, catalogue, split=Split(), short_histories="drop", out=Path(folder))
        loaded = Sequences.load(Path(folder))
        arrays = {key: np.array(getattr(loaded, key)) for key in ("items", "offsets", "parts", "times")}
        return Sequences(**arrays, item_ids=loaded.item_ids, user_ids=loaded.user_ids)
