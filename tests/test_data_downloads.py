"""Downloads from a server of this machine: going on after a break, checking, unpacking, recording a hash."""

import dataclasses
import hashlib
import io
import re
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from llm2rec.config import DataConfig
from llm2rec.data import downloads, origins, sources
from llm2rec.data.downloads import RemoteFile
from llm2rec.data.layouts import LAYOUTS
from llm2rec.data.mirrors import Url
from llm2rec.data.registry import layout_reader
from llm2rec.errors import DataError
from published import ml_csv

CONTENT = bytes(range(256)) * 40


class Site(HTTPServer):
    """Serves `files`; `breaks` lists after how many bytes each of the next answers breaks off."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.breaks, self.asked, self.ranges, self.version = {}, [], [], True, '"1"'

    def address(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        site, name = self.server, self.path.strip("/")
        asked = self.headers.get("Range")
        site.asked.append(asked)
        if name not in site.files:
            self.send_error(404)
            return
        content, start = site.files[name], 0
        if asked and site.ranges and self.headers.get("If-Range") == site.version:
            start = int(re.match(r"bytes=(\d+)-", asked).group(1))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        if site.version:
            self.send_header("ETag", site.version)
        self.end_headers()
        sent = content[start:]
        self.wfile.write(sent[: site.breaks.pop(0)] if site.breaks else sent)

    def log_message(self, *_args):
        pass


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def remote(site):
    site.files["log.gz"] = CONTENT
    return RemoteFile(site.address("log.gz"), hashlib.md5(CONTENT).hexdigest())


def broken_off(site, remote, folder, after=1000):
    """Leaves `after` bytes behind: the next answer brings them, the one after it nothing."""
    site.breaks = [after, 0]
    with pytest.raises(DataError) as caught:
        downloads.fetch(remote, folder)
    return str(caught.value)


def test_a_file_is_downloaded_under_its_own_name(remote, tmp_path):
    assert downloads.fetch(remote, tmp_path) == [tmp_path / "log.gz"]
    assert (tmp_path / "log.gz").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["log.gz"]


def test_a_break_that_brought_something_is_gone_on_from_at_once(site, remote, tmp_path):
    site.breaks = [1000, 500]
    downloads.fetch(remote, tmp_path)
    assert (tmp_path / "log.gz").read_bytes() == CONTENT
    assert site.asked == [None, "bytes=1000-", "bytes=1500-"]


def test_a_broken_download_leaves_its_part_and_says_so(site, remote, tmp_path):
    message = broken_off(site, remote, tmp_path)
    assert (tmp_path / "log.gz.part").read_bytes() == CONTENT[:1000]
    assert "1,000 bytes are kept, the same command goes on there" in message
    assert not (tmp_path / "log.gz").exists()


def test_a_later_call_goes_on_where_the_part_ends(site, remote, tmp_path):
    broken_off(site, remote, tmp_path)
    site.asked.clear()
    downloads.fetch(remote, tmp_path)
    assert site.asked == ["bytes=1000-"] and (tmp_path / "log.gz").read_bytes() == CONTENT


def test_a_server_that_knows_no_ranges_is_read_from_the_start(site, remote, tmp_path):
    broken_off(site, remote, tmp_path)
    site.ranges = False
    downloads.fetch(remote, tmp_path)
    assert (tmp_path / "log.gz").read_bytes() == CONTENT


def test_parts_of_two_versions_are_never_joined(site, remote, tmp_path):
    broken_off(site, remote, tmp_path)
    site.files["log.gz"], site.version = CONTENT[::-1], '"2"'
    downloads.fetch(RemoteFile(remote.address), tmp_path)
    assert (tmp_path / "log.gz").read_bytes() == CONTENT[::-1]


def test_a_part_of_unknown_version_is_not_gone_on_from(site, remote, tmp_path):
    (tmp_path / "log.gz.part").write_bytes(b"who knows")
    downloads.fetch(remote, tmp_path)
    assert site.asked == [None] and (tmp_path / "log.gz").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_fetched_anew(site, remote, tmp_path):
    broken_off(site, remote, tmp_path)
    (tmp_path / "log.gz.part").write_bytes(CONTENT * 2)
    downloads.fetch(remote, tmp_path)
    assert (tmp_path / "log.gz").read_bytes() == CONTENT


def test_a_file_that_is_there_is_not_asked_for(site, remote, tmp_path):
    downloads.fetch(remote, tmp_path)
    downloads.fetch(remote, tmp_path)
    assert site.asked == [None]


def test_another_md5_than_the_published_one_is_refused_and_deleted(site, remote, tmp_path):
    site.files["log.gz"] = CONTENT[:-1] + b"x"
    with pytest.raises(DataError, match=f"{remote.md5} is published"):
        downloads.fetch(remote, tmp_path)
    assert not (tmp_path / "log.gz").exists() and not (tmp_path / "log.gz.part").exists()


def test_a_missing_file_is_named_by_its_address(site, tmp_path):
    with pytest.raises(DataError, match=r"nothing\.gz does not answer: HTTP Error 404"):
        downloads.fetch(RemoteFile(site.address("nothing.gz")), tmp_path)


def test_members_of_an_archive_stay_inside_the_folder(site, tmp_path):
    site.files["ml.zip"] = archive({"../../ratings.csv": "a", "ml/movies.csv": "b", "ml/tags.csv": "c"})
    paths = downloads.fetch(
        RemoteFile(site.address("ml.zip"), None, ("ratings.csv", "movies.csv")), tmp_path / "in"
    )
    assert [path.read_text() for path in paths] == ["a", "b"]
    assert sorted(path.name for path in tmp_path.rglob("*.csv")) == ["movies.csv", "ratings.csv"]
    assert {path.parent for path in paths} == {tmp_path / "in"}


def archive(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for name, text in files.items():
            content.writestr(name, text)
    return buffer.getvalue()


def test_an_archive_without_the_member_names_what_it_holds(site, tmp_path):
    site.files["ml.zip"] = archive({"README.txt": "hello"})
    with pytest.raises(DataError, match="does not hold 'ratings.csv'; it holds 'README.txt'"):
        downloads.fetch(RemoteFile(site.address("ml.zip"), None, ("ratings.csv",)), tmp_path)


def test_what_is_no_archive_is_refused_and_deleted(site, tmp_path):
    site.files["ml.zip"] = b"<html>captive portal</html>"
    with pytest.raises(DataError, match="is no zip archive"):
        downloads.fetch(RemoteFile(site.address("ml.zip"), None, ("ratings.csv",)), tmp_path)
    assert not (tmp_path / "ml.zip").exists()


@pytest.fixture
def source(site, tmp_path, monkeypatch):
    """A registered data set of two files in the layout movielens-csv, without a registered hash."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("LLM2REC_CACHE", str(cache))
    (tmp_path / "published").mkdir()
    files = {path.name: path.read_bytes() for path in ml_csv(tmp_path / "published").glob("*s.csv")}
    site.files |= files
    remotes = tuple(RemoteFile(site.address(name)) for name in ("ratings.csv", "movies.csv"))
    toy = dataclasses.replace(
        sources.DATA["movielens-latest-small"],
        name="toy",
        mirrors=((Url(remotes), layout_reader("movielens-csv")),),
    )
    monkeypatch.setitem(sources.DATA, "toy", toy)
    return cache


