"""Damaged folders of published layouts: one DataError that names file and line, never another exception."""

import gzip
import json

import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llm2rec.data.files import line_chunks
from llm2rec.data.layouts import LAYOUTS, detect_layout, records
from llm2rec.data.tables import RawTables
from llm2rec.errors import DataError
from published import (
    FOLDERS,
    INTER,
    ITEM,
    META_2023,
    REVIEWS_2023,
    csft,
    downstream,
    jsonl,
    ml_1m,
    ml_100k,
    ml_csv,
    put,
    python_lines,
    steam,
    zstd,
)


def amazon_2023(folder, log, name="Video_Games.jsonl"):
    put(folder / name, log)
    put(folder / "meta_Video_Games.jsonl", jsonl(*META_2023))
    return folder


def refusal(layout, folder):
    with pytest.raises(DataError) as caught:
        LAYOUTS[layout](folder)
    return str(caught.value)


@pytest.mark.parametrize("name", ["Video_Games.jsonl.gz", "meta_Video_Games.jsonl.gz"])
def test_a_cut_off_gzip_file_is_named(tmp_path, name):
    put(tmp_path / "Video_Games.jsonl.gz", jsonl(*REVIEWS_2023))
    put(tmp_path / "meta_Video_Games.jsonl.gz", jsonl(*META_2023))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-12])
    message = refusal("amazon-2023", tmp_path)
    assert str(path) in message and "cut off" in message


def test_a_cut_off_gzip_table_is_named(tmp_path):
    log = put(tmp_path / "Video_Games.csv.gz", "user_id,parent_asin,rating,timestamp\nA,B001,5.0,1\n" * 50)
    put(tmp_path / "meta_Video_Games.jsonl", jsonl(*META_2023))
    log.write_bytes(log.read_bytes()[:-9])
    assert f"{log} is damaged or cut off" in refusal("amazon-2023", tmp_path)


def test_a_cut_off_zstd_file_is_named(tmp_path):
    path = amazon_2023(tmp_path, zstd(jsonl(*REVIEWS_2023).encode())[:-5], "Video_Games.jsonl.zst")
    assert f"{path / 'Video_Games.jsonl.zst'} is damaged or cut off" in refusal("amazon-2023", tmp_path)


def test_a_malformed_json_line_is_named_with_number_and_start(tmp_path):
    lines = jsonl(*REVIEWS_2023).splitlines()
    lines[2] = lines[2][:60]
    message = refusal("amazon-2023", amazon_2023(tmp_path, "\n".join(lines)))
    assert "Video_Games.jsonl: line 3 is neither" in message and lines[2][:30] in message


def test_a_malformed_line_is_counted_across_chunks(tmp_path):
    path = put(tmp_path / "log.jsonl", jsonl(*({"a": str(number)} for number in range(50))) + "{broken\n")
    with pytest.raises(DataError, match="log.jsonl: line 51 is neither"):
        records.read_records(path, {"a": records.TEXT}, ("a",), chunk_bytes=64)


def test_a_malformed_python_line_is_named(tmp_path):
    steam(tmp_path)
    good = python_lines({"username": "A", "product_id": "1", "date": "2017-01-01"})
    put(tmp_path / "steam_reviews.json.gz", good + good[:20])
    assert "steam_reviews.json.gz: line 2 is neither" in refusal("steam", tmp_path)


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    log = jsonl(*REVIEWS_2023).encode() + '{"user_id": "é"}\n'.encode("latin-1")
    assert "line 6 is not UTF-8" in refusal("amazon-2023", amazon_2023(tmp_path, log))


@pytest.mark.parametrize(("field", "value"), [("timestamp", "soon"), ("timestamp", 1.5), ("rating", [5])])
def test_a_value_of_a_wrong_type_is_named_with_its_line(tmp_path, field, value):
    log = jsonl(REVIEWS_2023[0], {**REVIEWS_2023[1], field: value})
    assert f"line 2 has a {field} that is not a" in refusal("amazon-2023", amazon_2023(tmp_path, log))


def test_numbers_written_as_text_are_numbers(tmp_path):
    log = jsonl({**REVIEWS_2023[0], "timestamp": "1588687728923", "rating": "4.0"})
    events = LAYOUTS["amazon-2023"](amazon_2023(tmp_path, log)).events.collect()
    assert events.select("timestamp", "rating").rows() == [(1588687728923, 4.0)]


