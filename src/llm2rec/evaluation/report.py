"""What a run found: one self-contained HTML page, a table for the terminal, one for a README.

All three read plain values (the content of `metrics.json`), so showing a finished run needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from llm2rec.artifacts import flatten
from llm2rec.evaluation.maps import EmbeddingMap, map_legend, map_svg
from llm2rec.evaluation.verdicts import (
    BETTER,
    MARKS,
    REFERENCE,
    TOO_FEW,
    WITHIN_NOISE,
    WORSE,
    corrected_for,
    too_few_users,
    verdict_of,
)

HEADLINE_METRICS = ("ndcg@10", "recall@10")
TEMPLATES = Path(__file__).parent
REPORT, COMPARISON, LOG, STUDY = "report.html", "comparison.html", "log.html", "study.html"
ABSENT = "not in this recipe"
_TERMINAL_STYLES = {BETTER: "green", WORSE: "red", WITHIN_NOISE: "dim", TOO_FEW: "yellow", REFERENCE: "cyan"}


@dataclass(frozen=True)
class ReportData:
    """Everything the page shows, as plain values.

    Attributes:
        title: heading of the page.
        facts: name -> value of the data set.
        metrics: content of `metrics.json`: `rows` (MetricSummary by row and metric), `reference`,
            `comparisons` (row -> Comparison), `validation` (row -> `chosen` and `ndcg@10` of each variant),
            `protocol` (name -> value, in words; `ranking` among them).
        recall_curves: row -> (k, recall) points.
        training_curves: name -> (step, value) points.
        showcase: `neighbours` (title -> vector set -> (title, cosine) pairs) and `recommendations` of one
            user (`row`, `user_id`, `history` titles, `items` as (title, score) pairs).
        costs: a stage each: `stage`, `seconds`, `peak_memory_gb`; a number may be None where not measured.
        settings: the resolved recipe, nested.
        list_metrics: row -> metric -> value, from `ranking.list_metrics`; all rows with the same metrics.
        slices: slicing -> SlicingSummary, from `slices.summarise_slices`.
        maps: items in the plane, one map a vector set.
    """

    title: str
    facts: Mapping[str, Any]
    metrics: Mapping[str, Any]
    recall_curves: Mapping[str, Sequence[tuple[float, float]]]
    training_curves: Mapping[str, Sequence[tuple[float, float]]]
    showcase: Mapping[str, Any]
    costs: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    list_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    slices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    maps: Sequence[EmbeddingMap] = ()


@dataclass(frozen=True)
class ComparisonData:
    """Everything the comparison page shows, as plain values; the first run is the reference.

    Attributes:
        title: heading of the page.
        runs: run -> the `rows` of its `metrics.json`; at least two runs, or one and `against`.
        comparisons: run -> row -> Comparison, from `protocol.compare_runs`.
        settings: run -> its resolved recipe, nested.
        ranking: what competes with a target, in words.
        against: the row of the first run that is the reference instead.
    """

    title: str
    runs: Mapping[str, Mapping[str, Any]]
    comparisons: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Mapping[str, Any]]
    ranking: str
    against: str | None = None


def render_html(data: ReportData) -> str:
    """The report as one HTML page without outside references: readable offline, on a phone, light or dark.

    Titles and names are escaped; equal data give equal bytes.
    """
    from llm2rec.evaluation import figures  # here: matplotlib takes longer to import than a table to print

    metrics = data.metrics
    return (
        environment()
        .get_template(REPORT)
        .render(
            data=data,
            metrics=metrics,
            metric_names=list(next(iter(metrics["rows"].values()))),
            headline=headline(metrics),
            warning=users_warning(metrics["comparisons"].values()),
            verdicts={row: verdict_of(metrics, row) for row in metrics["rows"]},
            bars=[Markup(figures.bars(metrics, name)) for name in HEADLINE_METRICS],
            recall=Markup(figures.recall_lines(data.recall_curves)) if data.recall_curves else None,
            training=[Markup(figures.training_line(*curve)) for curve in data.training_curves.items()],
            slice_bars={name: Markup(figures.slice_bars(one["slices"])) for name, one in data.slices.items()},
            list_metric_names=list(next(iter(data.list_metrics.values()), {})),
            maps=[
                {"chart": chart, "svg": Markup(map_svg(chart)), "legend": map_legend(chart)} for chart in data.maps
            ],
            settings=_flat(data.settings),
            total_seconds=sum(cost["seconds"] or 0 for cost in data.costs),
        )
    )


def render_comparison_html(data: ComparisonData) -> str:
    """Several runs on one HTML page of the kind of `render_html`: results, paired differences, what differs.

    Raises:
        ValueError: fewer than two runs and no `against`, or a comparison or settings of a run that is not among
            them.
    """
    from llm2rec.evaluation import figures  # as in render_html

    if len(data.runs) < 2 and data.against is None:
        raise ValueError(f"comparing takes at least two runs, got {len(data.runs)}")
    strangers = sorted((data.comparisons.keys() | data.settings.keys()) - data.runs.keys())
    if strangers:
        raise ValueError(f"{strangers[0]!r} is not among the runs: {', '.join(data.runs)}")
    # Folder names are too long for a figure on a phone: runs are numbered and named once.
    labels = {run: f"run {number}" for number, run in enumerate(data.runs, 1)}
    compared = {
        f"{labels[run]}, {row}": result for run, rows in data.comparisons.items() for row, result in rows.items()
    }
    reference = "run 1" if data.against is None else f"{data.against} of run 1"
    return (
        environment()
        .get_template(COMPARISON)
        .render(
            data=data,
            labels=labels,
            reference=reference,
            rows=list(dict.fromkeys(row for rows in data.runs.values() for row in rows)),
            metric_names=HEADLINE_METRICS,
            compared=compared,
            headline=_comparison_headline(compared, reference),
            warning=users_warning(compared.values()),
            forest=Markup(figures.forest(compared, "difference in NDCG@10")) if compared else None,
            settings=differing_settings(data.settings),
        )
    )


def render_log_html(
    title: str, facts: Mapping[str, Any], warnings: Sequence[str], curves: Mapping[str, Any], over_time: Any
) -> str:
    """What a log looks like, on a page of the kind of `render_html`.

    Args:
        facts, warnings: name -> value; sentences.
        curves: name -> (x, y) points.
        over_time: (year, events) points; none where the log has no dates.
    """
    from llm2rec.evaluation import figures  # as in render_html

    drawn = [Markup(figures.log_curve(name, points)) for name, points in curves.items()]
    if over_time:
        drawn.append(Markup(figures.log_curve("events over time", over_time, over_time=True)))
    return (
        environment().get_template(LOG).render(data={"title": title}, facts=facts, warnings=warnings, curves=drawn)
    )


def render_study_html(title: str, content: Mapping[str, Any]) -> str:
    """The result of `studies.study` on a page of the kind of `render_html`: each table with its figures."""
    from llm2rec.evaluation import figures  # as in render_html

    tables = {
        name: {
            "metrics": metrics,
            "headline": headline(metrics),
            "warning": users_warning(metrics["comparisons"].values()),
            "verdicts": {row: verdict_of(metrics, row) for row in metrics["rows"]},
            "seeds": max(values["ndcg@10"]["n"] for values in metrics["rows"].values()),
            "bars": Markup(figures.bars(metrics, HEADLINE_METRICS[0])),
            "forest": Markup(figures.forest(metrics["comparisons"], "difference in NDCG@10")),
        }
        for name, metrics in content["tables"].items()
    }
    return (
        environment()
        .get_template(STUDY)
        .render(
            data={"title": title},
            question=content["question"],
            facts=content["facts"],
            tables=tables,
            variants=content["variants"],
            pending=content["pending"],
            settings=content["settings"],
        )
    )


def differing_settings(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Dotted key -> value by run, of the keys whose values differ; ABSENT where a recipe lacks the key.

    Args:
        settings: run -> its resolved recipe, nested.
    """
    flat = {run: _flat(recipe) for run, recipe in settings.items()}
    keys = dict.fromkeys(key for recipe in flat.values() for key in recipe)
    by_key = {key: {run: recipe.get(key, ABSENT) for run, recipe in flat.items()} for key in keys}
    return {
        key: values
        for key, values in by_key.items()
        if any(value != next(iter(values.values())) for value in values.values())
    }


