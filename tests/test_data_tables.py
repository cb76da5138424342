"""What the two canonical tables accept, what they make of it, and what they refuse."""

import datetime

import polars as pl
import pytest

from llm2rec.data.tables import Catalogue, Interactions, check_known_items
from llm2rec.errors import DataError

DAY_SECONDS = 86_400


def interactions(**columns):
    table = {"user_id": ["a", "a", "b"], "item_id": ["x", "y", "x"], "timestamp": [1, 2, 3], **columns}
    return Interactions.from_frame(pl.DataFrame(table, strict=False), "log.csv")


def catalogue(**columns):
    table = {"item_id": ["x", "y"], "title": ["Ex", "Why"], **columns}
    return Catalogue.from_frame(pl.DataFrame(table, strict=False), "items.csv")


def test_row_order_of_the_file_does_not_matter():
    frame = pl.DataFrame(
        {"user_id": ["b", "a", "a", "a"], "item_id": ["y", "z", "x", "y"], "timestamp": [1, 5, 5, 2]}
    )
    forward, backward = (Interactions.from_frame(part, "log") for part in (frame, frame.reverse()))
    assert forward.frame.equals(backward.frame)


def test_ties_in_time_are_ordered_by_item_id():
    events = interactions(item_id=["y", "x", "y"], timestamp=[7, 7, 7])
    assert events.frame["item_id"].to_list() == ["x", "y", "y"]


def test_exact_duplicate_events_are_kept():
    assert len(interactions(item_id=["x", "x", "y"], timestamp=[1, 1, 1])) == 3


DECIMALS = pl.Series([12, 13, 12]).cast(pl.Decimal(38, 10))  # what Spark makes of Oracle's NUMBER


@pytest.mark.parametrize("ids", [[12, 13, 12], [12.0, 13.0, 12.0], ["12", "13", "12"], DECIMALS])
def test_whole_number_ids_are_the_same_however_typed(ids):
    assert interactions(item_id=ids).frame["item_id"].to_list() == ["12", "13", "12"]


@pytest.mark.parametrize("times", [[5, 6, 7], [5.0, 6.0, 7.0], ["5", "6", "7"], ["5.0", "6.0", "7.0"]])
def test_whole_number_timestamps_stay_as_they_are(times):
    assert interactions(timestamp=times).frame["timestamp"].to_list() == [5, 6, 7]


@pytest.mark.parametrize(
    "time",
    [
        datetime.date(1970, 1, 2),
        datetime.datetime(1970, 1, 2),
        "1970-01-02",
        "1970-01-02T00:00:00",
        "1970-01-02T00:00:00Z",
        "1970-01-02T02:00:00+02:00",
    ],
)
def test_dates_become_moments_in_utc(time):
    log = interactions(timestamp=[time] * 3)
    assert log.frame["timestamp"].to_list() == [datetime.datetime(1970, 1, 2)] * 3
    assert (log.times() / log.ticks_per_second()).tolist() == [DAY_SECONDS] * 3


@pytest.mark.parametrize(
    ("time", "moment"),
    [
        ("2019-01-01 10:00:00+00", (2019, 1, 1, 10)),
        ("2019-01-01 10:00:00.12-05", (2019, 1, 1, 15, 0, 0, 120_000)),
        ("2019-01-01T10:00+02", (2019, 1, 1, 8)),
        ("2019-01-01 10:00:00 -0730", (2019, 1, 1, 17, 30)),
        ("2019-01-01 10:00:00-0730", (2019, 1, 1, 17, 30)),
        ("2019-01-01 10:00Z", (2019, 1, 1, 10)),
        ("2019-01-01", (2019, 1, 1)),
    ],
)
def test_offsets_may_be_of_hours_alone(time, moment):
    assert interactions(timestamp=[time] * 3).frame["timestamp"].to_list() == [datetime.datetime(*moment)] * 3


