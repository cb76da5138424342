"""What a study is made of: variants of a recipe, and tables of rows on the same test events."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from llm2rec import artifacts
from llm2rec.artifacts import Inputs
from llm2rec.comparison import require_same_catalogue
from llm2rec.data.mirrors import DATA_DIR
from llm2rec.data.sequences import CONTEXT, TEST, Sequences
from llm2rec.errors import ConfigError, DataError
from llm2rec.evaluation import protocol
from llm2rec.evaluation.protocol import Scorer
from llm2rec.rows import FLOORS
from llm2rec.runs import Domain, Run
from llm2rec.serve.recommender import load_scorer
from llm2rec.studies.worlds import World

WORLD = "world"
MEASURED = "measured"
PER_USER = "per_user.parquet"
RUNS = "runs"

Runs = Mapping[str, Run]  # by variant

# A random two-layer decoder and short trainings: what a study shows with them is that it runs.
SMALL = (
    "model.source=tiny-random",
    "model.dtype=float32",
    "csft.max_tokens=6000",
    "csft.batch_tokens=512",
    "csft.checkpoints=1",
    "iem.mntp.steps=8",
    "iem.mntp.checkpoints=1",
    "iem.contrastive.steps=8",
    "iem.contrastive.batch_size=16",
    "iem.contrastive.evaluations=2",
    "recommender.hidden_size=32",
    "recommender.learning_rate=0.005",
    "recommender.max_epochs=8",
    "recommender.patience=8",
    "evaluation.bootstrap_samples=1000",
)


@dataclass(frozen=True)
class Variant:
    """One recipe of a study: what it is in words, and what it sets beyond the study's base.

    csft_share: of the base's CSFT budget; None: all of it, and no override of the budget is refused.
    """

    name: str
    meaning: str
    overrides: tuple[str, ...] = ()
    csft_share: float | None = None


@dataclass(frozen=True)
class Entry:
    """One line of a table: its label, and the row of the variant that it is."""

    label: str
    variant: str
    row: str


@dataclass(frozen=True)
class Judged:
    """Rows on the same test events, one of them the reference that the others are tested against.

    per_user: as `protocol.per_user_table`, its rows named by the labels of the table.
    candidates: among which a target was ranked.
    known_length: events that a user was known by, as in `protocol.evaluate`.
    domain: whose test events they are, of a study over several.
    """

    title: str
    meaning: str
    reference: str
    per_user: pl.DataFrame
    candidates: str = protocol.CATALOGUE
    known_length: int | None = None
    domain: str | None = None


@dataclass(frozen=True)
class Study:
    """A question, the recipes that are run to answer it, and the tables that do.

    Attributes:
        recipe: the base, a shipped name or a file; `overrides` and `fixed` turn it into the study's base.
        fixed: overrides that the question depends on; nobody else's may set their keys.
        worlds: logs that are made for it before the first run.
        judge: finished runs by variant, and the study's folder -> tables.
        cumulative: two variants make a table already, and each further one lengthens it.
        needs: keys of budgets that must not be 0, since rows are named after what is trained with them.
        equal_tokens: variants train on different logs with one CSFT budget, which must be one of tokens.
    """

    question: str
    recipe: str
    overrides: tuple[str, ...]
    variants: tuple[Variant, ...]
    judge: Callable[[Runs, Path], list[Judged]]
    worlds: tuple[World, ...] = ()
    cumulative: bool = False
    needs: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    equal_tokens: bool = False


def base_recipe() -> str:
    """`games` where the folder of local data sets is named, else `demo`, which runs anywhere."""
    return "games" if os.environ.get(DATA_DIR) else "demo"


def over_world(world: World, folder: Path, section: str = "data") -> tuple[str, ...]:
    """The overrides that put a section of a recipe over a made log of the study in `folder`."""
    interactions, items = (
        json.dumps(str(path)) for path in world.files(folder / WORLD)
    )  # YAML with any character
    return (
        f"{section}.interactions={interactions}",
        f"{section}.items={items}",
        f"{section}.categories=theme",
        f"{section}.history_length=6",
    )


def rows_of(names: Iterable[str]) -> str:
    """The override that names the rows of a recipe."""
    return f"recommender.rows=[{', '.join(names)}]"


def gathered(runs: Runs, entries: Sequence[Entry], domain: str | None = None) -> pl.DataFrame:
    """The test ranks of the rows of several runs as one table, its rows named by the labels.

    Raises:
        ArtifactError: a run is not evaluated, or catalogues differ (the difference is named). Other test events
            are refused by the statistics.
        ConfigError: a run lacks a row.
    """
    used = {entry.variant: runs[entry.variant] for entry in entries}
    require_same_catalogue(used, domain)
    tables = {}
    for name, run in used.items():
        place = run.domain(domain).evaluation
        artifacts.require(place, "evaluate")
        tables[name] = pl.read_parquet(place / PER_USER, glob=False)
    return pl.concat([_labelled(tables[entry.variant], entry) for entry in entries])


def _labelled(table: pl.DataFrame, entry: Entry) -> pl.DataFrame:
    found = table.filter(pl.col("row") == entry.row)
    if found.is_empty():
        known = ", ".join(table["row"].unique(maintain_order=True))
        raise ConfigError(f"variant {entry.variant!r} was not run with the row {entry.row!r}; its rows: {known}")
    return found.with_columns(pl.lit(entry.label).alias("row"))


def entries_of(variant: str, rows: Mapping[str, str]) -> list[Entry]:
    """The lines of a table over one variant, from label -> row."""
    return [Entry(label, variant, row) for label, row in rows.items()]


def scorers(run: Run, domain: Domain, rows: Mapping[str, str]) -> list[tuple[str, int, Scorer]]:
    """Label, seed and recommender of every training of the rows, from label -> row.

    Raises:
        ArtifactError: a row is not trained, or its vectors are gone or changed.
    """
    seeds = range(run.recipe.recommender.seeds)
    return [
        (label, seed, load_scorer(domain, row, seed))
        for label, row in rows.items()
        for seed in ([0] if row in FLOORS else seeds)
    ]


def ranked_by(
    ranking: Iterable[tuple[str, int, Scorer]],
    sequences: Sequences,
    run: Run,
    history_length: int,
    batch_size: int = 512,
    known_length: int | None = None,
) -> pl.DataFrame:
    """Ranks of the test events of `sequences` by each scorer, under the run's protocol: PER_USER_COLUMNS.

    Lengths are those of `protocol.evaluate`.
    """
    tables = []
    for row, seed, scorer in ranking:
        ranked = protocol.evaluate(
            scorer,
            sequences,
            TEST,
            history_length,
            batch_size=batch_size,
            description=f"rank {row}",
            mask_history=run.recipe.evaluation.mask_history,
            known_length=known_length,
        )
        tables.append(protocol.per_user_table(ranked, sequences, row, seed))
    return pl.concat(tables)


def measured(study: Path, name: str, inputs: Inputs, make: Callable[[], pl.DataFrame]) -> pl.DataFrame:
    """A table of ranks that no run holds, kept in `measured/NAME` of the study while its inputs are the same."""
    folder = study / MEASURED / name
    if not artifacts.decide(folder, inputs).keep:
        with artifacts.stage(folder, "study", inputs, study) as summary:
            table = make()
            table.write_parquet(folder / PER_USER)
            summary["events"] = table.height
    return pl.read_parquet(folder / PER_USER, glob=False)


def evaluated_inputs(domain: Domain) -> Inputs:
    """What determines the recommenders of an evaluated domain and the events that they are tested on."""
    return {"evaluation": artifacts.hash_json(artifacts.require(domain.evaluation, "evaluate").inputs)}


def with_test_events(sequences: Sequences, wanted: np.ndarray, what: str) -> Sequences:
    """The sequences with only some of their test events; the others are left to be looked at as history.

    Args:
        wanted: (M,) bool, one a test event, in their order.
        what: of the events, for the error.

    Raises:
        DataError: none is wanted.
    """
    if not wanted.any():
        raise DataError(f"of {len(wanted):,} test events none is {what}; take more or longer histories")
    parts = np.array(sequences.parts)
    parts[sequences.held_out(TEST)[~wanted]] = CONTEXT
    return Sequences(
        sequences.items, sequences.offsets, parts, sequences.item_ids, sequences.user_ids, sequences.times
    )
