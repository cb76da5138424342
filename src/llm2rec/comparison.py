"""Verb `compare`: the rows of several runs on the same test events, tested against the first run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table

from llm2rec import artifacts
from llm2rec.data.tables import Catalogue
from llm2rec.errors import ArtifactError, ConfigError, first_few
from llm2rec.evaluation import protocol, report
from llm2rec.evaluation.verdicts import TOO_FEW
from llm2rec.runs import Run, open_run

METRIC = protocol.COMPARED_METRIC


def compare(
    runs: Sequence[str | Path | Run], domain: str | None = None, page: str | Path | None = None
) -> dict[str, Any]:
    """NDCG@10 of each row in each run, and each later run tested against the first.

    Args:
        domain: which log, of runs with several.
        page: where to write the comparison as a self-contained HTML page.

    Returns:
        `{"runs": {run: {row: mean}}, "comparisons": {run: {row: Comparison}}, "settings": {key: {run: value}},
        "ranking": words}`, runs by folder name; settings are the recipe keys whose values differ, each run's
        value; ranking says what competes with a target.

    Raises:
        ArtifactError: a run is not evaluated, or catalogues or test events differ (the difference is named).
        ConfigError: fewer than two runs.
    """
    opened = [run if isinstance(run, Run) else open_run(run) for run in runs]
    if len({run.folder.resolve() for run in opened}) < 2:
        raise ConfigError(
            f"comparing takes at least two different runs, got {[str(run.folder) for run in opened]}"
        )
    by_name = {str(run.folder): run for run in opened}
    require_same_catalogue(by_name, domain)
    metrics = {name: run.metrics(domain)["rows"] for name, run in by_name.items()}
    tables = {
        name: pl.read_parquet(run.domain(domain).evaluation / "per_user.parquet", glob=False)
        for name, run in by_name.items()
    }
    comparisons = protocol.compare_runs(tables, opened[0].recipe.evaluation.bootstrap_samples)
    settings = {name: run.recipe.model_dump(mode="json") for name, run in by_name.items()}
    ranking = _ranking_in_words([run.recipe.evaluation.mask_history for run in opened])
    if page is not None:
        data = report.ComparisonData("llm2rec: runs compared", metrics, comparisons, settings, ranking)
        Path(page).write_text(report.render_comparison_html(data), encoding="utf-8")
    return {
        "runs": {name: {row: one[METRIC]["mean"] for row, one in rows.items()} for name, rows in metrics.items()},
        "comparisons": comparisons,
        "settings": report.differing_settings(settings),
        "ranking": ranking,
    }


def _ranking_in_words(masked: list[bool]) -> str:
    if len(set(masked)) == 1:
        return protocol.ranking_in_words(masked[0])
    return "the runs differ in it (evaluation.mask_history), so do not judge by their means"


def require_same_catalogue(runs: Mapping[str, Run], domain: str | None = None) -> None:
    """Raises ArtifactError where runs rank other items than the first, naming the first such item.

    A rank among more items is a worse one, so that means over different catalogues say nothing.
    """
    items = {name: _item_ids(run, domain) for name, run in runs.items()}
    first, *others = items
    for other in others:
        for name, missing in ((first, other), (other, first)):
            extra = sorted(items[name] - items[missing])
            if extra:
                raise ArtifactError(
                    f"the catalogues of {first!r} ({len(items[first]):,} items) and {other!r} "
                    f"({len(items[other]):,}) differ: {len(extra):,} items only in {name!r}: {first_few(extra)}. "
                    "Compare results over the same data and the same filters"
                )


def _item_ids(run: Run, domain: str | None) -> set[str]:
    folder = run.domain(domain).data
    artifacts.require(folder, "prepare")
    return set(Catalogue.read(folder / "catalogue.parquet").item_ids)


def comparison_table(compared: dict[str, Any]) -> Table:
    """The result of `compare` for the terminal."""
    first, *others = compared["runs"]
    tests = sum(len(rows) for rows in compared["comparisons"].values())
    caption = f"paired bootstrap over users; p after Holm over {tests} tests. Ranking: {compared['ranking']}"
    title = f"{METRIC}, each run against {first}"
    table = report.terminal_table("row", first, *others, title=title, caption=caption)
    for row in dict.fromkeys(row for rows in compared["runs"].values() for row in rows):
        cells = [_cell(compared, run, row) for run in (first, *others)]
        table.add_row(row, *cells)
    table.add_section()
    for key, values in compared["settings"].items():
        table.add_row(key, *(str(values[run]) for run in (first, *others)), style="dim")
    return table


def _cell(compared: dict[str, Any], run: str, row: str) -> str:
    mean = compared["runs"][run].get(row)
    if mean is None:
        return "-"
    result = compared["comparisons"].get(run, {}).get(row)
    if result is None:
        return f"{mean:.4f}"
    tested = "" if result["verdict"] == TOO_FEW else f", p {result['p_holm']:.3f}"
    return f"{mean:.4f}  {result['verdict']} ({result['difference']:+.4f}{tested})"
