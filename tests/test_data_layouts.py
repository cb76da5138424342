"""Published layouts: small folders written as their publishers write them, and what the readers make of them."""

import polars as pl
import pytest

from llm2rec.data.layouts import LAYOUTS, detect_layout
from llm2rec.data.tables import Catalogue, Interactions
from llm2rec.errors import DataError
from published import (
    ADDED,
    FOLDERS,
    INTER,
    ITEM,
    META_2018,
    META_2023,
    REVIEWS_2018,
    REVIEWS_2023,
    book,
    csft,
    downstream,
    jsonl,
    ml_1m,
    ml_100k,
    ml_csv,
    put,
    python_lines,
    shelved,
    zstd,
)


def rows(raw, *columns):
    return raw.events.collect().select(columns or pl.all()).rows()


def titles(raw):
    return dict(raw.items.select("item_id", "title").iter_rows())


@pytest.fixture
def amazon_2023(tmp_path):
    put(tmp_path / "Video_Games.jsonl.gz", jsonl(*REVIEWS_2023))
    put(tmp_path / "meta_Video_Games.jsonl.gz", jsonl(*META_2023))
    return tmp_path


def test_amazon_2023_reads_parent_asin_and_milliseconds(amazon_2023):
    raw = LAYOUTS["amazon-2023"](amazon_2023)
    assert rows(raw, "user_id", "item_id", "timestamp", "rating") == [
        ("AE22", "B001", 1588687728923, 5.0),
        ("AE22", "B002", 1588687728924, 1.0),
        ("AF33", "B001", 1588687728927, 5.0),
    ]


def test_amazon_2023_counts_items_without_a_title_and_the_events_that_go_with_them(amazon_2023):
    raw = LAYOUTS["amazon-2023"](amazon_2023)
    assert raw.dropped == {"items_without_title": 2, "events_of_unknown_items": 2}


def test_amazon_2023_keeps_the_text_fields_of_an_item(amazon_2023):
    item = LAYOUTS["amazon-2023"](amazon_2023).items.row(0, named=True)
    assert item == {
        "item_id": "B001",
        "title": "Zelda & Co: Ärger",
        "main_category": "Video Games",
        "categories": "Video Games|Legacy Systems",
        "store": "Nintendo",
        "features": "For PC, Two players",
        "description": "",
    }


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_files_are_read_plain_gzipped_and_zstd(tmp_path, ending):
    for name, records in (("Video_Games.jsonl", REVIEWS_2023), ("meta_Video_Games.jsonl", META_2023)):
        path = put(tmp_path / f"{name}{ending}", jsonl(*records))
        if ending == ".zst":
            path.write_bytes(zstd(jsonl(*records).encode()))
    assert len(rows(LAYOUTS["amazon-2023"](tmp_path))) == 3


CSV_2023 = "user_id,parent_asin,rating,timestamp\nAE22,B001,5.0,1588687728923\nAF33,B002,1.0,1588687728924\n"


def test_amazon_2023_ratings_of_the_core_releases_are_read(tmp_path):
    put(tmp_path / "Video_Games.csv.gz", CSV_2023)
    put(tmp_path / "meta_Video_Games.jsonl", jsonl(*META_2023))
    assert rows(LAYOUTS["amazon-2023"](tmp_path)) == [
        ("AE22", "B001", 1588687728923, 5.0),
        ("AF33", "B002", 1588687728924, 1.0),
    ]


def test_amazon_2023_splits_keep_their_parts_and_ignore_the_history(tmp_path):
    put(tmp_path / "meta_Video_Games.jsonl", jsonl(*META_2023))
    head, first, second = CSV_2023.splitlines()
    for name, line in (("train", f"{first},"), ("valid", f"{second},B001"), ("test", f"{first},B001 B002")):
        put(tmp_path / f"Video_Games.{name}.csv.gz", f"{head},history\n{line}\n")
    parts = dict(rows(LAYOUTS["amazon-2023"](tmp_path), "part", "item_id"))
    assert parts == {"train": "B001", "validation": "B002", "test": "B001"}


def test_two_logs_of_one_category_are_refused_by_name(amazon_2023):
    put(amazon_2023 / "Video_Games.csv", CSV_2023)
    with pytest.raises(DataError, match=r"several files.*Video_Games.jsonl.gz.*Video_Games.csv"):
        LAYOUTS["amazon-2023"](amazon_2023)


