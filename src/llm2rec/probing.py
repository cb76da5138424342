"""Verb `probe`: what the vectors and the language models of a run know, and what that says of known failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import RenderableType

from llm2rec import artifacts, progress
from llm2rec.data.sequences import TEST, Sequences
from llm2rec.data.tables import Catalogue
from llm2rec.evaluation import probes, protocol, report
from llm2rec.evaluation.diagnosis import data_probes, diagnose
from llm2rec.runs import Domain, Run, open_run
from llm2rec.serve.recommender import load_scorer, load_vectors
from llm2rec.stages.base import Loaded, load_domain, model_path, trained_rows, vector_sets

PROBES = "probes.json"
ORDERS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "as it was": lambda history, generator: history,
    "reversed": lambda history, generator: history[::-1],
    "shuffled": lambda history, generator: generator.permutation(history),
}


def probe(run: str | Path | Run, domain: str | None = None) -> dict[str, Any]:
    """Probes every vector set, the language models and the best row of a run; written to `evaluation/probes.json`.

    Returns:
        `vectors` (set, and `data` -> name -> Probe), `language_model` (model -> future sensitivity, perplexity of
        the true and of a random next title), `order` (row, and NDCG@10 by order of the history), `diagnosis`
        (sentences, none where no known failure shows).

    Raises:
        ArtifactError: the run is not evaluated.
    """
    run = run if isinstance(run, Run) else open_run(run)
    place = run.domain(domain)
    artifacts.require(place.evaluation, "evaluate")
    loaded = load_domain(run, place)
    found, models = _vector_probes(run, place, loaded), _language_probes(run, place, loaded)
    content = {
        "vectors": found,
        "language_model": models,
        "order": _order_probe(run, place, loaded.sequences),
        "diagnosis": diagnose(found, models),
    }
    artifacts.write_json(place.evaluation / PROBES, content)
    return content


def _vector_probes(run: Run, domain: Domain, loaded: Loaded) -> dict[str, dict[str, probes.Probe]]:
    sequences = loaded.sequences
    items, _ = sequences.training()
    counts = np.bincount(np.asarray(items), minlength=sequences.n_items + 1)[1:]
    targets = np.asarray(sequences.items)[sequences.held_out(TEST)]
    found = {"data": data_probes(counts, loaded.texts, targets)}
    catalogue = Catalogue.read(domain.data / "catalogue.parquet")
    categories = None
    if domain.config.categories:
        categories = [labels[0] if labels else None for labels in catalogue.labels(domain.config.categories)]
    pairs = probes.consumed_together(sequences, TEST)
    for name in progress.track(vector_sets(run), "probe vectors", len(vector_sets(run))):
        found[name] = probes.vector_probes(load_vectors(domain, name, catalogue), pairs, counts, categories)
    return found


def _language_probes(run: Run, domain: Domain, loaded: Loaded) -> dict[str, dict[str, float]]:
    from llm2rec.lm import backbone as backbones
    from llm2rec.lm.backbone import future_sensitivity
    from llm2rec.lm.probes import next_title_perplexity
    from llm2rec.precision import resolve_dtype

    sets = vector_sets(run)
    causal = {"backbone": model_path(run), "csft": run.csft} if sets else {}
    encoders = {"mntp": run.mntp, "llm2rec": run.iem}
    found: dict[str, dict[str, float]] = {}
    dtype = resolve_dtype(run.recipe.model.dtype)
    for name, path in causal.items():
        if name == "backbone" or (run.csft / artifacts.MANIFEST).exists():
            lm = backbones.load(path, dtype)
            lm.set_causal(True)
            found[name] = {"future_sensitivity": future_sensitivity(lm)} | next_title_perplexity(
                lm,
                loaded.sequences,
                loaded.texts,
                history_length=domain.config.history_length,
                max_title_tokens=run.recipe.model.max_title_tokens,
                seed=run.recipe.seed,
            )
    for name, path in encoders.items():
        if (path / artifacts.MANIFEST).exists():
            found[name] = {"future_sensitivity": future_sensitivity(backbones.load(path, dtype, head=False))}
    return found


class _Reordered:
    """A scorer that sees every history in another order."""

    def __init__(self, scorer: protocol.Scorer, order: str) -> None:
        self._scorer, self._order = scorer, ORDERS[order]
        self.n_items = scorer.n_items
        self.needs_times = getattr(scorer, "needs_times", False)

    def score(self, histories: torch.Tensor, *times: torch.Tensor) -> torch.Tensor:
        """Scores (B, N) after the reordered histories."""
        generator = np.random.default_rng(0)
        changed = histories.numpy().copy()
        for row, length in zip(changed, (changed > 0).sum(axis=1), strict=True):
            row[:length] = self._order(row[:length].copy(), generator)
        return self._scorer.score(torch.from_numpy(changed), *times)


def _order_probe(run: Run, domain: Domain, sequences: Sequences) -> dict[str, Any]:
    """NDCG@10 on the test events with the history as it was, reversed and shuffled: order must matter."""
    rows = [row.name for row in trained_rows(run)]
    if not rows:
        return {}
    scorer = load_scorer(domain, rows[-1], 0)
    values = {}
    for order in ORDERS:
        ranked = protocol.evaluate(
            _Reordered(scorer, order),
            sequences,
            TEST,
            domain.config.history_length,
            description=f"history {order}",
        )
        values[order] = protocol.mean_metric(ranked, "ndcg@10")
    return {"row": rows[-1], "ndcg@10": values}


def show_probes(content: dict[str, Any]) -> list[RenderableType]:
    """The result of `probe` for the terminal."""
    sets = [name for name in content["vectors"] if name != "data"]
    heads = [*(name.replace("-", "\n") for name in sets), "chance"]
    table = report.terminal_table("vectors", *heads, numbers=heads)
    for name in dict.fromkeys(name for one in sets for name in content["vectors"][one]):
        readings = [content["vectors"][one][name] for one in sets]
        chance = readings[0]["chance"]
        table.add_row(
            name.replace("_", " "),
            *(f"{reading['value']:.3f}" for reading in readings),
            "" if chance is None else f"{chance:.3f}",
        )
    parts: list[RenderableType] = [table]
    heads = ["future\nsensitivity", "perplexity of the\ntrue next title", "of a\nrandom one"]
    models = report.terminal_table("language model", *heads, numbers=heads)
    for name, one in content["language_model"].items():
        models.add_row(
            name, *(f"{one[key]:.3f}" if key in one else "" for key in ("future_sensitivity", "true", "random"))
        )
    parts.append(models)
    if content["order"]:
        values = ", ".join(f"{order} {value:.4f}" for order, value in content["order"]["ndcg@10"].items())
        parts.append(f"NDCG@10 of {content['order']['row']} by order of the history: {values}")
    parts += [
        f"diagnosis: {sentence}" for sentence in content["diagnosis"] or ["none of the known failures shows"]
    ]
    return parts
