"""Stage `evaluate`: every row of a run on the test events -> metrics, per-user ranks, showcase, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llm2rec import artifacts
from llm2rec.config import FLOORS
from llm2rec.data.sequences import TEST, Sequences
from llm2rec.data.tables import Catalogue
from llm2rec.evaluation import protocol, report
from llm2rec.runs import Run
from llm2rec.serve.recommender import ScoredItem, load_scorer, load_vectors, nearest, recommend
from llm2rec.stages import fitted, load_data, row_variants

KNOWN_ITEMS = 5
NEIGHBOURS = 5
RECOMMENDATIONS = 10
PREFERRED_ROWS = ("sasrec-llm2rec", "sasrec-mntp", "sasrec-csft", "sasrec-backbone", "sasrec-id")


def judge(run: Run) -> dict[str, Any]:
    """Evaluates every row and writes `metrics.json`, `per_user.parquet`, `showcase.json`, `report.html`.

    Returns:
        Summary: test events, users, rows.
    """
    settings = run.recipe.evaluation
    reference = reference_row(run)
    sequences, _, _ = load_data(run)
    out = run.evaluation
    per_user = rank_rows(run, sequences)
    per_user.write_parquet(out / "per_user.parquet")
    summary = protocol.summarise(per_user, settings.k, settings.bootstrap_samples)
    compared = protocol.compare_rows(per_user, reference, settings.bootstrap_samples)
    test_events = len(sequences.held_out(TEST))
    content = {
        **summary,
        "reference": reference,
        "comparisons": compared,
        "validation": validation_choices(run),
        "protocol": {
            "ranking": "full, over the whole catalogue; items of the history compete as well",
            "test_events": test_events,
            "holdout": run.recipe.data.holdout,
            "history_length": run.recipe.data.history_length,
            "ties": "count against the target; events of equal time are ordered by item_id",
        },
    }
    artifacts.write_json(out / "metrics.json", content)
    artifacts.write_json(out / "showcase.json", showcase(run, sequences))
    (out / "report.html").write_text(report.render_html(report_data(run, per_user)), encoding="utf-8")
    return {"rows": len(summary["rows"]), "test_events": test_events}


def reference_row(run: Run) -> str:
    """The row that the others are tested against: the recipe's, or the first where the run lacks the default."""
    rows = run.recipe.recommender.rows
    wanted = run.recipe.evaluation.reference
    return wanted if wanted in rows else rows[0]


def rank_rows(run: Run, sequences: Sequences) -> pl.DataFrame:
    """Ranks of every test event by every row and seed, PER_USER_COLUMNS."""
    tables = []
    for row in run.recipe.recommender.rows:
        for seed in [0] if row in FLOORS else range(run.recipe.recommender.seeds):
            scorer = load_scorer(run, row, seed)
            ranked = protocol.evaluate(
                scorer, sequences, TEST, run.recipe.data.history_length, description=f"rank {row}"
            )
            tables.append(protocol.per_user_table(ranked, sequences, row, seed))
    return pl.concat(tables)


def validation_choices(run: Run) -> dict[str, dict[str, Any]]:
    """Row -> which of its variants validation chose, with the validation NDCG@10 of each."""
    rows = [row for row in run.recipe.recommender.rows if row not in FLOORS and len(row_variants(row)) > 1]
    chosen = {row: fitted(run, row, 0) for row in rows}
    return {row: {"chosen": one["chosen"], "ndcg@10": one["validation"]} for row, one in chosen.items()}


