"""The two canonical tables: who consumed what and when, and what the items are. Validated and immutable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from llm2rec.errors import ArtifactError, DataError, first_few

USER, ITEM, TIME, TITLE = "user_id", "item_id", "timestamp", "title"
LARGEST_EXACT_FLOAT = 2**53


@dataclass(frozen=True)
class Interactions:
    """Events (user_id, item_id: String, timestamp: Int64), sorted by user, then time, then item.

    Ties in time are ordered by item_id, so the order never depends on that of the file. Whole-number
    timestamps stay as they are; dates and ISO texts become epoch milliseconds. Repeats are legal.
    """

    frame: pl.DataFrame

    @classmethod
    def from_frame(cls, frame: pl.DataFrame, origin: str) -> Interactions:
        """Validates a table with the columns user_id, item_id, timestamp; others are left out.

        Raises:
            DataError: missing columns, null ids or timestamps, an empty table, one user or one item only.
        """
        require_columns(frame, (USER, ITEM, TIME), origin)
        events = frame.select(_as_id(frame, USER, origin), _as_id(frame, ITEM, origin), _as_time(frame, origin))
        for column in (USER, ITEM):
            if events[column].n_unique() < 2:
                raise DataError(f"{origin}: only one {column} ({events[column][0]!r}); there is nothing to rank")
        return cls(events.sort(USER, TIME, ITEM))

    def __len__(self) -> int:
        return self.frame.height

    def write(self, path: Path) -> None:
        """Writes parquet."""
        self.frame.write_parquet(path)

    @classmethod
    def read(cls, path: Path) -> Interactions:
        """What `write` wrote; not validated again."""
        return cls(_read_own(path))


@dataclass(frozen=True)
class Catalogue:
    """Items (item_id, title, further columns as they came); row i is item_index i + 1."""

    frame: pl.DataFrame

    @classmethod
    def from_frame(cls, frame: pl.DataFrame, origin: str) -> Catalogue:
        """Validates a table with the columns item_id and title.

        Raises:
            DataError: missing columns, null or duplicate ids, empty titles, fewer than two items.
        """
        require_columns(frame, (ITEM, TITLE), origin)
        _require_scalar(frame[TITLE], "text", origin)
        if frame[TITLE].dtype.is_float():
            raise DataError(f"{origin}: {TITLE} holds numbers with a decimal point (or NaN); give text")
        items = frame.with_columns(_as_id(frame, ITEM, origin), pl.col(TITLE).cast(pl.String))
        items = items.select(ITEM, TITLE, pl.exclude(ITEM, TITLE))
        if items.height < 2:
            raise DataError(f"{origin}: only one item; there is nothing to rank")
        repeated = items.filter(pl.col(ITEM).is_duplicated())[ITEM].unique(maintain_order=True).to_list()
        if repeated:
            raise DataError(
                f"{origin}: {len(repeated)} item_id stand in more than one row: {first_few(repeated)}; "
                "keep one row an item"
            )
        empty = items.filter(pl.col(TITLE).is_null() | (pl.col(TITLE).str.strip_chars() == ""))[ITEM].to_list()
        if empty:
            raise DataError(
                f"{origin}: {len(empty)} items have an empty title: {first_few(empty)}; every item needs a text, "
                "so fill the titles in or remove these items and their interactions"
            )
        return cls(items)

    @property
    def item_ids(self) -> list[str]:
        """Outside ids, (N,)."""
        return self.frame[ITEM].to_list()

    @property
    def titles(self) -> list[str]:
        """Titles, (N,)."""
        return self.frame[TITLE].to_list()

    def __len__(self) -> int:
        return self.frame.height

    def write(self, path: Path) -> None:
        """Writes parquet."""
        self.frame.write_parquet(path)

    @classmethod
    def read(cls, path: Path) -> Catalogue:
        """What `write` wrote; not validated again."""
        return cls(_read_own(path))


@dataclass(frozen=True)
class RawTables:
    """What the reader of a published layout found, before validation.

    events: one row an event: user_id, item_id (String), timestamp (Int64, unit as published), and where the
        layout has them rating (Float64, null = none given) and part (String: train, validation, test; null =
        the event is history only, never a target).
    items: item_id, title (String), further text columns (String, "" = none); one row an item, no empty title.
    dropped: reason -> rows left out. What is not counted here is in `events` or `items`.
    """

    events: pl.LazyFrame
    items: pl.DataFrame
    dropped: dict[str, int]


def check_known_items(interactions: Interactions, catalogue: Catalogue) -> None:
    """Raises DataError where an interaction names an item that the catalogue lacks."""
    unknown = interactions.frame.join(catalogue.frame.select(ITEM), on=ITEM, how="anti", maintain_order="left")
    if unknown.height:
        items = unknown[ITEM].unique(maintain_order=True).to_list()
        raise DataError(
            f"{unknown.height:,} interactions name {len(items):,} items that the items table lacks: "
            f"{first_few(items)}; add these items, or remove their interactions"
        )


def require_columns(frame: pl.DataFrame, columns: tuple[str, ...], origin: str) -> None:
    """Raises DataError where a column is missing, or where there is no row."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise DataError(
            f"{origin}: no column {first_few(missing)}; it has {first_few(frame.columns, 12)}. Rename the columns"
        )
    if frame.is_empty():
        raise DataError(f"{origin}: the table has no rows")


