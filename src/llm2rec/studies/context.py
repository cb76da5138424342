"""Study `context`: do categories and times do what the text does, and do they add to it?"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from llm2rec.data.sequences import Sequences
from llm2rec.evaluation.protocol import Scorer
from llm2rec.rec.average import ScoreAverage, best_weight, validation_by_weight
from llm2rec.runs import Domain, Run
from llm2rec.serve.recommender import load_trained
from llm2rec.studies.base import (
    SMALL,
    Judged,
    Runs,
    Study,
    Variant,
    entries_of,
    evaluated_inputs,
    gathered,
    measured,
    over_world,
    ranked_by,
    rows_of,
)
from llm2rec.studies.worlds import World

IDS = "ids"
CONTEXT = "context"
CONTEXT_ROWS = {
    IDS: "sasrec-id",
    CONTEXT: "sasrec-context",
    "text": "sasrec-llm2rec",
    "ids and text": "sasrec-llm2rec+average",
}
COMBINED = ("sasrec-context", "sasrec-llm2rec")
COMBINED_LABEL = "context and text"
ONLY = "all"


def context(small: bool, folder: Path, recipe: str) -> Study:
    """SASRec with categories and time gaps against ids and LLM2Rec vectors, alone and averaged."""
    world = World("games", users=60)
    return Study(
        question="Do categories and times do what the text does, and do they add to it?",
        recipe=recipe,
        overrides=(*SMALL, *over_world(world, folder)) if small else (),
        variants=(Variant(ONLY, "all rows over the same log", (rows_of(CONTEXT_ROWS.values()),)),),
        judge=_judge_context,
        worlds=(world,) if small else (),
    )


def _judge_context(runs: Runs, folder: Path) -> list[Judged]:
    run = runs[ONLY]
    domain = run.domain()

    def make() -> pl.DataFrame:
        seeds = range(run.recipe.recommender.seeds)
        pairs: list[tuple[str, int, Scorer]] = [
            (COMBINED_LABEL, seed, _combined(run, domain, seed)) for seed in seeds
        ]
        return ranked_by(pairs, Sequences.load(domain.data), run, domain.config.history_length)

    alone = gathered(runs, entries_of(ONLY, CONTEXT_ROWS))
    together = measured(
        folder, "combined", {**evaluated_inputs(domain), "rows": {COMBINED_LABEL: list(COMBINED)}}, make
    )
    column = domain.config.categories
    features = "the time between events" + (f" and the column `{column}`" if column else "")
    meaning = (
        f"`context` is SASRec over ids that reads {features}; `text` is SASRec over LLM2Rec vectors; two together "
        "are the averages of their standardised scores, with the weight that validation chooses."
    )
    return [Judged("Side features, ids and text", meaning, CONTEXT, pl.concat([alone, together]))]


def _combined(run: Run, domain: Domain, seed: int) -> ScoreAverage:
    """Both recommenders' scores with the weight that validation chooses, as an averaged row has it."""
    first, second = (load_trained(domain, row, seed) for row in COMBINED)
    by_weight = validation_by_weight(
        ScoreAverage(first, second),
        Sequences.load(domain.data),
        domain.config.history_length,
        mask_history=run.recipe.evaluation.mask_history,
    )
    return ScoreAverage(first, second, best_weight(by_weight))