def environment() -> Environment:
    """The templates beside this file, with the page's filters."""
    from llm2rec.evaluation import figures  # as in render_html

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        label=figures.metric_label,
        plain=plain,
        corrected_for=corrected_for,
        duration=_duration,
        percent=percent,
        p_cell=_p_cell,
        verdict_p=_verdict_p_cell,
        spread=_spread,
    )
    made.globals["marks"] = MARKS
    return made


def users_warning(comparisons: Iterable[Mapping[str, Any]]) -> str | None:
    """The warning of a table whose users are too few, else None."""
    few = next((result for result in comparisons if result["verdict"] == TOO_FEW), None)
    return None if few is None else too_few_users(few["users"])


def _comparison_headline(compared: Mapping[str, Mapping[str, Any]], reference: str) -> str:
    counted = {word: sum(one["verdict"] == word for one in compared.values()) for word in MARKS}
    said = [f"{number} {word}" for word, number in counted.items() if number]
    return f"Against {reference}, of {len(compared)} rows in NDCG@10: {', '.join(said) or 'none compared'}."


def headline(metrics: Mapping[str, Any]) -> str:
    """The result in one sentence: the best row by NDCG@10 and how it stands against the reference."""
    rows, reference = metrics["rows"], metrics["reference"]
    best = max(rows, key=lambda row: rows[row]["ndcg@10"]["mean"])
    start = f"Highest NDCG@10: {best} with {rows[best]['ndcg@10']['mean']:.4f}"
    if best == reference:
        clear = sum(result["verdict"] == WORSE for result in metrics["comparisons"].values())
        return f"{start}, the reference row; {clear} of {len(rows) - 1} other rows are distinguishably worse."
    result = metrics["comparisons"][best]
    if result["verdict"] == TOO_FEW:
        return f"{start}; {result['users']} test users are too few to compare it with the reference {reference}."
    change = f"{percent(result['relative'])}, p {p_value(result)} after Holm"
    if result["verdict"] == WITHIN_NOISE:
        return f"{start}, not distinguishable from the reference {reference} ({change})."
    return f"{start}, {result['verdict']} than the reference {reference} ({change})."


