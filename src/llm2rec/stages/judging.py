"""Stage `evaluate`: every row of a run on the test events -> metrics, per-user ranks, showcase, report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from llm2rec import artifacts
from llm2rec.config import TINY_RANDOM, SplitConfig
from llm2rec.data.sequences import TEST, Sequences
from llm2rec.data.tables import Catalogue
from llm2rec.data.texts import clean
from llm2rec.evaluation import protocol, report
from llm2rec.evaluation.maps import EmbeddingMap, shown_places
from llm2rec.evaluation.probes import principal_plane
from llm2rec.evaluation.ranking import list_metrics, metric_names, top_k
from llm2rec.evaluation.slices import slice_events, summarise_slices
from llm2rec.rows import FLOORS, preferred_row
from llm2rec.runs import Domain, Run
from llm2rec.serve.recommender import ScoredItem, listed, load_scorer, load_vectors
from llm2rec.serve.similar import nearest, unit_length
from llm2rec.stages.base import VARIANTS, averaged_rows, load_domain, row_variants, trained_rows, vector_sets
from llm2rec.stages.evaluation import reference_row
from llm2rec.stages.language import language_stages
from llm2rec.stages.recommenders import fit_stages_of, fitted

KNOWN_ITEMS = 5
NEIGHBOURS = 5
RECOMMENDATIONS = 10
SHOWN_CHARACTERS = 80
CUT = " ..."
NOT_FACTS = ("item_ids", "seconds", "peak_memory_gb", "dropped")
LANGUAGE_SETS = (*VARIANTS["backbone"], *VARIANTS["csft"], "mntp", "llm2rec")  # in the order of the pipeline


def judge(run: Run, domain: Domain) -> dict[str, Any]:
    """Evaluates every row; writes `metrics.json`, `table.md`, `per_user.parquet`, `showcase.json`, `report.html`.

    Returns:
        Summary: how many rows and test events.
    """
    settings = run.recipe.evaluation
    reference = reference_row(run)
    sequences = load_domain(run, domain).sequences
    out = domain.evaluation
    per_user, lists = rank_rows(run, domain, sequences)
    summary = protocol.summarise(per_user, metric_names(settings.k), settings.bootstrap_samples)
    compared = protocol.compare_rows(per_user, reference, settings.bootstrap_samples)
    test_events = len(sequences.held_out(TEST))
    content = {
        **summary,
        "reference": reference,
        "comparisons": compared,
        "lists": lists,
        "slices": summarise_slices(per_user, slice_events(sequences, TEST), reference, settings.bootstrap_samples),
        "validation": validation_choices(run, domain),
        "protocol": {
            "ranking": protocol.ranking_in_words(settings.mask_history, protocol.never_repeats(sequences)),
            "test_events": test_events,
            "split": split_in_words(domain.config.split),
            "history_length": domain.config.history_length,
            "ties": ties_in_words(domain.config.split),
            "vectors": vectors_in_words(run.recipe.recommender.smoothing),
        },
    }
    shown = showcase(run, domain, sequences)
    per_user.write_parquet(out / "per_user.parquet")  # written only now: a failure so far leaves the old one
    artifacts.write_json(out / "metrics.json", content)
    artifacts.write_json(out / "showcase.json", shown)
    artifacts.write_text(out / "table.md", report.markdown_table(content))
    (out / "report.html").write_text(report.render_html(report_data(run, domain, per_user)), encoding="utf-8")
    return {"rows": len(summary["rows"]), "test_events": test_events}


def split_in_words(split: SplitConfig) -> str:
    """How events were held out, for readers of a table."""
    cold = f"; {split.cold_items:.0%} of the items are test targets only" if split.cold_items else ""
    shares = "/".join(f"{100 * share:g}" for share in split.ratio)
    words = {
        "last": f"each user's last {split.holdout} test, the {split.holdout} before validation",
        "time": f"by time, {' and '.join(split.dates) if split.dates else shares + ' % of the events'}",
        "users": f"by users, {shares} %, the last {split.holdout} events of those held out",
        "given": "as given with the data",
    }
    return words[split.by] + cold


def ties_in_words(split: SplitConfig) -> str:
    """What decides between equal scores, and between events of equal time."""
    order = "part, then item_id" if split.by == "given" else "item_id"
    return f"equal scores count against the target; events of equal time are ordered by {order}"


def vectors_in_words(smoothing: float) -> str | None:
    """What the item vectors of all rows over text have in common beyond their encoders, for readers of a table."""
    return f"smoothed by {smoothing:g} over what is consumed together" if smoothing else None


def rank_rows(run: Run, domain: Domain, sequences: Sequences) -> tuple[pl.DataFrame, dict[str, dict[str, float]]]:
    """Ranks of every test event by every row and seed, PER_USER_COLUMNS, and what each row's lists are like.

    Lists are those of seed 0: coverage, Gini, novelty and popularity lift of the recommended items.
    """
    settings, length = run.recipe.evaluation, domain.config.history_length
    histories = torch.from_numpy(sequences.histories(sequences.held_out(TEST), length).astype(np.int64))
    counts = torch.from_numpy(sequences.training_counts())
    tables, lists = [], {}
    for row in run.recipe.recommender.rows:
        for seed in [0] if row in FLOORS else range(run.recipe.recommender.seeds):
            ranked = protocol.evaluate(
                load_scorer(domain, row, seed),
                sequences,
                TEST,
                length,
                description=f"rank {row}",
                mask_history=settings.mask_history,
                list_length=0 if seed else min(max(settings.k), sequences.n_items),
            )
            tables.append(protocol.per_user_table(ranked, sequences, row, seed))
            if not seed:
                recommended = torch.tensor(ranked["recommended"].to_numpy())
                cutoffs = [k for k in settings.k if k <= sequences.n_items]
                lists[row] = _list_metrics(recommended, histories, counts, cutoffs)
    return pl.concat(tables), lists


def _list_metrics(
    recommended: torch.Tensor, histories: torch.Tensor, counts: torch.Tensor, cutoffs: Sequence[int]
) -> dict[str, float]:
    """`list_metrics`; none where nothing was left to recommend, or no item of a history was trained on."""
    try:
        return list_metrics(recommended, histories, counts, cutoffs)
    except ValueError:
        return {}


def validation_choices(run: Run, domain: Domain) -> dict[str, dict[str, Any]]:
    """Row -> which of its variants validation chose, with the validation NDCG@10 of each, averaged over seeds.

    A weight is chosen for each seed by itself: where they differ, `chosen` names that of every seed in order.
    """
    rows = [row.name for row in trained_rows(run) if len(row_variants(row)) > 1]
    rows += [row.name for row in averaged_rows(run)]
    seeds = range(run.recipe.recommender.seeds)
    return {row: _choice([fitted(domain, row, seed) for seed in seeds]) for row in rows}


def _choice(fits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the trainings of all seeds chose for a row."""
    chosen = [fit["chosen"] for fit in fits]
    values = {name: sum(fit["validation"][name] for fit in fits) / len(fits) for name in fits[0]["validation"]}
    return {"chosen": chosen[0] if len(set(chosen)) == 1 else ", ".join(chosen), "ndcg@10": values}