def _as_id(frame: pl.DataFrame, column: str, origin: str) -> pl.Series:
    """Ids as text: 12, 12.0 and "12" are one id."""
    values = frame[column]
    _require_scalar(values, "text or whole numbers", origin)
    if values.dtype.is_float():
        whole = _is_whole(values)
        _refuse(values, ~whole, f"{column} is not a whole number", origin)
        values = values.cast(pl.Int64)
    text = values.cast(pl.String).str.strip_chars()
    _refuse(values, text.is_null() | (text == ""), f"{column} is empty", origin)
    return text.rename(column)


def _as_time(frame: pl.DataFrame, origin: str) -> pl.Series:
    values = frame[TIME]
    _require_scalar(values, "whole numbers, dates or ISO 8601 text", origin)
    if values.dtype.is_integer():
        times = values.cast(pl.Int64, strict=False)
    elif values.dtype.is_float():
        _refuse(values, ~_is_whole(values), f"{TIME} is not a whole number", origin)
        times = values.cast(pl.Int64)
    elif values.dtype.is_temporal():
        times = values.cast(pl.Datetime("ms"), strict=False).cast(pl.Int64)
    else:
        times = _parse_times(values.cast(pl.String).str.strip_chars())
    _refuse(values, times.is_null(), f"{TIME} is empty or cannot be read as a number, date or ISO time", origin)
    return times.rename(TIME)


def _parse_times(text: pl.Series) -> pl.Series:
    """Whole numbers as they are, else ISO dates and times in epoch milliseconds, else null."""
    numbers = text.cast(pl.Float64, strict=False)
    numbers = numbers.set(~_is_whole(numbers), None)
    if numbers.null_count() < len(text):
        exact = text.cast(pl.Int64, strict=False)
        return exact.fill_null(numbers.cast(pl.Int64))
    times = text.str.to_datetime(time_unit="ms", strict=False, time_zone="UTC").cast(pl.Int64)
    days = text.str.to_date(strict=False).cast(pl.Datetime("ms")).cast(pl.Int64)
    return times.fill_null(days)


def _is_whole(values: pl.Series) -> pl.Series:
    """Whether each float is a whole number that a float holds exactly; False for null, NaN and infinity."""
    whole = values.is_finite() & (values == values.round()) & (values.abs() <= LARGEST_EXACT_FLOAT)
    return whole.fill_null(False)


def _require_scalar(values: pl.Series, allowed: str, origin: str) -> None:
    if values.dtype.is_nested() or values.dtype in (pl.Time, pl.Duration, pl.Binary, pl.Object):
        raise DataError(f"{origin}: {values.name} has the type {values.dtype}; give {allowed}")


def _refuse(values: pl.Series, wrong: pl.Series, what: str, origin: str) -> None:
    rows = wrong.arg_true()
    if len(rows):
        shown = ", ".join(f"row {row + 1}: {values[row]!r}" for row in rows[:5].to_list())
        raise DataError(
            f"{origin}: {what} in {len(rows):,} of {len(values):,} rows ({shown}); mend or remove them"
        )


def _read_own(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}); run `prepare` again") from error
