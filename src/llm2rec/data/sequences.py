"""Stage `prepare`: tables -> one flat sequence of item indices a user, split without leakage.

Memory-mapped: `items`, `offsets` and `parts` are read by CSFT and the recommenders without copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from llm2rec.data.tables import Catalogue, Interactions, check_known_items
from llm2rec.errors import ArtifactError, DataError, first_few

TRAIN, VALIDATION, TEST = 0, 1, 2
FOLDER = "sequences"


@dataclass(frozen=True)
class Sequences:
    """Every user's events in order of time, as item indices 1..N, with the part of the split each is in.

    items: (E,) int32. offsets: (U + 1,) int64, user u owns `items[offsets[u]:offsets[u + 1]]`.
    parts: (E,) uint8, TRAIN, VALIDATION or TEST. Item index i stands for `item_ids[i - 1]`; 0 is padding.
    """

    items: np.ndarray
    offsets: np.ndarray
    parts: np.ndarray
    item_ids: list[str]
    user_ids: list[str]

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
            arrays = [
                np.load(folder / FOLDER / f"{name}.npy", mmap_mode="r") for name in ("items", "offsets", "parts")
            ]
            users = pl.read_parquet(folder / FOLDER / "users.parquet")["user_id"].to_list()
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise ArtifactError(f"no readable sequences in {folder} ({error}); run `prepare` again") from error
        items = Catalogue.read(folder / "catalogue.parquet").item_ids
        return cls(arrays[0], arrays[1], arrays[2], items, users)

    def training(self) -> tuple[np.ndarray, np.ndarray]:
        """Items (T,) and offsets (U + 1,) of the training events alone."""
        counts = np.add.reduceat(np.asarray(self.parts) == TRAIN, np.asarray(self.offsets[:-1]), dtype=np.int64)
        items = np.asarray(self.items)[np.asarray(self.parts) == TRAIN]
        return items, np.concatenate([[0], np.cumsum(counts)])

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
        starts = np.maximum(np.asarray(self.offsets)[self.users_of(positions)], positions - length)
        cells = starts[:, None] + np.arange(length)[None, :]
        inside = cells < positions[:, None]
        return np.where(inside, np.asarray(self.items)[np.where(inside, cells, 0)], 0).astype(np.int32)


def prepare(
    interactions: Interactions,
    catalogue: Catalogue,
    *,
    holdout: int,
    short_histories: Literal["error", "drop"],
    out: Path,
) -> dict[str, Any]:
    """Splits each user's last `holdout` events off as test, as many before as validation, and writes `out`.

    Writes `interactions.parquet`, `catalogue.parquet` and `sequences/`; the same input gives the same bytes.

    Returns:
        Summary: users, items, events, and what was dropped.

    Raises:
        DataError: unknown items, users too short for the split, fewer than two users, or a leak.
    """
    check_known_items(interactions, catalogue)
    kept, dropped = _long_enough(interactions, 2 * holdout + 1, short_histories)
    frame = kept.frame
    index = pl.DataFrame({"item_id": catalogue.item_ids}).with_row_index("item_index", offset=1)
    items = frame.join(index, on="item_id", how="left", maintain_order="left")["item_index"]
    lengths = frame.group_by("user_id", maintain_order=True).len()
    counts = lengths["len"].to_numpy().astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    from_end = np.repeat(offsets[1:], counts) - np.arange(len(frame))  # 1 = the user's last event
    parts = np.where(from_end <= holdout, TEST, np.where(from_end <= 2 * holdout, VALIDATION, TRAIN))
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    kept.write(out / "interactions.parquet")
    catalogue.write(out / "catalogue.parquet")
    np.save(out / FOLDER / "items.npy", items.to_numpy().astype(np.int32))
    np.save(out / FOLDER / "offsets.npy", offsets)
    np.save(out / FOLDER / "parts.npy", parts.astype(np.uint8))
    lengths.select("user_id").write_parquet(out / FOLDER / "users.parquet")
    check_leakage(Sequences.load(out), kept, holdout=holdout)
    summary = {"users": len(counts), "items": len(catalogue), "events": len(frame)}
    return summary | {"events_per_user": round(float(counts.mean()), 1), **dropped}


def _long_enough(
    interactions: Interactions, shortest: int, short_histories: str
) -> tuple[Interactions, dict[str, int]]:
    counted = interactions.frame.group_by("user_id", maintain_order=True).len()
    short = counted.filter(pl.col("len") < shortest)
    if short.is_empty():
        return interactions, {}
    if short_histories == "error":
        raise DataError(
            f"{short.height:,} of {counted.height:,} users have fewer than the {shortest} events that the split "
            f"needs: {first_few(short['user_id'].to_list())}; `--set data.short_histories=drop` leaves them out"
        )
    frame = interactions.frame.join(short, on="user_id", how="anti", maintain_order="left")
    if frame["user_id"].n_unique() < 2:
        raise DataError(f"fewer than two users have the {shortest} events that the split needs; gather more data")
    dropped = {"dropped_users": short.height, "dropped_events": interactions.frame.height - frame.height}
    return Interactions.from_frame(frame, "interactions of users long enough"), dropped


def check_leakage(
    sequences: Sequences, interactions: Interactions, *, holdout: int, history_length: int = 10
) -> None:
    """Checks the split against the interactions by another way than the one that made it.

    Raises:
        DataError: a user without exactly `holdout` validation and test events, a held-out event that is not
            among the user's last, or training views that hold anything but the training events.
    """
    expected = (
        interactions.frame.sort("user_id", "timestamp", "item_id")
        .with_columns(
            left=pl.len().over("user_id") - pl.int_range(pl.len()).over("user_id"),
            item_index=pl.col("item_id").replace_strict(
                sequences.item_ids, list(range(1, sequences.n_items + 1)), return_dtype=pl.Int64
            ),
        )
        .with_columns(
            part=pl.when(pl.col("left") <= holdout)
            .then(TEST)
            .when(pl.col("left") <= 2 * holdout)
            .then(VALIDATION)
            .otherwise(TRAIN)
        )
    )
    users = np.repeat(np.arange(sequences.n_users), np.diff(np.asarray(sequences.offsets)))
    found = pl.DataFrame(
        {
            "user_id": pl.Series(sequences.user_ids, dtype=pl.String).gather(users),
            "item_index": np.asarray(sequences.items).astype(np.int64),
            "part": np.asarray(sequences.parts).astype(np.int32),
        }
    )
    wanted = expected.select("user_id", "item_index", pl.col("part").cast(pl.Int32))
    if found.height != wanted.height:
        raise DataError(f"leak: sequences hold {found.height:,} events, the interactions {wanted.height:,}")
    wrong = (found != wanted).select(pl.any_horizontal(pl.all())).to_series().arg_true()
    if len(wrong):
        row = int(wrong[0])
        user, item, part = found.row(row)
        raise DataError(
            f"leak: event {row} of the sequences (user {user!r}, item {sequences.item_ids[item - 1]!r}, "
            f"{('training', 'validation', 'test')[part]}) should be user, item, part {wanted.row(row)}; "
            "the split does not hold the last events out. Run `prepare` again"
        )
    _check_training_views(sequences, found, history_length)


def _check_training_views(sequences: Sequences, events: pl.DataFrame, history_length: int) -> None:
    """`training()` and `windows()` place by place: right items, right users, each target exactly once."""
    training = events.filter(pl.col("part") == TRAIN)
    items, offsets = sequences.training()
    sizes = training.group_by("user_id", maintain_order=True).len()
    own = pl.DataFrame({"user_id": sequences.user_ids, "own": np.diff(offsets)})
    other = own.join(sizes, on="user_id", how="left").filter(pl.col("own") != pl.col("len").fill_null(0))
    if other.height:
        raise DataError(
            f"leak: training gives user {other['user_id'][0]!r} {other['own'][0]} events instead of "
            f"{other['len'][0] or 0}; run `prepare` again"
        )
    wrong = np.flatnonzero(items != training["item_index"].to_numpy())
    if len(wrong):
        _refuse_event(sequences, training, int(wrong[0]), "is not the event that training reads at its place")
    starts, ends = sequences.windows(history_length)
    owners = np.searchsorted(offsets, starts, side="right") - 1
    outside = (starts < 0) | (ends > offsets[owners + 1]) | (ends - starts > history_length + 1)
    if outside.any():
        first = max(int(starts[outside.argmax()]), 0)
        _refuse_event(sequences, training, first, "begins a window that leaves its user or is too long")
    edges = np.bincount(starts + 1, minlength=len(items) + 1) - np.bincount(ends, minlength=len(items) + 1)
    supervised = np.cumsum(edges)[: len(items)]
    wanted = np.ones(len(items), dtype=np.int64)
    wanted[offsets[:-1][np.diff(offsets) > 0]] = 0  # a user's first event has nothing before it
    wrong = np.flatnonzero(supervised != wanted)
    if len(wrong):
        place = int(wrong[0])
        what = f"is a target {supervised[place]} times instead of {wanted[place]}"
        _refuse_event(sequences, training, place, what)


def _refuse_event(sequences: Sequences, events: pl.DataFrame, place: int, what: str) -> None:
    user, item = events["user_id"][place], sequences.item_ids[events["item_index"][place] - 1]
    raise DataError(f"leak: training event {place} (user {user!r}, item {item!r}) {what}; run `prepare` again")
