"""Verb `compare`: rows on the same test events, tested against those of the first run or one of its rows."""

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
from llm2rec.evaluation.verdicts import TOO_FEW, corrected_for
from llm2rec.runs import Run, open_run
from llm2rec.stages.settings import require_settings

METRIC = protocol.COMPARED_METRIC
CONTENT = "content of the data"


def compare(
    runs: Sequence[str | Path | Run],
    domain: str | None = None,
    page: str | Path | None = None,
    against: str | None = None,
) -> dict[str, Any]:
    """NDCG@10 of each row in each run, and each later run tested against the first.

    Args:
        domain: which log, of runs with several.
        page: where to write the comparison as a self-contained HTML page.
        against: a row of the first run, which every other row of every run is tested against instead; one run
            will do.

    Returns:
        `{"runs": {run: {row: mean}}, "comparisons": {run: {row: Comparison}}, "settings": {key: {run: value}},
        "ranking": words, "against": row or None}`, runs by folder name; settings are the recipe keys whose values
        differ, each run's value, and the data where their content does; ranking says what competes with a target.

    Raises:
        ArtifactError: a run is not evaluated, half rerun or made with other settings than its recipe now has, or
            catalogues, test events or what competes with a target differ (the difference is named).
        ConfigError: fewer than two runs and no `against`, or the first run has no such row.
    """
    opened = [run if isinstance(run, Run) else open_run(run) for run in runs]
    if len({run.folder.resolve() for run in opened}) < (2 if against is None else 1):
        raise ConfigError(
            f"comparing takes at least two different runs, got {[str(run.folder) for run in opened]}; "
            "--against ROW tests the rows of one run against one of them"
        )
    by_name = {str(run.folder): run for run in opened}
    for run in opened:
        if problem := run.unfinished():
            raise ArtifactError(problem)
        require_settings(run, run.domain(domain))
    require_same_catalogue(by_name, domain)
    ranking = _shared_ranking(by_name, domain)
    metrics = {name: run.metrics(domain)["rows"] for name, run in by_name.items()}
    tables = {
        name: pl.read_parquet(run.domain(domain).evaluation / "per_user.parquet", glob=False)
        for name, run in by_name.items()
    }
    comparisons = protocol.compare_runs(tables, opened[0].recipe.evaluation.bootstrap_samples, against=against)
    settings = {
        name: {**run.recipe.model_dump(mode="json"), CONTENT: _data_content(run, domain)}
        for name, run in by_name.items()
    }
    if page is not None:
        data = report.ComparisonData("llm2rec: runs compared", metrics, comparisons, settings, ranking, against)
        Path(page).write_text(report.render_comparison_html(data), encoding="utf-8")
    return {
        "runs": {name: {row: one[METRIC]["mean"] for row, one in rows.items()} for name, rows in metrics.items()},
        "comparisons": comparisons,
        "settings": report.differing_settings(settings),
        "ranking": ranking,
        "against": against,
    }


def _shared_ranking(runs: Mapping[str, Run], domain: str | None) -> str:
    """What competes with a target in every run, in words; raises ArtifactError where the runs differ in it."""
    evaluated = {name: artifacts.require(run.domain(domain).evaluation, "evaluate") for name, run in runs.items()}
    masked = {name: bool(manifest.inputs["evaluation.mask_history"]) for name, manifest in evaluated.items()}
    if len(set(masked.values())) > 1:
        values = ", ".join(f"{name}: {str(value).lower()}" for name, value in masked.items())
        raise ArtifactError(
            f"ranks with and without the items of the history cannot be compared (evaluation.mask_history of "
            f"{values}); evaluate again with one setting"
        )
    first = next(iter(runs.values()))
    return str(first.metrics(domain)["protocol"]["ranking"])


def _data_content(run: Run, domain: str | None) -> str:
    """The beginning of a hash of the prepared events and items: paths may be equal where files are not."""
    return artifacts.require(run.domain(domain).data, "prepare").fingerprint[:8]


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
    against = compared["against"]
    results = [result for rows in compared["comparisons"].values() for result in rows.values()]
    warning = report.users_warning(results)
    caption = warning or (
        "difference with its 95 % interval, paired bootstrap over users; p: the larger of bootstrap and sign-flip "
        f"test, after Holm over {corrected_for(results)}"
    )
    caption += f". Ranking: {compared['ranking']}"
    title = f"{METRIC}, " + (
        f"each run against {first}" if against is None else f"every row against {against} of {first}"
    )
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
    tested = "" if result["verdict"] == TOO_FEW else f", p {report.p_value(result)}"
    interval = f"{result['low']:+.4f} to {result['high']:+.4f}"
    change = f"{result['difference']:+.4f}, {report.percent(result['relative'])}"
    return f"{mean:.4f}  {result['verdict']}\n{change} ({interval}{tested})"