def terminal_table(
    *heads: str, numbers: Collection[str] = (), title: str | None = None, caption: str | None = None
) -> Table:
    """An empty table for a terminal of any width: what does not fit is wrapped or folded, `numbers` are never cut.

    Args:
        numbers: the heads of the columns that hold numbers.
    """
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for head in heads:
        if head in numbers:
            table.add_column(head, justify="right", no_wrap=True)
        else:
            table.add_column(head, overflow="fold")
    return table


def render_table(metrics: Mapping[str, Any]) -> Table:
    """The content of `metrics.json` for the terminal: means, intervals, verdict against the reference.

    Narrow enough for 80 columns: without the p-values, and the spread over seeds stands below its mean.
    """
    numbers = ("Recall@10", "NDCG@10", "95 % interval", "change")
    title = f"Test events, full ranking; against {metrics['reference']}"
    table = terminal_table("row", *numbers, "verdict", numbers=numbers, title=title, caption=_caption(metrics))
    for (row, recall, ndcg, interval, change, _, word), verdict in _table_rows(metrics):
        means = [_spread_below(mean) for mean in (recall, ndcg)]
        table.add_row(row, *means, interval, change, Text(word, style=_TERMINAL_STYLES[verdict]))
    return table


def render_slice(metrics: Mapping[str, Any], slicing: str, name: str, title: str) -> Table | None:
    """One slice of `metrics.json` for the terminal; None where it holds no test event."""
    found = metrics["slices"][slicing]["slices"].get(name)
    if found is None:
        return None
    numbers = ("NDCG@10", "95 % interval")
    counted = f"{title}: {found['events']:,} test events of {found['users']:,} users"
    caption = " ".join(filter(None, [found["warning"], f"Ranking: {metrics['protocol']['ranking']}."]))
    table = terminal_table("row", *numbers, "verdict", numbers=numbers, title=counted, caption=caption)
    for row, ndcg in found["rows"].items():
        verdict = REFERENCE if row == metrics["reference"] else found["comparisons"][row]["verdict"]
        word = Text(f"{MARKS[verdict]} {verdict}".strip(), style=_TERMINAL_STYLES[verdict])
        table.add_row(row, _spread_below(_spread(ndcg)), f"{ndcg['low']:.4f}–{ndcg['high']:.4f}", word)
    return table


