"""Amazon Reviews 2023 (Hou et al. 2024, arXiv 2403.03952) and 2018 (Ni, Li, McAuley, EMNLP 2019)."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl

from llm2rec.data.files import PACKED, matching, refuse_missing, the_one
from llm2rec.data.layouts.assembly import COMMA, PIPE, assemble, joined
from llm2rec.data.layouts.delimited import (
    header_of,
    numbers,
    read_delimited,
    require_cells,
    whole_numbers,
)
from llm2rec.data.layouts.records import NUMBER, TEXT, TEXTS, WHOLE, read_records
from llm2rec.data.tables import RawTables
from llm2rec.errors import DataError, first_few

LONGEST_TITLE_CHARACTERS = 1000  # Amazon allows a few hundred; longer ones are pages of HTML
SCRIPT_MARK = "getTime"  # of the page script that the 2018 crawl took for a title
PARTS = {"train": "train", "valid": "validation", "test": "test"}


def read_amazon_2023(folder: Path) -> RawTables:
    """One category of Amazon Reviews 2023; the item is `parent_asin`, timestamps are milliseconds.

    `meta_<Category>.jsonl` with either the reviews `<Category>.jsonl`, the ratings of the 0-core and 5-core
    releases `<Category>.csv`, or their split form `<Category>.train.csv`, `.valid.csv`, `.test.csv` (each row
    is a target of that part; its `history` column repeats earlier rows and is ignored). Any may be packed.
    Text columns: main_category, categories, store, features, description.

    Raises:
        DataError: a file is missing, ambiguous, damaged or holds a malformed line.
    """
    meta = the_one(folder, r"meta_.+\.jsonl" + PACKED, "meta_<Category>.jsonl(.gz)")
    category = re.escape(meta.name.removeprefix("meta_").partition(".jsonl")[0])
    reviews = matching(folder, category + r"\.jsonl" + PACKED)
    ratings = matching(folder, category + r"(\.train|\.valid|\.test)?\.csv" + PACKED)
    plain = category.replace("\\", "")
    wanted = f"{plain}.jsonl(.gz) or {plain}.csv(.gz)"
    if not reviews and not ratings:
        refuse_missing(folder, wanted)
    split = all(_part_of(path) for path in ratings)
    if len(reviews) + (len(ratings) > 0) > 1 or (len(ratings) > 1 and not split):
        names = first_few([path.name for path in (*reviews, *ratings)])
        raise DataError(f"{folder} holds several files of the kind {wanted}: {names}; keep one of them")
    events = _reviews_2023(reviews[0]) if reviews else pl.concat(_ratings_2023(path) for path in ratings)
    return assemble(events, _items_2023(meta), {}, str(folder))


def _part_of(ratings: Path) -> str | None:
    return next((part for name, part in PARTS.items() if f".{name}.csv" in ratings.name), None)


def _reviews_2023(path: Path) -> pl.DataFrame:
    fields = {"user_id": TEXT, "parent_asin": TEXT, "timestamp": WHOLE, "rating": NUMBER}
    table = read_records(path, fields, ("user_id", "parent_asin", "timestamp"))
    return table.rename({"parent_asin": "item_id"})


def _ratings_2023(path: Path) -> pl.DataFrame:
    columns = ("user_id", "parent_asin", "rating", "timestamp")
    table = read_delimited(path, columns)
    require_cells(table, ("user_id", "parent_asin"), path)
    part = _part_of(path)
    return table.select(
        "user_id",
        pl.col("parent_asin").alias("item_id"),
        whole_numbers(table, "timestamp", path),
        numbers(table, "rating", path),
        *([pl.lit(part, dtype=pl.String).alias("part")] if part else []),
    )


def _items_2023(path: Path) -> pl.DataFrame:
    fields = {"parent_asin": TEXT, "title": TEXT, "main_category": TEXT, "categories": TEXTS}
    fields |= {"store": TEXT, "features": TEXTS, "description": TEXTS}
    table = read_records(path, fields, ("parent_asin",))
    return table.select(
        pl.col("parent_asin").alias("item_id"),
        "title",
        "main_category",
        joined("categories", PIPE),
        "store",
        joined("features", COMMA),
        joined("description", COMMA),
    )


def read_amazon_2018(folder: Path) -> RawTables:
    """One category of Amazon reviews 2018; timestamps are seconds.

    `meta_<Category>.json` with either the reviews `<Category>.json` or `<Category>_5.json`, or the ratings
    `<Category>.csv` (item, user, rating, timestamp, no header). Lines are JSON or Python dictionaries. Titles
    that are pages of HTML (over 1,000 characters, or with the script's `getTime`) are left out and counted.
    Text columns: brand, main_category, categories, description.

    Raises:
        DataError: a file is missing, ambiguous, damaged or holds a malformed line.
    """
    meta = the_one(folder, r"meta_.+\.json" + PACKED, "meta_<Category>.json(.gz)")
    category = meta.name.removeprefix("meta_").partition(".json")[0]
    pattern = re.escape(category) + r"((_5)?\.json|\.csv)" + PACKED
    events = the_one(folder, pattern, f"{category}.json(.gz), {category}_5.json(.gz) or {category}.csv")
    read = _ratings_2018 if f"{category}.csv" in events.name else _reviews_2018
    items = _items_2018(meta)
    damaged = pl.col("title").str.contains(SCRIPT_MARK, literal=True)
    damaged |= pl.col("title").str.len_chars() > LONGEST_TITLE_CHARACTERS
    kept = items.filter(~damaged.fill_null(False))
    dropped = {"items_with_damaged_title": items.height - kept.height}
    return assemble(read(events), kept, dropped, str(folder))


def _reviews_2018(path: Path) -> pl.DataFrame:
    fields = {"reviewerID": TEXT, "asin": TEXT, "unixReviewTime": WHOLE, "overall": NUMBER}
    table = read_records(path, fields, ("reviewerID", "asin", "unixReviewTime"))
    return table.rename(
        {"reviewerID": "user_id", "asin": "item_id", "unixReviewTime": "timestamp", "overall": "rating"}
    )


def _ratings_2018(path: Path) -> pl.DataFrame:
    width = len(header_of(path))
    if width != 4:
        raise DataError(f"{path}: the first line has {width} cells; item, user, rating, timestamp are needed")
    columns = ("item_id", "user_id", "rating", "timestamp")
    table = read_delimited(path, columns, has_header=False)
    require_cells(table, ("item_id", "user_id"), path, has_header=False)
    return table.select(
        "user_id",
        "item_id",
        whole_numbers(table, "timestamp", path, has_header=False),
        numbers(table, "rating", path, has_header=False),
    )


def _items_2018(path: Path) -> pl.DataFrame:
    fields = {"asin": TEXT, "title": TEXT, "brand": TEXT, "main_cat": TEXT, "category": TEXTS}
    table = read_records(path, {**fields, "description": TEXTS}, ("asin",))
    return table.select(
        pl.col("asin").alias("item_id"),
        "title",
        "brand",
        pl.col("main_cat").alias("main_category"),
        joined("category", PIPE).alias("categories"),
        joined("description", COMMA),
    )
