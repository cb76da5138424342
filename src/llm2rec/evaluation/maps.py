"""Maps of items as inline SVG: one dot an item, its title shown when it is pointed at.

Written by hand and not drawn: two thousand dots stay small, and each carries a `<title>`. Imports nothing heavy.
"""

from __future__ import annotations

import html
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MAX_POINTS = 2_000
OTHER = "other"

_WIDTH, _HEIGHT, _MARGIN, _RADIUS = 480, 400, 8, 2.6
_CATEGORY_COLOURS = ("blue", "vermilion", "green", "amber", "purple", "sky")
_VALUE_COLOURS = ("ramp-1", "ramp-2", "ramp-3", "ramp-4", "ramp-5")  # from low to high
_OTHER_COLOUR = "grey"


@dataclass(frozen=True)
class EmbeddingMap:
    """Items in the plane; all sequences are of one length, an entry an item.

    Attributes:
        name: what is shown, as the vector set.
        x, y: coordinates, finite; both axes have one scale.
        titles: shown when a dot is pointed at.
        colours: a category (str) or a value (number) of each item; the six most frequent categories have a
            colour of their own, values have five steps of about equally many items.
        colour_name: what the colour stands for.
        n_items: items of the catalogue, of which these are shown.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    titles: Sequence[str]
    colours: Sequence[str] | Sequence[float]
    colour_name: str
    n_items: int

    def __post_init__(self) -> None:
        sizes = {len(values) for values in (self.x, self.y, self.titles, self.colours)}
        if len(sizes) != 1 or not sizes.pop():
            raise ValueError(
                f"map {self.name!r} has {len(self.x)} x, {len(self.y)} y, {len(self.titles)} titles and "
                f"{len(self.colours)} colours; give equally many, at least one"
            )


def shown_places(count: int) -> list[int]:
    """Which of `count` items a map shows: all, or MAX_POINTS evenly spaced ones, so that none is preferred."""
    if count <= MAX_POINTS:
        return list(range(count))
    return [place * count // MAX_POINTS for place in range(MAX_POINTS)]


def map_legend(chart: EmbeddingMap) -> list[tuple[str, str]]:
    """(label, name of the page's colour) of each group of dots, in the order of the legend."""
    return [(label, colour) for label, colour, _ in _groups(chart)]


def map_svg(chart: EmbeddingMap) -> str:
    """The map as an `<svg>` element that scales to its container; equal maps give equal bytes."""
    across, down = _scaled(chart)
    # The last groups of the legend lie at the bottom: "other" must not cover what has a name.
    groups = "".join(
        f'<g style="fill: var(--{colour})">'
        + "".join(
            f'<circle cx="{across[place]:.1f}" cy="{down[place]:.1f}" r="{_RADIUS}">'
            f"<title>{html.escape(_hover(chart, place))}</title></circle>"
            for place in places
        )
        + "</g>"
        for _, colour, places in reversed(_groups(chart))
    )
    spoken = (
        f"Map of {len(chart.x)} items by {chart.name}, near items are alike; coloured by {chart.colour_name}: "
        + ", ".join(f"{label} ({len(places)})" for label, _, places in _groups(chart))
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(spoken)}">'
        f'<g fill-opacity="0.8">{groups}</g></svg>'
    )


def _hover(chart: EmbeddingMap, place: int) -> str:
    colour = chart.colours[place]
    return f"{chart.titles[place]} ({chart.colour_name}: {colour if isinstance(colour, str) else _number(colour)})"


def _groups(chart: EmbeddingMap) -> list[tuple[str, str, list[int]]]:
    """(label, colour, places of the items) of each group, empty ones left out."""
    if isinstance(chart.colours[0], str):
        return _by_category([str(colour) for colour in chart.colours])
    return _by_value([float(colour) for colour in chart.colours])


def _by_category(categories: list[str]) -> list[tuple[str, str, list[int]]]:
    counted = Counter(categories)
    counted.pop(OTHER, None)
    named = sorted(counted, key=lambda label: (-counted[label], label))[: len(_CATEGORY_COLOURS)]
    colours = dict(zip(named, _CATEGORY_COLOURS, strict=False)) | {OTHER: _OTHER_COLOUR}
    members: dict[str, list[int]] = {label: [] for label in colours}
    for place, category in enumerate(categories):
        members[category if category in colours else OTHER].append(place)
    return [(label, colours[label], places) for label, places in members.items() if places]


def _by_value(values: list[float]) -> list[tuple[str, str, list[int]]]:
    ordered, steps = sorted(values), len(_VALUE_COLOURS)
    highest = [ordered[-(-len(ordered) * step // steps) - 1] for step in range(1, steps + 1)]  # of each step
    members: list[list[int]] = [[] for _ in _VALUE_COLOURS]
    for place, value in enumerate(values):
        members[bisect_left(highest, value)].append(place)  # equal values never part
    groups = []
    for colour, places in zip(_VALUE_COLOURS, members, strict=True):
        if places:
            low, high = min(values[place] for place in places), max(values[place] for place in places)
            label = _number(low) if low == high else f"{_number(low)} to {_number(high)}"
            groups.append((label, colour, places))
    return groups


def _number(value: float) -> str:
    """A count in full, another number short."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.4g}"


def _scaled(chart: EmbeddingMap) -> tuple[list[float], list[float]]:
    """Coordinates on the page: one scale for both axes, centred, y upwards."""
    low_x, high_x, low_y, high_y = min(chart.x), max(chart.x), min(chart.y), max(chart.y)
    room_x, room_y = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    spans = [room / span for room, span in ((room_x, high_x - low_x), (room_y, high_y - low_y)) if span > 0]
    scale = min(spans) if spans else 0.0
    across = [_WIDTH / 2 + scale * (x - (low_x + high_x) / 2) for x in chart.x]
    down = [_HEIGHT / 2 - scale * (y - (low_y + high_y) / 2) for y in chart.y]
    return across, down