def showcase(run: Run, domain: Domain, sequences: Sequences) -> dict[str, Any]:
    """Examples to look at: neighbours of the best-known items before and after, one user's next items."""
    catalogue = Catalogue.read(domain.data / "catalogue.parquet")
    events = sequences.training_counts()
    known = (np.argsort(-events, kind="stable")[:KNOWN_ITEMS] + 1).tolist()
    new, names = torch.from_numpy(events == 0), distinct_names(catalogue)
    neighbours: dict[str, dict[str, Any]] = {names[catalogue.item_ids[index - 1]]: {} for index in known}
    for name in shown_sets(run):
        unit = unit_length(load_vectors(domain, name, catalogue))
        lists = nearest(catalogue, unit, known, NEIGHBOURS, new)
        for of_item, items in zip(neighbours.values(), lists, strict=True):
            of_item[name] = [_entry(item, names) for item in items]
    row = preferred_row(run.recipe.recommender.rows)
    user, known_events = _typical_user(sequences)
    history = np.asarray(sequences.items)[known_events]
    window = known_events[-domain.config.history_length :]
    scorer = load_scorer(domain, row, 0)
    seen = [torch.from_numpy(np.asarray(sequences.items)[window].astype(np.int64))[None]]
    if getattr(scorer, "needs_times", False):
        seen.append(torch.from_numpy(np.asarray(sequences.times)[window])[None])
    items, scores = top_k(
        scorer.score(*seen), RECOMMENDATIONS, exclude=torch.from_numpy(history.astype(np.int64))[None]
    )
    best = listed(catalogue, items[0], scores[0], new)
    return {
        "neighbours": neighbours,
        "recommendations": {
            "row": row,
            "user_id": user,
            "history": [names[catalogue.item_ids[item - 1]] for item in seen[0][0].tolist()],
            "items": [_entry(item, names) for item in best],
        },
    }


