"""The text of an item: a template over columns, without markup."""

import polars as pl
import pytest

from llm2rec.data.tables import Catalogue
from llm2rec.data.texts import clean, item_texts
from llm2rec.errors import ConfigError

ITEMS = Catalogue.from_frame(
    pl.DataFrame(
        {
            "item_id": ["1", "2", "3"],
            "title": ["Emma", "Dune", "Ulysses"],
            "author": ["Austen", None, " "],
            "genres": [["love", "society"], ["space"], None],
        }
    ),
    "books",
)


def test_the_default_text_is_the_title():
    assert item_texts(ITEMS) == ["Emma", "Dune", "Ulysses"]


def test_empty_columns_leave_their_part_out():
    assert item_texts(ITEMS, "{title}. {author}. {genres}") == [
        "Emma. Austen. love, society",
        "Dune. space",
        "Ulysses",
    ]


def test_a_template_may_begin_with_an_empty_column():
    assert item_texts(ITEMS, "{author}: {title}") == ["Austen: Emma", "Dune", "Ulysses"]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{title} ({author})", ["Emma (Austen)", "Dune", "Ulysses"]),
        ("{title} ({author}): {genres}", ["Emma (Austen): love, society", "Dune: space", "Ulysses"]),
        (
            "{title} [by {author} himself] {genres}",
            ["Emma [by Austen himself] love, society", "Dune space", "Ulysses"],
        ),
        ("{author}'s {title}", ["Austen's Emma", "Dune", "Ulysses"]),
        ('"{title}" - {author}, a book', ['"Emma" - Austen, a book', '"Dune"', '"Ulysses"']),
        (
            "The book {title} is on {genres}.",
            ["The book Emma is on love, society.", "The book Dune is on space.", "The book Ulysses"],
        ),
        ("{title} {{new}}", ["Emma {new}", "Dune {new}", "Ulysses {new}"]),
    ],
)
def test_an_empty_column_takes_the_plain_text_that_belongs_to_it(template, wanted):
    assert item_texts(ITEMS, template) == wanted


@pytest.mark.parametrize("template", ["{titel}", "title", "{title", "{item_id}", "{}"])
def test_a_template_that_means_nothing_is_refused(template):
    with pytest.raises(ConfigError, match="data.text"):
        item_texts(ITEMS, template)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("<b>Bold</b><br/>line", "Bold line"),
        ("a\u200bb\x00c\ufeff", "a b c"),
        ("  two\n lines\t", "two lines"),
        ("3 < 4 and 5 > 4", "3 < 4 and 5 > 4"),
        ("I <3 you", "I <3 you"),
    ],
)
def test_markup_and_control_characters_go_and_text_stays(text, wanted):
    assert clean(text) == wanted
