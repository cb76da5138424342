"""The two canonical tables: who consumed what and when, and what the items are. Validated and immutable.

Logs are read lazily and in a stream; what stays in memory of an event is two codes and a time (16 bytes).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from llm2rec.errors import ArtifactError, DataError, first_few

USER, ITEM, TIME, TITLE = "user_id", "item_id", "timestamp", "title"
RATING, PART = "rating", "part"
FILE = "file of the row"  # which file of a folder a row stands in; readers add it, tables leave it out
PARTS = ("train", "validation", "test")
LARGEST_EXACT_FLOAT = 2**53 - 1
SECONDS_BELOW = 10**11  # whole-number times below this are seconds (until 5138), a thousandfold milliseconds
MOMENT = pl.Datetime("us")  # what dates, ISO texts and fractions of seconds become, UTC
_INVISIBLE = r"[\p{C}\p{Z}]"  # control, format (zero-width) and space characters
_WRITTEN_AS_FLOAT = r"^-?\d+\.0+$"
_RENAMED = re.compile(r"(.*)_duplicated_\d+", re.DOTALL)
_SHOWN_ROWS = 5
_EVENTS_A_GROUP = 2**24  # every group of rows repeats all ids: small groups take time that grows with the square
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Interactions:
    """Events (user_id, item_id: Enum of the sorted ids, timestamp: Int64 or Datetime), sorted by user, time, item.

    Ties in time are ordered by item_id, those of a given split by part before, so the order never depends on that
    of the file. Whole-number timestamps stay as they are, in the unit that the highest tells; dates, ISO texts and
    seconds with a fraction become Datetime (microseconds, UTC). Repeats are legal.
    `rating` (Float64) and `part` (a given split: train, validation, test; null = history only) are further columns
    where asked for.
    """

    frame: pl.DataFrame

    @classmethod
    def from_frame(
        cls, frame: pl.DataFrame | pl.LazyFrame, origin: str, further: Sequence[str] = (), at_least: int = 2
    ) -> Interactions:
        """Validates a table with the columns user_id, item_id, timestamp; others are left out.

        Args:
            frame: may be lazy: it is read in a stream, once for the events and before and after for what is
                checked (text six or seven times, whole numbers of parquet three times), never held as text.
            origin: names the table in errors.
            further: columns kept beside the three, of `rating` and `part`.
            at_least: users and items that there must be.

        Raises:
            DataError: missing columns, null ids or timestamps, an empty table, too few users or items.
        """
        table = frame.lazy()
        schema = schema_of(table, origin)
        require_columns(schema.names(), (USER, ITEM, TIME, *further), origin)
        columns = [_id_column(table, schema, USER, origin), _id_column(table, schema, ITEM, origin)]
        columns.append(_time_column(table, schema, origin))
        ids = [_distinct(table, column, name, origin) for column, name in zip(columns, (USER, ITEM), strict=False)]
        for column, name in zip(ids, (USER, ITEM), strict=True):
            if len(column) < at_least:
                raise DataError(f"{origin}: only one {name} ({column[0]!r}); there is nothing to rank")
        columns = [columns[0].cast(pl.Enum(ids[0])), columns[1].cast(pl.Enum(ids[1])), columns[2]]
        columns += [_FURTHER[name] for name in further]
        events = collect(table.select(columns), origin)
        if events[TIME].null_count():
            seconds = _moment_of_seconds(schema)
            moments = collect(table.select(seconds), origin)
            if moments[TIME].null_count():
                better = moments[TIME].null_count() < events[TIME].null_count()
                wrong = (seconds if better else columns[2]).is_null()
                _refuse(table, wrong, TIME, _WRONG[TIME], origin, "write ISO dates, or remove these rows")
            events = events.with_columns(moments)
        for name in further:
            given = pl.col(name).fill_nan(None) if schema[name].is_float() else pl.col(name)
            unreadable = columns[events.columns.index(name)].is_null() & given.is_not_null()
            if events[name].null_count() and collect(table.select(unreadable.any()), origin).item():
                _refuse(table, unreadable, name, _WRONG[name], origin)
        _refuse_mixed_units(table, columns[2], cls(events), origin)
        if schema[TIME] == pl.String and events[TIME].dtype == MOMENT:
            _refuse_mixed_offsets(table, origin)
        return cls(events.sort(USER, TIME, *(name for name in further if name == PART), ITEM))

    def __len__(self) -> int:
        return self.frame.height

    def codes(self, column: str) -> np.ndarray:
        """(E,) int32: the place of each event's id among `ids(column)`."""
        return self.frame[column].to_physical().to_numpy().astype(np.int32, copy=False)

    def counts(self, column: str) -> np.ndarray:
        """(ids,) int64: how many events each of `ids(column)` has."""
        return np.bincount(self.codes(column), minlength=len(self.ids(column)))

    def times(self) -> np.ndarray:
        """(E,) int64: the time of each event since 1970, or its rank; `ticks_per_second` is the unit."""
        return self.frame[TIME].to_physical().to_numpy()

    def ticks_per_second(self) -> int:
        """The unit of `times`: 1 (seconds, or ranks), 10**3, 10**6 or 10**9; the highest whole number tells it."""
        if self.frame[TIME].dtype == MOMENT:
            return 10**6
        highest = int(self.frame[TIME].max())  # type: ignore[arg-type]
        return next((ticks for ticks in (1, 10**3, 10**6) if highest < SECONDS_BELOW * ticks), 10**9)

    def ids(self, column: str) -> pl.Series:
        """The ids that the codes of `user_id` or `item_id` stand for, sorted; some may have no event."""
        return self.frame[column].dtype.categories  # type: ignore[attr-defined]

    def kept(self, rows: np.ndarray) -> Interactions:
        """The events at `rows` (a mask or indices), in order."""
        mask = pl.Series(rows)
        return Interactions(self.frame.filter(mask) if mask.dtype == pl.Boolean else self.frame[mask])

    def of_present_ids(self) -> Interactions:
        """The same events, where `ids` are those with an event alone."""
        narrowed = []
        for name in (USER, ITEM):
            has_event = self.counts(name) > 0
            present = self.ids(name).gather(np.flatnonzero(has_event))
            places = (np.cumsum(has_event) - 1)[self.codes(name)]
            narrowed.append(present.cast(pl.Enum(present)).gather(places).alias(name))
        return Interactions(self.frame.with_columns(narrowed))

    def write(self, path: Path) -> None:
        """Writes parquet."""
        self.frame.write_parquet(path, row_group_size=_EVENTS_A_GROUP)

    @classmethod
    def read(cls, path: Path) -> Interactions:
        """What `write` wrote; not validated again.

        Raises:
            ArtifactError: missing, damaged, or of an earlier version.
        """
        frame = _read_own(path)
        if (
            not {USER: pl.Enum, ITEM: pl.Enum}.items()
            <= {k: v.base_type() for k, v in frame.schema.items()}.items()
        ):
            raise ArtifactError(f"{path} was written by an earlier version; run `prepare` again")
        return cls(frame)


