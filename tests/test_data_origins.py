"""Every way in: files of each kind, renamed columns, folders in a layout; and what `describe` says of them."""

import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llm2rec as lr
from llm2rec import artifacts
from llm2rec.config import ColumnsConfig, DataConfig
from llm2rec.data import origins, readers
from llm2rec.data.description import _histogram
from llm2rec.data.tables import FILE
from llm2rec.errors import ConfigError, DataError

EVENTS = [("a", "x", 1), ("a", "y", 2), ("b", "x", 3)]
LOG = pl.DataFrame(EVENTS, schema=["user_id", "item_id", "timestamp"], orient="row")
ITEMS = pl.DataFrame({"item_id": ["x", "y"], "title": ["Ex", "Why"], "genres": ["A|B", "C"]})


def write_parquet_folder(folder):
    (folder / "log").mkdir()
    for number, part in enumerate((LOG[:2], LOG[2:])):
        part.write_parquet(folder / "log" / f"part-{number}.parquet")
    return folder / "log"


def write_partitioned(folder):
    for user in ("a", "b"):
        (folder / "log" / f"user_id={user}").mkdir(parents=True)
        own = LOG.filter(pl.col("user_id") == user).drop("user_id")
        own.write_parquet(folder / "log" / f"user_id={user}" / "part.parquet")
    return folder / "log"


def write_text(name, text):
    def write(folder):
        path = folder / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


JSON_LINES = "".join(json.dumps(dict(zip(LOG.columns, row, strict=True))) + "\n" for row in EVENTS)
CSV = LOG.write_csv()
WRITERS = {
    "csv": write_text("log.csv", CSV),
    "csv.gz": write_text("log.csv.gz", CSV),
    "tsv": write_text("log.tsv", CSV.replace(",", "\t")),
    "jsonl": write_text("log.jsonl", JSON_LINES),
    "jsonl.gz": write_text("log.jsonl.gz", JSON_LINES),
    "folder of parquet": write_parquet_folder,
    "partitioned parquet": write_partitioned,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_log(tmp_path, kind):
    assert readers.read_interactions(WRITERS[kind](tmp_path)).frame.rows() == EVENTS


def test_keys_in_the_names_of_folders_count_below_the_folder_given_alone(tmp_path):
    above = tmp_path / "timestamp=2020" / "part=7"
    above.mkdir(parents=True)
    LOG.write_parquet(above / "log.parquet")
    for path in (above / "log.parquet", above):
        assert readers.read_interactions(path).frame.rows() == EVENTS
    with pytest.raises(DataError, match="'timestamp' is a column and the name of a folder"):
        readers.read_interactions(tmp_path)


def test_keys_above_a_partitioned_folder_are_no_columns(tmp_path):
    (tmp_path / "title=1").mkdir()
    log = write_partitioned(tmp_path / "title=1")
    assert readers.read_interactions(log).frame.rows() == EVENTS
    assert readers.scan_table(log).collect_schema().names() == ["item_id", "timestamp", "user_id", FILE]


NARROW = pl.col("timestamp").cast(pl.Int32)
MOMENTS = [pl.from_epoch("timestamp").cast(pl.Datetime(unit)) for unit in ("ns", "us")]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([], [pl.lit("new").alias("channel")]),
        ([pl.lit("old").alias("channel")], []),
        ([NARROW], []),
        ([], [NARROW]),
        ([pl.lit(None).alias("channel")], [pl.lit("new").alias("channel")]),
    ],
    ids=["a column more", "a column less", "wider", "narrower", "a column of nulls"],
)
def test_parts_whose_columns_have_grown_are_one_log(tmp_path, first, second):
    LOG[:2].with_columns(first).write_parquet(tmp_path / "a.parquet")
    LOG[2:].with_columns(second).write_parquet(tmp_path / "b.parquet")
    assert readers.read_interactions(tmp_path).frame.rows() == EVENTS


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pl.lit(float("nan")), pl.lit("new")),
        (pl.lit(True), pl.lit(1)),
        (pl.lit(1).cast(pl.Datetime), pl.lit(1).cast(pl.Datetime("us", "UTC"))),
        (pl.lit("p").cast(pl.Enum(["p"])), pl.lit("q").cast(pl.Enum(["q"]))),
    ],
    ids=["nan and text", "bool and int", "naive and aware", "two enums"],
)
def test_parts_may_differ_in_columns_that_are_not_read(tmp_path, first, second):
    LOG[:2].with_columns(first.alias("channel")).write_parquet(tmp_path / "a.parquet")
    LOG[2:].with_columns(second.alias("channel")).write_parquet(tmp_path / "b.parquet")
    assert readers.read_interactions(tmp_path).frame.rows() == EVENTS
    with pytest.raises(DataError, match="no column 'label'; it has .*'channel'"):
        readers.read_interactions(tmp_path, {"item_id": "label"})


