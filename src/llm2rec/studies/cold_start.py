"""Study `cold-start`: users of whom little is known, and items of which no training event tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2rec.data.sequences import TEST, Sequences, cold_items
from llm2rec.evaluation.protocol import Scorer
from llm2rec.evaluation.ranking import ranks
from llm2rec.runs import Domain, Run
from llm2rec.serve.recommender import Lists, is_new, load_trained
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
UNTRAINED = "text, untrained"
TEXT = "text"
COLD_ROWS = {
    "popularity": "popularity",
    IDS: "sasrec-id",
    UNTRAINED: "sasrec-backbone-causal",
    "text after CSFT": "sasrec-csft-causal",
    TEXT: "sasrec-llm2rec",
    "both, summed": "sasrec-llm2rec+sum",
    "both, averaged": "sasrec-llm2rec+average",
}
PLACES = {"as scored": None, "1 place": 1, "2 places": 2, "3 places": 3}
AS_SCORED = "as scored"
LISTED = 10
ONLY = "all"


def cold_start(small: bool, folder: Path, recipe: str) -> Study:
    """Ids, text and both for users with few known events, and for items that no training event names.

    Vectors of the language model before and after CSFT stand beside LLM2Rec's: do its stages pay where ids fail?
    Where ids know nothing, the untrained model's vectors are the reference.

    Seen in training are targets with training events, never seen those that are held out. Targets that only
    validation and test name are neither: IEM reads their titles, recommenders know them as wrong answers.
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
        judge=_judge,
        worlds=(world,) if small else (),
    )


def _judge(runs: Runs, folder: Path) -> list[Judged]:
    run = runs[ONLY]
    domain = run.domain()
    whole = gathered(runs, entries_of(ONLY, COLD_ROWS))
    is_seen = pl.col("item_id").is_in(trained_items(Sequences.load(domain.data)).implode())
    is_cold = pl.col("item_id").is_in(cold_items(domain.data).cast(pl.String).implode())
    kept = _with_places(run, domain, folder)
    listed = f"Lists of {LISTED} by `text`, as `recommend --new-items` makes them: what is not listed ranks last."
    return [
        *_of_known_users(run, domain, folder),
        Judged(
            "Items seen in training",
            "Targets with training events, after whole histories. Targets without any that were not held out are "
            "in no table: trainings know them as titles and as wrong answers.",
            IDS,
            whole.filter(is_seen),
        ),
        Judged(
            "Items never seen in training",
            "Held-out targets, ranked among all items.",
            UNTRAINED,
            whole.filter(is_cold),
        ),
        Judged(
            "Items never seen, among themselves",
            "The same targets, ranked among items without training events alone: what the vectors say of them.",
            UNTRAINED,
            _among_new(run, domain, folder),
            "the items without training events",
        ),
        Judged("Places kept for new items: items seen", listed, AS_SCORED, kept.filter(is_seen)),
        Judged("Places kept for new items: items never seen", listed, AS_SCORED, kept.filter(is_cold)),
    ]


def _of_known_users(run: Run, domain: Domain, folder: Path) -> list[Judged]:
    """A table for each number of known events: ranks of the trained targets after the last so many alone.

    The others are neither seen nor hidden from the ranking: a system that knew only these would not know them.
    """
    meaning = (
        f"Users with at least {max(KNOWN_EVENTS)} known events, their histories cut to the last so many. "
        "`text` is SASRec over LLM2Rec vectors, the other texts are over the causal means of the language model. "
        "Targets seen in training."
    )
    tables = []
    for events in KNOWN_EVENTS:
        if events > domain.config.history_length:
            continue  # no recommender looks so far back: the table would be the one before

        def make(events: int = events) -> pl.DataFrame:
            tested = known_users(Sequences.load(domain.data), max(KNOWN_EVENTS))
            return ranked_by(scorers(run, domain, COLD_ROWS), tested, run, events, known_length=events)

        inputs = {**evaluated_inputs(domain), "known_length": events, "rows": COLD_ROWS}
        seen = "1 known event" if events == 1 else f"{events} known events"
        ranked = measured(folder, f"known-{events}", inputs, make)
        tables.append(Judged(f"Users with {seen}", meaning, IDS, ranked, known_length=events))
    return tables


