"""Live progress with an ETA, the same for training steps, encoding and lists: a bar, in a log a line a minute."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from llm2rec import processes

T = TypeVar("T")
LINE_SECONDS = 60.0  # between two lines of a log
console = Console(stderr=True, quiet=not processes.is_main())  # of several processes one speaks


class Bar:
    """One running bar: `advance` moves it, `note` is the text at its end (loss, metric).

    Where stderr is no terminal (nohup, a job's log, a notebook) a line a minute takes the bar's place.
    """

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._began_at, self._began = 0, time.monotonic()
        self._said = self._began

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Move on by `steps`, and replace the note if one is given."""
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self._progress.update(self._task, advance=steps, **fields)
        if not console.is_terminal and time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            say(self._line())

    def move_to(self, completed: int) -> None:
        """Set the absolute position (after a resume)."""
        self._progress.update(self._task, completed=completed)
        self._began_at, self._began = completed, time.monotonic()

    def _line(self) -> str:
        task = self._progress.tasks[self._task]
        done, total = int(task.completed), int(task.total or 0)
        parts = [f"{done:,} of {total:,}" if total else f"{done:,}"]
        if self._began_at < done <= total:
            seconds = (total - done) * (time.monotonic() - self._began) / (done - self._began_at)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        if task.fields["note"]:
            parts.append(task.fields["note"])
        return f"       {task.description}  {', '.join(parts)}"


@contextmanager
def bar(description: str, total: int) -> Iterator[Bar]:
    """A progress bar with count, elapsed time, ETA and a note; lines instead where stderr is no terminal."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bar(progress, progress.add_task(description, total=total, note=""))


def track(values: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yields `values` unchanged while a bar of `total` steps moves."""
    with bar(description, total) as running:
        for value in values:
            yield value
            running.advance()


def say(text: str) -> None:
    """One line about the course of a run, on stderr."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
