"""Generic files as they break: one DataError that names file and line, and never a row that is lost in silence."""

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm2rec.data import readers
from llm2rec.errors import DataError

HEADER = ("user_id", "item_id", "timestamp")
LOG = b"user_id,item_id,timestamp\na,x,1\na,y,2\nb,x,3\n"
LINES = [b'{"user_id": "a", "item_id": "x", "timestamp": 1}', b'{"user_id": "b", "item_id": "y", "timestamp": 2}']


def refusal(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        readers.read_interactions(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (b"b,x,3,9", "line 5 has 4 cells instead of 3: 'b,x,3,9'"),
        (b'b,5" disk,3', "line 5 has a quotation mark without a second one"),
        (b'b,"x,3', "line 5 has a quotation mark without a second one"),
        (b'b,"x" y,3', "line 5 holds no separated cells"),
        ("b,é,3".encode("latin-1"), "line 5 is not UTF-8: 'b,\ufffd,3'; save the whole file as UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_a_broken_row_is_named_by_its_line_also_behind_embedded_line_feeds(tmp_path, name, row, what):
    content = b'user_id,item_id,timestamp\na,"x\ny",1\na,y,2\n' + row + b"\nb,z,4\n"
    content = gzip.compress(content) if name.endswith(".gz") else content
    assert f"{tmp_path / name}: {what}" in refusal(tmp_path / name, content)


@pytest.mark.parametrize("name", ["items.csv", "items.csv.gz"])
@pytest.mark.parametrize("feed", [b"\n", b"\r\n"])
@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (
            b'1,"One\ntwo",\n3,Long\nname,B\n',
            "line 4 has 2 cells instead of 3: '3,Long'; complete it; a cell with",
        ),
        (b"1,One,A\n2,Two", "line 3 has 2 cells instead of 3: '2,Two'"),
    ],
    ids=["line break without quotes", "cut off"],
)
def test_a_row_that_ends_early_is_named_by_its_line(tmp_path, name, feed, rows, what):
    content = (b"item_id,title,brand\n" + rows).replace(b"\n", feed)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError) as caught:
        readers.read_items(tmp_path / name)
    assert f"{tmp_path / name}: {what}" in str(caught.value)


def test_a_log_whose_row_ends_before_an_unused_column_is_refused(tmp_path):
    content = b"user_id,item_id,timestamp,review\na,x,1,\na,y,2,good\nb,z,3,so\nand,so,4\n"
    assert "log.csv: line 5 has 3 cells instead of 4: 'and,so,4'" in refusal(tmp_path / "log.csv", content)


@pytest.mark.parametrize("feed", ["\n", "\r\n"])
def test_an_empty_last_cell_is_no_row_that_ends_early(tmp_path, feed):
    text = f'item_id;title;brand{feed}1;One;{feed}2;"Two{feed}lines";{feed}3;a\rb;C{feed}4;"5"" disk";'
    (tmp_path / "items.csv").write_text(text, newline="")
    brands = readers.read_items(tmp_path / "items.csv").frame["brand"].to_list()
    assert brands == [None, None, "C", None]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"user_id": "a"', "line 2 is no JSON object (Expecting ',' delimiter, character 16)"),
        (b"[1, 2]", "line 2 is no JSON object"),
        (b'{"user_id": "a", "item_id": "x", "timestamp": NaN}', "NaN is no JSON; write null"),
        (b'{"user_id": "a", "item_id": "x", "timestamp": true}', "line 2 has a boolean as 'timestamp'"),
        ('{"user_id": "é"}'.encode("latin-1"), "line 2 is not UTF-8"),
    ],
)
def test_a_broken_json_line_is_named(tmp_path, line, what):
    message = refusal(tmp_path / "log.jsonl", b"\n".join([LINES[0], line, LINES[1]]))
    assert f"{tmp_path / 'log.jsonl'}: line 2 " in message and what in message


def test_json_lines_with_a_byte_order_mark_are_refused_with_what_to_do(tmp_path):
    message = refusal(tmp_path / "log.jsonl", b"\xef\xbb\xbf" + b"\n".join(LINES))
    assert "log.jsonl begins with a byte-order mark" in message and "tail -c +4" in message


