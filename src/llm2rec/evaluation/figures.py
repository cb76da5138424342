"""Figures of the report as inline SVG: coloured by the page (light or dark), equal bytes for equal data.

Drawn on `Figure` objects, never on pyplot's global state. Colours are written as CSS variables that the page
defines, and text takes the page's colour and font.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, NullFormatter

from llm2rec.evaluation.verdicts import (
    BETTER,
    COMPARED_METRIC,
    MARKS,
    REFERENCE,
    TOO_FEW,
    WITHIN_NOISE,
    WORSE,
    verdict_of,
)

Points = Sequence[tuple[float, float]]

_INK = "#010203"  # stands for the page's text colour
# Okabe and Ito's colour-blind-safe palette; each hex value becomes the page's variable of that name.
_PALETTE = {
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "amber": "#e69f00",
    "sky": "#56b4e9",
    "grey": "#8a8f98",
}
_VERDICT_COLOURS = {
    BETTER: "blue",
    WORSE: "vermilion",
    WITHIN_NOISE: "grey",
    TOO_FEW: "grey",
    REFERENCE: "green",
}
_LINE_COLOURS = ("grey", "amber", "vermilion", "green", "purple", "sky", "blue")
_ACRONYMS = frozenset({"ndcg", "mrr"})
_DASHES = ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "llm2rec",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.parse_math": False,
    "axes.prop_cycle": cycler(color=[_INK]),
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
}


def bars(metrics: Mapping[str, Any], name: str) -> str:
    """Horizontal bars of one metric by row with 95 % intervals, coloured by the verdict on NDCG@10; SVG."""
    rows: Mapping[str, Any] = metrics["rows"]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 0.34 * len(rows) + 0.75), layout="constrained")
        axes = figure.subplots()
        for place, (row, values) in enumerate(rows.items()):
            value, verdict = values[name], verdict_of(metrics, row)
            reach = _reach([value])
            axes.barh(place, value["mean"], height=0.66, color=_PALETTE[_VERDICT_COLOURS[verdict]])
            axes.errorbar(value["mean"], place, xerr=reach, fmt="none", ecolor=_INK, elinewidth=1, capsize=2.5)
            mark = MARKS[verdict] if name == COMPARED_METRIC else ""  # no verdict is given on other metrics
            label = f"{value['mean']:.4f} {mark}".rstrip()
            axes.annotate(
                label, (value["high"], place), (5, 0), textcoords="offset points", va="center", fontsize=8
            )
        highest = max(values[name]["high"] for values in rows.values())
        axes.set_xlim(0, (highest or 1.0) * 1.28)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlabel(f"{metric_label(name)}, 95 % interval")
        axes.tick_params(axis="y", length=0)
        _grid(axes, "x")
        spoken = "; ".join(
            f"{row} {values[name]['mean']:.4f} ({values[name]['low']:.4f} to {values[name]['high']:.4f})"
            for row, values in rows.items()
        )
        return _svg(figure, f"Bars of {metric_label(name)} by row with 95 % intervals: {spoken}")


def slice_bars(slices: Mapping[str, Any]) -> str:
    """Horizontal bars of NDCG@10 with 95 % intervals, one group a slice, one colour a row; SVG.

    Args:
        slices: slice -> SliceSummary, as in `slices.summarise_slices`; all with the same rows.
    """
    names = list(next(iter(slices.values()))["rows"])
    highest = max(value["high"] for summary in slices.values() for value in summary["rows"].values())
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, len(slices) * (0.15 * len(names) + 0.22) + 1.3), layout="constrained")
        axes = figure.subplots()
        height = 0.84 / len(names)
        for place, name in enumerate(names):
            values = [summary["rows"][name] for summary in slices.values()]
            levels = [group - 0.42 + height * (place + 0.5) for group in range(len(slices))]
            means = [value["mean"] for value in values]
            reach = _reach(values)
            colour = _PALETTE[_LINE_COLOURS[place % len(_LINE_COLOURS)]]
            alpha = 1.0 if place < len(_LINE_COLOURS) else 0.55  # the colours come round again
            axes.barh(levels, means, height=0.88 * height, color=colour, alpha=alpha, label=name)
            axes.errorbar(means, levels, xerr=reach, fmt="none", ecolor=_INK, elinewidth=0.8)
        axes.set_xlim(0, (highest or 1.0) * 1.05)
        axes.set_yticks(range(len(slices)), [f"{word}\n{one['users']:,} users" for word, one in slices.items()])
        axes.invert_yaxis()
        axes.set_xlabel(f"{metric_label(COMPARED_METRIC)}, 95 % interval")
        axes.tick_params(axis="y", length=0)
        _grid(axes, "x")
        figure.legend(loc="outside lower center", ncols=2 if len(names) < 10 else 3)
        spoken = "; ".join(
            f"{word}: " + ", ".join(f"{row} {value['mean']:.4f}" for row, value in summary["rows"].items())
            for word, summary in slices.items()
        )
        return _svg(figure, f"Bars of {metric_label(COMPARED_METRIC)} by slice and row with intervals: {spoken}")


def forest(comparisons: Mapping[str, Mapping[str, Any]], unit: str) -> str:
    """Forest plot: each paired difference with its 95 % interval against 0, coloured by verdict; SVG.

    Args:
        comparisons: label -> Comparison, from the top down; labels short enough for a phone.
        unit: what differs, the label of the axis.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 0.32 * len(comparisons) + 0.85), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=_INK, linewidth=0.8)
        for place, result in enumerate(comparisons.values()):
            colour = _PALETTE[_VERDICT_COLOURS[result["verdict"]]]
            axes.plot([result["low"], result["high"]], [place, place], color=colour, linewidth=2)
            axes.plot(result["difference"], place, "s", color=colour, markersize=5)
            # All at the right edge: beside its interval a number would often lie on the line at 0.
            words = f"{result['difference']:+.4f} {MARKS[result['verdict']]}"
            axes.text(
                0.99, place, words, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8
            )
        ends = [end for result in comparisons.values() for end in (result["low"], result["high"], 0.0)]
        width = (max(ends) - min(ends)) or 1.0
        axes.set_xlim(min(ends) - 0.05 * width, max(ends) + 0.5 * width)  # room for the numbers
        axes.set_ylim(len(comparisons) - 0.5, -0.5)
        axes.set_yticks(range(len(comparisons)), list(comparisons))
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(axis="y", length=0)
        _grid(axes, "x")
        spoken = "; ".join(
            f"{label} {one['difference']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f}), {one['verdict']}"
            for label, one in comparisons.items()
        )
        return _svg(figure, f"Forest plot, {unit}: {spoken}")


