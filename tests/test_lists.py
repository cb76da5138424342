"""Lists for every user of a log are those that each user would be given alone."""

import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

import llm2rec as lr
from llm2rec.data.sequences import Sequences
from llm2rec.errors import ArtifactError, ConfigError, DataError
from llm2rec.serve import lists
from llm2rec.serve.recommender import is_new
from test_additions import run, trained  # noqa: F401 (fixtures)

STRANGERS = pl.DataFrame(
    {"user_id": ["z", "y", "z", "z"], "item_id": ["i03", "i05", "i01", "i04"], "timestamp": [2, 1, 1, 3]}
)


@pytest.mark.parametrize("row", ["markov", "sasrec-id", "sasrec-llm2rec", "sasrec-llm2rec+average"])
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_lists_are_those_that_each_user_is_given_alone(run, tmp_path, monkeypatch, row, ending):  # noqa: F811
    monkeypatch.setattr(lists, "USERS_AT_ONCE", 7)
    sequences, out = Sequences.load(run.data), tmp_path / f"lists.{ending}"
    assert lr.recommend_users(run, out, k=3, row=row) == sequences.n_users
    table = pl.read_parquet(out) if ending == "parquet" else pl.read_csv(out)
    assert table.columns == ["user_id", "place", "item_id", "title", "score", "new"]
    for user in (0, 11, sequences.n_users - 1):
        events = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
        alone = lr.recommend(run, [sequences.item_ids[item - 1] for item in events], k=3, row=row)
        own = table.filter(pl.col("user_id") == sequences.user_ids.cast(pl.String)[user])
        assert own["item_id"].to_list() == [item.item_id for item in alone]
        assert own["score"].to_list() == pytest.approx([item.score for item in alone], abs=1e-4)
        assert own["place"].to_list() == list(range(1, len(alone) + 1))


def test_a_few_users_cost_the_same_however_many_there_are(run, monkeypatch):  # noqa: F811
    cast, written = pl.Series.cast, []

    def counting(series, *arguments, **options):
        written.append(len(series))
        return cast(series, *arguments, **options)

    sequences, served = Sequences.load(run.data), lr.load_row(run, "markov")
    monkeypatch.setattr(pl.Series, "cast", counting)
    items = served.catalogue.frame
    lists._table(sequences, sequences, np.arange(3), served, served.lists(2, None), items)
    assert sequences.n_users > 3 * 2  # premise
    assert set(written) == {3 * 2}


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_lists_are_written_as_they_are_made(run, tmp_path, monkeypatch, ending):  # noqa: F811
    read = pl.read_parquet if ending == "parquet" else pl.read_csv
    whole, out = tmp_path / f"whole.{ending}", tmp_path / f"out.{ending}"
    lr.recommend_users(run, whole, k=3, row="markov")
    made, written = [], []
    make, write, clean = lists._table, pl.DataFrame.write_parquet, lists.clean

    def making(*given):
        made.append("batch")
        return make(*given)

    def writing(frame, path):
        written.append((len(made), len(frame)))
        write(frame, path)

    def cleaning(title):
        made.append("title")
        return clean(title)

    monkeypatch.setattr(lists, "_table", making)
    monkeypatch.setattr(lists, "clean", cleaning)
    monkeypatch.setattr(pl.DataFrame, "write_parquet", writing)
    monkeypatch.setattr(lists, "USERS_AT_ONCE", 7)
    monkeypatch.setattr(lists, "ROWS_AT_ONCE", 40)
    assert lr.recommend_users(run, out, k=3, row="markov") == 40
    assert made == ["title"] * 12 + ["batch"] * 6
    assert written == [(12 + 2, 2 * 7 * 3), (12 + 4, 2 * 7 * 3), (12 + 6, 12 * 3)]
    assert read(out).equals(read(whole))
    assert {path.name for path in tmp_path.iterdir()} == {whole.name, out.name, "run", "new.csv"}


def test_lists_hold_the_history_where_they_are_asked_to(run, tmp_path):  # noqa: F811
    STRANGERS.write_csv(tmp_path / "log.csv")
    lr.recommend_users(run, tmp_path / "out.parquet", tmp_path / "log.csv", k=50, exclude_history=False)
    table = pl.read_parquet(tmp_path / "out.parquet")
    assert set(table.group_by("user_id").len()["len"]) == {len(Sequences.load(run.data).item_ids)}


def test_users_of_another_log_are_given_lists_by_the_order_of_their_events(run, tmp_path):  # noqa: F811
    STRANGERS.write_csv(tmp_path / "log.csv")
    lr.add_items(run, run.folder.parent / "new.csv")
    assert lr.recommend_users(run, tmp_path / "out.parquet", tmp_path / "log.csv", k=4, new_items=2) == 2
    table = pl.read_parquet(tmp_path / "out.parquet")
    for user, history in (("y", ["i05"]), ("z", ["i01", "i03", "i04"])):
        own = table.filter(pl.col("user_id") == user)
        alone = lr.recommend(run, history, k=4, new_items=2)
        assert own["item_id"].to_list() == [item.item_id for item in alone]
        assert own["new"].to_list() == [item.new for item in alone] and own["new"].sum() == 2