@pytest.mark.parametrize("lines", [jsonl, lambda *records: "".join(f"{record!r}\n" for record in records)])
@pytest.mark.parametrize("name", ["Video_Games.json.gz", "Video_Games_5.json.gz", "Video_Games_5.json"])
def test_amazon_2018_is_read_as_json_and_as_python_dictionaries(tmp_path, lines, name):
    put(tmp_path / name, lines(*REVIEWS_2018))
    put(tmp_path / "meta_Video_Games.json.gz", lines(*META_2018))
    raw = LAYOUTS["amazon-2018"](tmp_path)
    assert rows(raw) == [("A1HP", "0700026657", 1445040000, 4.0), ("A1JG", "B002", 1437955200, 5.0)]
    assert raw.items.row(0) == (
        *("0700026657", "Anno 2070", "Sega's", "Video Games"),
        *("Video Games|PC|</span></span></span>", "Loved it"),
    )


def test_amazon_2018_counts_html_titles_and_repeated_items_and_keeps_the_first(tmp_path):
    put(tmp_path / "Video_Games_5.json.gz", jsonl(*REVIEWS_2018))
    put(tmp_path / "meta_Video_Games.json.gz", jsonl(*META_2018))
    raw = LAYOUTS["amazon-2018"](tmp_path)
    assert titles(raw) == {"0700026657": "Anno 2070", "B002": "Sonic &amp; Tails"}
    assert raw.dropped == {"items_with_damaged_title": 2, "items_repeated": 1, "events_of_unknown_items": 1}


def test_amazon_2018_ratings_without_header_are_item_user_rating_time(tmp_path):
    put(tmp_path / "Video_Games.csv", "0700026657,A1HP,4.0,1445040000\nB002,A1JG,5.0,1437955200\n")
    put(tmp_path / "meta_Video_Games.json.gz", jsonl(*META_2018))
    assert rows(LAYOUTS["amazon-2018"](tmp_path)) == [
        ("A1HP", "0700026657", 1445040000, 4.0),
        ("A1JG", "B002", 1437955200, 5.0),
    ]


def test_a_python_line_is_never_executed(tmp_path):
    put(tmp_path / "Video_Games.json", jsonl(*REVIEWS_2018) + "__import__('os').system('true')\n")
    put(tmp_path / "meta_Video_Games.json", jsonl(*META_2018))
    with pytest.raises(DataError, match="Video_Games.json: line 4 is neither"):
        LAYOUTS["amazon-2018"](tmp_path)


def test_movielens_100k_reads_latin_1_and_genres(tmp_path):
    raw = LAYOUTS["movielens-100k"](ml_100k(tmp_path))
    assert raw.items.rows() == [
        ("1", "Toy Story (1995)", "01-Jan-1995", "Animation|Comedy"),
        ("2", "Misérables, Les (1995)", "01-Jan-1995", "Drama"),
    ]
    assert rows(raw)[0] == ("196", "1", 881250949, 3.0)


def test_movielens_10m_is_read_as_utf_8(tmp_path):
    films = ml_1m(tmp_path) / "movies.dat"
    films.write_text(films.read_text(encoding="latin-1"), encoding="utf-8")
    assert LAYOUTS["movielens-1m"](tmp_path).items.row(1)[1] == "Misérables: Les (1995)"


def test_movielens_1m_reads_double_colons_and_single_ones_in_titles(tmp_path):
    raw = LAYOUTS["movielens-1m"](ml_1m(tmp_path))
    assert raw.items.row(1) == ("1193", "Misérables: Les (1995)", "Drama")
    assert rows(raw)[1] == ("1", "661", 978302109, 3.0)


def test_movielens_csv_reads_quoted_titles_and_half_stars(tmp_path):
    raw = LAYOUTS["movielens-csv"](ml_csv(tmp_path))
    assert raw.items.row(1) == ("11", "American President, The (1995)", "")
    assert rows(raw)[1] == ("2", "11", 964981247, 3.5)


@pytest.fixture
def goodreads_folder(tmp_path):
    records = (shelved("8842", "12", ADDED, 5), shelved("8842", "13", ADDED, 0), shelved("77", "12", "", 3))
    put(tmp_path / "goodreads_interactions_poetry.json.gz", jsonl(*records))
    put(tmp_path / "goodreads_books_poetry.json.gz", jsonl(book("12", "W.C. Fields"), book("13", "")))
    return tmp_path


