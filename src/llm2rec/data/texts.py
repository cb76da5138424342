"""What an item says of itself: its columns through a template, cleaned of markup."""

from __future__ import annotations

import html
import re
import string

import polars as pl

from llm2rec.data.tables import ITEM, Catalogue
from llm2rec.errors import ConfigError, DataError, first_few

TEMPLATE = "{title}"
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff]+")


def item_texts(catalogue: Catalogue, template: str = TEMPLATE) -> list[str]:
    """The text of each item (N,): one line, without HTML entities, tags and control characters.

    Args:
        template: text with columns in braces, `"{title}. {brand}. {category}"`. Where a column is empty its part,
            up to the next one, is left out.

    Raises:
        ConfigError: the template names no column, or one that the catalogue lacks.
        DataError: an item whose text is empty.
    """
    parts = _parse(template, catalogue.frame.columns)
    columns = {name: _cleaned_column(catalogue, name) for _, name in parts}
    rows = zip(*columns.values(), strict=True)
    texts = [_fill(parts, dict(zip(columns, row, strict=True))) for row in rows]
    empty = [item for item, text in zip(catalogue.item_ids, texts, strict=True) if not text]
    if empty:
        raise DataError(f"{len(empty):,} items have no text under data.text {template!r}: {first_few(empty)}")
    return texts


def clean(text: str) -> str:
    """One line of text: entities resolved, tags and control characters removed, white space collapsed.

    >>> clean("Tom &amp; Jerry <b>II</b>")
    'Tom & Jerry II'
    """
    plain = _TAG.sub(" ", html.unescape(text))
    return " ".join(_INVISIBLE.sub(" ", plain).split())


def _parse(template: str, columns: list[str]) -> list[tuple[str, str]]:
    """(text before, column) of each column of a template; text after the last column is not allowed."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"data.text {template!r} is no template ({error}); for example '{{title}}. {{brand}}'"
        ) from error
    if any(spec or conversion for _, _, spec, conversion in fields):
        raise ConfigError(f"data.text {template!r}: only names of columns stand in braces, without '!' and ':'")
    parts = [(before, name) for before, name, _, _ in fields if name is not None]
    unknown = [name for _, name in parts if name not in columns or name == ITEM]
    if unknown or not parts:
        known = ", ".join(name for name in columns if name != ITEM)
        raise ConfigError(f"data.text {template!r}: columns of the items table in braces, of {known}")
    if fields[-1][1] is None and fields[-1][0].strip(" ."):
        raise ConfigError(
            f"data.text {template!r} ends in plain text, which says nothing of an item; end with a column"
        )
    return parts


def _cleaned_column(catalogue: Catalogue, name: str) -> list[str]:
    values = catalogue.frame[name]
    if isinstance(values.dtype, pl.Array):
        values = values.arr.to_list()
    if isinstance(values.dtype, pl.List):
        values = values.cast(pl.List(pl.String)).list.join(", ")
    if values.dtype.is_nested() or values.dtype == pl.Binary:
        raise ConfigError(f"data.text names {name!r}, a column of type {values.dtype}; name columns of text")
    if values.dtype.is_float():
        values = values.fill_nan(None)
    return ["" if value is None else clean(str(value)) for value in values.to_list()]


def _fill(parts: list[tuple[str, str]], values: dict[str, str]) -> str:
    text = ""
    for before, name in parts:
        if values[name]:
            text += (before if text else before.lstrip(" .,:;|/-")) + values[name]
    return " ".join(text.split())
