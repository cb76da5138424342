import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import pytest

from llm2rec import artifacts
from llm2rec.errors import ArtifactError


def finish(folder, run, inputs, content="result"):
    with artifacts.stage(folder, "prepare", inputs, run) as summary:
        (folder / "out.txt").write_text(content)
        summary["events"] = 3


def test_a_finished_stage_with_unchanged_inputs_is_kept(tmp_path):
    finish(tmp_path / "data", tmp_path, {"a": 1})
    assert artifacts.decide(tmp_path / "data", {"a": 1}).keep


def test_a_changed_input_is_named(tmp_path):
    finish(tmp_path / "data", tmp_path, {"a": 1, "b": 2})
    assert artifacts.decide(tmp_path / "data", {"a": 1, "b": 3, "c": None}).reasons == ("b", "c")


def test_a_damaged_output_is_made_again(tmp_path):
    finish(tmp_path / "data", tmp_path, {"a": 1})
    (tmp_path / "data" / "out.txt").write_text("damage")
    assert artifacts.decide(tmp_path / "data", {"a": 1}).reasons == ("damaged out.txt",)


def test_superseded_results_are_moved_aside(tmp_path):
    finish(tmp_path / "data", tmp_path, {"a": 1}, "old")
    finish(tmp_path / "data", tmp_path, {"a": 2}, "new")
    (old,) = (tmp_path / artifacts.SUPERSEDED).rglob("out.txt")
    assert old.read_text() == "old"
    assert (tmp_path / "data" / "out.txt").read_text() == "new"


def test_a_stage_that_fails_leaves_no_manifest_and_keeps_its_checkpoints(tmp_path):
    folder = tmp_path / "csft"
    with pytest.raises(RuntimeError), artifacts.stage(folder, "csft", {"a": 1}, tmp_path):
        (folder / artifacts.CHECKPOINTS / "checkpoint-1").mkdir(parents=True)
        raise RuntimeError
    assert artifacts.decide(folder, {"a": 1}).reasons == ("interrupted",)
    with artifacts.stage(folder, "csft", {"a": 1}, tmp_path):
        assert (folder / artifacts.CHECKPOINTS).exists()
    assert not (folder / artifacts.CHECKPOINTS).exists()


def test_of_an_interrupted_stage_a_changed_input_is_named_as_well(tmp_path):
    with pytest.raises(RuntimeError), artifacts.stage(tmp_path / "csft", "csft", {"a": 1, "b": 1}, tmp_path):
        (tmp_path / "csft" / artifacts.CHECKPOINTS / "checkpoint-1").mkdir(parents=True)
        raise RuntimeError
    assert artifacts.decide(tmp_path / "csft", {"a": 2, "b": 1}).reasons == ("interrupted", "a")
    (tmp_path / "csft" / artifacts.STARTED).write_text("{")
    assert artifacts.decide(tmp_path / "csft", {"a": 2, "b": 1}).reasons == ("interrupted",)


def test_many_reasons_are_counted_rather_than_listed():
    assert artifacts.Decision(False, ("a", "b", "c")).in_words == "a, b, c"
    assert artifacts.Decision(False, ("a", "b", "c", "d", "e")).in_words == "a, b, c and 2 more"


def test_a_stage_that_fails_before_it_writes_leaves_the_finished_one(tmp_path):
    finish(tmp_path / "data", tmp_path, {"a": 1}, "old")
    with pytest.raises(RuntimeError), artifacts.stage(tmp_path / "data", "prepare", {"a": 2}, tmp_path):
        raise RuntimeError
    assert artifacts.decide(tmp_path / "data", {"a": 1}).keep
    assert artifacts.decide(tmp_path / "data", {"a": 2}).reasons == ("a",)


def test_a_stage_that_fails_before_it_writes_was_never_run(tmp_path):
    with pytest.raises(RuntimeError), artifacts.stage(tmp_path / "data", "prepare", {"a": 1}, tmp_path):
        raise RuntimeError
    assert artifacts.decide(tmp_path / "data", {"a": 2}).reasons == ("not run yet",)