def test_events_without_a_user_are_counted(tmp_path):
    log = jsonl(REVIEWS_2023[0], {**REVIEWS_2023[1], "user_id": None}, {**REVIEWS_2023[1], "user_id": " "})
    raw = LAYOUTS["amazon-2023"](amazon_2023(tmp_path, log))
    assert raw.dropped["events_without_user_item_or_time"] == 2


def test_a_file_of_another_layout_is_refused_by_its_fields(tmp_path):
    message = refusal("amazon-2023", amazon_2023(tmp_path, jsonl({"reviewerID": "A", "asin": "B001"})))
    assert "no record has the field 'user_id'" in message


@pytest.mark.parametrize("layout", FOLDERS)
def test_zero_byte_files_are_refused_by_name(tmp_path, layout):
    FOLDERS[layout](tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    assert "empty (zero bytes)" in refusal(layout, tmp_path) or "header" in refusal(layout, tmp_path)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ("1,1,4.0,964982703\n2,11\n", "line 3 has a timestamp that is no whole number"),
        ("1,1,4.0,964982703\n2,11,3.5,soon\n", "line 3 has a timestamp that is no whole number: '2, 11"),
        ("1,1,4.0,964982703\n2,11,3.5,1,1\n", "line 3 has 5 cells instead of 4"),
        ("1,1,4.0,964982703\n2,,3.5,1\n", "line 3 has no movieId"),
        ("1,1,nan,964982703\n", "line 2 has a rating that is no number"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path, rows, what):
    ml_csv(tmp_path)
    put(tmp_path / "ratings.csv", f"userId,movieId,rating,timestamp\n{rows}")
    assert f"ratings.csv: {what}" in refusal("movielens-csv", tmp_path)


def test_a_row_that_is_not_utf_8_is_named(tmp_path):
    ml_csv(tmp_path)
    put(tmp_path / "movies.csv", "movieId,title,genres\n1,Toy,A\n11,Misérables,B\n", "latin-1")
    assert "movies.csv: line 3 is not UTF-8" in refusal("movielens-csv", tmp_path)


def test_a_repeated_header_is_refused(tmp_path):
    ml_csv(tmp_path)
    put(tmp_path / "ratings.csv", "userId,movieId,movieId,rating,timestamp\n1,1,1,4.0,9\n")
    assert "names 'movieId' more than once" in refusal("movielens-csv", tmp_path)


def test_a_header_with_a_name_that_only_looks_repeated_is_read(tmp_path):
    ml_csv(tmp_path)
    put(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp,is_duplicated_order\n1,1,4.0,9,no\n")
    assert LAYOUTS["movielens-csv"](tmp_path).events.collect().height == 1


def test_a_repeated_field_of_an_atomic_file_is_refused(tmp_path):
    put(tmp_path / "ml.inter", INTER.replace("rating:float", "item_id:token"))
    put(tmp_path / "ml.item", ITEM)
    assert "names a field more than once" in refusal("recbole", tmp_path)


def test_an_atomic_file_without_types_is_refused(tmp_path):
    put(tmp_path / "ml.inter", INTER.replace(":token", ""))
    put(tmp_path / "ml.item", ITEM)
    assert "must name each field with its type" in refusal("recbole", tmp_path)


def test_a_line_of_movielens_1m_with_other_fields_is_named(tmp_path):
    ml_1m(tmp_path)
    put(tmp_path / "ratings.dat", "1::1193::5::978300760\n1::661::3\n")
    assert "ratings.dat: line 2 has 3 fields instead of 4: '1::661::3'" in refusal("movielens-1m", tmp_path)


def test_a_line_of_movielens_100k_with_other_fields_is_named(tmp_path):
    ml_100k(tmp_path)
    put(tmp_path / "u.data", "196\t1\t3\t881250949\n196\t2\n")
    assert "line 2 has 2 fields instead of 4" in refusal("movielens-100k", tmp_path)


def test_a_sample_without_a_history_is_named(tmp_path):
    downstream(tmp_path)
    put(tmp_path / "val_data.txt", "1 2\n3\n")
    assert "val_data.txt: line 2 is a target without a history" in refusal("llm2rec", tmp_path)


def test_a_missing_part_of_a_split_is_named(tmp_path):
    (downstream(tmp_path) / "val_data.txt").unlink()
    assert "has no val_data.txt" in refusal("llm2rec", tmp_path)


def test_a_history_that_is_no_list_is_named(tmp_path):
    put(tmp_path / "Games.csv", csft(("A", [1], 2)) + "B,print(1),It's 2,[1],2\n")
    assert "line 3 holds a history that is no Python list" in refusal("llm2rec", tmp_path)


def test_an_embedded_line_feed_belongs_to_the_title(tmp_path):
    ml_csv(tmp_path)
    put(tmp_path / "movies.csv", 'movieId,title,genres\n1,"Toy\nStory",A\n11,"A ""quoted"" one",B\n')
    assert LAYOUTS["movielens-csv"](tmp_path).items["title"].to_list() == ["Toy\nStory", 'A "quoted" one']


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = {"text": records.TEXT, "number": records.NUMBER, "whole": records.WHOLE, "texts": records.TEXTS}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.fixed_dictionaries({name: JSON for name in FIELDS}), min_size=1, max_size=3))
@example([{"text": [1, "x"], "number": 1, "whole": 2**53, "texts": [[1], {"a": None}]}])
def test_polars_and_the_line_by_line_reader_read_the_same(lines):
    chunk = "".join(json.dumps(line) + "\n" for line in lines).encode()
    quick = records._read_quickly(chunk, FIELDS, ("text",))
    if quick is not None:
        plain = records._read_line_by_line("log", 1, chunk, FIELDS)
        assert quick.select("whole", "number").equals(plain.select("whole", "number"))
        assert quick["text"].is_null().equals(plain["text"].is_null())
        assert quick["texts"].list.drop_nulls().list.len().equals(plain["texts"].list.drop_nulls().list.len())


