"""Which events are trained on and which are held out: (E,) parts of a log that is sorted by user and time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, date, datetime

import numpy as np
import polars as pl

from llm2rec.data.tables import ITEM, PART, USER, Interactions
from llm2rec.errors import ConfigError, DataError

TRAIN, VALIDATION, TEST = 0, 1, 2
CONTEXT = 3  # read as history, never a target: neither trained on nor scored


@dataclass(frozen=True)
class Split:
    """How a log is split; `by` says which of the other values count.

    Attributes:
        by: `last`: each user's last `holdout` events are test, as many before validation. `time`: everything
            from a moment on, at `ratio` of the events or at `dates`. `users`: the last `holdout` events of a
            `ratio` of users who are never trained on. `given`: the column `part` of the log.
        holdout: last events of a user held out.
        ratio: training, validation, test; of events (`time`) or users (`users`).
        dates: first moment of validation and of test, ISO 8601.
        cold_items: share of the items that appear as test targets only.
        seed: of the choice of held-out users and items.
    """

    by: str = "last"
    holdout: int = 1
    ratio: tuple[float, float, float] = (0.8, 0.1, 0.1)
    dates: tuple[str, str] | None = None
    cold_items: float = 0.0
    seed: int = 0


def assign_parts(log: Interactions, split: Split) -> np.ndarray:
    """(E,) uint8: TRAIN, VALIDATION, TEST or CONTEXT of each event; see `split_events` for cold items.

    A held-out event without any event before it cannot be predicted from a history: it is CONTEXT.

    Raises:
        DataError: no event is left to train on, to validate on or to test on.
        ConfigError: dates that cannot be read, or in the wrong order.
    """
    make = {"last": _by_last, "time": _by_time, "users": _by_users, "given": _by_given}[split.by]
    parts = make(log, split)
    first = np.diff(log.codes(USER), prepend=-1) != 0
    parts[first & (parts != TRAIN)] = CONTEXT
    _require_parts(parts, split)
    if np.bincount(log.codes(USER)[parts == TRAIN]).max() < 2:
        raise DataError(
            f"the split (data.split.by: {split.by}) leaves no user two training events, so no next item to learn; "
            "gather longer histories, or hold out fewer events"
        )
    return parts


def _require_parts(parts: np.ndarray, split: Split) -> None:
    for part, name in ((TRAIN, "train on"), (VALIDATION, "validate on"), (TEST, "test on")):
        if not (parts == part).any():
            raise DataError(f"the split (data.split.by: {split.by}) leaves no event to {name}; change data.split")


def from_end(log: Interactions) -> np.ndarray:
    """(E,) int64: 1 for a user's last event, 2 for the one before, ..."""
    ends = np.cumsum(log.counts(USER))
    return ends[log.codes(USER)] - np.arange(len(log))


def _by_last(log: Interactions, split: Split) -> np.ndarray:
    place = from_end(log)
    parts = np.where(place <= split.holdout, TEST, np.where(place <= 2 * split.holdout, VALIDATION, TRAIN))
    return parts.astype(np.uint8)


def _by_time(log: Interactions, split: Split) -> np.ndarray:
    validation, test = time_cuts(log, split)
    times = log.times()
    return np.where(times >= test, TEST, np.where(times >= validation, VALIDATION, TRAIN)).astype(np.uint8)


def time_cuts(log: Interactions, split: Split) -> tuple[int, int]:
    """First time of validation and of test, in the unit of the log.

    By ratio the cut falls between two different times: events of equal time stay together.

    Raises:
        ConfigError: dates that cannot be read, or in the wrong order.
    """
    if split.dates is not None:
        cuts = [int(_moment(text).timestamp() * log.ticks_per_second()) for text in split.dates]
        if cuts[0] >= cuts[1]:
            raise ConfigError(
                f"data.split.dates: validation {split.dates[0]} must begin before test {split.dates[1]}"
            )
        return cuts[0], cuts[1]
    ordered = np.sort(log.times())
    places = [int(share * len(log) + 1e-6) for share in (split.ratio[0], split.ratio[0] + split.ratio[1])]
    return int(ordered[places[0]]), int(ordered[min(places[1], len(log) - 1)])


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"data.split.dates: {text!r} is no ISO 8601 date; write for example {date(2014, 7, 1)}"
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _by_users(log: Interactions, split: Split) -> np.ndarray:
    codes = log.codes(USER)
    places = _hash_places(log.ids(USER), np.flatnonzero(log.counts(USER)), split.seed)
    validation, test = split.ratio[0], split.ratio[0] + split.ratio[1]
    last = from_end(log) <= split.holdout
    held_out = np.where(places[codes] >= test, TEST, VALIDATION)
    parts = np.where(places[codes] < validation, TRAIN, np.where(last, held_out, CONTEXT))
    return parts.astype(np.uint8)


def _by_given(log: Interactions, split: Split) -> np.ndarray:
    """As given; an event without a part is history, and trained on where a training event of its user follows."""
    parts = log.frame[PART].to_physical().fill_null(CONTEXT).to_numpy().astype(np.uint8)
    user = log.codes(USER)
    last_trained = np.full(len(log.ids(USER)), -1, dtype=np.int64)
    trained = np.flatnonzero(parts == TRAIN)
    last_trained[user[trained]] = trained  # ascending: the last one stays
    parts[(parts == CONTEXT) & (np.arange(len(log)) < last_trained[user])] = TRAIN
    return parts


