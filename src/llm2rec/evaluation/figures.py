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
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llm2rec.evaluation.verdicts import BETTER, COMPARED_METRIC, MARKS, REFERENCE, WITHIN_NOISE, WORSE, verdict_of

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
_VERDICT_COLOURS = {BETTER: "blue", WORSE: "vermilion", WITHIN_NOISE: "grey", REFERENCE: "green"}
_LINE_COLOURS = ("grey", "amber", "vermilion", "green", "purple", "sky", "blue")
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
            reach = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
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


def metric_label(name: str) -> str:
    """A metric's name as people write it: `NDCG@10`, `Recall@10`, `MRR`."""
    return name.replace("recall", "Recall") if name.startswith("recall") else name.upper()


def _line_style(place: int) -> dict[str, Any]:
    """Colour and dash of the line at `place`; 28 lines can be told apart, neighbours also without colour."""
    colour = _LINE_COLOURS[place % len(_LINE_COLOURS)]
    return {"color": _PALETTE[colour], "linestyle": _DASHES[place % len(_DASHES)]}


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


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
