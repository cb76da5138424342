"""The benchmarks give figures; how fast, no test says."""

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import data_scale  # noqa: E402
import language  # noqa: E402
import loss_memory  # noqa: E402
import peers  # noqa: E402
import recommenders  # noqa: E402

from llm2rec.data.sequences import TEST  # noqa: E402

pytestmark = pytest.mark.slow  # whole runs, several processes: CI runs them


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return language.quick_world(Namespace(rounds=1), tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", sorted(set(language.MEASURES) - {"memory"}))
def test_every_side_of_a_comparison_gives_a_figure(world, name):
    figures = language.MEASURES[name](world)
    assert len(figures) >= 2
    assert all(figure.median > 0 and figure.ratio > 0 for figure in figures)
    assert figures[-1].ratio == 1


def test_the_profile_of_a_step_names_operations_with_their_shares(world, capsys):
    language.profile_csft(world)
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| aten::")]
    shares = [float(line[3].strip(" %")) for line in lines]
    assert len(shares) > 5 and sorted(shares, reverse=True) == shares and 0 < sum(shares) <= 100.1


def test_a_side_is_measured_at_its_fastest_batch():
    sides = {"a": {"slow": lambda: 1.0, "fast": lambda: 4.0}, "b": {"only": lambda: 2.0}}
    ours, theirs = language.compare("x", "a second", sides, rounds=3)
    assert (ours.batch, ours.median, ours.ratio) == ("fast", 4.0, 2.0)
    assert (theirs.batch, theirs.ratio) == ("only", 1.0)


def test_a_drifting_peak_voids_the_run(capsys):
    language.show_useful([], flops=1.0, before=1e12, after=1.2e12)
    assert "VOID" in capsys.readouterr().out


def test_the_minimal_flops_count_no_padding_and_the_labelled_positions_only(world):
    lm = world.load()
    batches = language.packed_batches(world, lm, 256)
    tokens = sum(batches[number]["input_ids"].shape[1] for number in range(len(batches)))
    labels = sum(batches[number]["n_targets"] for number in range(len(batches)))
    least = 6 * (2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32) * tokens + lm.head.numel() * labels)
    attended = language.minimal_flops(lm, batches) * batches.targets - least
    assert 0 < attended < 3 * 4 * 2 * 16 * tokens * 200  # no sequence has 200 tokens


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory from /proc")
def test_the_loss_in_chunks_needs_less_memory_than_full_logits(capsys):
    found = loss_memory.measure([2048], [16_384], 16)
    json.dumps(found)
    peaks = {one["loss"]: one["mb"] for one in found}
    assert 0 < peaks["ours"] < peaks["full logits"] / 2


def test_the_sides_without_an_interpreter_are_left_out_of_the_table_of_peers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--quick", "--rounds", "2", "--threads", "1"])
    peers.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {(row[0].removeprefix("| "), row[1]) for row in rows}
    assert found >= {("training", "llm2rec"), ("ranks", "llm2rec"), ("ranks", "torch"), ("lists", "torch")}
    assert {("all", "rectools"), ("all", "recbole")} <= found


def test_an_epoch_of_ours_trains_every_target_once(tmp_path):
    log = peers.log_of(peers.quick_sequences(users=20))
    assert log.targets == (np.diff(log.offsets) - 3).sum()  # all but the first and the last two
    log.save(tmp_path / "log.npz")
    with peers.Worker("llm2rec", sys.executable, tmp_path / "log.npz", log.targets, threads=1) as worker:
        worker.start()
        count, seconds = worker.measure("training", 8)
    assert count == log.targets
    assert seconds > 0


def test_a_side_that_fails_says_why(tmp_path):
    worker = peers.Worker("llm2rec", sys.executable, tmp_path / "absent.npz", 1, threads=1)
    with pytest.raises(SystemExit, match="(?s)the side llm2rec ended.*absent.npz"), worker:
        worker.start()


def test_every_way_of_training_and_ranking_gives_a_figure(monkeypatch):
    monkeypatch.setattr(recommenders, "STEPS", 2)
    sequences = recommenders.made(60, users=200, events=5)
    parts = sequences.parts.copy()
    parts[4::5] = TEST
    sequences = replace(sequences, parts=parts)
    vectors = np.random.default_rng(0).standard_normal((60, recommenders.WIDTH)).astype(np.float32)
    ways = [
        recommenders.bare_training(sequences, vectors, 8, "bfloat16"),
        recommenders.engine_training(sequences, vectors, 8, "float32"),
        recommenders.authors_training(sequences, vectors),
        recommenders.our_ranking(sequences, vectors),
        recommenders.torch_ranking(sequences, vectors, 40),
        recommenders.authors_ranking(sequences, vectors, 40),
    ]
    assert all(way() > 0 for way in ways)


def test_the_memory_that_a_training_adds_is_measured(capsys):
    for loss in (recommenders.FULL, recommenders.SAMPLED_SOFTMAX):
        recommenders.train_on(20_000, loss)
        added, speed = json.loads(capsys.readouterr().out)
        assert added > 20_000 * recommenders.WIDTH * 2  # the frozen vectors at least
        assert speed > 0


def test_both_ways_of_preparing_a_log_leave_the_same_events(tmp_path):
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    data_scale.make_log(tmp_path, 20_000)
    ours, theirs = data_scale.ours(tmp_path), data_scale.pandas_way(tmp_path)
    assert {key: ours[key] for key in theirs} == theirs