def recall_lines(curves: Mapping[str, Points]) -> str:
    """Recall@k over k, one line a row; SVG."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        axes = figure.subplots()
        for place, (row, points) in enumerate(curves.items()):
            axes.plot(*_columns(points), **_line_style(place), label=row, linewidth=1.6)
        axes.set_xlabel("k")
        axes.set_ylabel("Recall@k")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        _grid(axes, "both")
        figure.legend(loc="outside lower center", ncols=2 if len(curves) < 10 else 3, handlelength=2.6)
        last = "; ".join(f"{row} {points[-1][1]:.4f} at k = {points[-1][0]}" for row, points in curves.items())
        return _svg(figure, f"Recall@k over k by row: {last}")


def training_line(name: str, points: Points) -> str:
    """One small training curve titled `name`, value over optimizer steps; SVG."""
    steps, values = _columns(points)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.2, 1.9), layout="constrained")
        axes = figure.subplots()
        marker = "o" if len(points) < 20 else ""
        axes.plot(steps, values, color=_PALETTE["blue"], linewidth=1.5, marker=marker, markersize=3)
        axes.set_title(name)
        axes.set_xlabel("step", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        _grid(axes, "y")
        return _svg(figure, f"{name} over steps: from {values[0]:.4g} to {values[-1]:.4g} at step {steps[-1]:g}")


def log_curve(name: str, points: Points, over_time: bool = False) -> str:
    """One curve of a log titled `name`; logarithmic where it falls by more than a hundred times; SVG.

    Args:
        over_time: the points lie at years (2021.5 is July), shown as dates on an axis that is never logarithmic.
    """
    places, values = _columns(points)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(places, values, color=_PALETTE["blue"], linewidth=1.5)
        axes.set_title(name)
        if not over_time and min(values) > 0 and max(values) > 100 * min(values):
            axes.set_xscale("log")
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(_plain_number))
            axis.set_minor_formatter(NullFormatter())
        if over_time:
            _date_axis(axes, places[-1] - places[0])
        _grid(axes, "both")
        first, last, highest = (_plain_number(value) for value in (values[0], values[-1], max(values)))
        return _svg(figure, f"{name}: from {first} to {last}, highest {highest}")


def _plain_number(value: float, _: Any = None) -> str:
    """A number on an axis without powers of ten: `20,000`."""
    return f"{value:,.10g}"


def _date_axis(axes: Axes, years: float) -> None:
    """Labels an axis of years by year, by month, by day or, within a week, by minute."""
    unit = "Y" if years > 4 else "M" if years > 0.5 else "D" if years > 7 / 365.25 else "m"
    if unit == "M":
        months = next(step for step in (1, 2, 3, 6, 12) if step >= 3 * years)  # three to six labels
        axes.xaxis.set_major_locator(MultipleLocator(months / 12))
    else:
        axes.xaxis.set_major_locator(MaxNLocator({"Y": 6, "D": 3, "m": 2}[unit], integer=unit == "Y"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda year, _: _date(year, unit)))


def _date(year: float, unit: str) -> str:
    """`2021`, `2021-07`, `2021-07-02` or `2021-07-02 12:30`: a moment given in years."""
    if unit == "Y":
        return f"{year:.0f}"
    if unit == "M":
        whole, month = divmod(round(12 * year), 12)
        return f"{whole}-{month + 1:02d}"
    moment = np.datetime64(round((year - 1970) * 365.2425 * 1440), "m")
    return str(moment if unit == "m" else moment.astype("datetime64[D]")).replace("T", " ")


def metric_label(name: str) -> str:
    """A metric's name as people write it: `NDCG@10`, `Recall@10`, `MRR`, `Popularity lift@10`."""
    base, at, cutoff = name.partition("@")
    return (base.upper() if base in _ACRONYMS else base.replace("_", " ").capitalize()) + at + cutoff


