"""From what a file holds to RawTables: every row is either kept or counted."""

from __future__ import annotations

import polars as pl

from llm2rec.data.tables import ITEM, TIME, TITLE, USER, RawTables
from llm2rec.errors import DataError

PIPE, COMMA = "|", ", "


def assemble(events: pl.DataFrame, items: pl.DataFrame, dropped: dict[str, int], origin: str) -> RawTables:
    """Raw tables of events and items in the columns' final types.

    Left out and counted: items without an id, further rows of an item, items without a title; events without
    user, item or time; events of items that are not in the catalogue (any more).

    Raises:
        DataError: nothing is left.
    """
    counts = dict(dropped)

    def keep(table: pl.DataFrame, condition: pl.Expr, reason: str) -> pl.DataFrame:
        kept = table.filter(condition)
        counts[reason] = counts.get(reason, 0) + table.height - kept.height
        return kept

    items = items.with_columns(pl.col(ITEM, TITLE).str.strip_chars())
    items = items.with_columns(pl.exclude(ITEM, TITLE).fill_null(""))
    items = keep(items, _filled(ITEM), "items_without_id")
    items = keep(items, _filled(TITLE), "items_without_title")
    items = keep(items, pl.col(ITEM).is_first_distinct(), "items_repeated")
    events = events.with_columns(pl.col(USER, ITEM).str.strip_chars())
    complete = _filled(USER) & _filled(ITEM) & pl.col(TIME).is_not_null()
    events = keep(events, complete, "events_without_user_item_or_time")
    known = events.join(items.select(ITEM), on=ITEM, how="semi", maintain_order="left")
    counts["events_of_unknown_items"] = events.height - known.height
    counts = {reason: count for reason, count in counts.items() if count}
    if items.is_empty() or known.is_empty():
        what = "item" if items.is_empty() else "event"
        raise DataError(f"{origin}: no {what} is left; left out: {counts or 'nothing, the file has no rows'}")
    return RawTables(known.lazy(), items, counts)


def joined(column: str, separator: str) -> pl.Expr:
    """A list of texts as one text, stripped, empty entries left out."""
    entries = pl.col(column).list.eval(pl.element().str.strip_chars())
    return entries.list.eval(pl.element().filter(pl.element() != "")).list.join(separator)


def _filled(column: str) -> pl.Expr:
    return pl.col(column).is_not_null() & (pl.col(column) != "")