def test_goodreads_dates_become_milliseconds_and_rating_0_becomes_null(goodreads_folder):
    raw = LAYOUTS["goodreads"](goodreads_folder)
    assert rows(raw) == [("8842", "12", 1397804400000, 5.0), ("8842", "13", 1397804400000, None)]
    assert raw.dropped == {"events_without_readable_time": 1}


def test_goodreads_falls_back_to_the_title_without_series(goodreads_folder):
    raw = LAYOUTS["goodreads"](goodreads_folder)
    assert raw.items.row(1) == ("13", "Plain", "St. Martin's Press", "1984", "A book.")


def test_goodreads_names_authors_where_their_file_is_there(goodreads_folder):
    authors = jsonl({"author_id": "604031", "name": "Ronald J. Fields"}, {"author_id": "2", "name": "N. N."})
    put(goodreads_folder / "goodreads_book_authors.json.gz", authors)
    assert LAYOUTS["goodreads"](goodreads_folder).items["author"].to_list() == ["Ronald J. Fields"] * 2


@pytest.mark.parametrize("name", ["steam_reviews.json.gz", "steam_new.json.gz"])
def test_steam_reads_python_dictionaries(tmp_path, name):
    reviews = [
        {"username": "Chaos Syren", "hours": 0.1, "product_id": "725280", "date": "2017-12-17", "text": "It's"},
        {"username": "Ariman1", "product_id": "328100", "date": "2017-08-02", "text": 'ö \u2028 "x"'},
        {"username": "Ariman1", "product_id": "1", "date": "soon", "text": ""},
    ]
    games = [
        {"id": "725280", "app_name": "Lost & Co", "title": "Lost", "genres": ["Action", "Indie"], "tags": ["2D"]},
        {"id": "328100", "app_name": "Real Pool", "developer": "Ko'x", "release_date": "2014-08-05"},
        {"app_name": "no id at all"},
    ]
    put(tmp_path / name, python_lines(*reviews))
    put(tmp_path / "steam_games.json.gz", python_lines(*games))
    raw = LAYOUTS["steam"](tmp_path)
    assert rows(raw) == [("Chaos Syren", "725280", 1513468800000), ("Ariman1", "328100", 1501632000000)]
    assert raw.items.rows() == [
        ("725280", "Lost", "", "", "", "Action|Indie", "2D"),
        ("328100", "Real Pool", "Ko'x", "", "2014-08-05", "", ""),
    ]
    assert raw.dropped == {"events_without_readable_time": 1, "items_without_id": 1}


def test_recbole_reads_typed_fields(tmp_path):
    put(tmp_path / "ml-100k.inter", INTER)
    put(tmp_path / "ml-100k.item", ITEM)
    raw = LAYOUTS["recbole"](tmp_path)
    assert rows(raw) == [("196", "242", 881250949, 3.0), ("186", "302", 890000000, 3.0)]
    assert raw.items.row(0, named=True) == {
        **{"item_id": "242", "title": 'Kolya "K"', "release_year": "1996", "class": "Comedy|Drama"}
    }


def test_recbole_splits_keep_their_parts(tmp_path):
    head, first, second = INTER.splitlines()
    for name, line in (("train", first), ("valid", second), ("test", first)):
        put(tmp_path / f"ml.{name}.inter", f"{head}\n{line}\n")
    put(tmp_path / "ml.item", ITEM)
    assert rows(LAYOUTS["recbole"](tmp_path), "item_id", "part") == [
        ("242", "train"),
        ("302", "validation"),
        ("242", "test"),
    ]


def test_recbole_without_items_says_that_titles_are_needed(tmp_path):
    put(tmp_path / "ml-100k.inter", INTER)
    with pytest.raises(DataError, match=r"no <name>.item.*titles that are needed.*'ml-100k.inter'"):
        LAYOUTS["recbole"](tmp_path)


def test_recbole_without_a_title_field_names_the_fields_there_are(tmp_path):
    put(tmp_path / "ml-100k.inter", INTER)
    put(tmp_path / "ml-100k.item", ITEM.replace("movie_title", "caption"))
    with pytest.raises(DataError, match="no title field .*'caption'"):
        LAYOUTS["recbole"](tmp_path)


def test_llm2rec_lines_that_continue_each_other_are_one_sequence(tmp_path):
    assert rows(LAYOUTS["llm2rec"](downstream(tmp_path))) == [
        ("train-1", "1", 0, None),
        ("train-1", "2", 1, "train"),
        ("train-1", "3", 2, "train"),
        ("validation-1", "3", 0, None),
        ("validation-1", "1", 1, "validation"),
        ("train-1", "4", 3, "test"),
    ]


