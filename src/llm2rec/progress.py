"""Live progress with an ETA, the same bar for training steps, encoding and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
console = Console(stderr=True, quiet=not processes.is_main())  # of several processes one speaks


class Bar:
    """One running bar: `advance` moves it, `note` is the text at its end (loss, metric)."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Move on by `steps`, and replace the note if one is given."""
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self._progress.update(self._task, advance=steps, **fields)

    def move_to(self, completed: int, note: str | None = None) -> None:
        """Set the absolute position (after a resume)."""
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self._progress.update(self._task, completed=completed, **fields)


@contextmanager
def bar(description: str, total: int) -> Iterator[Bar]:
    """A progress bar with count, elapsed time, ETA and a note; draws nothing when stderr is not a terminal."""
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