def showcase(run: Run, sequences: Sequences) -> dict[str, Any]:
    """Examples to look at: neighbours of the best-known items before and after, one user's next items."""
    catalogue = Catalogue.read(run.data / "catalogue.parquet")
    items, _ = sequences.training()
    counts = np.bincount(np.asarray(items), minlength=sequences.n_items + 1)
    known = np.argsort(-counts, kind="stable")[:KNOWN_ITEMS]
    sets = [name for name in ("backbone", "csft", "mntp", "llm2rec") if _has_vectors(run, name)]
    vectors = {name: load_vectors(run, name, catalogue) for name in sets}
    neighbours = {
        catalogue.titles[index - 1]: {
            name: [_entry(item) for item in nearest(catalogue, matrix, int(index), NEIGHBOURS)]
            for name, matrix in vectors.items()
        }
        for index in known.tolist()
    }
    row = next(
        (name for name in PREFERRED_ROWS if name in run.recipe.recommender.rows),
        run.recipe.recommender.rows[0],
    )
    user, history = _typical_user(sequences)
    ids = [catalogue.item_ids[item - 1] for item in history]
    best = recommend(run, ids, RECOMMENDATIONS, row)
    return {
        "neighbours": neighbours,
        "recommendations": {
            "row": row,
            "user_id": user,
            "history": [catalogue.titles[item - 1] for item in history[-run.recipe.data.history_length :]],
            "items": [_entry(item) for item in best],
        },
    }


def _typical_user(sequences: Sequences) -> tuple[str, list[int]]:
    """The user with the median number of events, and what is known before the first test event."""
    lengths = np.diff(np.asarray(sequences.offsets))
    user = int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
    events = slice(int(sequences.offsets[user]), int(sequences.offsets[user + 1]))
    known = np.asarray(sequences.items[events])[np.asarray(sequences.parts[events]) != TEST]
    return str(sequences.user_ids[user]), [int(item) for item in known]


def _entry(item: ScoredItem) -> list[Any]:
    return [item.title, round(item.score, 4)]


def _has_vectors(run: Run, name: str) -> bool:
    return (run.embeddings(name) / artifacts.MANIFEST).exists()


def training_curves(run: Run) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, value) of every logged training: losses of the LM stages, validation of the rows."""
    curves = {}
    for name, folder in (("csft loss", run.csft), ("mntp loss", run.mntp), ("contrastive loss", run.iem)):
        curves[name] = _logged(folder / "metrics.jsonl", "loss")
    curves["contrastive validation AUC"] = _logged(run.iem / "metrics.jsonl", "eval_auc")
    for row in run.recipe.recommender.rows:
        if row not in FLOORS:
            file = run.recommender(row, 0) / "metrics.jsonl"
            curves[f"{row} validation NDCG@10"] = _logged(file, "eval_ndcg@10")
    return {name: points for name, points in curves.items() if points}


def _logged(file: Path, key: str) -> list[tuple[float, float]]:
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def stage_costs(run: Run) -> list[dict[str, Any]]:
    """Seconds and peak memory of every finished stage, in the order of the pipeline."""
    folders = [run.data, run.csft, run.mntp, run.iem]
    folders += sorted((run.folder / "embeddings").glob("*/*")) + sorted((run.folder / "recommender").glob("*/*/*"))
    costs = []
    for folder in folders:
        manifest = artifacts.read_manifest(folder)
        if manifest is not None:
            cost = {key: manifest.summary.get(key) for key in ("seconds", "peak_memory_gb")}
            costs.append({"stage": str(folder.relative_to(run.folder)), **cost})
    return costs


def report_data(run: Run, per_user: pl.DataFrame) -> report.ReportData:
    """Everything the HTML page shows."""
    metrics = artifacts.read_json(run.evaluation / "metrics.json")
    shown = artifacts.read_json(run.evaluation / "showcase.json")
    prepared = artifacts.require(run.data, "prepare").summary
    return report.ReportData(
        title=f"llm2rec: {run.folder.name}",
        facts={
            key: value for key, value in prepared.items() if key not in ("item_ids", "seconds", "peak_memory_gb")
        },
        metrics=metrics,
        recall_curves=protocol.recall_curves(per_user),
        training_curves=training_curves(run),
        showcase=shown,
        costs=stage_costs(run),
        settings=run.recipe.model_dump(mode="json"),
    )