@pytest.mark.parametrize("digits", [0, 3, 6, 9])
def test_whole_number_times_tell_their_unit_by_their_size(digits):
    times = [(16_000 + day) * DAY_SECONDS * 10**digits for day in range(3)]
    log = interactions(timestamp=times)
    assert log.times().tolist() == times and log.ticks_per_second() == 10**digits


@pytest.mark.parametrize(
    "zoned", ["2022-07-08 20:52Z", "2022-07-08T20:52:10+02:00", "2022-07-08 20:52:10.5 -0330"]
)
def test_times_of_day_with_and_without_an_offset_are_refused_with_their_rows(zoned):
    times = [zoned, "2022-07-08 20:53", "2022-07-09"]
    with pytest.raises(DataError, match=r"no offset from UTC .* in 1 of 3 rows \(row 2: '2022-07-08 20:53'\)"):
        interactions(timestamp=times)
    for fine in ([zoned, zoned, "2022-07-09"], ["2022-07-08 20:52", "2022-07-08T20:53:01", "2022-07-09"]):
        assert len(interactions(timestamp=fine)) == 3


@pytest.mark.parametrize("times", [[0.5, 2.25, 1.0], ["0.5", "2.25", " 1"]])
def test_seconds_with_a_fraction_are_moments(times):
    log = interactions(user_id=["a", "b", "a"], timestamp=times)
    assert log.times().tolist() == [500_000, 1_000_000, 2_250_000] and log.ticks_per_second() == 10**6


@pytest.mark.parametrize(
    "times", [[-1, 1_500_000_000, 1_500_000_000_000], ["0", "1500000000", "1500000000000000"]]
)
def test_whole_number_times_in_two_units_are_refused_with_their_rows(times):
    with pytest.raises(DataError, match=r"log.csv: timestamp is in another unit .* in 1 of 3 rows \(row 2: "):
        interactions(timestamp=times)


def test_dates_before_and_after_1973_stand_in_one_log():
    log = interactions(timestamp=["2020-01-01", "1960-06-01", "1971-01-01"])
    assert log.frame["item_id"].to_list() == ["y", "x", "x"]


@pytest.mark.parametrize(
    ("times", "row"),
    [
        ([1, None, 3], "row 2: None"),
        ([1.0, float("nan"), 3.0], "row 2: nan"),
        (["1", "2", "soon"], "row 3: 'soon'"),
        (["2020-01-01", "soon", "2020-01-02"], "row 2: 'soon'"),
        ([None, None, None], "row 1: None"),
        ([1.5, float("inf"), 3.0], "row 2: inf"),
        (["1.5", "2020-01-01", "3"], "row 2: '2020-01-01'"),
        ([1_500_000_000_000.5, 1.0, 2.0], "row 1: 1500000000000.5"),
    ],
)
def test_an_unusable_timestamp_is_refused_with_its_row(times, row):
    with pytest.raises(DataError, match="timestamp") as caught:
        interactions(timestamp=times)
    assert "log.csv" in str(caught.value) and row in str(caught.value)


@pytest.mark.parametrize("column", ["user_id", "item_id"])
@pytest.mark.parametrize("bad", [None, "", "  "])
def test_an_empty_id_is_refused_with_its_row(column, bad):
    with pytest.raises(DataError, match=f"log.csv: {column} .*row 2"):
        interactions(**{column: ["p", bad, "q"]})


@pytest.mark.parametrize("bad", [1.5, float("nan")])
def test_a_float_id_that_is_not_a_whole_number_is_refused(bad):
    with pytest.raises(DataError, match="row 2"):
        interactions(item_id=[1.0, bad, 2.0])


@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_one_user_or_one_item_only_is_refused(column):
    with pytest.raises(DataError, match=f"log.csv: only one {column} \\('only'\\)"):
        interactions(**{column: ["only"] * 3})


