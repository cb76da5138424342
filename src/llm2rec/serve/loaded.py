"""What a service answers from, in memory: loaded whole from a run, and anew where the run has changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from llm2rec import artifacts, progress
from llm2rec.data.sequences import Sequences
from llm2rec.data.tables import ITEM, TITLE
from llm2rec.data.texts import clean
from llm2rec.errors import ConfigError
from llm2rec.rows import Row, preferred_row
from llm2rec.runs import Domain, open_run
from llm2rec.serve.recommender import ServedRow, load_row, made_sets
from llm2rec.serve.similar import ServedVectors, served_set

LOOKED_EVERY = 1.0  # seconds between two looks at the run's folder
TRIED_EVERY = 10.0  # seconds between two tries to load what could not be loaded


@dataclass(frozen=True)
class Loaded:
    """All that a service answers from.

    vectors: None of a run that made none. titles: item_id, title, its lower case and training events of each item,
    most events first. stamp: when what it was loaded from was finished, looked at before loading.
    """

    row: ServedRow
    vectors: ServedVectors | None
    titles: pl.DataFrame
    stamp: list[int]

    def find(self, text: str, k: int) -> pl.DataFrame:
        """The `k` items of most training events whose title holds every word of `text`, which may have none."""
        held = [pl.col("lower").str.contains(word, literal=True) for word in text.lower().split()]
        return self.titles.lazy().filter(*held).head(k).select(ITEM, TITLE, "events").collect()

    @property
    def outdated(self) -> bool:
        """Whether the run has changed since, perhaps while it was loaded, so that parts may not fit each other."""
        return _stamp(self.row.domain, self.row.row) != self.stamp


def load(folder: Path, row: str | None, vectors: str | None, domain: str | None) -> Loaded:
    """A row of a run and its vectors; arguments and errors as in `service.create_app`."""
    run = open_run(folder)  # load_row says what is unfinished in it
    place = run.domain(domain)
    stamp = _stamp(place, row or preferred_row(run.recipe.recommender.rows))
    served = load_row(run, row, domain)
    if served.lists(1, None).needs_times:
        raise ConfigError(
            f"row {served.row!r} looks at the times of events, which no request gives; serve another"
        )
    has_vectors = vectors is not None or made_sets(place)
    near = served_set(place, served.catalogue, vectors) if has_vectors else None
    return Loaded(served, near, _titles(served), stamp)


def _titles(served: ServedRow) -> pl.DataFrame:
    counts = Sequences.load(served.domain.data).training_counts()
    frame = served.catalogue.frame
    titles = pl.Series(TITLE, [clean(title) for title in frame[TITLE]])
    events = pl.Series("events", np.pad(counts, (0, len(frame) - len(counts))))  # added items have none
    table = pl.DataFrame([frame[ITEM], titles, titles.str.to_lowercase().alias("lower"), events])
    return table.sort("events", descending=True, maintain_order=True)


def _stamp(place: Domain, row: str) -> list[int]:
    """When each artifact that a row and the vectors are loaded from was finished, in ns; 0: not there."""
    trained = [place.recommender(one, 0) for one in (row, *Row.parse(row).parents)]
    folders = [place.data, place.added, *trained, *map(place.embeddings, made_sets(place))]
    manifests = (folder / artifacts.MANIFEST for folder in folders)
    return [path.stat().st_mtime_ns if path.exists() else 0 for path in manifests]


class Latest:
    """Keeps what is loaded up to date with the run's folder: items added or rows trained since are taken up.

    While they are loaded the earlier ones answer, and go on where they cannot be loaded.
    """

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load = load
        while (loaded := load()).outdated:
            progress.say("the run has changed while it was loaded; loading it again")
        self._loaded = loaded
        self._lock = threading.Lock()
        self._next_look = time.monotonic() + LOOKED_EVERY
        self._problem = ""

    @property
    def loaded(self) -> Loaded:
        """What to answer from, now."""
        if time.monotonic() >= self._next_look and self._lock.acquire(blocking=False):
            try:
                wait = LOOKED_EVERY if self._look() else TRIED_EVERY
                self._next_look = time.monotonic() + wait
            finally:
                self._lock.release()
        return self._loaded

    def _look(self) -> bool:
        """Loads the run anew where it has changed; whether that could be done, or need not be."""
        try:
            if not self._loaded.outdated:
                return True
            loaded = self._load()
            if loaded.outdated:  # changed once more: the next look loads it whole
                return True
        except Exception as error:  # whatever a folder that is being written makes fail: the earlier one answers
            if str(error) != self._problem:
                self._problem = str(error)
                progress.say(f"note: the run has changed and cannot be loaded; the earlier one answers: {error}")
            return False
        self._loaded, self._problem = loaded, ""
        progress.say(f"the run has changed: loaded anew, {len(loaded.row.new):,} items")
        return True
