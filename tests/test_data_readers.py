"""Files as people write them, and as they break."""

import gzip
import io
import zipfile

import polars as pl
import pytest

from llm2rec.data import readers
from llm2rec.data.tables import FILE
from llm2rec.errors import DataError

LOG = "user_id,item_id,timestamp\na,x,1\na,y,2\nb,x,3\n"


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.csv", LOG.encode()),
        ("log.csv", LOG.replace("\n", "\r\n").encode()),
        ("log.csv", b"\xef\xbb\xbf" + LOG.encode()),
        ("log.tsv", LOG.replace(",", "\t").encode()),
        ("log.csv", b"\xef\xbb\xbf" + LOG.replace(",", ";").replace("\n", "\r\n").encode()),
        ("log.csv", LOG.replace(",", "\t").encode()),
        ("log.txt", LOG.encode()),
        ("log.txt", LOG.replace(",", "|").encode()),
        ("log.csv", b'"user_id";"item_id";"timestamp";"a, b"\na;x;1;\na;y;2;\nb;x;3;"6,5"\n'),
        ("log.csv.gz", gzip.compress(LOG.replace(",", ";").encode())),
    ],
    ids=["csv", "crlf", "bom", "tsv", "semicolon", "tab in csv", "comma in txt", "bar", "quoted", "compressed"],
)
def test_text_tables_read_the_same(tmp_path, name, content):
    events = readers.read_interactions(written(tmp_path, name, content))
    assert events.frame.rows() == [("a", "x", 1), ("a", "y", 2), ("b", "x", 3)]


def test_the_files_of_a_folder_are_separated_as_the_first(tmp_path):
    for name, rows in (("a.csv", "a;x;1\na;y;2\n"), ("b.csv", "b;x;3\n")):
        (tmp_path / name).write_text("user_id;item_id;timestamp\n" + rows)
    assert readers.read_interactions(tmp_path).frame.height == 3


def test_the_separator_is_what_shows_the_mapped_columns(tmp_path):
    path = written(tmp_path, "items.csv", b"sku;name, or title;price\nx;One, two;6,50\ny;Three;7\n")
    items = readers.read_items(path, {"item_id": "sku", "title": "name, or title"})
    assert items.frame.rows() == [("x", "One, two", "6,50"), ("y", "Three", "7")]


def test_parquet_reads_like_csv(tmp_path):
    path = written(tmp_path, "log.csv", LOG.encode())
    pl.read_csv(path, infer_schema=False).write_parquet(tmp_path / "log.parquet")
    first, second = (readers.read_interactions(tmp_path / name) for name in ("log.csv", "log.parquet"))
    assert first.frame.equals(second.frame)


JSON_LOG = b'{"user_id": "a", "item_id": "x", "timestamp": 1}\n{"user_id": "b", "item_id": "y", "timestamp": 2}\n'


@pytest.mark.parametrize("name", ["part[12].jsonl", "part?.jsonl", "part*.jsonl"])
def test_a_name_with_wildcards_is_that_of_one_file(tmp_path, name):
    written(tmp_path, "part1.jsonl", JSON_LOG.replace(b'"x"', b'"of another file"'))
    events = readers.read_interactions(written(tmp_path, name, JSON_LOG))
    assert events.frame.rows() == [("a", "x", 1), ("b", "y", 2)]


def test_a_folder_with_wildcards_in_its_name_is_read_and_its_files_are_named_plainly(tmp_path):
    folder = tmp_path / "data[1]"
    folder.mkdir()
    written(folder, "l.jsonl", JSON_LOG)
    assert readers.read_interactions(folder).frame.rows() == [("a", "x", 1), ("b", "y", 2)]
    assert readers.scan_table(folder).collect()[FILE].to_list() == [str(folder / "l.jsonl")] * 2


def test_cells_of_csv_stay_text(tmp_path):
    path = written(tmp_path, "items.csv", b"item_id,title\n007,1984\n08,300\n")
    assert readers.read_items(path).frame.rows() == [("007", "1984"), ("08", "300")]


