"""Studies of the recommenders: users and items that are hardly known (`cold-start`), side features (`context`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from llm2rec.data.sequences import TEST, Sequences, cold_items
from llm2rec.evaluation.protocol import Scorer
from llm2rec.evaluation.ranking import top_k
from llm2rec.rec.average import ScoreAverage, best_weight, validation_by_weight
from llm2rec.rec.sequential import SequentialRecommender
from llm2rec.runs import Domain, Run
from llm2rec.serve.recommender import is_new, load_trained, with_new_items
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
    scorers,
    with_test_events,
)
from llm2rec.studies.worlds import World

KNOWN_EVENTS = (1, 2, 3, 5)
IDS = "ids"
COLD_ROWS = {
    "popularity": "popularity",
    IDS: "sasrec-id",
    "text, untrained": "sasrec-backbone-causal",
    "text after CSFT": "sasrec-csft-causal",
    "text": "sasrec-llm2rec",
    "both, summed": "sasrec-llm2rec+sum",
    "both, averaged": "sasrec-llm2rec+average",
}
PLACES = (0, 1, 2, 3)
LISTED = 10
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


def cold_start(small: bool, folder: Path, recipe: str) -> Study:
    """Ids, text and both for users with few known events, and for items that no training event names.

    Vectors of the language model before and after CSFT stand beside LLM2Rec's: do its stages pay where ids fail?
    """
    world = World("games", users=240, events=10)
    share = 0.3 if small else 0.1
    return Study(
        question="What can be recommended to users, and what of items, of whom little is known?",
        recipe=recipe,
        overrides=(*SMALL, *over_world(world, folder)) if small else (),
        variants=(
            Variant(
                ONLY,
                f"{share:.0%} of the items appear as test targets only",
                (rows_of(COLD_ROWS.values()), f"data.split.cold_items={share}"),
            ),
        ),
        judge=_judge_cold_start,
        worlds=(world,) if small else (),
    )


def _judge_cold_start(runs: Runs, folder: Path) -> list[Judged]:
    run = runs[ONLY]
    domain = run.domain()
    known = (
        f"Users with at least {max(KNOWN_EVENTS)} known events, their histories cut to the last so many. "
        "`text` is SASRec over LLM2Rec vectors, the other texts are over the causal means of the language model."
    )
    tables = []
    for events in KNOWN_EVENTS:
        per_user = _ranked_after(run, domain, events, folder)
        seen = "1 known event" if events == 1 else f"{events} known events"
        tables.append(Judged(f"Users with {seen}", f"{known} Targets seen in training.", IDS, per_user))
    whole = gathered(runs, entries_of(ONLY, COLD_ROWS))
    is_cold = pl.col("item_id").is_in(cold_items(domain.data).cast(pl.String).implode())
    for title, meaning, chosen in (
        ("Items seen in training", "Test targets with training events, after whole histories.", ~is_cold),
        ("Items never seen in training", "Held-out test targets, ranked among all items.", is_cold),
    ):
        tables.append(Judged(title, meaning, IDS, whole.filter(chosen)))
    kept = _ranked_with_places(run, domain, folder)
    for kind, chosen in (("seen in training", ~is_cold), ("never seen in training", is_cold)):
        title, meaning = (
            f"Places kept, items {kind}",
            f"Lists of {LISTED} by `text`, as `recommend --new-items` makes",
        )
        tables.append(
            Judged(
                title,
                f"{meaning} them; outside of its list a target counts as last.",
                _places(0),
                kept.filter(chosen),
            )
        )
    return tables


def _places(number: int) -> str:
    return f"{number} places"


def _ranked_with_places(run: Run, domain: Domain, folder: Path) -> pl.DataFrame:
    """Ranks of all test events in lists that keep places for items without training events."""

    def make() -> pl.DataFrame:
        sequences = Sequences.load(domain.data)
        ranking = [
            (_places(places), seed, _WithPlaces(load_trained(domain, COLD_ROWS["text"], seed), domain, places))
            for places in PLACES
            for seed in range(run.recipe.recommender.seeds)
        ]
        return ranked_by(ranking, sequences, run, domain.config.history_length)

    return measured(folder, "places", {**evaluated_inputs(domain), "places": list(PLACES), "k": LISTED}, make)


class _WithPlaces:
    """A recommender by its lists of LISTED, which keep places for new items: what is not listed ranks last."""

    def __init__(self, scorer: SequentialRecommender, domain: Domain, places: int) -> None:
        self._scorer, self._places = scorer, places
        self._new = is_new(domain, scorer.n_items)
        self.n_items = scorer.n_items

    def score(self, histories: Tensor) -> Tensor:
        """As the recommender itself scores, (B, N)."""
        return self._scorer.score(histories)

    def ranks(self, targets: Tensor, exclude: Tensor | None, histories: Tensor) -> Tensor:
        """Place in the list, (B,) int64, 1 = first; N where the target is not listed."""
        scores = self.score(histories)
        hidden = (
            targets.new_zeros(len(targets), 1)
            if exclude is None
            else exclude.masked_fill(exclude == targets[:, None], 0)
        )
        lists = with_new_items(top_k(scores, LISTED, hidden)[0], scores, hidden, self._new, self._places)
        is_target = lists == targets[:, None]
        return torch.where(is_target.any(dim=1), is_target.int().argmax(dim=1) + 1, self.n_items)


def _ranked_after(run: Run, domain: Domain, events: int, folder: Path) -> pl.DataFrame:
    """Ranks of the test events whose targets were trained on, after the last `events` events alone."""

    def make() -> pl.DataFrame:
        tested = known_users(Sequences.load(domain.data), cold_items(domain.data), max(KNOWN_EVENTS))
        return ranked_by(scorers(run, domain, COLD_ROWS), tested, run, events)

    inputs = {**evaluated_inputs(domain), "events": events, "rows": COLD_ROWS}
    return measured(folder, f"known-{events}", inputs, make)


def known_users(sequences: Sequences, cold: pl.Series, events: int) -> Sequences:
    """The sequences with the test events that have so many events before them and a target that is not cold.

    Raises:
        DataError: there is none.
    """
    positions = sequences.held_out(TEST)
    before = positions - np.asarray(sequences.offsets)[sequences.users_of(positions)]
    is_cold = np.isin(sequences.item_ids, cold.cast(pl.String).to_list())
    targets = np.asarray(sequences.items)[positions]
    wanted = (before >= events) & ~is_cold[targets - 1]
    return with_test_events(sequences, wanted, f"of a trained item after {events} or more events")


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
