"""What the terminal shows of an evaluated run: reads JSON only, so an unchanged rerun stays instant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table

from llm2rec import artifacts
from llm2rec.evaluation import report
from llm2rec.evaluation.verdicts import COLD_TARGET
from llm2rec.runs import Domain, Run

if TYPE_CHECKING:
    from llm2rec.data.description import Description
    from llm2rec.serve.recommender import ScoredItem


NEW = "new"  # beside an item that no training event holds


def show(run: Run) -> list[RenderableType]:
    """What the terminal shows of an evaluated run: the table, neighbours, recommendations, the report's path."""
    return [part for domain in run.domains for part in _show_domain(run, domain)]


def _show_domain(run: Run, domain: Domain) -> list[RenderableType]:
    metrics = run.metrics(domain.name)
    shown = artifacts.read_json(domain.evaluation / "showcase.json")
    parts: list[RenderableType] = [] if domain.alone else [f"\n{domain.name}"]
    parts.append(report.render_table(metrics))
    if domain.config.split.cold_items:
        cold = report.render_slice(metrics, "item_training", COLD_TARGET, "Targets never trained on")
        parts += [cold] if cold else []
    for row, choice in metrics["validation"].items():
        values = ", ".join(f"{name} {value:.4f}" for name, value in choice["ndcg@10"].items())
        parts.append(f"{row}: {choice['chosen']} (validation NDCG@10: {values})")
    parts += _neighbour_tables(shown["neighbours"])
    parts.append(_recommendation_table(shown["recommendations"]))
    parts.append(f"report: {domain.evaluation / 'report.html'}")
    return parts


def show_log(what: str, described: dict[str, Description], page: Path | None) -> list[RenderableType]:
    """A table and the warnings of each domain of a log; with `page`, a page with plots is written as well."""
    parts: list[RenderableType] = []
    for name, one in described.items():
        table = report.terminal_table(what if len(described) == 1 else f"{what}: {name}", "")
        for fact, value in one.facts.items():
            table.add_row(fact.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
        parts += [table, *(f"note: {warning}" for warning in one.warnings)]
        if page is not None:
            path = page if len(described) == 1 else page.with_stem(f"{page.stem}-{name}")
            text = report.render_log_html(f"{what}: {name}", one.facts, one.warnings, one.curves, one.over_time)
            path.write_text(text, encoding="utf-8")
            parts.append(f"page: {path}")
    return parts


def show_items(items: list[ScoredItem], score: str) -> RenderableType:
    """A numbered list of items for the terminal, new ones marked; `score` is what their number is called."""
    if not items:
        return "nothing is left to show: the history covers the whole catalogue"
    table = report.terminal_table("", "item", "title", score, numbers=("", score))
    for number, item in enumerate(items, 1):
        place = f"{number} {NEW}" if item.new else str(number)
        table.add_row(place, item.item_id, item.title, f"{item.score:.3f}")
    if any(item.new for item in items):
        table.caption = f"{NEW}: no training event"
    return table


def _neighbour_tables(neighbours: dict[str, dict[str, list[Any]]]) -> list[RenderableType]:
    if not any(neighbours.values()):
        return []
    names = list(next(iter(neighbours.values())))
    ends = list(dict.fromkeys([names[0], names[-1]]))
    table = Table("item", *(f"nearest by {name}" for name in ends), title="Neighbours")
    for title, sets in neighbours.items():
        table.add_row(title, *("\n".join(near for near, _ in sets[name]) for name in ends), end_section=True)
    return [table]


def _recommendation_table(shown: dict[str, Any]) -> RenderableType:
    table = Table("last items of the history", f"next, by {shown['row']}", title=f"User {shown['user_id']}")
    recommended = [f"{title}  ({score:.2f})" for title, score in shown["items"]]
    table.add_row("\n".join(shown["history"]), "\n".join(recommended))
    return table
