import numpy as np
import polars as pl
import pytest
import torch

from llm2rec.data.sequences import TEST, TRAIN, VALIDATION, Sequences
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.evaluation import protocol, significance
from llm2rec.evaluation.ranking import metric_names


def table(**rows):
    """per_user table from row=[[rank of user 0, ...] of each seed]."""
    frames = [
        pl.DataFrame({"row": row, "seed": seed, "user_id": [f"u{u}" for u in range(len(ranks))], "item_id": "i"})
        .with_columns(rank=pl.Series(ranks, dtype=pl.Int64), seed=pl.lit(seed, dtype=pl.Int64))
        .select(protocol.PER_USER_COLUMNS)
        for row, seeds in rows.items()
        for seed, ranks in enumerate(seeds)
    ]
    return pl.concat(frames)


class NextOnTheCircle:
    """Scores the item after the last of the history highest, the others lower the further on they are."""

    def __init__(self, n_items):
        self.n_items = n_items

    def score(self, histories):
        last = histories.gather(1, (histories > 0).sum(1, keepdim=True) - 1)  # (B, 1) item_index
        return -((torch.arange(1, self.n_items + 1) - last - 1) % self.n_items).float()


def circle_of(n_items):
    """Two users on a circle of items; the second user's test event goes one too far."""
    parts = np.array([TRAIN, TRAIN, VALIDATION, TEST] * 2, dtype=np.uint8)
    items = np.array([1, 2, 3, 4, 2, 3, 4, 1], dtype=np.int32)
    return Sequences(items, np.array([0, 4, 8]), parts, [f"i{i}" for i in range(1, n_items + 1)], ["u0", "u1"])


GOOD, BAD = [1, 2] * 50, [30, 2] * 50


def test_means_are_over_users_and_then_seeds():
    summary = protocol.summarise(table(a=[[1, 100], [1, 1]]), metric_names([10]), samples=50)["rows"]["a"][
        "recall@10"
    ]
    assert summary["values"] == [0.5, 1.0]
    assert (summary["mean"], summary["n"]) == (0.75, 2)
    assert summary["std"] == pytest.approx(np.std([0.5, 1.0], ddof=1))


def test_one_seed_has_no_spread():
    assert protocol.summarise(table(a=[[1, 2]]), metric_names([10]), samples=50)["rows"]["a"]["mrr"]["std"] is None


