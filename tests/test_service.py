"""A run answers over HTTP as it answers in Python, takes up what changes in it, and says what it cannot do."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import asdict

import pytest
from fastapi.testclient import TestClient

import llm2rec as lr
from llm2rec import artifacts
from llm2rec.data.tables import Catalogue
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.serve import loaded, service
from test_additions import run, trained  # noqa: F401 (fixtures)


@pytest.fixture
def client(run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(loaded, "LOOKED_EVERY", 0.0)
    monkeypatch.setattr(loaded, "TRIED_EVERY", 0.0)
    return TestClient(lr.create_app(run))


def asked(client, *history, **options):
    answer = client.post("/recommend", json={"history": history, **options})
    return answer.status_code, answer.json()


@pytest.mark.parametrize("options", [{}, {"k": 3}, {"k": 1000}, {"with_history": True, "k": 2}, {"new_items": 0}])
def test_recommendations_are_those_of_the_function(client, run, options):  # noqa: F811
    status, answer = asked(client, "i03", "i04", **options)
    ours = {name: value for name, value in options.items() if name != "with_history"}
    expected = lr.recommend(run, ["i03", "i04"], exclude_history="with_history" not in options, **ours)
    assert status == 200 and answer["row"] == "sasrec-llm2rec" and answer["unknown"] == []
    assert [item["item_id"] for item in answer["items"]] == [item.item_id for item in expected]
    assert [item["score"] for item in answer["items"]] == pytest.approx([item.score for item in expected])
    assert answer["items"][0].keys() == asdict(expected[0]).keys()


@pytest.mark.parametrize("row", ["markov", "sasrec-id", "sasrec-llm2rec+average"])
def test_any_row_answers(run, row):  # noqa: F811
    status, answer = asked(TestClient(lr.create_app(run, row)), "i03", k=4)
    assert status == 200 and answer["row"] == row
    assert [item["item_id"] for item in answer["items"]] == [
        item.item_id for item in lr.recommend(run, ["i03"], k=4, row=row)
    ]


def test_unknown_items_of_a_history_are_left_out_and_named(client):
    plain = asked(client, "i03", "i04")[1]["items"]
    assert asked(client, 77, "i03", "gone", "i04", 77) == (
        200,
        {"row": "sasrec-llm2rec", "items": plain, "unknown": ["77", "gone"]},
    )
    status, answer = asked(client, "gone", "lost")
    assert status == 422 and "knows no item of the history: 'gone', 'lost'" in answer["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {"history": []},
        {"history": "i03"},
        {"history": ["i03"] * (service.LONGEST_HISTORY + 1)},
        {"history": ["i03"], "k": 0},
        {"history": ["i03"], "k": service.LONGEST_LIST + 1},
        {"history": ["i03"], "new_items": -1},
        {"history": ["i03"], "k": 2, "new_items": 3},
        {"history": ["i03"], "kk": 3},
        {"history": ["i03"], "k": True},
        {"history": ["i03"], "k": float("nan")},
        {"history": [True]},
        {"history": [1.0]},
        {"history": [None] * 100},
        {"history": ["i03", "\ud800"]},
        {"history": ["i03"], "\ud800": 1},
        {},
    ],
    ids=lambda body: ascii(body)[:40],
)
def test_a_request_that_makes_no_sense_is_refused(client, body):
    answer = client.post("/recommend", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and 0 < len(answer.json()["detail"]) < 500


def test_a_request_too_large_is_not_read(client):
    assert client.post("/recommend", json={"history": ["x" * service.LARGEST_BODY]}).status_code == 413


def test_similar_items_are_those_of_the_function(client, run):  # noqa: F811
    answer = client.get("/similar", params={"item": "i03", "k": 4}).json()
    assert answer["vectors"] == "llm2rec"
    assert lr.load_set(run).similar("i03", 4) == lr.similar(run, "i03", 4)
    assert [item["item_id"] for item in answer["items"]] == [item.item_id for item in lr.similar(run, "i03", 4)]
    missing = client.get("/similar", params={"item": "nothing"})
    assert missing.status_code == 404 and "'nothing'" in missing.json()["detail"]
    assert client.get("/similar", params={"item": "i03", "k": 0}).status_code == 422


def test_titles_are_searched_by_all_their_words_the_known_first(client):
    every = client.get("/items", params={"k": 1000}).json()
    assert sorted(every, key=lambda item: -item["events"]) == every and every[0]["events"] > 0
    title = every[-1]["title"]
    found = client.get("/items", params={"title": " ".join(reversed(title.upper().split()))}).json()
    assert title in [item["title"] for item in found] and len(found) < len(every)
    assert client.get("/items", params={"title": ".*"}).json() == []  # not a pattern
    assert len(client.get("/items", params={"k": 2}).json()) == 2


def test_added_items_are_taken_up_without_a_restart(client, run, capsys):  # noqa: F811
    before = client.get("/health").json()
    assert before["status"] == "ok" and before["row"] == "sasrec-llm2rec" and before["vectors"] == "llm2rec"
    assert client.get("/similar", params={"item": "new1"}).status_code == 404
    lr.add_items(run, run.folder.parent / "new.csv")
    assert client.get("/health").json() == before | {
        "items": before["items"] + 2,
        "new_items": before["new_items"] + 2,
    }
    assert "the run has changed: loaded anew" in capsys.readouterr().err
    assert asked(client, "new1", "i03")[1]["unknown"] == []
    (found,) = client.get("/items", params={"title": "something else"}).json()
    assert found == {"item_id": "new2", "title": "Something else", "events": 0}
    assert client.get("/similar", params={"item": "new1", "k": 3}).json()["items"]


def test_an_item_that_the_row_cannot_know_is_named(run):  # noqa: F811
    lr.add_items(run, run.folder.parent / "new.csv")
    status, answer = asked(TestClient(lr.create_app(run, "sasrec-id")), "i03", "new1")
    assert status == 200 and answer["unknown"] == ["new1"]


def test_a_run_that_can_no_longer_be_loaded_goes_on_answering_until_it_can(client, run, capsys):  # noqa: F811
    before = asked(client, "i03")
    manifest = run.recommender("sasrec-llm2rec", 0) / artifacts.MANIFEST
    weights = manifest.with_name("model.safetensors")
    kept = weights.read_bytes()
    weights.unlink()
    manifest.touch()
    assert asked(client, "i03") == before
    assert "cannot be loaded; the earlier one answers" in capsys.readouterr().err
    assert asked(client, "i03") == before
    assert "cannot be loaded" not in capsys.readouterr().err  # said once
    weights.write_bytes(kept)
    assert asked(client, "i03") == before
    assert "loaded anew" in capsys.readouterr().err


def test_a_service_answers_from_memory(client, run):  # noqa: F811
    run.folder.rename(run.folder.with_name("elsewhere"))
    assert client.get("/items").json() and asked(client, "i03")[0] == 200 and client.get("/").status_code == 200


@pytest.mark.parametrize("at_the_start", [True, False])
def test_what_changes_while_it_is_loaded_is_taken_up(run, monkeypatch, at_the_start):  # noqa: F811
    changes = [lambda: lr.add_items(run, run.folder.parent / "new.csv")]

    def load():
        made = loaded.load(run.folder, None, None, None)
        if changes:
            changes.pop()()
        return made

    monkeypatch.setattr(loaded, "LOOKED_EVERY", 0.0)
    change = None if at_the_start else changes.pop()
    latest = loaded.Latest(load)
    if change is not None:
        changes.append(change)
        (run.data / artifacts.MANIFEST).touch()
        assert len(latest.loaded.row.catalogue) == len(Catalogue.read(run.data / "catalogue.parquet"))
    known = latest.loaded
    assert known.row.reads("new2") and not known.outdated and "new2" in known.titles["item_id"]


def test_a_damaged_run_is_refused_at_the_start(run):  # noqa: F811
    shutil.rmtree(run.recommender("sasrec-llm2rec", 0))
    with pytest.raises(ArtifactError, match="sasrec-llm2rec"):
        lr.create_app(run)


def test_a_run_without_vectors_recommends_and_finds_nothing_similar(run):  # noqa: F811
    shutil.rmtree(run.folder / "embeddings")
    client = TestClient(lr.create_app(run, "sasrec-id"))
    assert asked(client, "i03")[0] == 200 and client.get("/health").json()["vectors"] is None
    assert client.get("/similar", params={"item": "i03"}).status_code == 404
    assert "const similarShown = false" in client.get("/").text


def test_a_row_that_needs_times_is_not_served(run, monkeypatch):  # noqa: F811
    served = lr.load_row(run, "sasrec-id")
    monkeypatch.setattr(type(served.scorer), "needs_times", True)
    with pytest.raises(ConfigError, match="looks at the times of events"):
        lr.create_app(run, "sasrec-id")


def test_the_page_shows_what_is_served_and_fetches_nothing_from_elsewhere(run, tmp_path):  # noqa: F811
    shutil.move(run.folder, tmp_path / "<b>shop")
    page = TestClient(lr.create_app(tmp_path / "<b>shop")).get("/").text
    assert "sasrec-llm2rec" in page and "&lt;b&gt;shop" in page and "<b>shop" not in page
    assert not re.findall(r"https?://", page)


def test_what_is_missing_is_named_where_fastapi_is_not_installed(run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(service, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'llm2rec\[serve\]'"):
        lr.create_app(run)


@pytest.mark.parametrize("host", ["", "no.such.host.invalid", "127.0.0.1"])
def test_a_place_where_it_cannot_listen_is_named_before_anything_is_loaded(tmp_path, host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=re.escape(f"cannot listen on host {host!r}, port {port} (")):
            service.serve(tmp_path / "nothing", host=host, port=port)


def test_the_verb_answers_until_it_is_interrupted(run):  # noqa: F811
    command = [sys.executable, "-m", "llm2rec.cli", "serve", str(run.folder), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        address = next(found[0] for line in lines if (found := re.search(r"http://127.0.0.1:\d+", line)))
        with urllib.request.urlopen(f"{address}/health", timeout=30) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.communicate()