def test_asking_for_more_new_items_than_there_are_says_so(run, capsys):  # noqa: F811
    assert not any(item.new for item in lr.recommend(run, ["i05"], k=4, new_items=2))
    assert "note: 0 of the" in capsys.readouterr().err
    lr.add_items(run, run.folder.parent / "new.csv")
    assert sum(item.new for item in lr.recommend(run, ["i05"], k=4, new_items=2)) == 2
    assert "training event" not in capsys.readouterr().err


def test_lists_shorter_than_asked_for_have_no_empty_places(run, tmp_path):  # noqa: F811
    STRANGERS.write_csv(tmp_path / "log.csv")
    lr.recommend_users(run, tmp_path / "out.parquet", tmp_path / "log.csv", k=50)
    table = pl.read_parquet(tmp_path / "out.parquet")
    items = len(Sequences.load(run.data).item_ids)
    assert table.group_by("user_id").len().sort("user_id").rows() == [("y", items - 1), ("z", items - 3)]
    assert table["item_id"].null_count() == 0


def test_events_of_items_that_the_run_does_not_know_are_left_out_and_counted(run, tmp_path, capsys):  # noqa: F811
    strange = STRANGERS.with_columns(item_id=pl.lit("i99"), timestamp=pl.col("timestamp") + 9)
    strange.vstack(STRANGERS).write_csv(tmp_path / "log.csv")
    assert lr.recommend_users(run, tmp_path / "out.csv", tmp_path / "log.csv", k=3) == 2
    assert "4 events (of items that the run does not know; `add-items`" in capsys.readouterr().err
    STRANGERS.write_csv(tmp_path / "known.csv")
    lr.recommend_users(run, tmp_path / "known-out.csv", tmp_path / "known.csv", k=3)
    assert (tmp_path / "out.csv").read_text() == (tmp_path / "known-out.csv").read_text()
    strange.write_csv(tmp_path / "log.csv")
    with pytest.raises(DataError, match="no event is left"):
        lr.recommend_users(run, tmp_path / "out.csv", tmp_path / "log.csv")


def by_rating(run):  # noqa: F811
    """The run, as if its recipe left out events rated below 4."""
    data = run.recipe.data
    filters = data.filters.model_copy(update={"min_rating": 4.0})
    recipe = run.recipe.model_copy(update={"data": data.model_copy(update={"filters": filters})})
    return replace(run, recipe=recipe)


@pytest.mark.parametrize("row", ["markov", "sasrec-id", "sasrec-llm2rec"])
def test_what_was_rated_low_is_neither_looked_at_nor_listed(run, tmp_path, row):  # noqa: F811
    lr.add_items(run, run.folder.parent / "new.csv")
    low = STRANGERS.with_columns(item_id=pl.Series(["i06", "i07", "i06", "new1"]), rating=pl.lit(1))
    STRANGERS.with_columns(rating=pl.lit(5)).write_csv(tmp_path / "high.csv")
    STRANGERS.with_columns(rating=pl.lit(5)).vstack(low).write_csv(tmp_path / "all.csv")
    tables = {}
    for log in ("high", "all"):
        lr.recommend_users(by_rating(run), tmp_path / "out.parquet", tmp_path / f"{log}.csv", k=50, row=row)
        tables[log] = pl.read_parquet(tmp_path / "out.parquet").drop("place")
    rated_low = low.select("user_id", "item_id").unique()
    assert tables["high"].join(rated_low, on=["user_id", "item_id"], how="semi").height > 1  # premise
    left = tables["high"].join(rated_low, on=["user_id", "item_id"], how="anti", maintain_order="left")
    assert tables["all"].equals(left)


def test_users_without_an_event_left_are_counted_and_named(run, tmp_path, capsys):  # noqa: F811
    liked = STRANGERS.with_columns(rating=pl.lit(5))
    stranger = liked[:1].with_columns(user_id=pl.lit("x"), item_id=pl.lit("i99"))
    critic = liked[:1].with_columns(user_id=pl.lit("w"), rating=pl.lit(1))
    liked.vstack(stranger).vstack(critic).write_csv(tmp_path / "log.csv")
    assert lr.recommend_users(by_rating(run), tmp_path / "out.csv", tmp_path / "log.csv", k=3) == 2
    assert "users who have no event left and get no list: 2 ('w', 'x')" in capsys.readouterr().err
    liked.write_csv(tmp_path / "log.csv")
    lr.recommend_users(by_rating(run), tmp_path / "out.csv", tmp_path / "log.csv", k=3)
    assert "get no list" not in capsys.readouterr().err


