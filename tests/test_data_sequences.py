"""The split partitions the events, training reads its part alone, and planted leaks are caught."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2rec.data.sequences import ARRAYS, TEST, TRAIN, VALIDATION, Sequences, check_leakage, cold_items, prepare
from llm2rec.data.splits import Split
from llm2rec.data.tables import Catalogue, Interactions
from llm2rec.errors import ArtifactError, DataError

N_ITEMS = 6
ITEMS = Catalogue.from_frame(
    pl.DataFrame({"item_id": [f"i{i}" for i in range(N_ITEMS)], "title": [f"Title {i}" for i in range(N_ITEMS)]}),
    "items",
)
events = st.tuples(st.integers(0, N_ITEMS - 1), st.integers(0, 4))  # few times: many ties


@st.composite
def logs(draw):
    """A holdout and a log whose users are all long enough for it, with ties and repeats."""
    holdout = draw(st.integers(1, 2))
    length = st.lists(events, min_size=2 * holdout + 1, max_size=9)
    users = draw(st.lists(length, min_size=2, max_size=5))
    rows = [(f"u{user}", f"i{item}", time) for user, own in enumerate(users) for item, time in own]
    rows += [("u0", "i0", 0), ("u0", "i1", 0)]  # never one item only
    return holdout, as_log(rows)


def as_log(rows):
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return Interactions.from_frame(frame, "log.csv")


def split(log, holdout=1, short_histories="error"):
    with tempfile.TemporaryDirectory() as folder:
        prepare(log, ITEMS, split=Split(holdout=holdout), short_histories=short_histories, out=Path(folder))
        loaded = Sequences.load(Path(folder))
        arrays = {name: np.array(getattr(loaded, name)) for name in ARRAYS}
        return dataclasses.replace(loaded, **arrays)


@pytest.fixture
def log():
    rng = np.random.default_rng(0)
    return as_log([(f"u{u}", f"i{rng.integers(N_ITEMS)}", t) for u in range(4) for t in range(8)])


quick = settings(max_examples=40, deadline=None)


@quick
@given(logs())
def test_the_split_partitions_the_events_in_order_of_time(case):
    holdout, log = case
    sequences = split(log, holdout)
    assert [f"i{item - 1}" for item in sequences.items] == log.frame["item_id"].to_list()
    for start, end in zip(sequences.offsets, sequences.offsets[1:], strict=False):
        training = end - start - 2 * holdout
        assert (
            sequences.parts[start:end].tolist() == [TRAIN] * training + [VALIDATION] * holdout + [TEST] * holdout
        )


@quick
@given(logs(), st.integers(1, 4))
def test_each_training_target_is_supervised_exactly_once(case, length):
    sequences = split(case[1], case[0])
    items, offsets = sequences.training()
    starts, ends = sequences.windows(length)
    targets = [at for start, end in zip(starts, ends, strict=True) for at in range(start + 1, end)]
    wanted = [at for a, b in zip(offsets, offsets[1:], strict=False) for at in range(a + 1, b)]
    assert sorted(targets) == wanted
    assert all(2 <= size <= length + 1 for size in ends - starts)


@quick
@given(logs(), st.integers(1, 4))
def test_no_window_crosses_users(case, length):
    sequences = split(case[1], case[0])
    _, offsets = sequences.training()
    starts, ends = sequences.windows(length)
    owner = np.searchsorted(offsets, starts, side="right")
    assert np.array_equal(owner, np.searchsorted(offsets, ends - 1, side="right"))


@quick
@given(logs(), st.integers(1, 4))
def test_histories_equal_a_plain_loop(case, length):
    sequences = split(case[1], case[0])
    positions = np.arange(len(sequences.items))
    expected = []
    for position in positions:
        user = int(sequences.users_of(np.array([position]))[0])
        own = sequences.items[sequences.offsets[user] : position].tolist()[-length:]
        expected.append(own + [0] * (length - len(own)))
    assert sequences.histories(positions, length).tolist() == expected


@quick
@given(logs(), st.integers(1, 4))
def test_the_latest_events_equal_a_plain_loop(case, length):
    sequences = split(case[1], case[0])
    users = np.arange(sequences.n_users)
    for found, values in (
        (sequences.latest(users, length), sequences.items),
        (sequences.latest_times(users, length), sequences.times),
    ):
        expected = []
        for user in users:
            own = np.asarray(values[sequences.offsets[user] : sequences.offsets[user + 1]]).tolist()[-length:]
            expected.append(own + [0] * (length - len(own)))
        assert found.tolist() == expected


@quick
@given(logs())
def test_training_holds_the_training_events_alone(case):
    sequences = split(case[1], case[0])
    items, offsets = sequences.training()
    assert np.array_equal(items, sequences.items[sequences.parts == TRAIN])
    assert np.array_equal(np.diff(offsets), np.diff(sequences.offsets) - 2 * case[0])


@quick
@given(logs())
def test_an_honest_split_passes_the_leakage_check(case):
    assert check_leakage(split(case[1], case[0]), case[1], split=Split(holdout=case[0])) is None  # a leak raises


def test_the_history_of_a_test_event_ends_with_the_validation_event(log):
    sequences = split(log)
    test, validation = sequences.held_out(TEST), sequences.held_out(VALIDATION)
    assert np.array_equal(sequences.histories(test, 3)[:, -1], sequences.items[validation])


def test_equal_input_gives_equal_bytes(log, tmp_path):
    for name in ("first", "second"):
        prepare(log, ITEMS, split=Split(), short_histories="error", out=tmp_path / name)
    files = [path for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(files) == 8
    for path in files:
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()


def test_who_was_removed_leaves_no_trace(log, tmp_path):
    others = as_log(log.frame.filter(pl.col("item_id") != "i0").rows())
    removed = [("alone", "i0", 1), *((f"u{user}", "i0", 99) for user in range(4))]
    more = as_log([*others.frame.rows(), *removed])
    left = more.kept((more.frame["item_id"] != "i0").to_numpy())
    assert "alone" in left.ids("user_id") and "i0" in left.ids("item_id")  # the premise: the columns know them
    for name, events in (("before", others), ("removed", left)):
        prepare(events, ITEMS, split=Split(), short_histories="error", out=tmp_path / name)
        read = Interactions.read(tmp_path / name / "interactions.parquet")
        assert read.ids("user_id").to_list() == [f"u{user}" for user in range(4)] and "i0" not in read.ids(
            "item_id"
        )
    for path in (path for path in (tmp_path / "before").rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "removed" / path.relative_to(tmp_path / "before")).read_bytes()


def test_short_histories_are_refused_with_users_and_mend(log):
    short = as_log([*log.frame.rows(), ("brief", "i0", 1), ("brief", "i1", 2)])
    with pytest.raises(DataError, match=r"'brief'.*--set data.short_histories=drop"):
        split(short)


def test_dropped_users_are_counted(log, tmp_path):
    short = as_log([*log.frame.rows(), ("brief", "i0", 1), ("brief", "i1", 2)])
    summary = prepare(short, ITEMS, split=Split(), short_histories="drop", out=tmp_path)
    assert (summary["users"], summary["dropped"]) == (4, {"events of users too short for the split": 2})


def test_dropping_all_but_one_user_is_refused(log):
    only = log.frame.filter(pl.col("user_id") == "u0").rows()
    with pytest.raises(DataError, match="fewer than two users"):
        split(as_log([*only, ("brief", "i0", 1)]), short_histories="drop")


def test_an_unknown_item_is_refused_before_anything_is_written(log, tmp_path):
    stranger = as_log([*log.frame.rows(), ("u0", "stranger", 99)])
    with pytest.raises(DataError, match="'stranger'"):
        prepare(stranger, ITEMS, split=Split(), short_histories="error", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", ["1960-01-01", "1971-01-01", "2020-01-01"])
def test_times_of_dates_are_seconds_whenever_they_lie(first, log, tmp_path):
    start = pl.lit(first).str.to_datetime("%Y-%m-%d", time_unit="ms")
    dated = log.frame.with_columns(timestamp=start + pl.duration(hours="timestamp"))
    prepare(Interactions.from_frame(dated, "log"), ITEMS, split=Split(), short_histories="error", out=tmp_path)
    times = Sequences.load(tmp_path).times
    assert times[:8].tolist() == [int(np.datetime64(first, "s").astype(int)) + 3600 * n for n in range(8)]


def test_sequences_are_memory_mapped(log, tmp_path):
    prepare(log, ITEMS, split=Split(), short_histories="error", out=tmp_path)
    assert isinstance(Sequences.load(tmp_path).items, np.memmap)


def test_held_out_items_that_leave_the_catalogue_are_not_counted(log, tmp_path):
    half = Split(cold_items=0.5)
    every, left = (
        prepare(log, ITEMS, split=half, short_histories="error", out=tmp_path / name, only_consumed=name == "left")
        for name in ("every", "left")
    )
    assert every["items"] == N_ITEMS and left["items"] < N_ITEMS  # the premise: some are no test event's item
    assert every["cold_items"] - left["cold_items"] == N_ITEMS - left["items"]
    assert set(cold_items(tmp_path / "left")) < set(Sequences.load(tmp_path / "left").item_ids)


def test_loading_an_unfinished_folder_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="prepare"):
        Sequences.load(tmp_path)


def relabelled(sequences):
    parts = sequences.parts.copy()
    parts[7] = TRAIN  # the first user's test event
    return dataclasses.replace(sequences, parts=parts)


def exchanged(sequences):
    parts = sequences.parts.copy()
    parts[0], parts[7] = TEST, TRAIN  # counts stay right, the order is broken
    return dataclasses.replace(sequences, parts=parts)


def reordered(sequences):
    items = sequences.items.copy()
    assert items[0] != items[7]
    items[[0, 7]] = items[[7, 0]]
    return dataclasses.replace(sequences, items=items)


class TrainsOnEverything(Sequences):
    def training(self):
        return np.asarray(self.items), np.asarray(self.offsets)


def trains_on_everything(sequences):
    fields = {field.name: getattr(sequences, field.name) for field in dataclasses.fields(sequences)}
    return TrainsOnEverything(**fields)


@pytest.mark.parametrize("leak", [relabelled, exchanged, reordered, trains_on_everything])
def test_a_planted_leak_is_caught(leak, log):
    sequences = split(log)
    check_leakage(sequences, log, split=Split())  # the premise: without the leak it passes
    with pytest.raises(DataError, match="leak"):
        check_leakage(leak(sequences), log, split=Split())
