"""The three errors a user can cause, each saying what was got, what is allowed and how to mend it."""

from __future__ import annotations


class Llm2RecError(Exception):
    """Base of every error that the command line prints without a traceback."""


class DataError(Llm2RecError):
    """A table, a file or a downloaded source does not hold what it should."""


class ConfigError(Llm2RecError):
    """A recipe, an override or an argument is not allowed."""


class ArtifactError(Llm2RecError):
    """A run folder, a checkpoint or a finished stage is missing, foreign, locked or damaged."""


def first_few(values: list[str], limit: int = 5) -> str:
    """The first `limit` values, quoted and joined, with a count of the rest: `'a', 'b' (+3 more)`."""
    shown = ", ".join(repr(value) for value in values[:limit])
    return shown if len(values) <= limit else f"{shown} (+{len(values) - limit} more)"