def test_parts_whose_ids_are_of_two_enums_are_one_log(tmp_path):
    for name, part in {"a": LOG[:2], "b": LOG[2:]}.items():
        users = pl.col("user_id").cast(pl.Enum(part["user_id"].unique()))
        part.with_columns(users).write_parquet(tmp_path / f"{name}.parquet")
    assert readers.read_interactions(tmp_path).frame.rows() == EVENTS


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_ids_too_large_for_the_decimals_of_another_part_are_refused_with_that_part(tmp_path, names):
    whole = pl.DataFrame({"user_id": [2**60 + 1, 7], "item_id": ["x", "y"], "timestamp": [1, 2]})
    decimal = pl.DataFrame({"user_id": [7.0, 8.0], "item_id": ["x", "y"], "timestamp": [3, 4]})
    for name, part in zip(names, (whole, decimal), strict=True):
        part.write_parquet(tmp_path / f"{name}.parquet")
    what = f"{names[1]}.parquet has 'user_id' with a decimal point, .* the {2**60 + 1} of {names[0]}.parquet"
    with pytest.raises(DataError, match=what):
        readers.read_interactions(tmp_path)
    whole[1:].write_parquet(tmp_path / f"{names[0]}.parquet")
    assert readers.read_interactions(tmp_path).frame.rows() == [("7", "y", 2), ("7", "x", 3), ("8", "y", 4)]


@pytest.mark.parametrize("order", [1, -1])
def test_moments_of_two_units_are_one_time(tmp_path, order):
    for name, part, moments in zip("ab", (LOG[:2], LOG[2:]), MOMENTS[::order], strict=True):
        part.with_columns(moments).write_parquet(tmp_path / f"{name}.parquet")
    assert readers.read_interactions(tmp_path).times().tolist() == [10**6, 2 * 10**6, 3 * 10**6]


@pytest.mark.parametrize(
    ("second", "what"),
    [
        (
            [MOMENTS[1]],
            r"b.parquet has 'timestamp' as Datetime.*, where a.parquet has it as Int64; write it alike",
        ),
        ([pl.lit(None).alias("timestamp")], r"timestamp is empty .* 1 of 3 rows \(b.parquet row 1: None\)"),
        (pl.exclude("timestamp"), r"timestamp is empty .* 1 of 3 rows \(b.parquet row 1: None\)"),
    ],
    ids=["dates beside numbers", "nulls", "left out"],
)
def test_parts_that_cannot_be_one_log_are_refused_with_the_file(tmp_path, second, what):
    LOG[:2].write_parquet(tmp_path / "a.parquet")
    part = LOG[2:].with_columns(second) if isinstance(second, list) else LOG[2:].select(second)
    part.write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=what):
        readers.read_interactions(tmp_path)


def test_a_folder_of_several_kinds_is_refused(tmp_path):
    write_parquet_folder(tmp_path)
    (tmp_path / "log" / "notes.csv").write_text("a\n")
    with pytest.raises(DataError, match=r"several kinds \(.csv, .parquet\)"):
        readers.read_interactions(tmp_path / "log")


