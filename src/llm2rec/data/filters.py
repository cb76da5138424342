"""Which events of a log are kept: ratings, repeats, k-core, lengths, a sample of users. Every loss is counted."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import polars as pl

from llm2rec.data.tables import ITEM, RATING, USER, Interactions
from llm2rec.errors import DataError

Repeats = Literal["keep", "drop-consecutive", "keep-first"]
Dropped = dict[str, int]


def filtered(
    log: Interactions,
    *,
    min_rating: float | None,
    users: int | None,
    repeats: Repeats,
    k_core: int,
    min_events: int,
    max_events: int | None,
    seed: int,
    at_least: int = 2,
) -> tuple[Interactions, Dropped]:
    """The events that are kept, and reason -> events left out.

    In this order: ratings below `min_rating`; all but a sample of `users`; repeated events; then, to the fixpoint
    of all three together, users with fewer than `min_events` or more than `max_events` events and users and
    items with fewer than `k_core`.

    Args:
        log: with its ratings where `min_rating` is given.
        users: how many to keep, the same ones whatever the order of the file; None keeps all.
        repeats: `drop-consecutive` keeps the first of equal neighbours, `keep-first` the first event of an item.
        k_core: 1 changes nothing.
        seed: of the sample.
        at_least: users and items that must be left; a log to train on needs two of each.

    Raises:
        DataError: fewer are left.
    """
    dropped: Dropped = {}

    def keep(rows: np.ndarray, reason: str) -> None:
        nonlocal log
        if not rows.all():
            dropped[reason] = dropped.get(reason, 0) + int((~rows).sum())
            log = log.kept(rows)

    if min_rating is not None:
        keep(log.frame[RATING].is_not_null().to_numpy(), "no rating")
        keep((log.frame[RATING] >= min_rating).to_numpy(), f"rating below {min_rating:g}")
    if users is not None:
        keep(_sampled(log, users, seed), "events of users not in the sample")
    if repeats != "keep" and len(log):
        keep(_first_of_repeats(log, repeats), "repeated item")
    for rows, reason in _core(log, k_core, min_events, max_events):
        keep(rows, reason)
    for name in (USER, ITEM):
        if np.count_nonzero(log.counts(name)) < at_least:
            raise DataError(
                f"the filters of the recipe leave fewer than {at_least} {name} ({dropped}); loosen data.filters"
            )
    return log, dropped


def _sampled(log: Interactions, users: int, seed: int) -> np.ndarray:
    """Events of the `users` users with the lowest hash of (seed, id): stable when the log grows."""
    ids = log.ids(USER)
    present = np.flatnonzero(log.counts(USER))
    keys = [hashlib.blake2b(f"{seed}/{ids[int(code)]}".encode(), digest_size=8).digest() for code in present]
    chosen = np.zeros(len(ids), dtype=bool)
    chosen[present[np.argsort(np.array(keys, dtype="S8"), kind="stable")[:users]]] = True
    return chosen[log.codes(USER)]


def _first_of_repeats(log: Interactions, repeats: Repeats) -> np.ndarray:
    if repeats == "keep-first":
        return log.frame.select(pl.struct(USER, ITEM).is_first_distinct()).to_series().to_numpy()
    user, item = log.codes(USER), log.codes(ITEM)
    return np.concatenate([[True], (user[1:] != user[:-1]) | (item[1:] != item[:-1])])


def _core(log: Interactions, k_core: int, min_events: int, max_events: int | None) -> list[tuple[np.ndarray, str]]:
    """Masks to apply one after the other, with their reasons, that end at the fixpoint."""
    user, item = log.codes(USER), log.codes(ITEM)
    alive = np.ones(len(log), dtype=bool)
    n_users, n_items = len(log.ids(USER)), len(log.ids(ITEM))
    reasons = {"events of users too short": 0, "events of users too long": 0, "events of items too rare": 0}
    masks = {reason: np.ones(len(log), dtype=bool) for reason in reasons}
    lowest = max(k_core, min_events)
    if max_events is not None:  # once: events that fall away later do not make a robot a person
        long = np.bincount(user, minlength=n_users) > max_events
        masks["events of users too long"] = ~long[user]
        alive &= masks["events of users too long"]
    while True:
        before = int(alive.sum())
        short = np.bincount(user[alive], minlength=n_users) < lowest
        gone = alive & short[user]
        masks["events of users too short"][gone] = False
        alive &= ~gone
        rare = np.bincount(item[alive], minlength=n_items) < k_core
        gone = alive & rare[item]
        masks["events of items too rare"][gone] = False
        alive &= ~gone
        if int(alive.sum()) == before:
            return _successive(masks)


def _successive(masks: dict[str, np.ndarray]) -> list[tuple[np.ndarray, str]]:
    """Masks over all events as masks over what the ones before them left."""
    left = np.ones(len(next(iter(masks.values()))), dtype=bool)
    steps = []
    for reason, mask in masks.items():
        steps.append((mask[left], reason))
        left &= mask
    return steps
