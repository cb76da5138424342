"""Maps of items."""

import re
from xml.etree import ElementTree

import pytest

from llm2rec.evaluation.maps import MAX_POINTS, EmbeddingMap, map_legend, map_svg, shown_places


def chart(count=3, **changes):
    fields = {
        "name": "llm2rec",
        "x": [float(place) for place in range(count)],
        "y": [0.0] * count,
        "titles": [f"title {place}" for place in range(count)],
        "colours": ["drama"] * count,
        "colour_name": "genre",
        "n_items": count,
    }
    return EmbeddingMap(**fields | changes)


def centres(svg):
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', svg)]


def test_every_dot_shows_its_title_escaped():
    svg = map_svg(chart(2, titles=["<b>A & B</b>", "C"]))
    titles = [title.text for title in ElementTree.fromstring(svg).iter("title")]
    assert titles == ["<b>A & B</b> (genre: drama)", "C (genre: drama)"]


def test_both_axes_have_one_scale_and_y_goes_up():
    (left, low), (right, high) = centres(map_svg(chart(2, x=[0.0, 2.0], y=[0.0, 1.0])))
    assert right - left == pytest.approx(2 * (low - high), abs=0.2) and low > high


def test_all_dots_lie_inside():
    svg = map_svg(chart(4, x=[-1e6, 5.0, 1e6, 0.0], y=[3e6, -3e6, 0.0, 1.0]))
    width, height = (float(size) for size in re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    assert all(0 < x < width and 0 < y < height for x, y in centres(svg))


def test_items_at_one_point_lie_in_the_middle():
    assert set(centres(map_svg(chart(3, x=[1.0] * 3)))) == {(240.0, 200.0)}


def test_the_six_most_frequent_categories_have_a_colour_and_the_rest_is_other():
    colours = [name for place, name in enumerate("abcdefgh") for _ in range(9 - place)]
    legend = map_legend(chart(len(colours), colours=colours))
    assert [label for label, _ in legend] == [*"abcdef", "other"]
    assert len({colour for _, colour in legend}) == 7


def test_a_category_called_other_is_the_rest():
    assert map_legend(chart(3, colours=["other", "other", "a"])) == [("a", "blue"), ("other", "grey")]


def test_values_are_coloured_in_five_steps_of_equally_many():
    legend = map_legend(chart(10, colours=[float(value) for value in range(10)]))
    assert legend == [(f"{low} to {low + 1}", f"ramp-{low // 2 + 1}") for low in range(0, 10, 2)]


def test_counts_are_written_in_full():
    assert map_legend(chart(5, colours=[12_345, 12_345, 1, 23_456, 1]))[1:] == [
        ("12,345", "ramp-3"),
        ("23,456", "ramp-5"),
    ]


def test_equal_values_share_a_step():
    assert map_legend(chart(5, colours=[0.0, 0.0, 0.0, 0.0, 7.0])) == [("0", "ramp-1"), ("7", "ramp-5")]


def test_a_large_map_is_thinned_evenly():
    places = shown_places(2 * MAX_POINTS + 1)
    assert places[:3] == [0, 2, 4] and len(places) == MAX_POINTS
    assert shown_places(5) == [0, 1, 2, 3, 4]


def test_the_svg_speaks_and_has_no_size_of_its_own():
    opening = re.match(r"<svg[^>]*>", map_svg(chart()))[0]
    assert 'role="img"' in opening and "Map of 3 items by llm2rec" in opening and "width=" not in opening


def test_a_map_of_other_lengths_is_refused():
    with pytest.raises(ValueError, match="3 x, 2 y"):
        chart(3, y=[0.0, 1.0])
    with pytest.raises(ValueError, match="at least one"):
        chart(0)