def _typical_user(sequences: Sequences) -> tuple[str, np.ndarray]:
    """The tested user with the median number of events, and the positions before the first test event."""
    positions = sequences.held_out(TEST)
    users, first = np.unique(sequences.users_of(positions), return_index=True)
    lengths = np.diff(np.asarray(sequences.offsets))[users]
    place = int(np.argsort(lengths, kind="stable")[len(users) // 2])
    known = np.arange(int(sequences.offsets[users[place]]), int(positions[first[place]]))
    return str(sequences.user_ids[int(users[place])]), known


def shown_sets(run: Run) -> list[str]:
    """The vector sets that neighbours and maps are shown of; each is large, so they are loaded one at a time."""
    wanted = vector_sets(run)
    return [name for name in (*run.recipe.encode.text_encoders, *LANGUAGE_SETS) if name in wanted]


def embedding_maps(run: Run, domain: Domain, sequences: Sequences) -> list[EmbeddingMap]:
    """Each vector set on its first two principal axes, coloured by category, or by popularity without any.

    They hold the items that a page shows; the axes are of all items.
    """
    catalogue = Catalogue.read(domain.data / "catalogue.parquet")
    places, names = shown_places(len(catalogue)), list(distinct_names(catalogue).values())
    colours: list[Any] = sequences.training_counts().tolist()
    colour_name = "training events"
    if domain.config.categories:
        labels = catalogue.labels(domain.config.categories)
        colours, colour_name = [row[0] if row else "none" for row in labels], domain.config.categories
    titles, colours = [names[place] for place in places], [colours[place] for place in places]
    maps = []
    for name in shown_sets(run):
        x, y = principal_plane(load_vectors(domain, name, catalogue), places).T.tolist()
        maps.append(EmbeddingMap(name, x, y, titles, colours, colour_name, len(catalogue)))
    return maps


def distinct_names(catalogue: Catalogue) -> dict[str, str]:
    """Item id -> what it is called in lists: its title, shortened; with its id where that name is shared."""
    names = [_shortened(clean(title)) for title in catalogue.titles]
    counts = Counter(names)
    pairs = zip(catalogue.item_ids, names, strict=True)
    return {item_id: name + (f" [{item_id}]" if counts[name] > 1 else "") for item_id, name in pairs}


def _shortened(title: str) -> str:
    """The title, or its first characters: not every language has spaces to cut at."""
    if len(title) <= SHOWN_CHARACTERS:
        return title
    return title[: SHOWN_CHARACTERS - len(CUT)].rstrip() + CUT


def _entry(item: ScoredItem, names: dict[str, str]) -> list[Any]:
    return [names[item.item_id], round(item.score, 4)]


def training_curves(run: Run, domain: Domain) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, value) of every logged training: losses of the LM stages, validation of the rows."""
    curves = {}
    for stage in language_stages(run):
        name = "contrastive" if stage.folder == run.iem else stage.folder.name
        curves[f"{name} loss"] = _logged(stage.folder / artifacts.METRICS, "loss")
        curves[f"{name} validation AUC"] = _logged(stage.folder / artifacts.METRICS, "eval_auc")
    for row in trained_rows(run):
        file = domain.recommender(row.name, 0) / artifacts.METRICS
        curves[f"{row.name} validation NDCG@10"] = _logged(file, "eval_ndcg@10")
    return {name: points for name, points in curves.items() if points}


def _logged(file: Path, key: str) -> list[tuple[float, float]]:
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def stage_costs(run: Run, domain: Domain) -> list[dict[str, Any]]:
    """Seconds and peak memory of every finished stage, in the order of the pipeline."""
    folders = [domain.data, *(stage.folder for stage in language_stages(run))]
    folders += [domain.embeddings(name) for name in vector_sets(run)]
    folders += [stage.folder for stage in fit_stages_of(run, domain)]
    costs = []
    for folder in folders:
        summary = _summary(folder)
        cost = {key: summary.get(key) for key in ("seconds", "peak_memory_gb")}
        costs.append({"stage": str(folder.relative_to(run.folder)), **cost})
    return costs


def _summary(folder: Path) -> dict[str, Any]:
    """What a finished stage says of itself."""
    manifest = artifacts.read_manifest(folder)
    return {} if manifest is None else manifest.summary


def report_facts(run: Run, domain: Domain) -> dict[str, Any]:
    """What stands under the title: the data, the model and what it was trained with."""
    prepared = artifacts.require(domain.data, "prepare").summary
    facts = {key: value for key, value in prepared.items() if key not in NOT_FACTS}
    model = run.recipe.model.source
    facts["language_model"] = f"{model} (random weights: a trial)" if model == TINY_RANDOM else model
    trained = {stage.folder: _summary(stage.folder) for stage in language_stages(run)}
    budgets = ("csft_tokens", run.csft, "tokens"), ("mntp_steps", run.mntp, "steps")
    for name, folder, key in (*budgets, ("contrastive_steps", run.iem, "best_step")):
        if folder in trained:
            facts[name] = trained[folder].get(key, 0)
    return facts


def report_data(run: Run, domain: Domain, per_user: pl.DataFrame) -> report.ReportData:
    """Everything the HTML page shows."""
    metrics = artifacts.read_json(domain.evaluation / "metrics.json")
    shown = artifacts.read_json(domain.evaluation / "showcase.json")
    return report.ReportData(
        title=f"llm2rec: {run.folder.name}" + ("" if domain.alone else f", {domain.name}"),
        facts=report_facts(run, domain),
        metrics=metrics,
        list_metrics={row: values for row, values in metrics["lists"].items() if values},
        slices=metrics["slices"],
        maps=embedding_maps(run, domain, Sequences.load(domain.data)),
        recall_curves=protocol.recall_curves(per_user),
        training_curves=training_curves(run, domain),
        showcase=shown,
        costs=stage_costs(run, domain),
        settings=run.recipe.model_dump(mode="json"),
    )
