"""Writes small folders in published layouts, as their publishers write them."""

import gzip
import json

import polars as pl

from llm2rec.data.readers import GENRES


def put(path, content, encoding="utf-8"):
    """Writes text or bytes, packed as the ending says."""
    data = content.encode(encoding) if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def python_lines(*records):
    """One Python dictionary a line, with the u'' of Python 2 that the publisher's files have."""
    return "".join(
        repr(record).replace("{'", "{u'").replace(", '", ", u'").replace(": '", ": u'") + "\n"
        for record in records
    )


def review_2023(user, parent, time, rating=5.0):
    return {
        "rating": rating,
        "title": "Great\nbuy",
        "text": 'It works, "really"',
        "images": [{"small_image_url": "https://x/y.jpg", "attachment_type": "IMAGE"}],
        "asin": f"{parent}X",
        "parent_asin": parent,
        "user_id": user,
        "timestamp": time,
        "helpful_vote": 0,
        "verified_purchase": True,
    }


def meta_2023(parent, title, **more):
    return {
        "main_category": "Video Games",
        "title": title,
        "average_rating": 4.8,
        "rating_number": 12,
        "features": ["For PC", " Two players "],
        "description": [],
        "price": None,
        "images": [],
        "videos": [],
        "store": "Nintendo",
        "categories": ["Video Games", "Legacy Systems"],
        "details": {"Best Sellers Rank": {"Video Games": 51019}, "Brand": "Nintendo"},
        "parent_asin": parent,
        "bought_together": None,
        **more,
    }


META_2023 = [
    meta_2023("B001", "Zelda & Co: Ärger"),
    meta_2023("B002", "Doom", price=9.99, store=None),
    meta_2023("B003", ""),
    meta_2023("B004", None),
]
REVIEWS_2023 = [
    review_2023("AE22", "B001", 1588687728923),
    review_2023("AE22", "B002", 1588687728924, rating=1.0),
    review_2023("AF33", "B003", 1588687728925),
    review_2023("AF33", "B999", 1588687728926),
    review_2023("AF33", "B001", 1588687728927),
]


def zstd(content):
    """A zstd frame of one uncompressed block (RFC 8878), for lack of a compressor."""
    assert len(content) < 2**17
    header = b"\x28\xb5\x2f\xfd" + bytes([0b10100000]) + len(content).to_bytes(4, "little")
    return header + ((len(content) << 3) | 1).to_bytes(3, "little") + content


def review_2018(user, asin, time, overall=5.0):
    return {
        "overall": overall,
        "verified": True,
        "reviewTime": "10 17, 2015",
        "reviewerID": user,
        "asin": asin,
        "reviewerName": "targe",
        "reviewText": "when it arrived",
        "summary": "Five Stars",
        "unixReviewTime": time,
    }


def meta_2018(asin, title, **more):
    return {
        "category": ["Video Games", "PC", "</span></span></span>"],
        "tech1": "",
        "description": ["Loved it"],
        "title": title,
        "brand": "Sega's",
        "main_cat": "Video Games",
        "price": "$19.99",
        "asin": asin,
        "details": {},
        **more,
    }


HTML = "var aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();"
META_2018 = [
    meta_2018("0700026657", "Anno 2070"),
    meta_2018("B002", "Sonic &amp; Tails"),
    meta_2018("B002", "Sonic again"),
    meta_2018("B003", HTML),
    meta_2018("B004", "long " * 300),
]
REVIEWS_2018 = [
    review_2018("A1HP", "0700026657", 1445040000, 4.0),
    review_2018("A1JG", "B002", 1437955200),
    review_2018("A1JG", "B003", 1437955201),
]


def ml_100k(folder):
    flags = {1: ("Animation", "Comedy"), 2: ("Drama",)}
    films = [
        "|".join([str(i), title, "01-Jan-1995", "", "http://x", *(str(int(g in flags[i])) for g in GENRES)])
        for i, title in ((1, "Toy Story (1995)"), (2, "Misérables, Les (1995)"))
    ]
    put(folder / "u.data", "196\t1\t3\t881250949\n196\t2\t5\t881250950\n186\t2\t1\t891717742\n")
    put(folder / "u.item", "\n".join(films) + "\n", "latin-1")
    put(folder / "u.genre", "".join(f"{genre}|{n}\n" for n, genre in enumerate(GENRES)) + "\n")
    return folder