@dataclass(frozen=True)
class RawTables:
    """What the reader of a published layout found, before validation.

    Attributes:
        events: one row an event: user_id, item_id (String), timestamp (Int64, unit as published), and where the
            layout has them rating (Float64, null = none given) and part (String: train, validation, test; null =
            the event is history only, never a target).
        items: item_id, title (String), further text columns (String, "" = none); one row an item, no empty title.
        dropped: reason -> rows left out. What is not counted here is in `events` or `items`.
    """

    events: pl.LazyFrame
    items: pl.DataFrame
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """Items (item_id, title, further columns as they came); row i is item_index i + 1."""

    frame: pl.DataFrame

    @classmethod
    def from_frame(cls, frame: pl.DataFrame, origin: str, at_least: int = 2) -> Catalogue:
        """Validates a table with the columns item_id and title.

        Raises:
            DataError: missing columns, null or duplicate ids, empty titles, fewer than `at_least` items.
        """
        require_columns(frame.columns, (ITEM, TITLE), origin)
        _require_scalar(frame[TITLE].dtype, TITLE, "text", origin)
        if frame[TITLE].dtype.is_float():
            raise DataError(f"{origin}: {TITLE} holds numbers with a decimal point (or NaN); give text")
        table = frame.lazy()
        ids = _id_column(table, frame.schema, ITEM, origin)
        _distinct(table, ids, ITEM, origin)
        items = frame.with_columns(ids, pl.col(TITLE).cast(pl.String))
        items = items.select(ITEM, TITLE, pl.exclude(ITEM, TITLE, FILE))
        if items.height < at_least:
            raise DataError(f"{origin}: only one item; there is nothing to rank")
        repeated = items.filter(pl.col(ITEM).is_duplicated())[ITEM].unique(maintain_order=True).to_list()
        if repeated:
            raise DataError(
                f"{origin}: {len(repeated)} item_id stand in more than one row: {first_few(repeated)}; "
                "keep one row an item"
            )
        empty = items.filter(pl.col(TITLE).is_null() | (pl.col(TITLE).str.replace_all(_INVISIBLE, "") == ""))[
            ITEM
        ].to_list()
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

    def labels(self, column: str) -> list[list[str]]:
        """The labels of each item, (N,) lists: a column of lists, or of text joined by "|" or ",".

        Raises:
            DataError: there is no such column.
        """
        require_columns(self.frame.columns, [column], "items")
        values = self.frame[column]
        if isinstance(values.dtype, pl.Array):
            values = values.arr.to_list()
        if isinstance(values.dtype, pl.List):
            return [[str(label) for label in row or [] if label is not None] for row in values.to_list()]
        if values.dtype.is_float():
            values = values.fill_nan(None)
        separator = "|" if values.cast(pl.String).str.contains("|", literal=True).any() else ","
        rows = ["" if value is None else str(value) for value in values.to_list()]
        return [[label.strip() for label in row.split(separator) if label.strip()] for row in rows]

    def __len__(self) -> int:
        return self.frame.height

    def write(self, path: Path) -> None:
        """Writes parquet."""
        self.frame.write_parquet(path)

    @classmethod
    def read(cls, path: Path) -> Catalogue:
        """What `write` wrote; not validated again."""
        return cls(_read_own(path))