def test_a_source_of_several_files_is_fetched_and_read_by_its_layout(source):
    interactions, catalogue = sources.fetch_data("toy")
    assert len(interactions) == 2 and catalogue.item_ids == ["1", "11"]


def test_downloaded_files_go_when_the_tables_are_kept(source):
    sources.fetch_data("toy")
    assert not list((source / "downloads").rglob("*.csv"))


def test_the_first_download_records_its_hash_and_tells_the_user(source, capsys):
    tables = sources.fetch_data("toy")
    assert sources.data_content_hash("toy") == sources.tables_hash(*tables)
    assert "no content hash is registered" in capsys.readouterr().err


def test_a_recorded_data_set_is_read_from_the_cache(source, site):
    sources.fetch_data("toy")
    site.files.clear()
    assert len(sources.fetch_data("toy")[0]) == 2


def test_of_two_that_start_on_an_empty_cache_one_downloads(source, site, by_two_at_once):
    first, second = by_two_at_once(sources.fetch_data, "toy")
    assert site.asked == [None, None]  # each of the two files once
    assert sources.tables_hash(*first) == sources.tables_hash(*second)


def test_a_cache_that_holds_the_set_need_not_be_writable(source, site):
    sources.fetch_data("toy")
    shutil.rmtree(source / "locks")
    (source / "locks").touch()  # nothing can be made in it
    assert len(sources.fetch_data("toy")[0]) == 2
    (source / "data" / "toy" / "items.parquet").unlink()
    with pytest.raises(DataError, match="toy cannot be stored .* set LLM2REC_CACHE"):
        sources.fetch_data("toy")