def split_events(log: Interactions, split: Split) -> tuple[Interactions, np.ndarray, pl.Series]:
    """The log, its parts (E,) and the ids of its cold items, whose events survive as test targets only.

    Raises:
        DataError: see `assign_parts`; or no test target is left with a cold item.
    """
    parts = assign_parts(log, split)
    ids = log.ids(ITEM)
    if not split.cold_items:
        return log, parts, ids.head(0)
    codes = log.codes(ITEM)
    cold = _hash_places(ids, np.flatnonzero(log.counts(ITEM)), split.seed) >= 1 - split.cold_items - 1e-9
    kept = ~cold[codes] | (parts == TEST)
    log, parts = log.kept(kept), parts[kept]
    while True:  # a cold target that has become its user's first event has no history left
        first = np.diff(log.codes(USER), prepend=-1) != 0
        alone = first & cold[log.codes(ITEM)]
        if not alone.any():
            break
        log, parts = log.kept(~alone), parts[~alone]
    parts[first & (parts != TRAIN)] = CONTEXT
    _require_parts(parts, split)
    if not (cold[log.codes(ITEM)] & (parts == TEST)).any():
        raise DataError(f"no test event has one of the {int(cold.sum())} cold items; raise data.split.cold_items")
    return log, parts, ids.filter(pl.Series(cold))


def _hash_places(ids: pl.Series, present: np.ndarray, seed: int) -> np.ndarray:
    """(ids,) float64: place of each present id in [0, 1) in the order of its hash with `seed`; others 0."""
    keys = [hashlib.blake2b(f"{seed}/{ids[int(code)]}".encode(), digest_size=8).digest() for code in present]
    places = np.zeros(len(ids))
    places[present[np.argsort(np.array(keys, dtype="S8"), kind="stable")]] = np.arange(len(present)) / len(present)
    return places


def check_parts(log: Interactions, parts: np.ndarray, split: Split, cold: pl.Series) -> None:
    """Checks the parts by what they must never do, and not by how they were made.

    Raises:
        DataError: training events later than a held-out one where time decides, a held-out user who is trained
            on, or a cold item anywhere but in a test target.
    """
    train, test = parts == TRAIN, parts == TEST
    held_out = test | (parts == VALIDATION)
    times, user = log.times(), log.codes(USER)
    if split.by == "time":
        cuts = [int(times[mask].min()) if mask.any() else None for mask in (held_out, test)]
        for mask, cut in ((train, cuts[0]), (parts == VALIDATION, cuts[1])):
            if cut is not None and (mask & (times >= cut)).any():
                place = int(np.argmax(mask & (times >= cut)))
                _refuse(log, place, "is trained or validated on, but lies after the cut")
    if split.by == "users":
        both = np.intersect1d(user[train], user[held_out])
        if len(both):
            raise DataError(
                f"leak: user {log.ids(USER)[int(both[0])]!r} is held out and trained on; run `prepare` again"
            )
    else:
        _check_order_within_users(log, user, train, held_out)
    if split.by == "last":
        counts = [np.bincount(user[mask], minlength=len(log.ids(USER))) for mask in (parts == VALIDATION, test)]
        present = log.counts(USER) > 0
        wrong = np.flatnonzero(present & ((counts[0] != split.holdout) | (counts[1] != split.holdout)))
        if len(wrong) and not split.cold_items:
            name, numbers = log.ids(USER)[int(wrong[0])], [int(count[wrong[0]]) for count in counts]
            raise DataError(
                f"leak: user {name!r} has {numbers} validation and test events instead of {split.holdout}"
            )
    if len(cold):
        is_cold = log.ids(ITEM).is_in(cold.implode()).to_numpy()[log.codes(ITEM)]
        early = np.flatnonzero(is_cold & ~test)
        if len(early):
            _refuse(log, int(early[0]), "has a held-out item, but is no test event")


def _check_order_within_users(
    log: Interactions, user: np.ndarray, train: np.ndarray, held_out: np.ndarray
) -> None:
    """No training event of a user after one of the user's held-out events."""
    seen = np.cumsum(held_out)
    starts = np.flatnonzero(np.diff(user, prepend=-1) != 0)
    before = np.repeat(seen[starts] - held_out[starts], np.diff(np.append(starts, len(user))))
    late = np.flatnonzero(train & (seen > before))
    if len(late):
        _refuse(log, int(late[0]), "is trained on, but lies after a held-out event of its user")


def _refuse(log: Interactions, place: int, what: str) -> None:
    user, item = log.frame[USER][place], log.frame[ITEM][place]
    raise DataError(f"leak: event {place} (user {user!r}, item {item!r}) {what}; run `prepare` again")


def too_short(log: Interactions, split: Split) -> list[str]:
    """Users with too few events for the split: under `last` one training event must be left."""
    shortest = 2 * split.holdout + 1 if split.by == "last" else split.holdout + 1 if split.by == "users" else 1
    counts = log.counts(USER)
    short = np.flatnonzero((counts > 0) & (counts < shortest))
    return log.ids(USER).gather(short).to_list()