def test_llm2rec_histories_cut_to_the_last_items_are_continued(tmp_path):
    downstream(tmp_path)
    put(tmp_path / "train_data.txt", "1 2\n1 2 3\n2 3 4\n")  # histories of at most two items
    put(tmp_path / "val_data.txt", "3 4 1\n")
    put(tmp_path / "test_data.txt", "4 1 2\n")
    raw = LAYOUTS["llm2rec"](tmp_path)
    assert [row[1:] for row in rows(raw)] == [
        ("1", 0, None),
        ("2", 1, "train"),
        ("3", 2, "train"),
        ("4", 3, "train"),
        ("1", 4, "validation"),
        ("2", 5, "test"),
    ]


def test_llm2rec_whole_sequences_are_read_where_there_is_no_split(tmp_path):
    raw = LAYOUTS["llm2rec"](only_sequences(tmp_path))
    assert rows(raw)[4:] == [("line-2", "3", 0), ("line-2", "1", 1), ("line-2", "2", 2)]


def only_sequences(folder):
    for path in downstream(folder).glob("*_data.txt"):
        path.unlink()
    return folder


def test_llm2rec_csv_rows_of_a_user_become_one_sequence(tmp_path):
    put(tmp_path / "train" / "Games.csv", csft(("A", [1], 2), ("B", [5], 6), ("A", [1, 2], 3)))
    put(tmp_path / "test" / "Games.csv", csft(("A", [2, 3], 4)))
    assert rows(LAYOUTS["llm2rec"](tmp_path)) == [
        ("A", "1", 0, None),
        ("A", "2", 1, "train"),
        ("B", "5", 0, None),
        ("B", "6", 1, "train"),
        ("A", "3", 2, "train"),
        ("A", "4", 3, "test"),
    ]


def test_llm2rec_csv_rows_that_do_not_continue_a_sequence_begin_another(tmp_path):
    put(tmp_path / "Games.csv", csft(("A", [1], 2), ("A", [3], 4)))
    users = [row[0] for row in rows(LAYOUTS["llm2rec"](tmp_path))]
    assert users == ["A", "A", "A#2", "A#2"]


def test_llm2rec_csv_titles_come_from_rows_and_histories(tmp_path):
    put(tmp_path / "Games.csv", csft(("A", [1, 2], 3)))
    assert titles(LAYOUTS["llm2rec"](tmp_path)) == {"1": "It's 1", "2": "It's 2", "3": "It's 3"}


def test_llm2rec_csv_of_overlapping_domains_is_refused(tmp_path):
    put(tmp_path / "Mix.csv", csft(("A", [1], 2)) + "B,['Other'],It's 2,[1],2\n")
    with pytest.raises(DataError, match=r"line 3 calls item '1' 'Other', before it was \"It's 1\""):
        LAYOUTS["llm2rec"](tmp_path)


@pytest.mark.parametrize("layout", FOLDERS)
def test_the_layout_of_a_folder_is_found_by_its_files(tmp_path, layout):
    FOLDERS[layout](tmp_path)
    assert detect_layout(tmp_path) == layout


def test_csft_csv_files_are_found_by_their_header(tmp_path):
    put(tmp_path / "anything.csv", csft(("A", [1], 2)))
    assert detect_layout(tmp_path) == "llm2rec"


def test_a_folder_without_published_names_has_no_layout(tmp_path):
    put(tmp_path / "interactions.csv", "user_id,item_id,timestamp\na,x,1\n")
    assert detect_layout(tmp_path) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_file_is_named_with_what_the_folder_holds(tmp_path, layout):
    put(tmp_path / "notes.md", "nothing here")
    with pytest.raises(DataError, match=r"no .*(meta_|u\.|ratings|goodreads|steam|inter|titles).*'notes.md'"):
        LAYOUTS[layout](tmp_path)


@pytest.mark.parametrize("layout", ["movielens-100k", "movielens-1m", "movielens-csv", "recbole", "llm2rec"])
def test_raw_tables_pass_the_validation_of_the_canonical_tables(tmp_path, layout):
    FOLDERS[layout](tmp_path)
    raw = LAYOUTS[layout](tmp_path)
    assert len(Interactions.from_frame(raw.events.collect(), layout)) == len(rows(raw))
    assert len(Catalogue.from_frame(raw.items, layout)) == raw.items.height
    assert all(dtype == pl.String for dtype in raw.items.dtypes)