def test_a_stage_that_fails_after_it_has_written_does_not_bring_the_old_one_back(tmp_path):
    finish(tmp_path / "data", tmp_path, {"a": 1}, "old")
    with pytest.raises(RuntimeError), artifacts.stage(tmp_path / "data", "prepare", {"a": 2}, tmp_path):
        (tmp_path / "data" / "out.txt").write_text("half")
        raise RuntimeError
    assert artifacts.decide(tmp_path / "data", {"a": 2}).reasons == ("interrupted",)
    (old,) = (tmp_path / artifacts.SUPERSEDED).rglob("out.txt")
    assert old.read_text() == "old"


def interrupt(folder, run, inputs):
    """A stage that ends with a checkpoint of its own."""
    with pytest.raises(RuntimeError), artifacts.stage(folder, "csft", inputs, run):
        checkpoint = folder / artifacts.CHECKPOINTS / f"checkpoint-{inputs['lr']}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "weights").write_text("hours")
        raise RuntimeError


def kept_checkpoints(run):
    return sorted(path.parent.name for path in run.rglob("weights"))


def test_a_stage_that_fails_before_it_writes_leaves_the_interrupted_one(tmp_path):
    folder = tmp_path / "csft"
    interrupt(folder, tmp_path, {"lr": 1})
    with pytest.raises(KeyError), artifacts.stage(folder, "csft", {"lr": 2}, tmp_path):
        (folder / artifacts.CHECKPOINTS).mkdir()  # as the engine does
        raise KeyError
    assert artifacts.decide(folder, {"lr": 1}).reasons == ("interrupted",)
    with artifacts.stage(folder, "csft", {"lr": 1}, tmp_path):
        assert (folder / artifacts.CHECKPOINTS / "checkpoint-1" / "weights").read_text() == "hours"


def test_checkpoints_moved_aside_are_deleted_once_the_stage_is_finished(tmp_path):
    folder, other = tmp_path / "csft", tmp_path / "iem"
    interrupt(other, tmp_path, {"lr": 7})
    interrupt(other, tmp_path, {"lr": 8})
    for rate in (1, 2, 3):
        interrupt(folder, tmp_path, {"lr": rate})
    assert kept_checkpoints(tmp_path) == [f"checkpoint-{rate}" for rate in (1, 2, 3, 7, 8)]
    finish(folder, tmp_path, {"lr": 4})
    assert kept_checkpoints(tmp_path) == ["checkpoint-7", "checkpoint-8"]
    assert len(list((tmp_path / artifacts.SUPERSEDED).glob(f"*/csft/{artifacts.STARTED}"))) == 3


def test_a_stage_that_is_taken_over_needs_no_checkpoints_either(tmp_path):
    finish(tmp_path / "one" / "csft", tmp_path / "one", {"lr": 1})
    interrupt(tmp_path / "two" / "csft", tmp_path / "two", {"lr": 1})
    artifacts.take_over(tmp_path / "one" / "csft", tmp_path / "two" / "csft", tmp_path / "two")
    assert artifacts.decide(tmp_path / "two" / "csft", {"lr": 1}).keep
    assert kept_checkpoints(tmp_path) == []


def test_a_stage_killed_while_its_checkpoints_are_deleted_is_finished(tmp_path, monkeypatch):
    folder = tmp_path / "csft"

    def killed(source, target):
        if "checkpoints" in str(source):
            raise KeyboardInterrupt
        os.rename(source, target)

    with (
        monkeypatch.context() as patched,
        pytest.raises(KeyboardInterrupt),
        artifacts.stage(folder, "csft", {"a": 1}, tmp_path),
    ):
        (folder / artifacts.CHECKPOINTS).mkdir()
        (folder / artifacts.CHECKPOINTS / "weights").write_text("large")
        (folder / "weights").write_text("x")
        patched.setattr(artifacts.os, "replace", killed)
    assert artifacts.decide(folder, {"a": 1}).keep
    assert list(artifacts.require(folder, "csft").outputs) == ["weights"]
    artifacts.tidy(folder, tmp_path)
    assert {path.name for path in folder.iterdir()} == {"weights", artifacts.MANIFEST}


def test_checkpoints_of_other_inputs_are_not_resumed(tmp_path):
    folder = tmp_path / "csft"
    with pytest.raises(RuntimeError), artifacts.stage(folder, "csft", {"a": 1}, tmp_path):
        (folder / artifacts.CHECKPOINTS / "checkpoint-1").mkdir(parents=True)
        raise RuntimeError
    with artifacts.stage(folder, "csft", {"a": 2}, tmp_path):
        assert not (folder / artifacts.CHECKPOINTS).exists()