def test_the_quick_reader_takes_what_publishers_write():
    chunk = jsonl(*REVIEWS_2023).encode()
    fields = {"user_id": records.TEXT, "timestamp": records.WHOLE, "rating": records.NUMBER}
    quick = records._read_quickly(chunk, fields, ("user_id", "timestamp"))
    assert quick is not None
    assert quick.equals(records._read_line_by_line("log", 1, chunk, fields))


CHANGES = st.sampled_from(["cut", "byte", "insert", "lines", "packed", "repeat"])


def damaged(content, change, place, junk):
    """The content with one damage at a place in [0, 1)."""
    at = int(len(content) * place)
    lines = content.splitlines(keepends=True)
    row = int(len(lines) * place)
    return {
        "cut": content[:at],
        "byte": content[:at] + junk[:1] + content[at + 1 :],
        "insert": content[:at] + junk + content[at:],
        "lines": b"".join([*lines[:row], junk + b"\n", *lines[row:]]),
        "packed": gzip.compress(content)[: at + 1],
        "repeat": content + content[at:],
    }[change]


JUNK = st.binary(min_size=1, max_size=6) | st.sampled_from(
    [b"\n", b'"', b"\t", b"::", b",", b"\x00", b"\xff\xfe", b"9" * 400, b"-1e999", b"NaN", b"{}", b"[[[", b"null"]
)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(which=st.integers(0, 4), change=CHANGES, place=st.floats(0, 1, exclude_max=True), junk=JUNK)
def test_no_damage_ends_in_anything_but_a_data_error(tmp_path_factory, layout, which, change, place, junk):
    folder = tmp_path_factory.mktemp("damaged")
    FOLDERS[layout](folder)
    files = sorted(folder.iterdir())
    path = files[which % len(files)]
    content = path.read_bytes()
    plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    path.write_bytes(damaged(plain, change, place, junk))
    try:
        raw = LAYOUTS[layout](folder)
    except DataError as error:
        assert str(error)
    else:
        assert isinstance(raw, RawTables) and raw.events.collect().height and raw.items.height
        assert raw.events.collect().null_count().select("user_id", "item_id", "timestamp").row(0) == (0, 0, 0)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        detect_layout(tmp_path / "nowhere")


@given(st.binary(max_size=60), st.integers(1, 20))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_chunks_join_to_the_file_and_count_its_lines(tmp_path, content, size):
    path = tmp_path / "file"
    path.write_bytes(b"x" + content)
    chunks = list(line_chunks(path, size))
    assert b"".join(chunk for _, chunk in chunks) == b"x" + content
    before = 0
    for number, chunk in chunks:
        assert number == before + 1
        before += chunk.count(b"\n")
    assert all(chunk.endswith(b"\n") for _, chunk in chunks[:-1])


def test_frames_of_several_chunks_keep_their_types(tmp_path):
    path = put(tmp_path / "log.jsonl", jsonl({"a": "x"}, {"a": "y", "b": ["z"]}, {"a": 3}))
    table = records.read_records(path, {"a": records.TEXT, "b": records.TEXTS}, ("a",), chunk_bytes=8)
    assert table.schema == {"a": pl.String, "b": pl.List(pl.String)}
    assert table["a"].to_list() == ["x", "y", "3"]