def check_known_items(interactions: Interactions, catalogue: Catalogue, origin: str = "the log") -> None:
    """Raises DataError where an interaction names an item that the catalogue lacks."""
    ids = interactions.ids(ITEM)
    lacking = np.flatnonzero(~ids.is_in(catalogue.frame[ITEM].implode()).to_numpy())
    unknown = interactions.counts(ITEM)[lacking]
    if unknown.sum():
        items = [ids[int(place)] for place in lacking[unknown > 0]]
        raise DataError(
            f"{origin}: {unknown.sum():,} interactions name {len(items):,} items that the items table lacks: "
            f"{first_few(items)}; {_hint_at_alike(items, catalogue)}add these items, or remove their interactions"
        )


def _hint_at_alike(lacking: list[str], catalogue: Catalogue) -> str:
    """Says that the catalogue has such ids in other capitals or with other zeros in front, "" where it has not."""

    def plainly(item: str) -> str:
        return item.lstrip("0").lower()

    wanted = {plainly(item) for item in lacking[:_SHOWN_ROWS]}
    alike = [item for item in catalogue.item_ids if plainly(item) in wanted]
    return f"it has {first_few(alike)}: write ids alike in both tables, or " if alike else ""


def require_columns(
    names: Sequence[str],
    columns: Sequence[str],
    origin: str,
    mend: str = "Rename the columns, or map them in the recipe (data.columns; files given by --set put those "
    "of the recipe aside and want --set data.columns=... as well)",
) -> None:
    """Raises DataError where a column is missing; `mend` says what to do about it."""
    missing = [column for column in columns if column not in names]
    if missing:
        if any("\0" in name for name in names):
            mend = "It looks like UTF-16, or no text at all: save it as UTF-8"
        shown = [name[:_SHOWN_CHARACTERS] for name in names]
        raise DataError(f"{origin}: no column {first_few(missing)}; it has {first_few(shown, 12)}. {mend}")


def refuse_repeated_columns(names: Sequence[str], origin: str) -> None:
    """Raises DataError where the header of a text file has a name twice: polars makes `a,a_duplicated_0` of it."""
    for name in names:
        renamed = _RENAMED.fullmatch(name)
        if renamed and renamed[1] in names:
            raise DataError(
                f"{origin}: the header names {renamed[1]!r} more than once; rename or remove one column"
            )


def schema_of(table: pl.LazyFrame, origin: str) -> pl.Schema:
    """Column names and types of a lazy table.

    Raises:
        DataError: the file cannot be read, or a column stands twice.
    """
    try:
        schema = table.collect_schema()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(_unreadable(origin, error)) from error
    refuse_repeated_columns(schema.names(), origin)
    return schema