def _line_style(place: int) -> dict[str, Any]:
    """Colour and dash of the line at `place`; 28 lines can be told apart, neighbours also without colour."""
    colour = _LINE_COLOURS[place % len(_LINE_COLOURS)]
    return {"color": _PALETTE[colour], "linestyle": _DASHES[place % len(_DASHES)]}


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _reach(values: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """How far the intervals reach below and above the means, which few resamples or rounding may leave outside."""
    below = [max(value["mean"] - value["low"], 0.0) for value in values]
    return [below, [max(value["high"] - value["mean"], 0.0) for value in values]]


def _grid(axes: Axes, which: Any) -> None:
    axes.grid(axis=which, color=_INK, alpha=0.14, linewidth=0.6)


def _svg(figure: Figure, description: str) -> str:
    """The figure as an `<svg>` element that scales to its container and speaks `description`."""
    stream = io.StringIO()
    figure.savefig(
        stream,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    drawn = stream.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[A-Za-z]+_\d+">', "<g>", drawn)  # such ids would repeat from figure to figure
    view_box = re.search(r'viewBox="[^"]+"', drawn)
    if view_box is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    opening = f'<svg {view_box[0]} role="img" aria-label="{html.escape(description)}">'
    drawn = opening + drawn[drawn.index(">") + 1 :]
    drawn = drawn.replace("xlink:href", "href").replace(_INK, "currentColor")
    for name, colour in _PALETTE.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    return re.sub(r"(font: [\d.]+px )[^;\"]+", r"\1system-ui, sans-serif", drawn)