def test_what_an_interrupted_stage_left_half_written_is_no_output(tmp_path):
    folder = tmp_path / "csft"
    with pytest.raises(RuntimeError), artifacts.stage(folder, "csft", {"a": 1}, tmp_path):
        for name in (artifacts.CHECKPOINTS, artifacts.STABLE, "half"):
            (folder / name).mkdir()
            (folder / name / "weights").write_text(name)
        (folder / ".metrics.jsonl.tmp").write_text("half")
        raise RuntimeError
    with artifacts.stage(folder, "csft", {"a": 1}, tmp_path):
        assert (folder / artifacts.CHECKPOINTS / "weights").exists()
        (folder / "weights").write_text("whole")
    assert set(artifacts.require(folder, "csft").outputs) == {"weights", f"{artifacts.STABLE}/weights"}


def test_checkpoints_are_resumed_where_only_a_key_differs_that_is_not_read(tmp_path):
    folder, unread = tmp_path / "csft", frozenset({"negatives"})
    interrupt(folder, tmp_path, {"lr": 1, "negatives": 256})
    other = {"lr": 1, "negatives": 999}
    assert artifacts.decide(folder, other).reasons == ("interrupted", "negatives")
    assert artifacts.decide(folder, other, unread).reasons == ("interrupted",)
    with artifacts.stage(folder, "csft", other, tmp_path, unread):
        assert (folder / artifacts.CHECKPOINTS / "checkpoint-1" / "weights").read_text() == "hours"
    assert artifacts.require(folder, "csft").inputs == other


def test_equal_outputs_have_equal_fingerprints_whatever_the_inputs(tmp_path):
    finish(tmp_path / "one", tmp_path, {"a": 1})
    finish(tmp_path / "two", tmp_path, {"a": 2})
    finish(tmp_path / "three", tmp_path, {"a": 1}, "other")
    prints = [artifacts.require(tmp_path / name, "x").fingerprint for name in ("one", "two", "three")]
    assert prints[0] == prints[1] != prints[2]


def test_the_logged_course_of_a_training_is_no_result(tmp_path):
    for name in ("whole", "resumed"):
        with artifacts.stage(tmp_path / name, "csft", {}, tmp_path):
            (tmp_path / name / "weights").write_text("equal")
            (tmp_path / name / artifacts.METRICS).write_text(name)
    whole, resumed = (artifacts.require(tmp_path / name, "csft") for name in ("whole", "resumed"))
    assert whole.outputs != resumed.outputs and whole.fingerprint == resumed.fingerprint


def test_a_stage_finished_when_its_course_still_counted_keeps_its_fingerprint(tmp_path):
    with artifacts.stage(tmp_path / "csft", "csft", {}, tmp_path):
        for name in ("weights", artifacts.METRICS, artifacts.PROVENANCE):
            (tmp_path / "csft" / name).write_text(name)
    outputs = artifacts.require(tmp_path / "csft", "csft").outputs
    manifest = artifacts.read_json(tmp_path / "csft" / artifacts.MANIFEST)
    del manifest["uncounted"]
    artifacts.write_json(tmp_path / "csft" / artifacts.MANIFEST, manifest)
    counted = {name: outputs[name]["sha256"] for name in ("weights", artifacts.METRICS)}
    assert artifacts.require(tmp_path / "csft", "csft").fingerprint == artifacts.hash_json(counted)


def test_a_second_process_in_the_folder_is_refused(tmp_path):
    with (
        artifacts.run_lock(tmp_path),
        pytest.raises(ArtifactError, match="another llm2rec process"),
        artifacts.run_lock(tmp_path),
    ):
        pass


@pytest.fixture
def without_locks(monkeypatch):
    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(artifacts.fcntl, "flock", unsupported)


def test_a_file_system_without_locks_is_named_as_the_reason(tmp_path, without_locks):
    with (
        pytest.raises(
            ArtifactError, match=r"no locks \(Operation not supported\); choose an --out on a local disk"
        ),
        artifacts.run_lock(tmp_path),
    ):
        pass


def test_the_lock_is_gone_with_its_holder(tmp_path):
    with artifacts.run_lock(tmp_path):
        pass
    with artifacts.run_lock(tmp_path):
        assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("content", ["{", json.dumps({"format": 99})])
