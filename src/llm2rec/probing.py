"""Verb `probe`: what the vectors and the language models of a run know, and what that says of known failures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from llm2rec import artifacts, progress
from llm2rec.config import TINY_RANDOM
from llm2rec.data import sources
from llm2rec.data.sequences import TEST
from llm2rec.data.tables import Catalogue
from llm2rec.evaluation import probes
from llm2rec.evaluation.diagnosis import (
    BACKBONE,
    BEFORE_CSFT,
    CSFT,
    DATA,
    FINAL,
    ORDER,
    PERPLEXITY,
    Probed,
    data_probes,
    diagnose,
)
from llm2rec.evaluation.findings import PROBES as PAGE
from llm2rec.evaluation.findings import render_findings_html
from llm2rec.evaluation.order import order_probe
from llm2rec.evaluation.probes import NothingToMeasure
from llm2rec.runs import Domain, Run, open_run
from llm2rec.serve.recommender import load_scorer, load_vectors
from llm2rec.stages import evaluate_stages, fitted, language_stages
from llm2rec.stages.base import (
    Loaded,
    dtype_of,
    language_sets,
    load_domain,
    model_path,
    require_current,
    trained_rows,
    vector_sets,
)
from llm2rec.stages.settings import require_settings

PROBES = "probes.json"

Reasons = dict[str, str]


def probe(run: str | Path | Run, domain: str | None = None) -> dict[str, Any]:
    """Probes every vector set, the language models and the best row of a run.

    Written to `probes.json` and, to look at, `probes.html` beside the evaluation; what they held before is moved
    aside where it differs.

    Returns:
        `vectors` (set, and `data` -> name -> Probe), `language_model` (model -> future sensitivity, perplexity of
        the true and of a random next title), `order` (`order_probe` of the row that is best on validation),
        `left_out` (what had nothing to measure -> why), `diagnosis` (a Diagnosis); and `page`, where that lies.

    Raises:
        ArtifactError: the run is not made and evaluated as its recipe now says, a model of it is missing or was
            changed, its folder cannot be written to, or another process works in it.
    """
    run = run if isinstance(run, Run) else open_run(run)
    place = run.domain(domain)
    artifacts.require(place.evaluation, "evaluate")
    for folder in (run.folder, place.evaluation):
        artifacts.require_writable(folder)
    with artifacts.run_lock(run.folder):
        _require_current(run, place)
        content = _measure(run, place)
        _write(run, place, content)
    return content | {"page": str(place.evaluation / PAGE)}


def _require_current(run: Run, domain: Domain) -> None:
    """Raises ArtifactError, before any model is loaded, where what is to be probed is missing or out of date."""
    for stage in evaluate_stages(run):
        if stage.folder == domain.evaluation:
            require_current(run, stage)
    require_settings(run, domain)
    for stage in language_stages(run):
        artifacts.require(stage.folder, stage.verb)
    if language_sets(run) and run.recipe.model.source != TINY_RANDOM:
        sources.check_model(run.recipe.model.source)


def _measure(run: Run, domain: Domain) -> dict[str, Any]:
    """The content of `probes.json`."""
    loaded = load_domain(run, domain)
    vectors, left_out = _vector_probes(run, domain, loaded)
    models, without = _language_probes(run, domain, loaded)
    left_out |= without
    order: dict[str, Any] = {}
    try:
        order = _order_probe(run, domain, loaded)
    except NothingToMeasure as reason:
        left_out[ORDER] = str(reason)
    probed = Probed(vectors, models, order, left_out)
    return asdict(probed) | {"diagnosis": diagnose(probed)}


def _write(run: Run, domain: Domain, content: dict[str, Any]) -> None:
    path, page = domain.evaluation / PROBES, domain.evaluation / PAGE
    if path.exists() and path.read_bytes() != artifacts.json_text(content).encode():
        for old in (path, page):
            artifacts.move_aside(old, run.folder)
    title = f"llm2rec: {run.folder.name}" + ("" if domain.alone else f", {domain.name}") + ", probed"
    artifacts.write_text(page, render_findings_html(title, content))
    artifacts.write_json(path, content)


def _vector_probes(run: Run, domain: Domain, loaded: Loaded) -> tuple[dict[str, dict[str, probes.Probe]], Reasons]:
    """`data` and every vector set of the run, and why what was left out."""
    sequences, sets = loaded.sequences, vector_sets(run)
    targets = np.asarray(sequences.items)[sequences.held_out(TEST)]
    counts = sequences.training_counts()
    found = {DATA: data_probes(counts, loaded.texts, targets)}
    if not sets:
        return found, {"vectors": "no row of this run reads item texts"}
    progress.say(f"probe  vectors of {len(loaded.item_ids):,} items: {', '.join(sets)}")
    catalogue = Catalogue.read(domain.data / "catalogue.parquet")
    left_out: Reasons = {}
    categories = None
    if domain.config.categories:
        categories = [labels[0] if labels else None for labels in catalogue.labels(domain.config.categories)]
    pairs = probes.consumed_together(sequences, TEST)
    shares = {}
    for name in progress.track(sets, "probe vectors", len(sets)):
        vectors = load_vectors(domain, name, catalogue)
        found[name], left_out, of_pairs = probes.vector_probes(vectors, pairs, counts, categories)
        if name in (*BEFORE_CSFT, *BEFORE_CSFT.values()) and of_pairs is not None:
            shares[name] = of_pairs
        del vectors  # before the next set is loaded
    for after, before in BEFORE_CSFT.items():
        if {after, before} <= shares.keys():
            found[after]["co_consumption_gain"] = probes.co_consumption_gain(shares[before], shares[after])
    return found, left_out


def _language_probes(run: Run, domain: Domain, loaded: Loaded) -> tuple[dict[str, dict[str, float]], Reasons]:
    """Every language model of the run, and why what was left out."""
    from llm2rec.lm import backbone as backbones
    from llm2rec.lm.backbone import future_sensitivity
    from llm2rec.lm.csft import Form
    from llm2rec.lm.probes import next_title_perplexity
    from llm2rec.precision import resolve_dtype
    from llm2rec.training import default_device

    models = _language_models(run)
    if not models:
        return {}, {"language models": "no row of this run is made by the language model"}
    dtype = resolve_dtype(dtype_of(run, run.recipe.model.dtype))
    trained, longest = run.recipe.csft, run.recipe.model.max_title_tokens
    form = Form(trained.mode, domain.config.history_length, longest, trained.paper_separator)
    found: dict[str, dict[str, float]] = {}
    left_out: Reasons = {}
    for name, path in models.items():
        progress.say(f"probe  language model {name}")
        writes = name in (BACKBONE, CSFT)
        lm = backbones.load(path, dtype, head=writes)
        lm.model.to(default_device())
        if writes:
            lm.set_causal(True)
        found[name] = {"future_sensitivity": future_sensitivity(lm)}
        try:
            if writes:
                found[name] |= next_title_perplexity(lm, loaded.sequences, loaded.texts, form, run.recipe.seed)
        except NothingToMeasure as reason:
            left_out[PERPLEXITY] = str(reason)
        del lm  # before the next one is loaded
    return found, left_out


def _language_models(run: Run) -> dict[str, str | Path]:
    """The untrained model, and those that the recipe trains from it, where they lie."""
    if not language_sets(run):
        return {}
    trained = [stage.folder for stage in language_stages(run)]
    models: dict[str, str | Path] = {BACKBONE: model_path(run)}
    for name, path in ((CSFT, run.csft), ("mntp", run.mntp), (FINAL, run.iem)):
        if path in trained:
            models[name] = path
    return models


def _order_probe(run: Run, domain: Domain, loaded: Loaded) -> dict[str, Any]:
    """`order_probe` of the row that is best on validation, and its name.

    Raises:
        NothingToMeasure: no row is trained, or no history has an order.
    """
    rows, seeds = [row.name for row in trained_rows(run)], range(run.recipe.recommender.seeds)
    if not rows:
        raise NothingToMeasure("no row of this run is trained")
    validation = {row: sum(fitted(domain, row, seed)["validation_ndcg@10"] for seed in seeds) for row in rows}
    best = max(rows, key=lambda row: validation[row])
    progress.say(f"probe  order of the history: {best}")
    per_user = pl.read_parquet(domain.evaluation / "per_user.parquet", glob=False)
    found = order_probe(
        {seed: load_scorer(domain, best, seed) for seed in seeds},
        per_user.filter(pl.col("row") == best),
        loaded.sequences,
        TEST,
        history_length=domain.config.history_length,
        mask_history=run.recipe.evaluation.mask_history,
        samples=run.recipe.evaluation.bootstrap_samples,
    )
    return {"row": best, **found}
