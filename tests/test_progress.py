"""What a run says of its progress where nobody watches: lines in a log instead of a bar."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from llm2rec import progress


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.strip() for line in capsys.readouterr().err.splitlines()]


def test_a_log_gets_a_line_with_count_time_left_and_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    clock = iter([100.0, 100.0, 150.0, 150.0, 150.0])  # begun, resumed, then: due? said, time left
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.bar("csft", 1_200) as running:
        running.move_to(1_000)  # resumed: its speed counts from there
        running.advance(50, note="loss 1.45")
    assert lines_of(capsys) == ["csft  1,050 of 1,200, 0:02:30 left, loss 1.45"]


def test_a_total_that_is_not_known_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with progress.bar("titles.csv", 0) as running:
        running.advance(note="MiB")
    assert lines_of(capsys) == ["titles.csv  1, MiB"]


def test_a_short_job_stays_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(3), "recommend", 3)) == [0, 1, 2]
    assert lines_of(capsys) == []


def test_a_bar_runs_inside_another_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(progress, "console", terminal)
    with progress.bar("contrastive", 2) as training, progress.bar("encode", 3) as validation:
        validation.advance(3)
        training.advance()
    assert "encode" in terminal.file.getvalue()
