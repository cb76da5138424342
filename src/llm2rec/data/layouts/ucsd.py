"""Goodreads (Wan & McAuley 2018, Wan et al. 2019) and Steam (Kang & McAuley 2018) as UCSD publishes them."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from llm2rec.data.files import PACKED, matching, the_one
from llm2rec.data.layouts.assembly import COMMA, PIPE, assemble, joined
from llm2rec.data.layouts.records import AUTHORS, NUMBER, TEXT, TEXTS, read_records
from llm2rec.data.tables import RawTables

GOODREADS_TIME = "%a %b %d %H:%M:%S %z %Y"  # "Fri Apr 18 00:00:00 -0700 2014"
STEAM_TIME = "%Y-%m-%d"


def read_goodreads(folder: Path) -> RawTables:
    """`goodreads_interactions*.json` and `goodreads_books*.json`, whole or of one genre.

    Every shelved book is an event at `date_added` (epoch milliseconds), read or not; rating 0 means none was
    given and is null. An event whose date cannot be read is left out and counted. Text columns: publisher,
    year, description, and author where `goodreads_book_authors.json` lies beside them (books name authors by id).

    Raises:
        DataError: a file is missing, ambiguous, damaged or holds a malformed line.
    """
    log = the_one(folder, r"goodreads_interactions.*\.json" + PACKED, "goodreads_interactions*.json(.gz)")
    books = the_one(folder, r"goodreads_books.*\.json" + PACKED, "goodreads_books*.json(.gz)")
    authors = matching(folder, r"goodreads_book_authors\.json" + PACKED)
    fields = {"user_id": TEXT, "book_id": TEXT, "date_added": TEXT, "rating": NUMBER}
    events = read_records(log, fields, ("user_id", "book_id", "date_added"))
    time = pl.col("date_added").str.to_datetime(GOODREADS_TIME, time_unit="ms", strict=False)
    events = events.select(
        "user_id",
        pl.col("book_id").alias("item_id"),
        time.cast(pl.Int64).alias("timestamp"),
        pl.when(pl.col("rating") != 0).then("rating").alias("rating"),
    )
    events, dropped = _with_time(events)
    return assemble(events, _books(books, authors[0] if authors else None), dropped, str(folder))


def _books(path: Path, authors: Path | None) -> pl.DataFrame:
    texts = ("book_id", "title", "title_without_series", "publisher", "publication_year", "description")
    table = read_records(path, {**dict.fromkeys(texts, TEXT), "authors": AUTHORS}, ("book_id",))
    titled = pl.col("title").str.strip_chars() != ""
    items = table.select(
        pl.col("book_id").alias("item_id"),
        pl.when(titled).then("title").otherwise("title_without_series").alias("title"),
        "publisher",
        pl.col("publication_year").alias("year"),
        "description",
        pl.col("authors").list.eval(pl.element().struct.field("author_id")),
    )
    if authors is None:
        return items.drop("authors")
    names = read_records(authors, {"author_id": TEXT, "name": TEXT}, ("author_id", "name"))
    names = names.drop_nulls().unique("author_id", keep="first")
    known = pl.col("authors").list.eval(
        pl.element().replace_strict(names["author_id"], names["name"], default=None, return_dtype=pl.String)
    )
    return items.with_columns(known.list.drop_nulls().list.join(COMMA).alias("author")).drop("authors")


def read_steam(folder: Path) -> RawTables:
    """`steam_reviews.json` (or `steam_new.json`) and `steam_games.json`: one Python dictionary a line.

    A review is an event of `username` at `date` (epoch milliseconds, midnight UTC); hours played are no rating.
    An event whose date cannot be read is left out and counted. The title is `title`, else `app_name`. Text
    columns: developer, publisher, release_date, genres, tags.

    Raises:
        DataError: a file is missing, ambiguous, damaged or holds a malformed line.
    """
    log = the_one(folder, r"steam_(reviews|new)\.json" + PACKED, "steam_reviews.json(.gz) or steam_new.json(.gz)")
    games = the_one(folder, r"steam_games\.json" + PACKED, "steam_games.json(.gz)")
    needed = ("username", "product_id", "date")
    events = read_records(log, dict.fromkeys(needed, TEXT), needed)
    time = pl.col("date").str.to_datetime(STEAM_TIME, time_unit="ms", strict=False)
    events, dropped = _with_time(
        events.select(
            pl.col("username").alias("user_id"),
            pl.col("product_id").alias("item_id"),
            time.cast(pl.Int64).alias("timestamp"),
        )
    )
    return assemble(events, _games(games), dropped, str(folder))


def _games(path: Path) -> pl.DataFrame:
    texts = ("id", "title", "app_name", "developer", "publisher", "release_date")
    table = read_records(path, {**dict.fromkeys(texts, TEXT), "genres": TEXTS, "tags": TEXTS}, ("id",))
    titled = pl.col("title").str.strip_chars() != ""
    return table.select(
        pl.col("id").alias("item_id"),
        pl.when(titled).then("title").otherwise("app_name").alias("title"),
        "developer",
        "publisher",
        "release_date",
        joined("genres", PIPE),
        joined("tags", PIPE),
    )


def _with_time(events: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    kept = events.filter(pl.col("timestamp").is_not_null())
    return kept, {"events_without_readable_time": events.height - kept.height}
