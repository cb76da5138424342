"""Each split by its promise, and each planted leak by the check that must catch it."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2rec.data.splits import CONTEXT, TEST, TRAIN, VALIDATION, Split, check_parts, split_events, too_short
from llm2rec.data.tables import Interactions
from llm2rec.errors import ConfigError, DataError

NO_COLD = pl.Series([], dtype=pl.String)


def make_log(seed=0, users=20, items=12, events=15):
    generator = np.random.default_rng(seed)
    rows = [
        (f"u{user:02d}", f"i{generator.integers(items):02d}", int(generator.integers(1000)))
        for user in range(users)
        for _ in range(events)
    ]
    return Interactions.from_frame(
        pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"), "log"
    )


quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)


@quick
@given(seeds)
def test_by_time_nothing_trained_on_is_later_than_the_cut(seed):
    log, parts, _ = split_events(make_log(seed), Split(by="time"))
    times = log.frame["timestamp"].to_numpy()
    assert times[parts == TRAIN].max() < times[parts == VALIDATION].min()
    assert times[parts == VALIDATION].max() < times[parts == TEST].min()


def test_by_time_the_shares_are_those_of_the_events():
    log, parts, _ = split_events(make_log(users=60), Split(by="time", ratio=(0.7, 0.2, 0.1)))
    assert np.bincount(parts, minlength=3)[:3] / len(log) == pytest.approx([0.7, 0.2, 0.1], abs=0.02)


@pytest.mark.parametrize("unit", [1, 1000])
def test_dates_cut_where_they_say_in_seconds_and_milliseconds(unit):
    day = 86_400 * unit
    rows = [(user, f"i{n}", (16_000 + n) * day) for user in "ab" for n in range(9)]  # 16,000 days: 2013-10-22
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    split = Split(by="time", dates=("2013-10-25", "2013-10-28"))
    _, parts, _ = split_events(Interactions.from_frame(frame, "log"), split)
    assert parts[:9].tolist() == [TRAIN] * 3 + [VALIDATION] * 3 + [TEST] * 3


def test_a_log_of_dates_before_1973_is_cut_where_the_dates_say():
    rows = [(user, f"i{n}", f"1971-01-0{n + 1}") for user in "ab" for n in range(9)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    split = Split(by="time", dates=("1971-01-04", "1971-01-07"))
    _, parts, _ = split_events(Interactions.from_frame(frame, "log"), split)
    assert parts[:9].tolist() == [TRAIN] * 3 + [VALIDATION] * 3 + [TEST] * 3


@pytest.mark.parametrize("dates", [("2013-13-01", "2014-01-01"), ("2014-01-01", "2013-01-01")])
def test_impossible_dates_are_refused(dates):
    with pytest.raises(ConfigError, match="data.split.dates"):
        split_events(make_log(), Split(by="time", dates=dates))


@quick
@given(seeds, st.integers(1, 3))
def test_held_out_users_are_never_trained_on(seed, holdout):
    log, parts, _ = split_events(make_log(seed), Split(by="users", holdout=holdout))
    users = log.codes("user_id")
    held_out = np.unique(users[np.isin(parts, (VALIDATION, TEST))])
    assert not np.isin(users[parts == TRAIN], held_out).any()
    assert (np.bincount(users[parts == TEST])[np.unique(users[parts == TEST])] == holdout).all()
    assert set(parts[np.isin(users, held_out)].tolist()) <= {VALIDATION, TEST, CONTEXT}


@quick
@given(seeds)
def test_cold_items_appear_as_test_targets_only(seed):
    log, parts, cold = split_events(make_log(seed), Split(cold_items=0.25))
    is_cold = log.frame["item_id"].cast(pl.String).is_in(cold.cast(pl.String).implode()).to_numpy()
    assert is_cold.any() and (parts[is_cold] == TEST).all()
    assert len(cold) == 3


def test_a_given_split_is_kept():
    parts = ["train", "train", "validation", "test"]
    frame = pl.DataFrame(
        {
            "user_id": ["a"] * 4 + ["b"] * 4,
            "item_id": list("wxyz") * 2,
            "timestamp": list(range(4)) * 2,
            "part": parts * 2,
        }
    )
    log = Interactions.from_frame(frame, "log", ["part"])
    assert split_events(log, Split(by="given"))[1].tolist() == [TRAIN, TRAIN, VALIDATION, TEST] * 2


def test_a_first_event_that_is_held_out_has_no_history_and_is_no_target():
    rows = [("a", f"i{n}", n) for n in range(20)] + [("late", "i0", 18), ("late", "i1", 19)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    _, parts, _ = split_events(Interactions.from_frame(frame, "log"), Split(by="time"))
    assert parts[-2:].tolist() == [CONTEXT, TEST]


def test_a_split_without_test_events_is_refused():
    with pytest.raises(DataError, match="no event to validate on"):
        split_events(make_log(), Split(by="time", dates=("2300-01-01", "2301-01-01")))


def late_training(parts, log):
    parts[np.flatnonzero(parts == TEST)[0]] = TRAIN


def test_users_too_short_are_named_from_one_list_of_ids(monkeypatch):
    rows = [(f"u{n}", f"i{n}", 1) for n in range(9)] + [("long", f"i{n}", n) for n in range(9)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    log = Interactions.from_frame(frame, "log")
    ids, asked = Interactions.ids, []
    monkeypatch.setattr(Interactions, "ids", lambda log, column: asked.append(column) or ids(log, column))
    assert too_short(log, Split()) == [f"u{n}" for n in range(9)]
    assert len(asked) <= 2  # each makes the list of all users anew


def held_out_user_trained(parts, log):
    parts[np.flatnonzero(parts == CONTEXT)[0]] = TRAIN


def held_out_before_training(parts, log):
    parts[np.flatnonzero(parts == TRAIN)[0]] = VALIDATION


def last_held_out_of_somebody_trained(parts, log):
    """After the cut, and yet before no held-out event of the same user."""
    held_out, user = np.flatnonzero(np.isin(parts, (VALIDATION, TEST))), log.codes("user_id")
    firsts = held_out[np.unique(user[held_out], return_index=True)[1]]
    alone = [place for place in firsts if (user[held_out] == user[place]).sum() == 1]
    parts[alone[-1]] = TRAIN


def cold_item_in_training(parts, log):
    parts[np.flatnonzero(parts == TEST)] = TRAIN


def all_validated(parts, log):
    parts[parts == TEST] = VALIDATION


def two_tests(parts, log):
    parts[np.flatnonzero(parts == VALIDATION)[0]] = TEST


@pytest.mark.parametrize(
    ("split", "leak", "words"),
    [
        (Split(by="time"), late_training, "lies after"),
        (Split(by="time"), last_held_out_of_somebody_trained, "after the cut"),
        (Split(by="users"), held_out_user_trained, "is held out and trained on"),
        (Split(), held_out_before_training, "after a held-out event of its user"),
        (Split(), late_training, "after a held-out event of its user"),
        (Split(), two_tests, "validation and test events instead of"),
        (Split(cold_items=0.25), cold_item_in_training, "leak"),
        (Split(cold_items=0.25), all_validated, "held-out item, but is no test event"),
    ],
)
def test_a_planted_leak_is_caught(split, leak, words):
    log, parts, cold = split_events(make_log(), split)
    check_parts(log, parts, split, cold)  # the premise: without the leak it passes
    leak(parts, log)
    with pytest.raises(DataError, match=f"leak.*{words}" if words != "leak" else words):
        check_parts(log, parts, split, cold)