def test_items_that_a_row_cannot_know_are_refused(run, tmp_path):  # noqa: F811
    lr.add_items(run, run.folder.parent / "new.csv")
    STRANGERS.with_columns(item_id=pl.lit("new1")).vstack(STRANGERS).write_csv(tmp_path / "log.csv")
    with pytest.raises(DataError, match="'new1' was added after the training"):
        lr.recommend_users(run, tmp_path / "out.csv", tmp_path / "log.csv", row="sasrec-id")
    assert not list(tmp_path.glob("*out*"))


def test_one_new_user_gets_a_list(run, tmp_path):  # noqa: F811
    STRANGERS[:1].write_csv(tmp_path / "log.csv")
    assert lr.recommend_users(run, tmp_path / "out.csv", tmp_path / "log.csv", k=3) == 1


def test_lists_are_written_over_lists_alone(run, tmp_path):  # noqa: F811
    log, out = tmp_path / "log.csv", tmp_path / "out.csv"
    STRANGERS.write_csv(log)
    for _ in range(2):
        lr.recommend_users(run, out, log, k=3)
    with pytest.raises(ConfigError, match="exists and holds no lists"):
        lr.recommend_users(run, log, log)
    with pytest.raises(ConfigError, match="lies in the run's folder"):
        lr.recommend_users(run, run.folder / "lists.csv")
    assert log.read_text() == STRANGERS.write_csv()


def test_a_table_of_an_unknown_kind_is_refused_before_anything_is_computed(run, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match=r"lists\.txt is none of .*\.parquet, \.csv"):
        lr.recommend_users(run, tmp_path / "lists.txt")


def test_a_row_that_is_loaded_once_gives_the_lists_of_recommend(run):  # noqa: F811
    served = lr.load_row(run, "sasrec-llm2rec")
    for history in (["i03"], ["i05", "i01"]):
        assert served.recommend(history, k=4) == lr.recommend(run, history, k=4)
    with pytest.raises(DataError, match="no item 'nonsense'"):
        served.recommend(["nonsense"])


@pytest.mark.parametrize("new_items", [None, 0])
def test_ids_list_no_item_that_was_held_out_from_them(run, new_items):  # noqa: F811
    served = lr.load_row(run, "sasrec-id")
    held_out = torch.arange(12) == 4
    served.scorer.items.blank(held_out)
    served.new[held_out] = True
    lists = served.recommend(["i03"], k=20, exclude_history=False, new_items=new_items)
    scores = served.scorer.score(torch.tensor([[4]]))[0]
    expected = [served.catalogue.item_ids[item] for item in scores.argsort(descending=True) if item != 4]
    assert scores[4] == 0 and scores.min() < 0  # premise: it would not be the last
    assert [item.item_id for item in lists] == expected


def test_what_ids_do_not_know_the_average_with_text_lists(run):  # noqa: F811
    served = lr.load_row(run, "sasrec-llm2rec+average")
    served.scorer._first.items.blank(torch.arange(12) == 4)
    assert "i04" in [item.item_id for item in served.recommend(["i03"], k=20)]


@pytest.mark.parametrize("kind", [tuple, np.array, pl.Series, iter])
def test_a_history_may_be_any_row_of_ids(run, kind):  # noqa: F811
    served = lr.load_row(run, "markov")
    assert served.recommend(kind(["i05", "i01"]), k=4) == served.recommend(["i05", "i01"], k=4)
    with pytest.raises(ConfigError, match="the history is empty"):
        served.recommend(kind([]))
    with pytest.raises(DataError, match="no item 'nonsense'"):
        served.recommend(kind(["nonsense"]))


@pytest.mark.parametrize("row", ["markov", "sasrec-id", "sasrec-llm2rec", "sasrec-llm2rec+average"])
def test_a_row_in_memory_reads_its_run_no_more(run, row):  # noqa: F811
    served = lr.load_row(run, row)
    before = served.recommend(["i03"], k=4)
    shutil.rmtree(run.folder)
    assert served.recommend(["i03"], k=4) == before


def test_a_row_in_memory_says_once_that_it_has_fewer_new_items_than_asked_for(run, capsys):  # noqa: F811
    served = lr.load_row(run, "sasrec-llm2rec")
    for wanted in (2, 2, 3):
        served.recommend(["i05"], k=4, new_items=wanted)
    assert capsys.readouterr().err.count("note: 0 of the 12 items have no training event") == 1


def test_a_log_with_more_items_than_are_scored_is_refused(run):  # noqa: F811
    assert torch.equal(is_new(run.domain(), 13), torch.arange(13) == 12)
    with pytest.raises(ArtifactError, match="has 12 items, of which only 11 can be scored"):
        is_new(run.domain(), 11)
