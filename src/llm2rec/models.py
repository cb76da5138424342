"""Named language models: the verbs `llm2rec models list | fetch`."""

from __future__ import annotations

import builtins
from pathlib import Path

from llm2rec.data.sources import MODELS, Source, fetch_model


def list() -> builtins.list[Source]:
    """The language models known by name."""
    return [*MODELS.values()]


def fetch(name: str) -> Path:
    """The file of a named language model, downloaded into the cache if need be.

    Raises:
        DataError: no such name, or no mirror has the registered content.
    """
    return fetch_model(name)
