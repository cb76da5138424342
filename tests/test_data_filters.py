"""What each filter keeps, and that every lost event is counted under its reason."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2rec.data.filters import filtered
from llm2rec.data.tables import Interactions
from llm2rec.errors import DataError

NONE = {
    "min_rating": None,
    "users": None,
    "repeats": "keep",
    "k_core": 1,
    "min_events": 1,
    "max_events": None,
    "seed": 0,
}


def as_log(rows, *further):
    columns = ["user_id", "item_id", "timestamp", *further]
    return Interactions.from_frame(pl.DataFrame(rows, schema=columns, orient="row"), "log", further)


def random_log(seed, users=12, items=9, events=70):
    generator = np.random.default_rng(seed)
    rows = zip(
        generator.integers(users, size=events), generator.zipf(1.5, events) % items, range(events), strict=True
    )
    return as_log([(f"u{user}", f"i{item}", time) for user, item, time in rows])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_the_core_is_the_largest_one(seed, k):
    log = random_log(seed)
    rows = log.frame.rows()
    while True:  # brute force: drop until nothing changes
        users, items = [row[0] for row in rows], [row[1] for row in rows]
        left = [row for row in rows if users.count(row[0]) >= k and items.count(row[1]) >= k]
        if len(left) == len(rows):
            break
        rows = left
    if len({row[0] for row in rows}) < 2 or len({row[1] for row in rows}) < 2:
        with pytest.raises(DataError, match="fewer than two"):
            filtered(log, **NONE | {"k_core": k})
    else:
        kept, dropped = filtered(log, **NONE | {"k_core": k})
        assert kept.frame.rows() == rows
        assert sum(dropped.values()) == len(log) - len(rows)


def test_low_ratings_are_left_out_and_counted():
    log = as_log([("a", "x", 1, 5.0), ("a", "y", 2, 2.0), ("b", "y", 3, 4.0)], "rating")
    kept, dropped = filtered(log, **NONE | {"min_rating": 4})
    assert kept.frame["item_id"].to_list() == ["x", "y"] and dropped == {"rating below 4": 1}


def test_consecutive_repeats_keep_the_first_of_each_run():
    log = as_log([("a", item, time) for time, item in enumerate("xxyxx")] + [("b", "x", 0), ("b", "y", 1)])
    kept, dropped = filtered(log, **NONE | {"repeats": "drop-consecutive"})
    assert kept.frame["item_id"].to_list() == ["x", "y", "x", "x", "y"] and dropped == {"repeated item": 2}


def test_keep_first_leaves_each_pair_once():
    log = as_log([("a", item, time) for time, item in enumerate("xyxy")] + [("b", "x", 0)])
    kept, _ = filtered(log, **NONE | {"repeats": "keep-first"})
    assert kept.frame.rows() == [("a", "x", 0), ("a", "y", 1), ("b", "x", 0)]


def test_lengths_outside_the_bounds_lose_their_users():
    log = as_log(
        [
            (user, item, time)
            for user, n in (("a", 2), ("b", 3), ("c", 6))
            for time, item in enumerate("xyzxyz"[:n])
        ]
        + [("d", item, time) for time, item in enumerate("xyz")]
    )
    kept, dropped = filtered(log, **NONE | {"min_events": 3, "max_events": 5})
    assert kept.frame["user_id"].unique().sort().to_list() == ["b", "d"]
    assert dropped == {"events of users too short": 2, "events of users too long": 6}


def test_the_sample_of_users_does_not_change_when_others_join():
    rows = [(f"u{user}", f"i{item}", item) for user in range(30) for item in range(3)]
    few = filtered(as_log(rows), **NONE | {"users": 5})[0].frame["user_id"].unique()
    again = filtered(as_log(rows[::-1]), **NONE | {"users": 5})[0].frame["user_id"].unique()
    assert sorted(few) == sorted(again) and len(few) == 5
    other = filtered(as_log(rows), **NONE | {"users": 5, "seed": 1})[0].frame["user_id"].unique()
    assert sorted(other) != sorted(few)