def ml_1m(folder):
    put(folder / "ratings.dat", "1::1193::5::978300760\n1::661::3::978302109\n2::661::4::978301968\n")
    films = "661::James and the Giant Peach (1996)::Animation|Children's\n1193::Misérables: Les (1995)::Drama\n"
    put(folder / "movies.dat", films, "latin-1")
    put(folder / "users.dat", "1::F::1::10::48067\n")
    return folder


def ml_csv(folder):
    put(folder / "ratings.csv", "userId,movieId,rating,timestamp\r\n1,1,4.0,964982703\r\n2,11,3.5,964981247\r\n")
    films = '1,Toy Story (1995),Adventure|Animation\r\n11,"American President, The (1995)",(no genres listed)\r\n'
    put(folder / "movies.csv", f"movieId,title,genres\r\n{films}")
    put(folder / "links.csv", "movieId,imdbId,tmdbId\r\n1,0114709,862\r\n")
    return folder


ADDED = "Fri Apr 18 00:00:00 -0700 2014"


def shelved(user, book, added, rating):
    return {
        "user_id": user,
        "book_id": book,
        "review_id": "a5d5",
        "is_read": True,
        "rating": rating,
        "review_text_incomplete": "",
        "date_added": added,
        "date_updated": added,
        "read_at": "",
        "started_at": "",
    }


def book(book_id, title, **more):
    return {
        "isbn": "",
        "series": [],
        "authors": [{"author_id": "604031", "role": ""}, {"author_id": "1", "role": "Editor"}],
        "publisher": "St. Martin's Press",
        "publication_year": "1984",
        "description": "A book.",
        "book_id": book_id,
        "title": title,
        "title_without_series": "Plain",
        **more,
    }


INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n186\t302\t3\t8.9e8\n"
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\tprice:float\n"
    '242\tKolya "K"\t1996\tComedy Drama\t1.5\n302\tL.A. Confidential\t1997\tCrime\t2\n'
)


def downstream(folder):
    put(folder / "data.txt", "1 2 3 4\n3 1 2\n")
    put(folder / "train_data.txt", "1 2\n1 2 3\n")
    put(folder / "val_data.txt", "3 1\n")
    put(folder / "test_data.txt", "1  2 3 4")
    put(folder / "item_titles.json", json.dumps({"1": "One", "2": "Two", "3": "Three", "4": "Four, 4"}))
    return folder


HEADER = "user_id,history_item_title,item_title,history_item_id,item_id"


def csft(*samples):
    """A CSFT CSV of (user, history of ids, target id); item 7 is called "It's 7"."""
    rows = [
        (user, repr([f"It's {i}" for i in history]), f"It's {item}", repr(history), item)
        for user, history, item in samples
    ]
    return pl.DataFrame(rows, schema=HEADER.split(","), orient="row").write_csv()


def steam(folder):
    put(folder / "steam_reviews.json.gz", python_lines({"username": "A", "product_id": "1", "date": "2017-01-01"}))
    put(folder / "steam_games.json.gz", python_lines({"id": "1", "title": "One"}))


def recbole(folder):
    put(folder / "ml.inter", INTER)
    put(folder / "ml.item", ITEM)


def goodreads(folder, *dates):
    """Two books, and one event of each date on the first book's shelf."""
    records = [shelved(f"u{number}", "12", date, 5) for number, date in enumerate(dates)]
    put(folder / "goodreads_interactions_poetry.json.gz", jsonl(*records))
    put(folder / "goodreads_books_poetry.json.gz", jsonl(book("12", "W.C. Fields"), book("13", "")))


def amazon(folder, ending="jsonl"):
    put(folder / f"Books.{ending}.gz", jsonl(REVIEWS_2023[0] | REVIEWS_2018[0]))
    put(folder / f"meta_Books.{ending}.gz", jsonl(META_2023[0] | meta_2018("0700026657", "One")))


FOLDERS = {
    "amazon-2023": amazon,
    "amazon-2018": lambda folder: amazon(folder, "json"),
    "movielens-100k": ml_100k,
    "movielens-1m": ml_1m,
    "movielens-csv": ml_csv,
    "goodreads": lambda folder: goodreads(folder, ADDED),
    "steam": steam,
    "recbole": recbole,
    "llm2rec": downstream,
}