def test_of_a_key_that_a_json_line_names_twice_the_first_counts(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(LINES[0].replace(b"}", b', "item_id": "z"}') + b"\n" + LINES[1])
    assert readers.read_interactions(tmp_path / "log.jsonl").frame["item_id"].to_list() == ["x", "y"]


@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.jsonl", "log.csv.gz"])
def test_a_zero_byte_file_is_refused_as_empty(tmp_path, name):
    assert f"{tmp_path / name} is empty" in refusal(tmp_path / name, b"")


def test_a_file_that_cannot_be_opened_is_refused_by_name(tmp_path, monkeypatch):
    def refused(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pl.LazyFrame, "collect_schema", refused)
    monkeypatch.setattr(Path, "open", refused)
    (tmp_path / "log.csv").touch()
    with pytest.raises(DataError, match="log.csv cannot be read .*Permission denied"):
        readers.read_interactions(tmp_path / "log.csv")


@pytest.mark.parametrize(
    ("second", "what"),
    [
        (
            b"item_id,user_id,timestamp\nx,a,1\n",
            "b.csv has the columns 'item_id', 'user_id', 'timestamp', but a.csv",
        ),
        (b"user_id,item_id,timestamp\na,x,1,7\n", "b.csv: line 2 has 4 cells instead of 3"),
        (b"user_id,item_id,timestamp\na,x,1\nb,x,soon\n", "(b.csv row 2: 'soon')"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named_by_file(tmp_path, second, what):
    (tmp_path / "a.csv").write_bytes(LOG)
    (tmp_path / "b.csv").write_bytes(second)
    with pytest.raises(DataError) as caught:
        readers.read_interactions(tmp_path)
    assert what in str(caught.value)


def test_json_lines_of_a_folder_may_differ_in_their_fields(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"item_id": 1, "title": "One"}\n')
    (tmp_path / "b.jsonl").write_text('{"brand": "B", "title": "Two", "item_id": "x"}\n')
    items = readers.read_items(tmp_path)
    assert items.frame.sort("item_id").rows() == [("1", "One", None), ("x", "Two", "B")]


@pytest.mark.parametrize(
    ("header", "shown"),
    [
        ("kunde;artikel;zeit", "it has 'kunde', 'artikel', 'zeit'"),
        ("user_id;item_id;zeit", "no column 'timestamp'; it has 'user_id', 'item_id', 'zeit'"),
        ("user_id item_id timestamp", "it has 'user_id item_id timestamp'"),
    ],
)
def test_a_header_without_the_wanted_columns_is_shown_as_it_is(tmp_path, header, shown):
    assert f"{shown}. Rename the columns" in refusal(tmp_path / "log.csv", f"{header}\na;x;1\n".encode())


def test_where_columns_are_mapped_the_mapping_is_to_be_corrected(tmp_path):
    (tmp_path / "log.csv").write_text("kunde;item_id;timestamp\na;x;1\nb;y;2\n")
    with pytest.raises(DataError, match="no column 'customer'; it has 'kunde'.*Correct data.columns") as caught:
        readers.read_interactions(tmp_path / "log.csv", {"user_id": "customer"})
    assert "map them" not in str(caught.value)


def test_a_broken_row_is_named_under_the_separator_of_the_header(tmp_path):
    content = LOG.replace(b",", b";") + b"b;x;3;9\n"
    assert "line 5 has 4 cells instead of 3: 'b;x;3;9'" in refusal(tmp_path / "log.csv", content)


def test_dates_whose_day_and_month_are_unclear_are_counted_with_how_to_write_them(tmp_path):
    message = refusal(tmp_path / "log.csv", LOG.replace(b",1\n", b",08.07.2022 20:52\n"))
    assert "in 1 of 3 rows (row 1: '08.07.2022 20:52'); write ISO dates, or remove these rows" in message


def test_utf_16_is_recognised(tmp_path):
    assert "looks like UTF-16" in refusal(tmp_path / "log.csv", LOG.decode().encode("utf-16"))


IDS = st.one_of(
    st.text(max_size=5),
    st.integers(-(2**64), 2**64),
    st.floats(),
    st.sampled_from(
        [12, 12.0, "12", "012", "12.0", " 12 ", "Ω\u200b", "two\nlines", 'a "quoted", one', None, True]
    ),
)
TIMES = st.one_of(
    st.integers(-(10**19), 10**19),
    st.floats(),
    st.sampled_from(
        ["1", "1.5", "2020-02-30", "2020-02-29", "0001-01-01", "9999-12-31T23:59:59.999Z", "", None, "x"]
    ),
)


def text_of(rows, kind):
    if kind == "jsonl":
        return "".join(json.dumps(dict(zip(HEADER, row, strict=True))) + "\n" for row in rows)
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([HEADER, *rows])
    return text.getvalue()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(IDS, IDS, TIMES), min_size=1, max_size=6), st.sampled_from(["csv", "jsonl"]))
def test_a_readable_log_keeps_every_row_and_another_is_refused_by_name(rows, kind):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"log.{kind}"
        path.write_bytes(text_of(rows, kind).encode("utf-8", "replace"))
        try:
            log = readers.read_interactions(path)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert len(log) == len(rows) and log.frame.null_count().sum_horizontal().item() == 0
            assert (log.times() // log.ticks_per_second()).dtype == "int64"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_log_with_every_oddity_that_is_legal_keeps_every_row(tmp_path, kind):
    rows = [
        ("two\nlines", "Ω", "2020-02-29"),
        ('a "quoted", one', "012", "1960-01-01"),
        (" 12 ", "12", "2020-03-01T10:00Z"),
    ]
    (tmp_path / f"log.{kind}").write_text(text_of(rows, kind), encoding="utf-8", newline="")
    log = readers.read_interactions(tmp_path / f"log.{kind}")
    assert sorted(log.frame["user_id"].cast(pl.String)) == ["12", 'a "quoted", one', "two\nlines"]
    assert sorted(log.frame["item_id"].cast(pl.String)) == ["012", "12", "Ω"]
