"""Named language models and text encoders: the verbs `llm2rec models list | fetch`."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path

from llm2rec.config import TINY_RANDOM
from llm2rec.data.sources import MODELS, TEXT_ENCODERS, Source, fetch_model, fetch_text_encoder
from llm2rec.errors import ConfigError

TokenCounter = Callable[[builtins.list[str]], builtins.list[int]]


def list() -> builtins.list[Source]:
    """The language models and text encoders known by name."""
    return [*MODELS.values(), *TEXT_ENCODERS.values()]


def fetch(name: str) -> Path:
    """The file of a named language model, or the folder of a text encoder, downloaded into the cache if need be.

    Raises:
        DataError: no such name, or no mirror has the registered content.
    """
    return fetch_text_encoder(name) if name in TEXT_ENCODERS else fetch_model(name)


def token_counter(source: str) -> TokenCounter:
    """Texts -> how many tokens a language model's tokenizer makes of each.

    Args:
        source: a named model, a hub id, a folder or a GGUF file.

    Raises:
        DataError, ConfigError: it cannot be had, or makes its tokenizer only in a run (tiny-random).
    """
    if source == TINY_RANDOM:
        raise ConfigError(
            f"{TINY_RANDOM} makes its tokenizer from the texts of a run and has none before; name another model, "
            f"for example {next(iter(MODELS))}"
        )
    from llm2rec.lm.backbone import load_tokenizer

    tokenizer = load_tokenizer(fetch_model(source) if source in MODELS else source)
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