def test_the_interval_is_that_of_the_mean():
    users = 400
    ranks = [1] * (users // 4) + [99] * (3 * users // 4)
    low, high = (
        protocol.summarise(table(a=[ranks]), metric_names([10]))["rows"]["a"]["recall@10"][k]
        for k in ("low", "high")
    )
    error = 1.96 * (0.25 * 0.75 / users) ** 0.5
    assert (low, high) == (pytest.approx(0.25 - error, abs=0.01), pytest.approx(0.25 + error, abs=0.01))


def test_equal_rows_are_not_distinguishable():
    result = protocol.compare_rows(table(a=[GOOD], b=[GOOD]), "a", samples=500)["b"]
    assert result["verdict"] == "not distinguishable" and result["p"] == 1.0


@pytest.mark.parametrize(("row", "verdict"), [(GOOD, "better"), (BAD, "worse")])
def test_a_clear_difference_is_found(row, verdict):
    base = BAD if row is GOOD else GOOD
    assert protocol.compare_rows(table(a=[base], b=[row]), "a", samples=500)["b"]["verdict"] == verdict


def test_seeds_are_averaged_before_users_are_compared():
    seeds_cancel = table(a=[[5, 5]], b=[[1, 50], [50, 1]])
    averaged = protocol.compare_rows(seeds_cancel, "a", samples=200)["b"]
    assert averaged["low"] == pytest.approx(averaged["high"])  # no spread is left over users


def test_holm_by_hand():
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_reference_that_is_no_row_is_refused():
    with pytest.raises(ConfigError, match="'z'"):
        protocol.compare_rows(table(a=[GOOD]), "z")


def test_runs_with_other_test_events_are_refused_and_the_difference_named():
    with pytest.raises(ArtifactError, match="u2"):
        protocol.compare_runs({"one": table(a=[[1, 2]]), "two": table(a=[[1, 2, 3]])}, samples=50)


def test_several_events_of_a_user_are_one_cluster():
    one = table(a=[[1, 50]], b=[[2, 50]])
    doubled = pl.concat([one, one.with_columns(item_id=pl.lit("j"))])
    single, double = (protocol.compare_rows(frame, "a", samples=300)["b"] for frame in (one, doubled))
    assert (single["low"], single["high"]) == (pytest.approx(double["low"]), pytest.approx(double["high"]))


def test_the_bootstrap_repeats_with_its_seed():
    values = np.random.default_rng(0).random((30, 2))
    assert np.array_equal(significance.bootstrap_means(values, 20, 3), significance.bootstrap_means(values, 20, 3))


def test_the_bootstrap_does_not_depend_on_its_chunks(monkeypatch):
    values = np.random.default_rng(0).random((30, 2))
    whole = significance.bootstrap_means(values, 20, 3)
    monkeypatch.setattr(significance, "CHUNK_BYTES", 1)
    assert significance.bootstrap_means(values, 20, 3) == pytest.approx(whole)


@pytest.mark.parametrize("batch_size", [1, 512])
def test_every_test_event_is_ranked_over_the_whole_catalogue(batch_size):
    ranked = protocol.evaluate(NextOnTheCircle(5), circle_of(5), TEST, 2, batch_size)
    assert ranked.rows() == [(0, 4, 1), (1, 1, 2)]


def test_a_scorer_that_ranks_by_itself_is_asked_for_ranks_where_no_list_is_wanted():
    class Ranking(NextOnTheCircle):
        def ranks(self, targets, exclude, histories):
            return torch.full_like(targets, 7)

    ranked = [
        protocol.evaluate(Ranking(4), circle_of(4), TEST, 3, list_length=k)["rank"].to_list() for k in (0, 2)
    ]
    assert ranked == [[7, 7], protocol.evaluate(NextOnTheCircle(4), circle_of(4), TEST, 3)["rank"].to_list()]


def test_ranks_are_kept_under_outside_ids():
    ranked = protocol.evaluate(NextOnTheCircle(5), circle_of(5), TEST, 2)
    kept = protocol.per_user_table(ranked, circle_of(5), "circle", 7)
    assert kept.rows() == [("circle", 7, "u0", "i4", 1), ("circle", 7, "u1", "i1", 2)]


def test_a_scorer_of_another_catalogue_is_refused():
    with pytest.raises(ValueError, match="ranks 4 items, the catalogue has 5"):
        protocol.evaluate(NextOnTheCircle(4), circle_of(5), TEST, 2)


def test_the_mean_of_a_metric_weighs_users_and_not_events():
    ranked = pl.DataFrame({"user_index": [0, 0, 0, 1], "item_index": [1, 2, 3, 1], "rank": [1, 1, 1, 50]})
    assert protocol.mean_metric(ranked, "recall@10") == 0.5


def test_rows_on_other_test_events_are_refused():
    frame = table(a=[[1, 2]], b=[[1, 2]])
    moved = frame.with_columns(item_id=pl.when(row="b").then(pl.lit("j")).otherwise("item_id"))
    with pytest.raises(ArtifactError, match="only in 'b, seed 0'"):
        protocol.compare_rows(moved, "a", samples=50)


def test_holm_covers_the_rows_of_the_table():
    noisy = np.random.default_rng(0).integers(1, 30, (5, 60)).tolist()
    result = protocol.compare_rows(table(**{f"r{i}": [ranks] for i, ranks in enumerate(noisy)}), "r0", samples=500)
    p_values = [row["p"] for row in result.values()]
    assert len(set(p_values)) > 1
    assert [row["p_holm"] for row in result.values()] == significance.holm(p_values)


def test_a_row_is_compared_between_runs():
    runs = {"old": table(a=[BAD], b=[GOOD]), "new": table(a=[GOOD], b=[GOOD])}
    result = protocol.compare_runs(runs, samples=500)
    assert {row: values["verdict"] for row, values in result["new"].items()} == {
        "a": "better",
        "b": "not distinguishable",
    }


def repeating():
    """One user who came back to item 1: its whole history is 2, 1, 3, the window of one event holds 3 alone."""
    parts = np.array([TRAIN, TRAIN, VALIDATION, TEST], dtype=np.uint8)
    items = np.array([2, 1, 3, 1], dtype=np.int32)
    return Sequences(items, np.array([0, 4]), parts, [f"i{i}" for i in range(1, 6)], ["u0"])


class LowestFirst(NextOnTheCircle):
    """Scores items by their index, the lowest highest: 1, 2, 3, ..."""

    def score(self, histories):
        return -torch.arange(self.n_items).float().repeat(len(histories), 1)


class HighestFirst(NextOnTheCircle):
    """Scores items by their index, the highest highest: ..., 3, 2, 1."""

    def score(self, histories):
        return torch.arange(self.n_items).float().repeat(len(histories), 1)


@pytest.mark.parametrize(("masked", "rank"), [(False, 5), (True, 3)])
def test_masking_hides_the_whole_history_but_not_the_target(masked, rank):
    ranked = protocol.evaluate(HighestFirst(5), repeating(), TEST, 1, mask_history=masked)
    assert ranked["rank"].to_list() == [rank]  # 5, 4, 3, 2, 1 without masking; 5, 4, 1 with it


@pytest.mark.parametrize(("known_length", "rank"), [(1, 4), (2, 4), (3, 3), (9, 3)])
def test_masking_hides_no_more_than_the_user_is_known_by(known_length, rank):
    ranked = protocol.evaluate(HighestFirst(5), repeating(), TEST, 1, mask_history=True, known_length=known_length)
    assert ranked["rank"].to_list() == [
        rank
    ]  # 5, 4, 2, 1 without the last event, or the last two: 1 is the target


@pytest.mark.parametrize(("masked", "listed"), [(False, [1, 2, 3]), (True, [4, 5, 0])])
def test_recommended_lists_stand_beside_the_ranks(masked, listed):
    ranked = protocol.evaluate(LowestFirst(5), repeating(), TEST, 1, mask_history=masked, list_length=3)
    assert ranked["recommended"].to_list() == [listed]


def test_lists_do_not_change_the_ranks():
    with_lists = protocol.evaluate(NextOnTheCircle(5), circle_of(5), TEST, 2, batch_size=1, list_length=2)
    assert with_lists.drop("recommended").equals(protocol.evaluate(NextOnTheCircle(5), circle_of(5), TEST, 2))


def test_a_user_with_nothing_before_the_target_is_ranked_under_masking():
    sequences = Sequences(
        np.array([3], np.int32), np.array([0, 1]), np.array([TEST], np.uint8), list("abc"), ["u"]
    )
    assert protocol.evaluate(HighestFirst(3), sequences, TEST, 1, mask_history=True)["rank"].to_list() == [1]


def test_the_protocol_says_whether_the_history_competes():
    assert protocol.ranking_in_words(False) != protocol.ranking_in_words(True)
    assert "history compete as well" in protocol.ranking_in_words(False)
    assert "consumes one twice" in protocol.ranking_in_words(False, none_repeats=True)
    assert "consumes one twice" not in protocol.ranking_in_words(True, none_repeats=True)
    assert "without the items of the user's last 3 known events alone" in protocol.ranking_in_words(
        True, known_length=3
    )


def test_fewer_than_thirty_users_are_not_compared():
    few, enough = (
        protocol.compare_rows(table(a=[BAD[:n]], b=[GOOD[:n]]), "a", samples=500)["b"] for n in (29, 30)
    )
    assert (few["verdict"], few["p"], few["p_holm"], few["p_sign_flip"]) == ("too few users", 1.0, 1.0, 1.0)
    assert few["low"] < few["difference"] < few["high"]
    assert enough["verdict"] == "better" and enough["p_sign_flip"] < 0.01


def test_a_comparison_says_how_many_users_its_difference_takes():
    result = protocol.compare_rows(table(a=[BAD], b=[GOOD]), "a", samples=100)["b"]
    assert result["users"] == 100
    assert result["users_needed"] == significance.users_needed(result["deviation"], result["difference"])


@pytest.mark.parametrize(("last", "none_repeats"), [(4, True), (1, False)])
def test_a_log_in_which_nobody_consumes_an_item_twice_is_known(last, none_repeats):
    items = np.array([1, 2, 3, last, 1, 2, 3, 4], dtype=np.int32)  # what two users share repeats nothing
    parts = np.tile(np.array([TRAIN, TRAIN, VALIDATION, TEST], dtype=np.uint8), 2)
    sequences = Sequences(items, np.array([0, 4, 8]), parts, ["a", "b", "c", "d"], ["u0", "u1"])
    assert protocol.never_repeats(sequences) is none_repeats
