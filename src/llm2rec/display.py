"""What the terminal shows of an evaluated run: reads JSON only, so an unchanged rerun stays instant."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table

from llm2rec import artifacts
from llm2rec.evaluation import report
from llm2rec.runs import Domain, Run


def show(run: Run) -> list[RenderableType]:
    """What the terminal shows of an evaluated run: the table, neighbours, recommendations, the report's path."""
    return [part for domain in run.domains for part in _show_domain(run, domain)]


def _show_domain(run: Run, domain: Domain) -> list[RenderableType]:
    metrics = run.metrics(domain.name)
    shown = artifacts.read_json(domain.evaluation / "showcase.json")
    parts: list[RenderableType] = [] if domain.alone else [f"\n{domain.name}"]
    parts.append(report.render_table(metrics))
    for row, choice in metrics["validation"].items():
        values = ", ".join(f"{name} {value:.4f}" for name, value in choice["ndcg@10"].items())
        parts.append(f"{row}: {choice['chosen']} (validation NDCG@10: {values})")
    parts += _neighbour_tables(shown["neighbours"])
    parts.append(_recommendation_table(shown["recommendations"]))
    parts.append(f"report: {domain.evaluation / 'report.html'}")
    return parts


def _neighbour_tables(neighbours: dict[str, dict[str, list[Any]]]) -> list[RenderableType]:
    if not any(neighbours.values()):
        return []
    names = list(next(iter(neighbours.values())))
    ends = list(dict.fromkeys([names[0], names[-1]]))
    table = Table("item", *(f"nearest by {name}" for name in ends), title="Neighbours before and after")
    for title, sets in neighbours.items():
        table.add_row(title, *("\n".join(near for near, _ in sets[name]) for name in ends), end_section=True)
    return [table]


def _recommendation_table(shown: dict[str, Any]) -> RenderableType:
    table = Table("last items of the history", f"next, by {shown['row']}", title=f"User {shown['user_id']}")
    recommended = [f"{title}  ({score:.2f})" for title, score in shown["items"]]
    table.add_row("\n".join(shown["history"]), "\n".join(recommended))
    return table