def test_a_later_download_must_match_the_recorded_hash(source, site):
    sources.fetch_data("toy")
    (source / "data" / "toy" / "items.parquet").unlink()
    site.files["movies.csv"] = site.files["movies.csv"].replace(b"Toy Story", b"Toy Storm")
    with pytest.raises(DataError, match="it is another version"):
        sources.fetch_data("toy")


def test_what_a_named_set_leaves_out_is_counted_then_and_later(source, site):
    site.files["ratings.csv"] += b"9,777,4.0,5\r\n"
    site.files["movies.csv"] += b"99,Unseen,Drama\r\n"
    for _ in ("downloaded", "from the cache"):
        log, _, left_out = origins.read(DataConfig(source="toy"))
        assert len(log) == 2 and left_out == {"events_of_unknown_items": 1, "items_without_events": 1}
        site.files.clear()


def test_a_damaged_record_is_named(source):
    sources.fetch_data("toy")
    (source / "data" / "toy" / "content.json").write_text("[")
    with pytest.raises(DataError, match=r"content.json is damaged"):
        sources.fetch_data("toy")


def test_the_hash_of_a_data_set_not_yet_fetched_is_had_by_fetching_it(source):
    found = sources.data_content_hash("toy")
    assert found == sources.tables_hash(*sources.fetch_data("toy"))


def test_an_interrupted_source_goes_on_in_the_cache(source, site):
    site.breaks = [30, 0]
    with pytest.raises(DataError, match="30 bytes are kept"):
        sources.fetch_data("toy")
    sources.fetch_data("toy")
    assert site.asked == [None, "bytes=30-", "bytes=30-", None]


def test_files_that_cannot_be_read_are_kept_and_said_to_be(source, site):
    site.files["movies.csv"] = b"movieId,title,genres\n1,Toy\n1,2,3,4\n"
    with pytest.raises(DataError, match=r"movies\.csv: line \d .*the files are kept in .*downloads"):
        sources.fetch_data("toy")


def test_items_that_no_event_names_are_not_in_the_canonical_tables(tmp_path):
    movies = ml_csv(tmp_path) / "movies.csv"
    movies.write_text(movies.read_text() + "99,Unseen,Drama\n")
    assert LAYOUTS["movielens-csv"](tmp_path).items.height == 3
    _, catalogue, left_out = layout_reader("movielens-csv")(tmp_path / "ratings.csv", movies)
    assert catalogue.item_ids == ["1", "11"] and left_out == {"items_without_events": 1}


@pytest.mark.parametrize("name", sources.DATA)
def test_registered_addresses_are_encrypted_and_their_files_have_names_of_their_own(name):
    for mirror, _ in sources.DATA[name].mirrors:
        if isinstance(mirror, Url):
            assert all(remote.address.startswith("https://") for remote in mirror.files)
            assert len({remote.name for remote in mirror.files}) == len(mirror.files)