def test_missing_columns_are_named_beside_those_that_are_there():
    with pytest.raises(DataError) as caught:
        Interactions.from_frame(pl.DataFrame({"user_id": ["a"], "when": [1]}), "log.csv")
    assert all(word in str(caught.value) for word in ("log.csv", "'item_id'", "'timestamp'", "'when'"))


def test_an_empty_table_is_refused():
    with pytest.raises(DataError, match="log.csv: the table has no rows"):
        interactions().frame.clear().pipe(Interactions.from_frame, "log.csv")


@pytest.mark.parametrize("title", [None, "", " \t\n"])
def test_a_blank_title_is_refused_with_its_item(title):
    with pytest.raises(DataError, match="items.csv: .*empty title: 'y'"):
        catalogue(title=["Ex", title])


def test_a_repeated_item_id_is_refused():
    with pytest.raises(DataError, match="items.csv: .*'x'"):
        catalogue(item_id=["x", "x"])


def test_a_catalogue_of_one_item_is_refused():
    with pytest.raises(DataError, match="one item"):
        Catalogue.from_frame(pl.DataFrame({"item_id": ["x"], "title": ["Ex"]}), "items.csv")


def test_the_catalogue_keeps_row_order_and_further_columns():
    items = catalogue(item_id=["y", "x"], brand=["B", None])
    assert items.item_ids == ["y", "x"] and items.frame["brand"].to_list() == ["B", None]


def test_interactions_with_unknown_items_are_refused_with_their_file():
    with pytest.raises(DataError, match="log.csv: 1 interactions name 1 items .* lacks: 'stranger'; add"):
        check_known_items(interactions(item_id=["x", "stranger", "y"]), catalogue(), "log.csv")


@pytest.mark.parametrize(("ours", "theirs"), [("7", "007"), ("b00x", "B00X")])
def test_an_id_that_another_table_writes_otherwise_is_shown(ours, theirs):
    with pytest.raises(DataError, match=f"lacks: '{ours}'; it has '{theirs}': write ids alike"):
        check_known_items(interactions(item_id=["x", ours, "x"]), catalogue(item_id=["x", theirs]))


def test_an_id_with_and_without_a_decimal_point_is_refused():
    with pytest.raises(DataError, match="log.csv: 1 item_id stand with and without a decimal point: '12.0'"):
        interactions(item_id=["12", "12.0", "x"])


def test_a_float_too_large_to_tell_from_the_next_is_no_id():
    with pytest.raises(DataError, match="row 2"):
        interactions(item_id=[1.0, float(2**53), 2.0])


def test_ties_of_a_given_split_are_ordered_by_part_before_item():
    table = {"item_id": ["x", "z", "y"], "timestamp": [7, 7, 7], "part": ["test", "train", "validation"]}
    table = {"user_id": ["a"] * 3 + ["b"] * 3, **{name: values * 2 for name, values in table.items()}}
    log = Interactions.from_frame(pl.DataFrame(table), "log.csv", ["part"])
    assert log.frame["item_id"].to_list() == ["z", "y", "x"] * 2


def test_items_without_interactions_are_fine():
    items = catalogue(item_id=["x", "y", "new"], title=["Ex", "Why", "New"])
    assert check_known_items(interactions(), items) is None  # an unknown item raises


@pytest.mark.parametrize(("make", "kind"), [(interactions, Interactions), (catalogue, Catalogue)])
def test_tables_survive_writing_and_reading(make, kind, tmp_path):
    make().write(tmp_path / "table.parquet")
    assert kind.read(tmp_path / "table.parquet").frame.equals(make().frame)


def test_category_zero_is_one_and_an_empty_place_is_none():
    assert catalogue(genre=[0, 1]).labels("genre") == [["0"], ["1"]]
    assert catalogue(genre=[1.5, float("nan")]).labels("genre") == [["1.5"], []]
    assert catalogue(genre=[None, "a|b"]).labels("genre") == [[], ["a", "b"]]
    assert catalogue(genre=[["p", None], None]).labels("genre") == [["p"], []]