def test_quoted_separators_and_line_breaks_belong_to_the_title(tmp_path):
    path = written(tmp_path, "items.csv", b'item_id,title\nx,"One, two"\ny,"Three\nfour"\n')
    assert readers.read_items(path).titles == ["One, two", "Three\nfour"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.csv", b""),
        ("log.parquet", b""),
        ("log.csv", b"user_id,item_id\na,x,1,2\n"),
        ("log.csv", b"user_id,item_id\n\xff\xfe,x\n"),
        ("log.parquet", b"PAR1 but no more"),
        ("log.xlsx", b"PK"),
    ],
    ids=["zero bytes", "zero bytes parquet", "ragged", "not utf-8", "damaged parquet", "unknown suffix"],
)
def test_an_unreadable_file_is_refused_by_name(tmp_path, name, content):
    path = written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        readers.read_interactions(path)
    assert str(path) in str(caught.value)


def test_a_truncated_parquet_file_is_refused_by_name(tmp_path):
    buffer = io.BytesIO()
    pl.DataFrame({"user_id": [str(i) for i in range(1000)]}).write_parquet(buffer)
    path = written(tmp_path, "log.parquet", buffer.getvalue()[: buffer.tell() // 2])
    with pytest.raises(DataError, match="log.parquet"):
        readers.read_interactions(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="nowhere.csv"):
        readers.read_interactions(tmp_path / "nowhere.csv")


def test_a_header_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        readers.read_interactions(written(tmp_path, "log.csv", b"user_id,item_id,timestamp\n"))


def test_an_unparsable_timestamp_in_csv_is_refused_with_its_row(tmp_path):
    path = written(tmp_path, "log.csv", LOG.replace("y,2", "y,soon").encode())
    with pytest.raises(DataError, match=r"log.csv: timestamp .*row 2: 'soon'"):
        readers.read_interactions(path)


FILMS = [  # id, title, release date, genres
    (1, "Toy Story (1995)", "01-Jan-1995", ("Animation", "Children's", "Comedy")),
    (2, "Misérables, Les (1995) ", "01-Jan-1995", ("Drama",)),
    (267, "unknown", "", ("unknown",)),
]
RATINGS = [(196, 1, 3, 881250949), (196, 267, 5, 881250949), (186, 2, 1, 891717742)]


@pytest.fixture
def published_zip(tmp_path):
    flags = [[str(int(genre in film[3])) for genre in readers.GENRES] for film in FILMS]
    items = ["|".join([str(f[0]), f[1], f[2], "", "", *flag]) for f, flag in zip(FILMS, flags, strict=True)]
    ratings = ["\t".join(map(str, rating)) for rating in RATINGS]
    with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as archive:
        archive.writestr("ml-100k/u.data", "\n".join(ratings) + "\n")
        archive.writestr("ml-100k/u.item", ("\n".join(items) + "\n").encode("latin-1"))
    return tmp_path / "ml-100k.zip"


@pytest.fixture
def wheel_files(tmp_path):
    columns = ["user_id", "movie_id", "rating", "timestamp"]
    pl.DataFrame(RATINGS, schema=columns, orient="row").write_parquet(tmp_path / "data.parquet.brotli")
    films = [
        {"movie_id": film[0], "movie_title": film[1], "release_date": film[2] or None}
        | {genre: int(genre in film[3]) for genre in readers.GENRES}
        for film in FILMS
    ]
    pl.DataFrame(films).write_parquet(tmp_path / "items.parquet.brotli")
    return tmp_path / "data.parquet.brotli", tmp_path / "items.parquet.brotli"


def test_movielens_titles_are_stripped_and_keep_year_and_accents(published_zip):
    _, items = readers.read_movielens_100k_zip(published_zip)
    assert items.titles == ["Toy Story (1995)", "Misérables, Les (1995)", "unknown"]


def test_movielens_genres_are_joined_in_published_order(published_zip):
    _, items = readers.read_movielens_100k_zip(published_zip)
    assert items.frame["genres"].to_list() == ["Animation|Children's|Comedy", "Drama", "unknown"]


def test_both_layouts_of_movielens_give_identical_tables(published_zip, wheel_files):
    published = readers.read_movielens_100k_zip(published_zip)
    packaged = readers.read_movielens_100k_parquet(*wheel_files)
    assert all(a.frame.equals(b.frame) for a, b in zip(published, packaged, strict=True))


def test_an_archive_that_is_not_movielens_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(DataError, match="other.zip"):
        readers.read_movielens_100k_zip(tmp_path / "other.zip")
