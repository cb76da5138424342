import numpy as np
import polars as pl
import pytest

from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.evaluation import protocol


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


GOOD, BAD = [1, 2] * 50, [30, 2] * 50


def test_means_are_over_users_and_then_seeds():
    summary = protocol.summarise(table(a=[[1, 100], [1, 1]]), [10], samples=50)["rows"]["a"]["recall@10"]
    assert summary["values"] == [0.5, 1.0]
    assert (summary["mean"], summary["n"]) == (0.75, 2)
    assert summary["std"] == pytest.approx(np.std([0.5, 1.0], ddof=1))


def test_one_seed_has_no_spread():
    assert protocol.summarise(table(a=[[1, 2]]), [10], samples=50)["rows"]["a"]["mrr"]["std"] is None


def test_the_interval_is_that_of_the_mean():
    users = 400
    ranks = [1] * (users // 4) + [99] * (3 * users // 4)
    low, high = (protocol.summarise(table(a=[ranks]), [10])["rows"]["a"]["recall@10"][k] for k in ("low", "high"))
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
    assert protocol.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


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
    assert np.array_equal(protocol.bootstrap_means(values, 20, 3), protocol.bootstrap_means(values, 20, 3))