def collect(table: pl.LazyFrame, origin: str) -> pl.DataFrame:
    """The rows of a lazy table, read in a stream.

    Raises:
        DataError: the file is damaged, or is not what its ending says.
    """
    try:
        return table.collect(engine="streaming")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(_unreadable(origin, error)) from error


def _unreadable(origin: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = "; save it as UTF-8" if "utf-8" in reason.lower() or "utf8" in reason.lower() else ""
    return f"{origin} cannot be read: {reason}{hint}"


def _id_column(table: pl.LazyFrame, schema: pl.Schema, name: str, origin: str) -> pl.Expr:
    """Ids as text, null where there is none: 12, 12.0 (or a decimal), "12" and a column of "12.0" are the same."""
    kind = schema[name]
    _require_scalar(kind, name, "text or whole numbers", origin)
    column = pl.col(name)
    if kind.is_float():
        return pl.when(_is_whole(column)).then(column.cast(pl.Int64, strict=False)).cast(pl.String).alias(name)
    text = column.cast(pl.String).str.strip_chars()
    if kind.is_decimal():
        text = text.str.replace(r"\.0+$", "")
    if kind == pl.String:
        written_as_float = text.str.contains(_WRITTEN_AS_FLOAT).all() & text.is_not_null().any()
        if collect(table.select(written_as_float), origin).item():
            text = text.str.replace(r"\.0+$", "")
    return pl.when(text != "").then(text).alias(name)


def _time_column(table: pl.LazyFrame, schema: pl.Schema, origin: str) -> pl.Expr:
    """Whole numbers as they are, dates and ISO 8601 text as MOMENT, null where unreadable."""
    kind, column = schema[TIME], pl.col(TIME)
    _require_scalar(kind, TIME, "whole numbers, dates or ISO 8601 text", origin)
    if kind.is_integer():
        return column.cast(pl.Int64, strict=False)
    if kind.is_float():
        return pl.when(_is_whole(column)).then(column.cast(pl.Int64, strict=False)).alias(TIME)
    if kind.is_temporal():
        return column.cast(MOMENT, strict=False)
    text = column.cast(pl.String).str.strip_chars()
    numbers = text.cast(pl.Float64, strict=False)
    exact = text.cast(pl.Int64, strict=False)
    whole = exact.fill_null(pl.when(_is_whole(numbers)).then(numbers.cast(pl.Int64, strict=False)))
    first = collect(table.select(text.alias(TIME)).drop_nulls().head(1), origin)
    if first.height and collect(first.lazy().select(whole.is_not_null()), origin).item():
        return whole.alias(TIME)
    return _iso_moment(text).alias(TIME)


def _iso_moment(text: pl.Expr) -> pl.Expr:
    """MOMENT of ISO 8601 dates and times; without an offset they are UTC."""
    whole = text.str.replace(r"^(\d{4})/(\d\d?)/(\d\d?)", "${1}-${2}-${3}")
    whole = whole.str.replace(r"^(\S+)\s+(\d)", "${1}T${2}").str.replace(r"\s*(?:Z|z|UTC)$", "+00:00")
    whole = whole.str.replace(r"^(\d{4}-\d\d?-\d\d?)$", "${1}T00:00")
    whole = whole.str.replace(r"T(\d\d:\d\d)($|[+-])", "T${1}:00${2}")
    whole = whole.str.replace(r"(T[\d:.]+)$", "${1}+00:00").str.replace(r"([+-]\d\d)(\d\d)$", "${1}:${2}")
    whole = whole.str.replace(r"(:[\d:.]+\s*[+-]\d\d)$", "${1}:00")
    return whole.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", time_unit="us", strict=False).cast(MOMENT)


def _moment_of_seconds(schema: pl.Schema) -> pl.Expr:
    """MOMENT of epoch seconds with a fraction, null for whatever else."""
    column = pl.col(TIME) if schema[TIME].is_numeric() else pl.col(TIME).cast(pl.String).str.strip_chars()
    seconds = column.cast(pl.Float64, strict=False)
    ticks = pl.when(seconds.abs() < SECONDS_BELOW).then((seconds * 10**6).round())  # false for NaN and infinity
    return ticks.cast(pl.Int64).cast(MOMENT).alias(TIME)


def _distinct(table: pl.LazyFrame, column: pl.Expr, name: str, origin: str) -> pl.Series:
    """The sorted distinct values of an id column.

    Raises:
        DataError: there is no row, a row without an id, or an id both as "12" and as "12.0".
    """
    values = collect(table.select(column.alias(name)).unique(), origin)[name].sort()
    if not len(values):
        raise DataError(f"{origin}: the table has no rows")
    if values.null_count():
        _refuse(table, column.is_null(), name, _WRONG[name], origin)
    as_float = values.filter(values.str.contains(_WRITTEN_AS_FLOAT))
    both = as_float.filter(as_float.str.replace(r"\.0+$", "").is_in(values.implode()))
    if len(both):
        raise DataError(
            f"{origin}: {len(both):,} {name} stand with and without a decimal point: {first_few(both.to_list())}; "
            "write each id one way"
        )
    return values


def _is_whole(values: pl.Expr) -> pl.Expr:
    """Whether each float is a whole number that a float holds exactly; False for null, NaN and infinity."""
    whole = values.is_finite() & (values == values.round()) & (values.abs() <= LARGEST_EXACT_FLOAT)
    return whole.fill_null(False)


_FURTHER = {
    RATING: pl.col(RATING).cast(pl.Float64, strict=False).fill_nan(None),  # null: none given
    PART: pl.col(PART).cast(pl.Enum(PARTS), strict=False),  # null: history only
}
_WRONG = {
    USER: "is empty or not a whole number",
    ITEM: "is empty or not a whole number",
    TIME: "is empty or cannot be read as a number, date or ISO time (2019-12-31T23:59)",
    RATING: "is not a number",
    PART: f"is none of {', '.join(PARTS)}",
}


def _require_scalar(kind: pl.DataType, name: str, allowed: str, origin: str) -> None:
    if kind.is_nested() or kind in (pl.Time, pl.Duration, pl.Binary, pl.Object):
        raise DataError(f"{origin}: {name} has the type {kind}; give {allowed}")


def _refuse(
    table: pl.LazyFrame, wrong: pl.Expr, name: str, what: str, origin: str, mend: str = "mend or remove them"
) -> None:
    file = pl.col(FILE) if FILE in table.collect_schema() else pl.lit("")
    numbered = table.select(pl.col(name), wrong.alias("wrong"), file.alias(FILE)).with_row_index("row", offset=1)
    count, total = collect(numbered.select(pl.col("wrong").sum(), pl.len()), origin).row(0)
    first = collect(numbered.filter("wrong").head(_SHOWN_ROWS), origin)
    before = collect(numbered.group_by(FILE).agg(before=pl.col("row").min() - 1), origin)
    first = first.join(before, on=FILE, maintain_order="left")
    rows = first.select(FILE, pl.col("row") - pl.col("before"), name).rows()
    shown = ", ".join(
        f"{os.path.relpath(file, origin)} row {row}: {value!r}" if file else f"row {row}: {value!r}"
        for file, row, value in rows
    )
    raise DataError(f"{origin}: {name} {what} in {count:,} of {total:,} rows ({shown}); {mend}")


def _refuse_mixed_units(table: pl.LazyFrame, column: pl.Expr, log: Interactions, origin: str) -> None:
    """Raises DataError where positive whole-number times are too small for the unit that the highest tells."""
    times, ticks = log.frame[TIME], log.ticks_per_second()
    coarser = 1, SECONDS_BELOW * ticks // 1000 - 1
    if times.dtype == pl.Int64 and ticks > 1 and times.is_between(*coarser).any():
        what = f"is in another unit (seconds, milliseconds, ...) than the highest, {int(log.times().max())},"
        _refuse(table, column.is_between(*coarser), TIME, what, origin)


def _refuse_mixed_offsets(table: pl.LazyFrame, origin: str) -> None:
    """Raises DataError where some times of day have an offset and some have none: their order would be a guess."""
    text = pl.col(TIME).str.strip_chars()
    without = text.str.contains(":") & ~text.str.contains(r"(?i)(z|utc|:.*[+-]\d\d:?(\d\d)?)$")
    some, every = collect(table.select(without.any().alias("some"), without.all().alias("every")), origin).row(0)
    if some and not every and collect(table.select((text.str.contains(":") & ~without).any()), origin).item():
        what = "has no offset from UTC (Z, +02:00), as other rows have,"
        _refuse(table, without, TIME, what, origin, "write all times with one, or all without")


def _read_own(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}); run `prepare` again") from error
