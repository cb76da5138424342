"""What an item says of itself: its columns through a template, cleaned of markup."""

from __future__ import annotations

import html
import re
import string

import polars as pl

from llm2rec.data.tables import ITEM, Catalogue
from llm2rec.errors import ConfigError, DataError, first_few

TEMPLATE = "{title}"
Part = tuple[str, str, str]  # plain text before, column, plain text behind
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_CLOSING = re.compile(r"((?:[^(\[]*[)\]])?[^\s.,:;|/(\[-]*).*", re.DOTALL)  # what closes the column before it
_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff]+")


def item_texts(catalogue: Catalogue, template: str = TEMPLATE) -> list[str]:
    """The text of each item (N,): one line, without HTML entities, tags and control characters.

    Args:
        template: plain text with columns in braces, `"{title} ({brand}). {category}"`. Where a column is empty,
            the plain text that belongs to it is left out: what stands before it, and of what stands behind it
            that up to a closing bracket or else to white space or `.,:;|/-`; behind the last column, everything.

    Raises:
        ConfigError: the template names no column, or one that the catalogue lacks.
        DataError: an item whose text is empty.
    """
    parts = _parse(template, catalogue.frame.columns)
    columns = {name: _cleaned_column(catalogue, name) for _, name, _ in parts}
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


def _parse(template: str, columns: list[str]) -> list[Part]:
    """The columns of a template, each with the plain text that belongs to it."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"data.text {template!r} is no template ({error}); for example '{{title}}. {{brand}}'"
        ) from error
    if any(spec or conversion for _, _, spec, conversion in fields):
        raise ConfigError(f"data.text {template!r}: only names of columns stand in braces, without '!' and ':'")
    plain, names = [""], []  # names[i] stands between plain[i] and plain[i + 1]
    for text, name, _, _ in fields:
        plain[-1] += text
        if name is not None:
            names.append(name)
            plain.append("")
    if not names or any(name not in columns or name == ITEM for name in names):
        known = ", ".join(name for name in columns if name != ITEM)
        raise ConfigError(f"data.text {template!r}: columns of the items table in braces, of {known}")
    behind = [_CLOSING.sub(r"\1", text) for text in plain[1:-1]]
    before = [text[len(closing) :] for text, closing in zip(plain[1:-1], behind, strict=True)]
    return list(zip([plain[0], *before], names, [*behind, plain[-1]], strict=True))


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


def _fill(parts: list[Part], values: dict[str, str]) -> str:
    text = ""
    for before, name, behind in parts:
        if values[name]:
            text += (before if text else before.lstrip(" .,:;|/-")) + values[name] + behind
    return " ".join(text.split())