def trained_items(sequences: Sequences) -> pl.Series:
    """Ids of the items with training events."""
    return pl.Series(sequences.item_ids, dtype=pl.String).filter(pl.Series(sequences.training_counts() > 0))


def known_users(sequences: Sequences, events: int) -> Sequences:
    """The sequences with the test events that have so many events before them and a target seen in training.

    Raises:
        DataError: there is none.
    """
    positions = sequences.held_out(TEST)
    before = positions - np.asarray(sequences.offsets)[sequences.users_of(positions)]
    wanted = (before >= events) & _has_target_among(sequences, trained_items(sequences))
    return with_test_events(sequences, wanted, f"of a trained item after {events} or more events")


def _has_target_among(sequences: Sequences, item_ids: pl.Series) -> np.ndarray:
    """Of each test event whether its target is one of the items, (T,) bool."""
    is_one = np.isin(sequences.item_ids, item_ids.cast(pl.String).to_list())
    targets: np.ndarray = is_one[np.asarray(sequences.items)[sequences.held_out(TEST)] - 1]
    return targets


def _among_new(run: Run, domain: Domain, folder: Path) -> pl.DataFrame:
    """Ranks of the held-out targets among the items without training events."""

    def make() -> pl.DataFrame:
        sequences = Sequences.load(domain.data)
        wanted = _has_target_among(sequences, cold_items(domain.data))
        tested = with_test_events(sequences, wanted, "of a held-out item")
        new = is_new(domain, sequences.n_items)
        ranking = [(row, seed, _AmongNew(scorer, new)) for row, seed, scorer in scorers(run, domain, COLD_ROWS)]
        return ranked_by(ranking, tested, run, domain.config.history_length)

    return measured(folder, "among-new", {**evaluated_inputs(domain), "rows": COLD_ROWS}, make)


def _with_places(run: Run, domain: Domain, folder: Path) -> pl.DataFrame:
    """Ranks of all test events in lists that keep places for items without training events."""

    def make() -> pl.DataFrame:
        sequences = Sequences.load(domain.data)
        new = is_new(domain, sequences.n_items)
        ranking = [
            (label, seed, _Listing(load_trained(domain, COLD_ROWS[TEXT], seed), new, places))
            for label, places in PLACES.items()
            for seed in range(run.recipe.recommender.seeds)
        ]
        return ranked_by(ranking, sequences, run, domain.config.history_length)

    inputs = {**evaluated_inputs(domain), "places": list(PLACES), "listed": LISTED}
    return measured(folder, "places", inputs, make)


class _AmongNew:
    """A scorer that ranks a new item (`new`: (N,) bool) among the new ones alone."""

    def __init__(self, scorer: Scorer, new: Tensor) -> None:
        self._scorer, self._new = scorer, new
        self.n_items = scorer.n_items

    def score(self, histories: Tensor) -> Tensor:
        """As the scorer itself, (B, N)."""
        return self._scorer.score(histories)

    def ranks(self, targets: Tensor, exclude: Tensor | None, histories: Tensor) -> Tensor:
        """Place among the new items, (B,) int64, 1 = first."""
        place = F.pad(self._new.cumsum(0) * self._new, (1, 0))  # item_index -> the one among them, 0 of the others
        hidden = None if exclude is None else place[exclude]
        return ranks(self.score(histories)[:, self._new], place[targets], hidden)


class _Listing:
    """A scorer by its lists of LISTED, in which new items (`new`: (N,) bool) have some places."""

    def __init__(self, scorer: Scorer, new: Tensor, places: int | None) -> None:
        self._lists = Lists(scorer, new, LISTED, places)
        self.n_items = scorer.n_items

    def score(self, histories: Tensor) -> Tensor:
        """As the scorer itself, (B, N)."""
        return self._lists.scorer.score(histories)

    def ranks(self, targets: Tensor, exclude: Tensor | None, histories: Tensor) -> Tensor:
        """Place in the list, (B,) int64, 1 = first; N where the target is not listed."""
        hidden = targets.new_zeros(len(targets), 1) if exclude is None else exclude
        hidden = hidden.masked_fill(hidden == targets[:, None], 0)  # a target competes
        lists, _ = self._lists.of([histories], hidden)
        is_target = lists == targets[:, None]
        return torch.where(is_target.any(dim=1), is_target.int().argmax(dim=1) + 1, self.n_items)