def test_a_truncated_gzip_file_is_refused_by_name(tmp_path):
    path = WRITERS["csv.gz"](tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="log.csv.gz is damaged or cut off"):
        readers.read_interactions(path)


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [(["12.0", "13.0", "12.0"], ["12", "13", "12"]), (["12.0", "x", "13"], ["12.0", "x", "13"])],
)
def test_ids_written_as_floats_throughout_are_whole_numbers(tmp_path, ids, wanted):
    LOG.with_columns(item_id=pl.Series(ids)).write_csv(tmp_path / "log.csv")
    assert sorted(readers.read_interactions(tmp_path / "log.csv").frame["item_id"]) == sorted(wanted)


def test_columns_may_be_called_otherwise(tmp_path):
    LOG.rename({"user_id": "customer", "item_id": "sku", "timestamp": "when"}).write_csv(tmp_path / "log.csv")
    ITEMS.rename({"item_id": "product", "title": "name"}).write_csv(tmp_path / "items.csv")
    columns = ColumnsConfig(user="customer", item="sku", time="when", items_item="product", title="name")
    config = DataConfig(interactions=tmp_path / "log.csv", items=tmp_path / "items.csv", columns=columns)
    log, items, _ = origins.read(config)
    assert log.frame.rows() == EVENTS and items.titles == ["Ex", "Why"]


def test_a_mapped_column_that_is_not_there_is_named(tmp_path):
    LOG.write_csv(tmp_path / "log.csv")
    with pytest.raises(DataError, match=r"log.csv: no column 'customer'; it has 'user_id'"):
        readers.read_interactions(tmp_path / "log.csv", {"user_id": "customer"})


def test_a_column_that_is_mapped_over_gives_way(tmp_path):
    LOG.with_columns(real_user=pl.Series(["p", "q", "p"])).write_csv(tmp_path / "log.csv")
    log = readers.read_interactions(tmp_path / "log.csv", {"user_id": "real_user"})
    assert set(log.frame["user_id"]) == {"p", "q"}


@pytest.fixture
def movielens(tmp_path):
    """A folder in the layout of MovieLens latest: rated, without a split."""
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,4,1\n1,2,3,2\n2,1,5,3\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n1,One,Drama\n2,Two,Drama\n3,Three,Drama\n")
    return tmp_path


def test_a_folder_in_a_known_layout_keeps_its_ratings_and_counts_what_it_leaves_out(movielens):
    log, items, dropped = origins.read(DataConfig(folder=movielens, filters={"min_rating": 4}))
    assert log.frame["rating"].to_list() == [4.0, 3.0, 5.0]
    assert items.item_ids == ["1", "2"] and dropped == {"items_without_events": 1}


def test_a_log_without_parts_cannot_be_asked_for_a_given_split(movielens):
    with pytest.raises(ConfigError, match="split.by: given needs a part"):
        origins.read(DataConfig(folder=movielens, split={"by": "given"}))


def test_an_unknown_layout_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="no layout 'netflix'; known: auto, amazon-2023"):
        origins.read(DataConfig(folder=tmp_path, layout="netflix"))


def test_a_folder_in_a_layout_is_what_its_reader_may_open_and_nothing_deeper(tmp_path):
    (tmp_path / "train").mkdir()
    names = ("u.data", "u.item", "train/csft.csv")
    for name in names:
        (tmp_path / name).write_text(name)

    def content():
        return origins.content_hash(DataConfig(folder=tmp_path))["folder"]

    before = content()
    assert before == artifacts.hash_json({name: artifacts.hash_file(tmp_path / name) for name in names})
    artifacts.write_text(tmp_path / "runs" / "mine" / "log.jsonl", "what a run beside its data writes")
    (tmp_path / "runs" / "gone").symlink_to(tmp_path / "nowhere")
    assert content() == before
    for name in names:
        (tmp_path / name).write_text("changed")
        assert content() != before
        (tmp_path / name).write_text(name)


