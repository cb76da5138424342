"""The command line on good and on bad input: every mistake ends in one message, before any training."""

import errno
import io
import json
import re
import sys
import urllib.error
import urllib.request

import polars as pl
import pytest
from safetensors import SafetensorError

import llm2rec as lr
from conftest import cyclic_log
from llm2rec import cli, studies
from test_pipeline import overrides, write_world
from test_studies import floor_study


@pytest.fixture
def llm2rec(monkeypatch, capsys):
    """Calls the command line in this process; returns exit status, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["llm2rec", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def run_on(llm2rec, tmp_path):
    """Runs the toy recipe on the given CSV texts; returns exit status and what stderr says."""

    def run(interactions=None, items=None, *changes):
        log, table = cyclic_log(users=4, items=6, events=5)
        (tmp_path / "interactions.csv").write_bytes((interactions or log.write_csv()).encode())
        (tmp_path / "items.csv").write_bytes((items or table.write_csv()).encode())
        settings = [part for change in (*overrides(tmp_path), *changes) for part in ("--set", change)]
        status, _, err = llm2rec("run", "demo", "--out", tmp_path / "run", *settings)
        return status, err

    return run


LOG = "user_id,item_id,timestamp\n"
ITEMS = "item_id,title\n"
EVENTS = "".join(f"u{user},i{item},{item}\n" for user in range(2) for item in range(3))
TITLES = "".join(f"i{item},Film {item}\n" for item in range(3))

BAD_INPUT = {
    "missing column": ("user,item_id,timestamp\nu,i0,1\n", None, ["interactions.csv", "user_id"]),
    "empty title": (LOG + EVENTS, ITEMS + "i0,\ni1,x\ni2,y\n", ["items.csv", "'i0'", "title"]),
    "blank title": (LOG + EVENTS, ITEMS + "i0,  \ni1,x\ni2,y\n", ["items.csv", "'i0'", "title"]),
    "unknown item": (LOG + EVENTS + "u0,i9,9\n", ITEMS + TITLES, ["'i9'"]),
    "duplicate item": (LOG + EVENTS, ITEMS + TITLES + "i1,again\n", ["items.csv", "'i1'"]),
    "null timestamp": (LOG + EVENTS + "u0,i0,\n", ITEMS + TITLES, ["interactions.csv", "timestamp", "row 7"]),
    "bad timestamp": (LOG + EVENTS + "u0,i0,soon\n", ITEMS + TITLES, ["timestamp", "row 7", "soon"]),
    "NaN timestamp": (LOG + EVENTS + "u0,i0,NaN\n", ITEMS + TITLES, ["timestamp", "row 7"]),
    "empty log": (LOG, ITEMS + TITLES, ["interactions.csv", "no rows"]),
    "zero bytes": (" ", ITEMS + TITLES, ["interactions.csv"]),
    "invisible title": (LOG + EVENTS, ITEMS + "i0,\u200b\ni1,x\ni2,y\n", ["items.csv", "'i0'", "title"]),
    "one user": (LOG + "u,i0,1\nu,i1,2\nu,i2,3\n", ITEMS + TITLES, ["only one user_id"]),
    "one item": (LOG + "u,i0,1\nv,i0,2\n", ITEMS + TITLES, ["only one item_id"]),
    "short histories": (LOG + EVENTS + "w,i0,1\n", ITEMS + TITLES, ["'w'", "short_histories=drop"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_before_any_training(run_on, tmp_path, case):
    interactions, items, words = BAD_INPUT[case]
    status, err = run_on(interactions, items)
    assert status == 1
    assert "Traceback" not in err and len(err.splitlines()) < 20
    assert [word for word in words if word not in err] == []
    assert not (tmp_path / "run" / "csft").exists()


def test_crlf_files_load(run_on):
    log, table = cyclic_log(users=4, items=6, events=5)
    crlf = [frame.write_csv().replace("\n", "\r\n") for frame in (log, table)]
    assert run_on(*crlf, "recommender.rows=[popularity]")[0] == 0


def test_short_histories_can_be_dropped(run_on):
    log, _ = cyclic_log(users=4, items=6, events=5)
    status, err = run_on(
        log.write_csv() + "w,i00,1\n", None, "data.short_histories=drop", "recommender.rows=[popularity]"
    )
    assert status == 0
    assert "left out: 1 (events of users too short for the split)" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("csft.max_token=5", "no such key"),
        ("csft.max_tokens=lots", "csft.max_tokens"),
        ("model.source=./no/such/model", "no file or folder"),
        ("recommender.rows=[sasrec-magic]", "unknown row"),
        ("data.history_length=0", "data.history_length"),
        ("csft=", "csft: a section"),
        ("recommender.rows=popularity", "[popularity]"),
        ("evaluation.k=10", "[10]"),
        ("evaluation.k=[5, 5]", "twice"),
        ("csft.max_tokens=100", "batch_tokens"),
        ("model.source=./nope.gguf", "no file or folder"),
        ("model.source=a b", "no possible hub id"),
    ],
)
def test_a_bad_setting_is_one_message(run_on, change, words):
    status, err = run_on(None, None, change)
    assert status == 1
    assert words in err and "Traceback" not in err and "Input should be" not in err


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "± ≈ ▲"), ("latin-1", r"± \u2248 \u25b2"), ("ascii", r"\xb1 \u2248 \u25b2")]
)
def test_a_terminal_of_another_encoding_is_shown_the_codes_of_what_it_lacks(llm2rec, monkeypatch, encoding, shown):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(cli, "app", lambda: cli.out.print("± ≈ ▲"))
    assert llm2rec()[0] == 0
    terminal.flush()
    assert terminal.buffer.getvalue().decode(encoding).strip() == shown


def test_a_bad_setting_leaves_no_folder(run_on, tmp_path):
    run_on(None, None, "csft.epochs=abc")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model_is_refused_before_the_data_are_read(run_on, tmp_path):
    (tmp_path / "empty").mkdir()
    status, err = run_on(None, None, f"model.source={tmp_path / 'empty'}")
    assert status == 1 and "config.json" in err
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize(("source", "words"), [("./nowhere", "no file or folder"), (".", "modules.json")])
def test_a_text_encoder_that_is_not_there_is_refused_before_the_data_are_read(run_on, tmp_path, source, words):
    status, err = run_on(
        None, None, f"encode.text_encoders.mine={source}", "recommender.rows=[popularity, sasrec-mine]"
    )
    assert status == 1 and "encode.text_encoders.mine" in err and words in err
    assert not (tmp_path / "run" / "data").exists()


def test_a_hub_that_cannot_be_asked_is_one_message_with_the_known_models(run_on, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    status, err = run_on(None, None, "model.source=someone/some-model")
    assert status == 1
    assert "no route to host" in err and "smollm2-135m-instruct-q4" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("recommender.dimensions=17", "vectors of tiny-random have 16"),
        ("recommender.dimensions=6", "6 different item texts of main vary in at most 5 directions"),
        ("encode.layer=3", "tiny-random has the layers 0 (embeddings) to 2"),
        ("iem.contrastive.positives=consumed-next", "of a batch of 8 without a title twice"),
    ],
)
def test_what_the_model_or_the_data_cannot_give_is_refused_before_csft(run_on, change, words):
    status, err = run_on(None, None, change)
    assert status == 1
    assert words in err and "done   csft" not in err


def test_views_that_the_model_cannot_give_are_refused_before_csft(run_on, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from llm2rec.lm import backbone as backbones
    from llm2rec.lm.tiny import make_tiny_random

    make_tiny_random(["Film"], tmp_path / "tiny", seed=0)
    tokenizer = backbones.load_tokenizer(tmp_path / "tiny")
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    backbones.save(backbones.Backbone(GPT2LMHeadModel(config), tokenizer), tmp_path / "gpt2")
    status, err = run_on(None, None, f"model.source={tmp_path / 'gpt2'}")
    assert status == 1
    assert "GPT2Model has no attention dropout" in err and "done   csft" not in err


@pytest.mark.parametrize(("title", "words"), [("Same film", "'Same film'"), (None, "single token")])
def test_titles_without_text_are_refused_before_csft(run_on, title, words):
    log, items = cyclic_log(users=4, items=6, events=5)
    titles = [title or chr(97 + number) for number in range(len(items))]
    status, err = run_on(log.write_csv(), items.with_columns(pl.Series("title", titles)).write_csv())
    assert status == 1
    assert words in err and "done   csft" not in err


FULL_DISK = {
    "pathlib": OSError(errno.ENOSPC, "No space left on device"),
    "numpy": OSError("2000000 requested and 262128 written"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "torch's stream": RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "polars": pl.exceptions.ComputeError("No space left on device (os error 28)"),
}


@pytest.mark.parametrize("writer", FULL_DISK)
def test_a_full_disk_is_said_in_words(llm2rec, monkeypatch, writer):
    def full(*args, **kwargs):
        raise FULL_DISK[writer]

    monkeypatch.setattr("llm2rec.pipeline.run", full)
    status, _, err = llm2rec("run", "demo")
    assert status == 1
    assert "disk is full" in err and "Traceback" not in err


def test_a_full_disk_is_said_in_words_whatever_it_led_to(llm2rec, monkeypatch):
    def full(*args, **kwargs):
        try:
            raise FULL_DISK["pathlib"]
        finally:
            raise ValueError("a file is cut short")

    monkeypatch.setattr("llm2rec.pipeline.run", full)
    status, _, err = llm2rec("run", "demo")
    assert status == 1 and "disk is full" in err


def test_a_fault_of_the_program_is_not_taken_for_a_full_disk(llm2rec, monkeypatch):
    def faulty(*args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("llm2rec.pipeline.run", faulty)
    with pytest.raises(RuntimeError, match="shapes differ"):
        llm2rec("run", "demo")


def test_the_verbs_print_titles(llm2rec, tmp_path):
    write_world(tmp_path, users=6, items=6, events=6)
    settings = [part for change in overrides(tmp_path) for part in ("--set", change)]
    settings += ["--set", "recommender.max_epochs=2"]
    status, out, _ = llm2rec("run", "demo", "--out", tmp_path / "run", *settings)
    assert status == 0
    assert "sasrec-llm2rec" in out and "nearest by llm2rec" in out
    status, out, _ = llm2rec("recommend", tmp_path / "run", "--history", "i00, i01", "-k", "2")
    assert status == 0 and "The " in out
    status, out, _ = llm2rec("recommend", tmp_path / "run", "--history", "i00", "--history", "i01", "-k", "2")
    assert status == 0 and "The " in out
    everything = ",".join(f"i{item:02d}" for item in range(6))
    status, out, _ = llm2rec("recommend", tmp_path / "run", "--history", everything)
    assert status == 0 and "covers the whole catalogue" in out
    status, out, _ = llm2rec("similar", tmp_path / "run", "i00", "-k", "2")
    assert status == 0 and "The " in out
    status, out, _ = llm2rec("similar", tmp_path / "run", "i00", "--vectors", "backbone")
    assert status == 0 and "The " in out
    status, out, _ = llm2rec("compare", tmp_path / "run", tmp_path / "run")
    assert status == 1  # the same folder twice is one run
    status, out, _ = llm2rec("data", "describe", tmp_path / "interactions.csv", tmp_path / "items.csv")
    assert status == 0 and "density" in out


def test_a_study_shows_its_tables_and_names_its_page(llm2rec, tmp_path, monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "floors", floor_study(users=20))
    status, out, _ = llm2rec("study", "floors", "--out", tmp_path / "study", "--set", "evaluation.k=[3]")
    assert status == 0
    said = " ".join(out.split())
    assert "Floors, 20 users; against popularity" in said and "study.html" in out.replace("\n", "")


def test_the_help_of_study_names_every_study(llm2rec):
    _, out, _ = llm2rec("study", "--help")
    assert [name for name in studies.STUDIES if name not in " ".join(out.split())] == []


def test_the_version_is_printed(llm2rec):
    status, out, _ = llm2rec("--version")
    assert status == 0 and out.strip() == f"llm2rec {lr.__version__}"


def test_an_empty_item_is_refused(llm2rec, tmp_path):
    write_world(tmp_path, users=6, items=6, events=6)
    changes = (*overrides(tmp_path), "recommender.rows=[popularity]")
    lr.run("demo", tmp_path / "run", changes)
    status, _, err = llm2rec("similar", tmp_path / "run", " ")
    assert status == 1 and "the item id is empty" in err and "The " not in err


@pytest.mark.parametrize("change", ['{"overrides": [1]}', '{"recipe_folder": 1}'])
def test_a_resolved_recipe_changed_by_hand_is_one_message(llm2rec, tmp_path, change):
    write_world(tmp_path, users=6, items=6, events=6)
    run = lr.run("demo", tmp_path / "run", (*overrides(tmp_path), "recommender.rows=[popularity]"))
    resolved = json.loads((run.folder / "resolved.json").read_text()) | json.loads(change)
    (run.folder / "resolved.json").write_text(json.dumps(resolved))
    (run.folder / "recipe.yaml").write_text((run.folder / "recipe.yaml").read_text() + "\n")
    status, _, err = llm2rec("evaluate", run.folder)
    assert status == 1 and "resolved.json is damaged" in err and "Traceback" not in err


def test_a_log_is_described_with_changes_to_its_recipe(llm2rec, tmp_path):
    write_world(tmp_path, users=6, items=6, events=6)
    settings = [part for change in overrides(tmp_path) for part in ("--set", change)]
    page = tmp_path / "log.html"
    status, out, _ = llm2rec(
        "data", "describe", "demo", *settings, "--set", "data.filters.users=3", "--html", page
    )
    assert status == 0 and re.search(r"users\s+3", out)
    assert "events a user" in page.read_text()


@pytest.mark.parametrize(
    ("option", "words"),
    [((), "the same command goes on"), (("--fresh",), "the same command without --fresh goes on")],
)
def test_an_interrupt_says_how_to_go_on(llm2rec, monkeypatch, option, words):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm2rec.pipeline.run", interrupted)
    status, _, err = llm2rec("run", "demo", *option)
    assert status == 130
    assert words in err


@pytest.mark.parametrize("verb", ["data", "models"])
def test_sources_are_listed_with_licence(llm2rec, verb):
    status, out, _ = llm2rec(verb, "list")
    assert status == 0 and "licence" in out


def test_a_missing_run_says_how_to_start_one(llm2rec, tmp_path):
    status, _, err = llm2rec("fit", tmp_path / "nowhere")
    assert status == 1
    assert "llm2rec run RECIPE" in err
