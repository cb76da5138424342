"""Study `csft-direct`: the CSFT model as the recommender itself, for a sample of users."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch

from llm2rec import artifacts
from llm2rec.artifacts import Inputs
from llm2rec.data.sequences import TEST, Sequences
from llm2rec.runs import Domain, Run
from llm2rec.stages.base import dtype_of, load_domain, model_inputs, model_path, text_inputs
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

if TYPE_CHECKING:
    from llm2rec.lm.direct import TitleRanker

REFERENCE = "CSFT vectors"
ROWS = {
    "popularity": "popularity",
    "ids": "sasrec-id",
    REFERENCE: "sasrec-csft-causal",
    "LLM2Rec vectors": "sasrec-llm2rec",
}
UNTRAINED, TRAINED = "backbone-direct", "csft-direct"
ONLY = "all"
HISTORIES_AT_ONCE = 4  # of one step of the progress bar; each is read by itself
USERS_AT_ONCE = 20  # whose ranks are kept together; a study that was killed goes on after them


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
    users = sampled_users(sequences, run.recipe.evaluation.direct_users, run.recipe.seed)
    names = sequences.user_ids.cast(pl.String).gather(users)
    rows = gathered(runs, entries_of(ONLY, ROWS)).filter(pl.col("user_id").is_in(names.implode()))
    direct = [_ranked_directly(run, domain, users, label, folder) for label in (UNTRAINED, TRAINED)]
    meaning = (
        f"{len(names):,} sampled users. {TRAINED} ranks all titles by their likelihood after the titles of the "
        f"history; {UNTRAINED} is the same model before CSFT."
    )
    return [Judged("The model itself and its vectors", meaning, REFERENCE, pl.concat([rows, *direct]))]


def sampled_users(sequences: Sequences, users: int, seed: int) -> np.ndarray:
    """Numbers of a random sample of the users with test events, rising; of all of them where they are fewer."""
    tested = np.unique(sequences.users_of(sequences.held_out(TEST)))
    return np.sort(np.random.default_rng(seed).choice(tested, min(users, len(tested)), replace=False))


def _ranked_directly(run: Run, domain: Domain, users: np.ndarray, label: str, folder: Path) -> pl.DataFrame:
    """Ranks of the test events of some users by the language model, one seed; kept a few users at a time."""
    sequences = Sequences.load(domain.data)
    owners = sequences.users_of(sequences.held_out(TEST))
    length = domain.config.history_length
    inputs = {
        **(_trained_inputs(run) if label == TRAINED else model_inputs(run)),
        **text_inputs(run, domain),
        "data": artifacts.require(domain.data, "prepare").fingerprint,
        "data.history_length": length,
        "evaluation.mask_history": run.recipe.evaluation.mask_history,
    }

    @cache
    def ranker() -> TitleRanker:
        made, positions = _ranker(run, domain, label), sequences.held_out(TEST)[np.isin(owners, users)]
        made.check_histories(torch.from_numpy(sequences.histories(positions, length)))  # before hours are spent
        return made

    def ranked(part: np.ndarray) -> pl.DataFrame:
        chosen = with_test_events(sequences, np.isin(owners, part), "of a sampled user")
        return ranked_by([(label, 0, ranker())], chosen, run, length, batch_size=HISTORIES_AT_ONCE)

    tables = []
    for begin in range(0, len(users), USERS_AT_ONCE):
        part = users[begin : begin + USERS_AT_ONCE]
        key = {**inputs, "users": part.tolist()}
        tables.append(measured(folder, f"{label}/{begin}", key, partial(ranked, part)))
    return pl.concat(tables)


def _trained_inputs(run: Run) -> Inputs:
    return {"csft": artifacts.require(run.csft, "csft").fingerprint}


def _ranker(run: Run, domain: Domain, label: str) -> TitleRanker:
    """The language model before or after CSFT as a scorer of a domain's items."""
    from llm2rec.lm import backbone as backbones
    from llm2rec.lm.direct import TitleRanker
    from llm2rec.precision import resolve_dtype
    from llm2rec.training import default_device

    dtype = resolve_dtype(dtype_of(run, run.recipe.model.dtype))
    lm = backbones.load(run.csft if label == TRAINED else model_path(run), dtype)
    lm.model.to(default_device())
    return TitleRanker(
        lm,
        load_domain(run, domain).texts,
        history_length=domain.config.history_length,
        max_title_tokens=run.recipe.model.max_title_tokens,
    )