def test_a_folder_in_no_layout_says_what_to_give_instead(tmp_path):
    with pytest.raises(DataError, match="data.interactions and data.items"):
        origins.read(DataConfig(folder=tmp_path))


def test_describe_counts_warns_and_checks(tmp_path):
    rows = [
        (f"u{user}", f"i{event % 7}", 1_500_000_000 + 60 * (event // 2)) for user in range(5) for event in range(9)
    ]
    rows += [("brief", "i0", 1_500_000_000)]
    pl.DataFrame(rows, schema=LOG.columns, orient="row").write_csv(tmp_path / "log.csv")
    items = pl.DataFrame({"item_id": [f"i{i}" for i in range(7)], "title": ["Same"] * 7})
    items.write_csv(tmp_path / "items.csv")
    (described,) = lr.data.describe(tmp_path / "log.csv", tmp_path / "items.csv").values()
    facts = described.facts
    assert (facts["users"], facts["items"], facts["events"], facts["duplicate_texts"]) == (6, 7, 46, 6)
    assert facts["first_event"] == "2017-07-14" and facts["leakage_check"] == "passed"
    assert len(described.warnings) == 3  # equal texts, ties, a user too short
    assert any("'brief'" in warning for warning in described.warnings)


def test_describe_of_a_recipe_says_what_its_filters_leave(tmp_path):
    rows = [(f"u{user}", f"i{event % (3 + user)}", event) for user in range(4) for event in range(6)]
    pl.DataFrame(rows, schema=LOG.columns, orient="row").write_csv(tmp_path / "log.csv")
    items = pl.DataFrame({"item_id": [f"i{i}" for i in range(6)], "title": ["a", "b", "c", "", "same", "same"]})
    items = items.with_columns(pl.col("title").replace("", "&nbsp;"))  # no text, of an item too rare to stay
    items.write_csv(tmp_path / "items.csv")
    (tmp_path / "mine.yaml").write_text(
        "data: {interactions: log.csv, items: items.csv, filters: {k_core: 4}}\nmodel: {source: tiny-random}\n"
        "csft: {epochs: 1}\niem: {mntp: {steps: 1}, contrastive: {steps: 1}}\n"
    )
    (described,) = lr.data.describe(tmp_path / "mine.yaml").values()
    prepared = lr.run(tmp_path / "mine.yaml", tmp_path / "run", until="prepare")
    summary = artifacts.require(prepared.domains[0].data, "prepare").summary
    for name in ("users", "items", "events"):
        assert described.facts[name] == summary[name]
    assert described.facts["left out: events of items too rare"] > 0
    assert described.facts["items"] == 3 and described.facts["text_characters_max"] == 1
    assert described.facts["density"] == round(summary["events"] / (summary["users"] * 3), 6)
    assert not any("different texts" in warning for warning in described.warnings)


def test_describe_takes_overrides_of_a_recipe_only(tmp_path):
    describe(tmp_path, WALKS)
    kept = [
        lr.data.describe(tmp_path / "mine.yaml", overrides=(f"data.filters.users={users}",))["main"].facts["users"]
        for users in (2, 3)
    ]
    assert kept == [2, 3]
    with pytest.raises(ConfigError, match="--set changes keys of a recipe"):
        lr.data.describe(tmp_path / "log.csv", tmp_path / "items.csv", overrides=("data.filters.users=2",))


def test_a_random_model_has_no_tokenizer_to_count_with():
    with pytest.raises(ConfigError, match="tiny-random makes its tokenizer from the texts of a run"):
        lr.models.token_counter("tiny-random")


def test_only_dates_are_shown_over_time(tmp_path):
    assert describe(tmp_path, WALKS).over_time == []  # ranks
    dated = describe(tmp_path, [(user, item, f"2021-0{1 + rank % 8}-01") for user, item, rank in WALKS])
    assert 2021 <= dated.over_time[0][0] < 2021.01 and sum(count for _, count in dated.over_time) == len(WALKS)


def describe(folder, events, **data):
    """The description of `events` with seven items in two categories; `data` are further keys of the recipe."""
    frame = pl.DataFrame(events, schema=[*LOG.columns, "part"][: len(events[0])], orient="row")
    frame.write_csv(folder / "log.csv")
    items = pl.DataFrame({"item_id": [f"i{i}" for i in range(7)], "title": list("abcdefg"), "kind": ["A|B"] * 7})
    items.write_csv(folder / "items.csv")
    budget = {"csft": {"epochs": 1}, "iem": {"mntp": {"steps": 1}, "contrastive": {"steps": 1}}}
    recipe = {
        "data": {"interactions": "log.csv", "items": "items.csv", **data},
        "model": {"source": "tiny-random"},
    }
    (folder / "mine.yaml").write_text(json.dumps(recipe | budget))
    (described,) = lr.data.describe(folder / "mine.yaml").values()
    return described


WALKS = [(f"u{user}", f"i{(user + event) % 7}", event) for user in range(9) for event in range(8)]


@pytest.mark.parametrize("split", [{"by": "last"}, {"by": "users", "ratio": [0.6, 0.2, 0.2]}, {"cold_items": 0.3}])
@pytest.mark.parametrize("short", ["error", "drop"])
def test_described_parts_and_what_the_split_leaves_out_sum_to_the_events(tmp_path, split, short):
    events = [*WALKS, ("brief", "i0", 1)]
    described = describe(tmp_path, events, split=split, short_histories=short)
    parts = {
        name: described.facts.get(f"{name}_events", 0) for name in ("training", "validation", "test", "context")
    }
    left_out = [value for name, value in described.facts.items() if name.startswith("left out by the split")]
    assert sum(parts.values()) + sum(left_out) == described.facts["events"] == len(events)
    assert (parts["context"] > 0) == (split.get("by") == "users")
    assert any("'brief'" in warning for warning in described.warnings) == (short == "error")


def test_describe_counts_the_categories_and_refuses_a_column_that_is_not_there(tmp_path):
    assert describe(tmp_path, WALKS, categories="kind").facts["categories"] == 2
    with pytest.raises(DataError, match="no column 'colour'"):
        describe(tmp_path, WALKS, categories="colour")


@pytest.mark.parametrize(
    ("time", "warned"),
    [
        ("9999-12-31", "1 events lie later than now (9999-12-31)"),
        ("0001-01-01", "1 events lie at 1970-01-01 00:00 or before (0001-01-01)"),
        ("2020-01-01", None),
    ],
)
def test_describe_counts_moments_at_which_nobody_consumes(tmp_path, time, warned):
    events = [(user, item, f"2020-01-0{rank + 1}") for user, item, rank in WALKS]
    warnings = describe(tmp_path, [*events, ("u0", "i0", time)]).warnings
    assert [warned in warning for warning in warnings] == ([True] if warned else [])


def test_describe_shows_impossible_times_as_they_come_out(tmp_path):
    events = [(user, item, 1_500_000_000 + rank) for user, item, rank in WALKS]
    described = describe(tmp_path, [*events, ("u0", "i0", -(2**62))])
    assert described.facts["first_event"].startswith("-") and "or before" in described.warnings[0]


def test_describe_warns_of_dates_without_separators(tmp_path):
    described = describe(tmp_path, [(user, item, 20_200_101 + rank) for user, item, rank in WALKS])
    assert "look like dates" in described.warnings[0]
    assert not describe(tmp_path, WALKS).warnings


def test_describe_warns_of_empty_cells_that_were_written_as_text(tmp_path):
    assert not describe(tmp_path, WALKS).warnings
    walks = [
        ("None" if user == "u0" else user, "NULL" if item == "i6" else item, rank) for user, item, rank in WALKS
    ]
    pl.DataFrame(walks, schema=LOG.columns, orient="row").write_csv(tmp_path / "log.csv")
    items = pl.DataFrame(
        {"item_id": [f"i{i}" for i in range(6)] + ["NULL"], "title": ["nan", "Nan", "Nancy", "d", "e", "f", "g"]}
    )
    items.write_csv(tmp_path / "items.csv")
    (described,) = lr.data.describe(tmp_path / "log.csv", tmp_path / "items.csv").values()
    assert described.warnings == [
        "user_id of 8 events reads 'None'; item_id of 1 items reads 'NULL'; title of 2 items reads 'nan': where "
        "that stands for an empty cell, fill it in or remove these rows"
    ]


def test_describe_names_ties_of_a_given_split_however_few(tmp_path):
    part = ["train"] * 6 + ["validation", "test"]
    events = [(user, item, 0 if user == "u0" and rank < 2 else rank, part[rank]) for user, item, rank in WALKS]
    (warning,) = describe(tmp_path, events, split={"by": "given"}).warnings
    assert (
        warning.startswith("2 events (2.8%) share user and time")
        and "order is that of part, then item_id" in warning
    )


def test_unknown_items_are_refused_with_the_file_of_the_interactions(tmp_path):
    with pytest.raises(DataError, match=r"log.csv: 1 interactions name 1 items .*'stranger'"):
        describe(tmp_path, [*WALKS, ("u0", "stranger", 9)])


CELLS = st.one_of(
    st.text(max_size=6),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(["", "x", "2020-01-01", "1e400", '"', "a,b", "\n", "\x00", "Ω", "NULL", "[1]"]),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=6), st.sampled_from(["csv", "jsonl"]), st.integers(0, 40))
def test_whatever_a_file_holds_it_is_a_log_or_a_data_error(rows, kind, cut):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"log.{kind}"
        if kind == "csv":
            text = "user_id,item_id,timestamp\n" + "".join(",".join(row) + "\n" for row in rows)
        else:
            text = "".join(json.dumps(dict(zip(LOG.columns, row, strict=True))) + "\n" for row in rows)
        path.write_bytes(text.encode("utf-8", "surrogatepass")[: len(text) - cut if cut < 20 else None])
        try:
            log = readers.read_interactions(path)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert log.frame.null_count().sum_horizontal().item() == 0


def test_a_histogram_counts_each_value_at_its_place():
    values = np.array([5] * 90 + [6] * 8 + [9] * 200)
    assert [point for point in _histogram(values) if point[1]] == [(5.0, 90.0), (6.0, 8.0), (9.0, 200.0)]


def test_a_split_by_time_over_numbers_that_are_no_times_is_warned_of(tmp_path):
    counted = [(f"u{user}", f"i{item}", item) for user in range(30) for item in range(6)]
    described = describe(tmp_path, counted, split={"by": "time"})
    assert any("only long histories are tested" in warning for warning in described.warnings)


def test_a_column_of_the_recipe_that_is_not_asked_for_need_not_be_there(tmp_path):
    pl.DataFrame({"who": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1, 2]}).write_csv(tmp_path / "log.csv")
    columns = {"user_id": "who", "rating": "stars", "part": "split"}
    assert len(readers.read_interactions(tmp_path / "log.csv", columns)) == 2
    with pytest.raises(DataError, match="'stars'"):
        readers.read_interactions(tmp_path / "log.csv", columns, ["rating"])


def test_a_rating_that_is_nan_is_none(tmp_path):
    table = {"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1, 2], "rating": [4.0, float("nan")]}
    pl.DataFrame(table).write_parquet(tmp_path / "log.parquet")
    log = readers.read_interactions(tmp_path / "log.parquet", further=["rating"])
    assert log.frame["rating"].to_list() == [4.0, None]
