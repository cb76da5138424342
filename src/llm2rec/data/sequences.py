"""Stage `prepare`: tables -> one flat sequence of item indices a user, split without leakage.

Memory-mapped: `items`, `offsets` and `parts` are read by CSFT and the recommenders without copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from llm2rec.data.splits import (
    CONTEXT,
    TEST,
    TRAIN,
    VALIDATION,
    Split,
    check_parts,
    split_events,
    too_short,
)
from llm2rec.data.tables import ITEM, TIME, USER, Catalogue, Interactions, check_known_items
from llm2rec.errors import ArtifactError, DataError, first_few

FOLDER = "sequences"
ARRAYS = ("items", "offsets", "parts", "times")
PART_NAMES = {TRAIN: "training", VALIDATION: "validation", TEST: "test", CONTEXT: "context"}


@dataclass(frozen=True)
class Sequences:
    """Every user's events in order of time, as item indices 1..N, with the part of the split each is in.

    items: (E,) int32. offsets: (U + 1,) int64, user u owns `items[offsets[u]:offsets[u + 1]]`.
    parts: (E,) uint8, TRAIN, VALIDATION, TEST or CONTEXT. Item index i stands for `item_ids[i - 1]`; 0 is padding.
    times: (E,) int64, epoch seconds (or ranks, where the log has no clock), never falling within a user.
    """

    items: np.ndarray
    offsets: np.ndarray
    parts: np.ndarray
    item_ids: list[str]
    user_ids: pl.Series
    times: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def n_items(self) -> int:
        """Items of the catalogue, N."""
        return len(self.item_ids)

    @property
    def n_users(self) -> int:
        """Users, U."""
        return len(self.user_ids)

    @classmethod
    def load(cls, folder: Path) -> Sequences:
        """The sequences of a prepared folder, memory-mapped.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        try:
            arrays = {name: np.load(folder / FOLDER / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
            users = pl.read_parquet(folder / FOLDER / "users.parquet", glob=False)[USER]
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise ArtifactError(f"no readable sequences in {folder} ({error}); run `prepare` again") from error
        items = Catalogue.read(folder / "catalogue.parquet").item_ids
        return cls(**arrays, item_ids=items, user_ids=users)

    def training(self) -> tuple[np.ndarray, np.ndarray]:
        """Items (T,) and offsets (U + 1,) of the training events alone."""
        train = np.asarray(self.parts) == TRAIN
        counts = np.add.reduceat(train, np.asarray(self.offsets[:-1]), dtype=np.int64)
        return np.asarray(self.items)[train], np.concatenate([[0], np.cumsum(counts)])

    def training_counts(self) -> np.ndarray:
        """Training events of each item, (N,) int64."""
        return np.bincount(self.training()[0], minlength=self.n_items + 1)[1:]

    def successions(self) -> tuple[np.ndarray, np.ndarray]:
        """Item and next item (S,) int64, 1..N, of every two training events of a user that follow each other."""
        items, offsets = self.training()
        items = np.asarray(items, dtype=np.int64)
        follows = np.ones(max(len(items) - 1, 0), dtype=bool)
        ends = np.asarray(offsets)[1:-1]
        follows[ends[(ends > 0) & (ends < len(items))] - 1] = False
        return items[:-1][follows], items[1:][follows]

    def windows(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends (W,) of consecutive windows into `training()`'s items.

        A window holds up to `length + 1` events and begins with the last event of the window before: every
        event but a user's first is a target exactly once, with 1..length events before it.
        """
        _, offsets = self.training()
        targets = np.maximum(np.diff(offsets) - 1, 0)
        counts = -(-targets // length)
        first = np.repeat(offsets[:-1], counts)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = first + number * length
        ends = np.minimum(starts + length + 1, np.repeat(offsets[1:], counts))
        return starts, ends

    def held_out(self, part: int) -> np.ndarray:
        """Positions (M,) int64 of the events of a part."""
        return np.flatnonzero(np.asarray(self.parts) == part)

    def users_of(self, positions: np.ndarray) -> np.ndarray:
        """User index (M,) int64 of each position."""
        return np.searchsorted(np.asarray(self.offsets), positions, side="right") - 1

    def histories(self, positions: np.ndarray, length: int) -> np.ndarray:
        """(M, length) int32: up to `length` events of the same user before each position.

        Oldest first, left-aligned, 0-padded at the end.
        """
        return self._before(positions, length, np.asarray(self.items)).astype(np.int32)

    def history_times(self, positions: np.ndarray, length: int) -> np.ndarray:
        """(M, length) int64: the times of the events of `histories`, 0 at padding."""
        return self._before(positions, length, np.asarray(self.times))

    def latest(self, users: np.ndarray, length: int) -> np.ndarray:
        """(B, length) int32: up to `length` last events of each user, aligned as in `histories`."""
        ends = np.asarray(self.offsets)[users + 1]
        return self._until(users, ends, length, np.asarray(self.items)).astype(np.int32)

    def latest_times(self, users: np.ndarray, length: int) -> np.ndarray:
        """(B, length) int64: the times of the events of `latest`, 0 at padding."""
        return self._until(users, np.asarray(self.offsets)[users + 1], length, np.asarray(self.times))

    def _before(self, positions: np.ndarray, length: int, values: np.ndarray) -> np.ndarray:
        return self._until(self.users_of(positions), positions, length, values)

    def _until(self, users: np.ndarray, ends: np.ndarray, length: int, values: np.ndarray) -> np.ndarray:
        starts = np.maximum(np.asarray(self.offsets)[users], ends - length)
        cells = starts[:, None] + np.arange(length)[None, :]
        inside = cells < ends[:, None]
        return np.where(inside, values[np.where(inside, cells, 0)], 0)


def prepare(
    interactions: Interactions,
    catalogue: Catalogue,
    *,
    split: Split,
    short_histories: Literal["error", "drop"],
    out: Path,
    only_consumed: bool = False,
    origin: str = "the log",
) -> dict[str, Any]:
    """Splits the events, checks the split and writes `out`.

    Writes `interactions.parquet`, `catalogue.parquet`, `cold.parquet` and `sequences/`; the same events give the
    same bytes, whoever and whatever was removed beside them.

    Args:
        only_consumed: leave items without an event out of the catalogue (after a k-core).
        origin: names the interactions in errors.

    Returns:
        Summary: users, items, events, events of each part, and what was dropped.

    Raises:
        DataError: unknown items, users too short for the split, fewer than two users, or a leak.
    """
    check_known_items(interactions, catalogue, origin)
    kept, parts, cold, dropped = split_log(interactions, split, short_histories)
    if only_consumed:
        catalogue = consumed(catalogue, kept)
        cold = cold.filter(cold.is_in(catalogue.frame[ITEM].implode()))
    sequences = _flat(kept, parts, catalogue)
    check_leakage(sequences, kept, split=split, cold=cold)
    _write(sequences, kept, catalogue, cold, out)
    summary: dict[str, Any] = {"users": sequences.n_users, "items": len(catalogue), "events": len(kept)}
    summary["events_per_user"] = round(len(kept) / sequences.n_users, 1)
    summary |= part_counts(parts)
    if len(cold):
        summary["cold_items"] = len(cold)
    return summary | {"dropped": dropped} if dropped else summary


def consumed(catalogue: Catalogue, log: Interactions) -> Catalogue:
    """The items that have an event: all that a k-core leaves of a catalogue."""
    present = log.ids(ITEM).gather(np.flatnonzero(log.counts(ITEM)))
    return Catalogue(catalogue.frame.filter(pl.col(ITEM).is_in(present.implode())))


def split_log(
    interactions: Interactions, split: Split, short_histories: str
) -> tuple[Interactions, np.ndarray, pl.Series, dict[str, int]]:
    """What is kept of a log, its parts (E,), the ids of its cold items, and reason -> events left out.

    Raises:
        DataError: users too short for the split where they are not to be dropped; see `split_events`.
    """
    long, dropped = _long_enough(interactions, split, short_histories)
    kept, parts, cold = split_events(long, split)
    if len(kept) < len(long):
        dropped["events with a cold item that are no test event"] = len(long) - len(kept)
    return kept, parts, cold, dropped


def part_counts(parts: np.ndarray) -> dict[str, int]:
    """Events of each part that has any, as `training_events`."""
    counts = np.bincount(parts, minlength=len(PART_NAMES))
    return {f"{PART_NAMES[part]}_events": int(counts[part]) for part in PART_NAMES if counts[part]}


def cold_items(folder: Path) -> pl.Series:
    """Ids of the held-out items of a prepared folder, which only test targets may name."""
    return pl.read_parquet(folder / "cold.parquet", glob=False)[ITEM]


def whole(log: Interactions, catalogue: Catalogue) -> Sequences:
    """All events of a log as context: sequences of users that nothing was trained or is tested on."""
    return _flat(log, np.full(len(log), CONTEXT, dtype=np.uint8), catalogue)


def _flat(log: Interactions, parts: np.ndarray, catalogue: Catalogue) -> Sequences:
    counts = log.counts(USER)
    users = np.flatnonzero(counts)
    offsets = np.concatenate([[0], np.cumsum(counts[users])])
    index = pl.DataFrame({ITEM: catalogue.item_ids}).with_row_index("item_index", offset=1)
    places = log.ids(ITEM).to_frame(ITEM).with_columns(pl.col(ITEM).cast(pl.String))
    known = places.join(index, on=ITEM, how="left", maintain_order="left")["item_index"].fill_null(0).to_numpy()
    assert len(known) == len(places)  # every id of the catalogue stands there once
    user_ids = log.ids(USER).gather(users).rename(USER)
    items = known.astype(np.int32)[log.codes(ITEM)]
    ticks = log.ticks_per_second()
    seconds = log.times() if ticks == 1 else log.times() // ticks
    return Sequences(items, offsets, parts, catalogue.item_ids, user_ids, seconds)


def _write(sequences: Sequences, log: Interactions, catalogue: Catalogue, cold: pl.Series, out: Path) -> None:
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    Interactions(log.frame.select(USER, ITEM, TIME)).of_present_ids().write(out / "interactions.parquet")
    catalogue.write(out / "catalogue.parquet")
    cold.to_frame(ITEM).write_parquet(out / "cold.parquet")
    for name in ARRAYS:
        np.save(out / FOLDER / f"{name}.npy", getattr(sequences, name))
    sequences.user_ids.to_frame(USER).write_parquet(out / FOLDER / "users.parquet")


def _long_enough(
    interactions: Interactions, split: Split, short_histories: str
) -> tuple[Interactions, dict[str, int]]:
    short = too_short(interactions, split)
    if not short:
        return interactions, {}
    users = np.count_nonzero(interactions.counts(USER))
    if short_histories == "error":
        raise DataError(
            f"{len(short):,} of {users:,} users have too few events for the split (data.split: by {split.by}, "
            f"holdout {split.holdout}): {first_few(short)}; `--set data.short_histories=drop` leaves them out"
        )
    if users - len(short) < 2:
        raise DataError("fewer than two users have the events that the split needs; gather more data")
    rows = ~interactions.ids(USER).is_in(pl.Series(short).implode()).to_numpy()[interactions.codes(USER)]
    return interactions.kept(rows), {"events of users too short for the split": int((~rows).sum())}


def check_leakage(
    sequences: Sequences,
    interactions: Interactions,
    *,
    split: Split,
    cold: pl.Series | None = None,
    history_length: int = 10,
) -> None:
    """Checks sequences against the interactions by another way than the one that made them.

    Args:
        cold: ids of the held-out items.

    Raises:
        DataError: an event that is not the interactions' at its place, a part that breaks the rule of the split
            (`check_parts`), or training views that hold anything but the training events.
    """
    _check_events(sequences, interactions)
    parts = np.asarray(sequences.parts)
    check_parts(interactions, parts, split, pl.Series([], dtype=pl.String) if cold is None else cold)
    _check_training_views(sequences, history_length)


def _check_events(sequences: Sequences, interactions: Interactions) -> None:
    """Each event of the sequences is the interactions' at its place: item and user."""
    if len(sequences.items) != len(interactions):
        raise DataError(f"leak: sequences hold {len(sequences.items):,} events, the log {len(interactions):,}")
    places = pl.Series(sequences.item_ids, dtype=pl.String).to_frame(ITEM).with_row_index("item_index", offset=1)
    known = (
        interactions.ids(ITEM)
        .cast(pl.String)
        .to_frame(ITEM)
        .join(places, on=ITEM, how="left", maintain_order="left")
    )
    expected = known["item_index"].fill_null(0).to_numpy()[interactions.codes(ITEM)]
    wrong = np.flatnonzero(expected != np.asarray(sequences.items))
    if not len(wrong):
        users = np.cumsum(interactions.counts(USER) > 0, dtype=np.int32) - 1  # of the ids that have an event
        wrong = np.flatnonzero(_owners(sequences) != users[interactions.codes(USER)])
    if len(wrong):
        row = interactions.frame.row(int(wrong[0]))
        raise DataError(
            f"leak: event {wrong[0]} of the sequences is not that of the log {row}; run `prepare` again"
        )


def _owners(sequences: Sequences) -> np.ndarray:
    """(E,) int32: user index of each event."""
    return np.repeat(np.arange(sequences.n_users, dtype=np.int32), np.diff(np.asarray(sequences.offsets)))


def _check_training_views(sequences: Sequences, history_length: int) -> None:
    """`training()` and `windows()` place by place: right items, right users, each target exactly once."""
    train = np.asarray(sequences.parts) == TRAIN
    items, offsets = sequences.training()
    own = np.bincount(_owners(sequences)[train], minlength=sequences.n_users)
    other = np.flatnonzero(own != np.diff(offsets))
    if len(other):
        user, given = sequences.user_ids[int(other[0])], int(np.diff(offsets)[other[0]])
        raise DataError(f"leak: training gives user {user!r} {given} events instead of {own[other[0]]}")

    def refuse(place: int, what: str) -> None:
        event = int(np.flatnonzero(train)[place])
        user = sequences.user_ids[int(sequences.users_of(np.array([event]))[0])]
        item = sequences.item_ids[int(sequences.items[event]) - 1]
        raise DataError(f"leak: training event {place} (user {user!r}, item {item!r}) {what}; run `prepare` again")

    wrong = np.flatnonzero(items != np.asarray(sequences.items)[train])
    if len(wrong):
        refuse(int(wrong[0]), "is not the event that training reads at its place")
    starts, ends = sequences.windows(history_length)
    owners = np.searchsorted(offsets, starts, side="right") - 1
    outside = (starts < 0) | (ends > offsets[owners + 1]) | (ends - starts > history_length + 1)
    if outside.any():
        refuse(max(int(starts[outside.argmax()]), 0), "begins a window that leaves its user or is too long")
    edges = np.bincount(starts + 1, minlength=len(items) + 1)
    edges -= np.bincount(ends, minlength=len(items) + 1)
    supervised = np.cumsum(edges[: len(items)], out=edges[: len(items)])
    first = offsets[:-1][np.diff(offsets) > 0]  # nothing stands before a user's first event
    if supervised[first].any():
        refuse(int(first[supervised[first].argmax()]), "is a target, but has nothing before it")
    supervised[first] = 1
    wrong = np.flatnonzero(supervised != 1)
    if len(wrong):
        refuse(int(wrong[0]), f"is a target {supervised[wrong[0]]} times instead of once")
