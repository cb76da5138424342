"""Slices of the test events."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm2rec.data.sequences import TEST, TRAIN, VALIDATION, Sequences
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.evaluation import protocol, significance
from llm2rec.evaluation.ranking import metric_names
from llm2rec.evaluation.slices import MEANINGS, popularity_thirds, slice_events, summarise_slices


def sequences_of(*users):
    """Sequences from (training items, validation item, test items) of each user, 9 items."""
    events = [[*training, validation, *tests] for training, validation, tests in users]
    parts = [[TRAIN] * len(training) + [VALIDATION] + [TEST] * len(tests) for training, _, tests in users]
    return Sequences(
        items=np.array([item for one in events for item in one], dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(one) for one in events])]),
        parts=np.array([part for one in parts for part in one], dtype=np.uint8),
        item_ids=[f"i{item}" for item in range(1, 10)],
        user_ids=[f"u{user}" for user in range(len(users))],
    )


def words(sequences, slicing, **settings):
    return slice_events(sequences, TEST, **settings)[slicing].cast(pl.String).to_list()


def test_a_target_is_a_repeat_where_the_user_had_it_before():
    sequences = sequences_of(([1, 2], 3, [1]), ([2, 4], 3, [1]), ([1, 2], 4, [4]))
    assert words(sequences, "target") == ["repeat", "novel", "repeat"]


def test_an_earlier_test_event_makes_a_repeat():
    assert words(sequences_of(([1, 2], 3, [5, 5])), "target") == ["novel", "repeat"]


def test_events_are_sorted_by_the_length_of_the_whole_history():
    sequences = sequences_of(([1], 2, [3, 4]), ([1, 2, 3, 4], 5, [6]))
    assert words(sequences, "history_length", length_bounds=(2, 4)) == ["up to 2", "3 to 4", "over 4"]


def test_head_middle_and_tail_gather_a_third_each():
    assert popularity_thirds(np.array([1, 4, 1, 3, 2, 1, 0])).tolist() == [2, 0, 2, 1, 1, 2, 2]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12))
def test_thirds_equal_a_loop(counts):
    expected, gathered = {}, 0
    for item in sorted(range(len(counts)), key=lambda item: (-counts[item], item)):
        third = 0 if gathered < sum(counts) / 3 else 1 if gathered < 2 * sum(counts) / 3 else 2
        expected[item] = third if counts[item] else 2
        gathered += counts[item]
    assert popularity_thirds(np.array(counts)).tolist() == [expected[item] for item in range(len(counts))]


def test_events_are_sorted_by_the_training_events_of_the_target():
    sequences = sequences_of(([1, 1, 1, 2], 3, [1]), ([1, 2, 4], 3, [2]), ([1, 4], 3, [4]), ([1, 5], 3, [9]))
    assert words(sequences, "item_popularity") == ["head", "middle", "tail", "tail"]


def test_a_target_without_training_events_is_cold_also_where_validation_holds_it():
    sequences = sequences_of(([1, 2], 3, [2]), ([1, 2], 4, [3]))
    assert words(sequences, "item_training") == ["in training", "no training event"]


def test_a_user_with_few_training_events_is_cold():
    sequences = sequences_of(([1, 2], 3, [2]), ([1, 2, 4], 4, [3]))
    assert words(sequences, "user_training", cold_user_events=3) == ["fewer than 3", "3 or more"]


def test_every_event_has_one_slice_of_every_slicing():
    sequences = sequences_of(([1, 2], 3, [2, 7]), ([1, 2, 4], 4, [3]))
    found = slice_events(sequences, TEST)
    assert found.columns == ["user_id", "item_id", *MEANINGS]
    assert found.rows()[1][:2] == ("u0", "i7")
    assert found.height == 3 and found.null_count().sum_horizontal().item() == 0


@pytest.mark.parametrize("bounds", [(), (5, 3), (0, 5), (5, 5)])
def test_bounds_that_do_not_rise_are_refused(bounds):
    with pytest.raises(ConfigError, match="bounds"):
        slice_events(sequences_of(([1, 2], 3, [2])), TEST, length_bounds=bounds)


def test_a_cold_user_takes_a_positive_bound():
    with pytest.raises(ConfigError, match="cold_user_events is 0"):
        slice_events(sequences_of(([1, 2], 3, [2])), TEST, cold_user_events=0)


def ranked_users(**rows):
    """per_user table and a slicing: users 0..39 are novel, 40..59 repeats; a rank for each of both by row."""
    users = [f"u{user:02d}" for user in range(60)]
    frames = [
        pl.DataFrame(
            {"row": row, "seed": 0, "user_id": users, "item_id": "i", "rank": [novel] * 40 + [repeat] * 20}
        )
        for row, (novel, repeat) in rows.items()
    ]
    per_user = pl.concat(frames).with_columns(pl.col("seed").cast(pl.Int64))
    kind = pl.Series(["novel"] * 40 + ["repeat"] * 20).cast(pl.Enum(["repeat", "novel"]))
    return per_user, pl.DataFrame({"user_id": users, "item_id": "i", "target": kind})


def test_a_row_is_averaged_over_the_events_of_a_slice():
    found = summarise_slices(*ranked_users(a=(1, 99), b=(99, 1)), "a", samples=50)["target"]["slices"]
    assert {word: one["rows"]["a"]["mean"] for word, one in found.items()} == {"repeat": 0.0, "novel": 1.0}
    assert {word: (one["users"], one["events"]) for word, one in found.items()} == {
        "repeat": (20, 20),
        "novel": (40, 40),
    }
    assert list(found) == ["repeat", "novel"]


def test_a_slice_of_few_users_is_shown_without_a_test():
    found = summarise_slices(*ranked_users(a=(1, 99), b=(99, 1)), "a", samples=200)["target"]["slices"]
    assert found["novel"]["comparisons"]["b"]["verdict"] == "worse" and found["novel"]["warning"] is None
    assert found["repeat"]["comparisons"]["b"]["verdict"] == "too few users"
    assert "Only 20 test users" in found["repeat"]["warning"]


def test_the_slices_of_a_slicing_are_one_holm_family():
    generator = np.random.default_rng(0)
    users = [f"u{user:03d}" for user in range(200)]
    per_user = pl.concat(
        pl.DataFrame(
            {"row": row, "seed": 0, "user_id": users, "item_id": "i", "rank": generator.integers(1, 30, 200)}
        )
        for row in "ab"
    )
    kind = pl.Series(["repeat", "novel"] * 100).cast(pl.Enum(["repeat", "novel"]))
    slices = pl.DataFrame({"user_id": users, "item_id": "i", "target": kind})
    found = summarise_slices(per_user, slices, "a", samples=200)["target"]["slices"]
    results = [one["comparisons"]["b"] for one in found.values()]
    corrected = [result["p_holm"] for result in results]
    assert (
        corrected == significance.holm([result["p"] for result in results]) != [result["p"] for result in results]
    )


def test_what_is_alike_in_a_slice_is_no_part_of_the_holm_family():
    generator = np.random.default_rng(1)
    users = [f"u{user:03d}" for user in range(200)]
    base = generator.integers(1, 30, 200)
    moved = np.where(np.arange(200) % 2, np.maximum(1, base - 1), base)  # novel targets alone
    per_user = pl.concat(
        pl.DataFrame({"row": row, "seed": 0, "user_id": users, "item_id": "i", "rank": ranks})
        for row, ranks in {"a": base, "b": moved, "c": base}.items()
    )
    kind = pl.Series(["repeat", "novel"] * 100).cast(pl.Enum(["repeat", "novel"]))
    slices = pl.DataFrame({"user_id": users, "item_id": "i", "target": kind})
    found = summarise_slices(per_user, slices, "a", samples=200)["target"]["slices"]
    result = found["novel"]["comparisons"]["b"]
    assert result["difference"] > 0 and (result["p_holm"], result["p_sign_flip_holm"]) == (
        result["p"],
        result["p_sign_flip"],
    )
    assert found["repeat"]["comparisons"]["b"]["p_holm"] == found["novel"]["comparisons"]["c"]["p_holm"] == 1.0


def test_a_verdict_is_possible_in_a_slicing_however_many_slices_and_rows_there_are():
    words, rows = ["repeat", "novel", "new"], "abcdef"
    users = [f"u{user:03d}" for user in range(120)]
    per_user = pl.concat(
        pl.DataFrame(
            {"row": row, "seed": 0, "user_id": users, "item_id": "i", "rank": [99 if row == "a" else 1] * 120}
        )
        for row in rows
    )
    kind = pl.Series(words * 40).cast(pl.Enum(words))
    slices = pl.DataFrame({"user_id": users, "item_id": "i", "target": kind})
    found = summarise_slices(per_user, slices, "a", samples=200)["target"]["slices"]
    verdicts = {result["verdict"] for one in found.values() for result in one["comparisons"].values()}
    assert verdicts == {"better"}


def test_a_whole_slicing_holds_every_event_once():
    per_user, slices = ranked_users(a=(3, 7))
    found = summarise_slices(per_user, slices, "a", samples=50)["target"]["slices"]
    whole = protocol.summarise(per_user, metric_names([10]), samples=50)["rows"]["a"]["ndcg@10"]["mean"]
    weighted = sum(one["users"] * one["rows"]["a"]["mean"] for one in found.values()) / 60
    assert weighted == pytest.approx(whole)


def test_events_of_one_user_and_item_keep_their_own_slices():
    sequences = sequences_of(([1, 2], 3, [5, 5]))
    per_user = pl.DataFrame(
        {"row": ["a"] * 2, "seed": [0] * 2, "user_id": ["u0"] * 2, "item_id": ["i5"] * 2, "rank": [99, 1]}
    )
    found = summarise_slices(per_user, slice_events(sequences, TEST), "a", samples=20)["target"]["slices"]
    assert (found["novel"]["rows"]["a"]["mean"], found["repeat"]["rows"]["a"]["mean"]) == (0.0, 1.0)


def test_events_without_a_slice_are_refused_and_named():
    per_user, slices = ranked_users(a=(3, 7))
    with pytest.raises(ArtifactError, match="1 test events have no slice .*u59 i"):
        summarise_slices(per_user, slices.head(59), "a", samples=20)


def test_a_result_of_evaluate_fits_its_slices():
    sequences = sequences_of(([1, 2], 3, [4, 1]), ([2, 4], 3, [9]))
    ranked = pl.DataFrame({"user_index": [0, 0, 1], "item_index": [4, 1, 9], "rank": [1, 2, 3]})
    per_user = protocol.per_user_table(ranked, sequences, "a", 0)
    found = summarise_slices(per_user, slice_events(sequences, TEST), "a", samples=20)
    assert set(found) == set(MEANINGS)
    assert {word: one["events"] for word, one in found["target"]["slices"].items()} == {"repeat": 1, "novel": 2}
