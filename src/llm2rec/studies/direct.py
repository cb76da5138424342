"""Study `csft-direct`: the CSFT model as the recommender itself, for a sample of users."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from llm2rec import artifacts
from llm2rec.artifacts import Inputs
from llm2rec.data.sequences import TEST, Sequences
from llm2rec.runs import Domain, Run
from llm2rec.stages.base import load_domain, model_inputs, model_path, text_inputs
from llm2rec.studies.base import (
    SMALL,
    Judged,
    Runs,
    Study,
    Variant,
    entries_of,
    gathered,
    measured,
    over_world,
    ranked_by,
    rows_of,
    with_test_events,
)
from llm2rec.studies.worlds import World

REFERENCE = "CSFT vectors"
ROWS = {
    "popularity": "popularity",
    "ids": "sasrec-id",
    REFERENCE: "sasrec-csft-bidirectional",
    "LLM2Rec vectors": "sasrec-llm2rec",
}
UNTRAINED, TRAINED = "backbone-direct", "csft-direct"
ONLY = "all"
HISTORIES_AT_ONCE = 4  # of one step of the progress bar; each is read by itself


def csft_direct(small: bool, folder: Path, recipe: str) -> Study:
    """All titles ranked by their likelihood after the history, against rows over the same model's vectors."""
    world = World("games", users=60)
    overrides = (*SMALL, *over_world(world, folder), "evaluation.direct_users=40") if small else ()
    packed = (rows_of(ROWS.values()), "csft.mode=packed")
    return Study(
        question="Does the collaborative language model recommend better itself than its vectors do?",
        recipe=recipe,
        overrides=overrides,
        variants=(Variant(ONLY, "titles are asked for as CSFT's mode packed lays them out", packed),),
        judge=_judge,
        worlds=(world,) if small else (),
    )


def _judge(runs: Runs, folder: Path) -> list[Judged]:
    run = runs[ONLY]
    domain = run.domain()
    sequences = Sequences.load(domain.data)
    sampled = sampled_users(sequences, run.recipe.evaluation.direct_users, run.recipe.seed)
    rows = gathered(runs, entries_of(ONLY, ROWS))
    users = sequences.user_ids.cast(pl.String).gather(np.unique(sampled.users_of(sampled.held_out(TEST))))
    rows = rows.filter(pl.col("user_id").is_in(users.implode()))
    direct = [_ranked_directly(run, domain, sampled, label, folder) for label in (UNTRAINED, TRAINED)]
    meaning = (
        f"{len(users):,} sampled users. {TRAINED} ranks all titles by their likelihood after the titles of the "
        f"history; {UNTRAINED} is the same model before CSFT."
    )
    return [Judged("The model itself and its vectors", meaning, REFERENCE, pl.concat([rows, *direct]))]


def sampled_users(sequences: Sequences, users: int, seed: int) -> Sequences:
    """The sequences with the test events of a random sample of users, of all where they are fewer."""
    owners = sequences.users_of(sequences.held_out(TEST))
    tested = np.unique(owners)
    chosen = np.random.default_rng(seed).choice(tested, min(users, len(tested)), replace=False)
    return with_test_events(sequences, np.isin(owners, chosen), "of a sampled user")


def _ranked_directly(run: Run, domain: Domain, sampled: Sequences, label: str, folder: Path) -> pl.DataFrame:
    """Ranks of the sampled test events by the language model, one seed."""

    def make() -> pl.DataFrame:
        from llm2rec.lm import backbone as backbones
        from llm2rec.lm.direct import TitleRanker
        from llm2rec.precision import resolve_dtype
        from llm2rec.training import default_device

        source = run.csft if label == TRAINED else model_path(run)
        lm = backbones.load(source, resolve_dtype(run.recipe.model.dtype))
        lm.model.to(default_device())
        ranker = TitleRanker(
            lm,
            load_domain(run, domain).texts,
            history_length=domain.config.history_length,
            max_title_tokens=run.recipe.model.max_title_tokens,
        )
        length = domain.config.history_length
        return ranked_by([(label, 0, ranker)], sampled, run, length, batch_size=HISTORIES_AT_ONCE)

    model: Inputs = model_inputs(run)
    if label == TRAINED:
        model = {"csft": artifacts.require(run.csft, "csft").fingerprint}
    inputs = {
        **model,
        **text_inputs(run, domain),
        "data": artifacts.require(domain.data, "prepare").fingerprint,
        "data.history_length": domain.config.history_length,
        "evaluation.direct_users": run.recipe.evaluation.direct_users,
        "evaluation.mask_history": run.recipe.evaluation.mask_history,
    }
    return measured(folder, label, inputs, make)