def markdown_table(metrics: Mapping[str, Any]) -> str:
    """The same table in Markdown, for a README; ends with its caption."""
    heads = ["row", "Recall@10", "NDCG@10", "95 % interval", "change", "p"]
    heads.append(f"against {metrics['reference']}")
    lines = [heads, ["---", *["---:"] * 5, "---"], *(cells for cells, _ in _table_rows(metrics))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{_caption(metrics)}\n"


def _table_rows(metrics: Mapping[str, Any]) -> list[tuple[list[str], str]]:
    """(cells, verdict) of each row, in the order of the recipe."""
    table = []
    for row, values in metrics["rows"].items():
        verdict = verdict_of(metrics, row)
        ndcg, recall = values["ndcg@10"], values["recall@10"]
        cells = [row, _spread(recall), _spread(ndcg), f"{ndcg['low']:.4f}–{ndcg['high']:.4f}"]
        if verdict == REFERENCE:
            cells += ["", ""]
        else:
            result = metrics["comparisons"][row]
            cells += [percent(result["relative"]), _verdict_p_cell(result)]
        table.append(([*cells, f"{MARKS[verdict]} {verdict}".strip()], verdict))
    return table


def _caption(metrics: Mapping[str, Any]) -> str:
    seeds = max(values["ndcg@10"]["n"] for values in metrics["rows"].values())
    spread = f"mean ± standard deviation over {seeds} seeds (floors: 1)" if seeds > 1 else "one seed a row"
    warning = users_warning(metrics["comparisons"].values())
    ranking = f"Ranking: {metrics['protocol']['ranking']}."
    if metrics["protocol"].get("vectors"):
        ranking += f" Item vectors: {metrics['protocol']['vectors']}."
    if warning is not None:
        return f"{spread}; interval and change are of NDCG@10, bootstrap over users. {warning} {ranking}"
    return (
        f"{spread}; interval, change and verdict are of NDCG@10: bootstrap over users and, for the verdict, a "
        f"sign-flip test as well, paired, Holm over {corrected_for(metrics['comparisons'].values())}. {ranking}"
    )


def _spread(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.4f}" if value["std"] is None else f"{value['mean']:.4f} ± {value['std']:.4f}"


def _spread_below(mean: str) -> str:
    return mean.replace(" ±", "\n±")


def percent(relative: float | None) -> str:
    """A relative change for a table: `+10.1 %`."""
    return "n/a" if relative is None else f"{100 * relative:+z.1f} %"


def _p_cell(result: Mapping[str, Any], name: str) -> str:
    """A p-value of a comparison for a table; a dash where no test was made."""
    return "–" if result["verdict"] == TOO_FEW else _p_value(result[name])


def _verdict_p_cell(result: Mapping[str, Any]) -> str:
    """The p-value that the verdict follows, for a table; a dash where no test was made."""
    return "–" if result["verdict"] == TOO_FEW else p_value(result)


def p_value(result: Mapping[str, Any]) -> str:
    """The p-value that a comparison's verdict follows: the larger of the two tests', each after Holm."""
    return _p_value(max(result["p_holm"], result["p_sign_flip_holm"]))


def _p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds) % 60:02d} s"


def plain(value: Any) -> str:
    """A value for people: thousands separated, floats short, names without underscores."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value)
    return str(value)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: leaf for name, value in settings.items() for key, leaf in flatten(name, value).items()}