def test_a_damaged_manifest_is_an_artifact_error(tmp_path, content):
    (tmp_path / artifacts.MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match="manifest.json"):
        artifacts.read_manifest(tmp_path)


def test_a_large_input_is_read_once_until_it_is_written_again(tmp_path, monkeypatch):
    weights, read = tmp_path / "weights", []
    hash_file = artifacts.hash_file
    monkeypatch.setattr(artifacts, "hash_file", lambda path: read.append(path) or hash_file(path))
    weights.write_text("before")
    hashes = {artifacts.hash_file_once(weights) for _ in range(3)}
    assert len(read) == 1
    times = weights.stat()
    artifacts.write_text(weights, "behind")  # as many bytes
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert artifacts.hash_file_once(weights) == hash_file(weights) and hash_file(weights) not in hashes


def test_flatten_gives_dotted_keys():
    assert artifacts.flatten("csft", {"a": {"b": 1}, "c": [2]}) == {"csft.a.b": 1, "csft.c": [2]}


def test_a_stage_that_is_taken_over_is_finished_and_the_same(tmp_path):
    finish(tmp_path / "one" / "data", tmp_path / "one", {"a": 1})
    finish(tmp_path / "two" / "data", tmp_path / "two", {"a": 2}, "old")
    artifacts.take_over(tmp_path / "one" / "data", tmp_path / "two" / "data", tmp_path / "two")
    assert artifacts.decide(tmp_path / "two" / "data", {"a": 1}).keep
    taken, given = (artifacts.require(tmp_path / name / "data", "prepare") for name in ("two", "one"))
    assert taken == given
    (old,) = (tmp_path / "two" / artifacts.SUPERSEDED).rglob("out.txt")
    assert old.read_text() == "old"


def test_running_a_stage_again_leaves_the_one_that_took_it_over_alone(tmp_path):
    finish(tmp_path / "one" / "data", tmp_path / "one", {"a": 1})
    artifacts.take_over(tmp_path / "one" / "data", tmp_path / "two" / "data", tmp_path / "two")
    finish(tmp_path / "one" / "data", tmp_path / "one", {"a": 2}, "new")
    assert (tmp_path / "two" / "data" / "out.txt").read_text() == "result"
    assert artifacts.decide(tmp_path / "two" / "data", {"a": 1}).keep


def test_where_files_cannot_be_linked_they_are_copied(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("no links here")

    finish(tmp_path / "one" / "data", tmp_path / "one", {"a": 1})
    monkeypatch.setattr(artifacts.os, "link", refuse)
    artifacts.take_over(tmp_path / "one" / "data", tmp_path / "two" / "data", tmp_path / "two")
    assert artifacts.decide(tmp_path / "two" / "data", {"a": 1}).keep


def test_an_unfinished_stage_is_not_taken_over(tmp_path):
    (tmp_path / "one" / "data").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="no finished stage"):
        artifacts.take_over(tmp_path / "one" / "data", tmp_path / "two" / "data", tmp_path / "two")


def test_a_single_file_is_moved_aside_and_kept(tmp_path):
    artifacts.write_text(tmp_path / "evaluation" / "probes.html", "old")
    aside = artifacts.move_aside(tmp_path / "evaluation" / "probes.html", tmp_path)
    assert aside.read_text() == "old" and aside.parent.name == "evaluation"
    assert not (tmp_path / "evaluation" / "probes.html").exists()


def test_a_place_without_room_for_a_file_is_refused(tmp_path):
    artifacts.require_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write to .*file \(Not a directory\); make it writable"):
        artifacts.require_writable(tmp_path / "file")


def test_who_waits_for_another_process_says_so(tmp_path, monkeypatch):
    said = Queue()
    monkeypatch.setattr(artifacts.progress, "say", said.put)

    def wait():
        with artifacts.turn(tmp_path / "films.lock"):
            return said.empty()

    with ThreadPoolExecutor(1) as pool:
        with artifacts.turn(tmp_path / "films.lock"):
            waiting = pool.submit(wait)
            assert "waiting for another process" in said.get(timeout=20)
        assert waiting.result(20)


def test_on_a_file_system_without_locks_nobody_waits_which_is_said(tmp_path, without_locks, capsys):
    with artifacts.turn(tmp_path / "films.lock"), artifacts.turn(tmp_path / "films.lock"):
        said = capsys.readouterr().err
    assert "without locks (Operation not supported); start other processes when" in " ".join(said.split())
