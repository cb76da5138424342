"""Studies of the language stages: each step (`ablation`), CSFT's budget (`budget`), other logs (`transfer`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from llm2rec import artifacts
from llm2rec.errors import ConfigError
from llm2rec.loading import load_recipe, recipe_names
from llm2rec.studies.base import (
    RUNS,
    SMALL,
    Entry,
    Judged,
    Runs,
    Study,
    Variant,
    gathered,
    over_world,
    rows_of,
)
from llm2rec.studies.worlds import World

LADDER = (
    Entry("ids", "steps", "sasrec-id"),
    Entry("last token", "last-token", "sasrec-backbone-causal"),
    Entry("causal", "steps", "sasrec-backbone-causal"),
    Entry("bidirectional", "steps", "sasrec-backbone-bidirectional"),
    Entry("+ CSFT, causal", "steps", "sasrec-csft-causal"),
    Entry("+ CSFT", "steps", "sasrec-csft-bidirectional"),
    Entry("+ MNTP", "steps", "sasrec-mntp"),
    Entry("+ contrastive", "steps", "sasrec-llm2rec"),
    Entry("all but CSFT", "no-csft", "sasrec-llm2rec"),
    Entry("contrastive alone", "contrastive-alone", "sasrec-llm2rec"),
    Entry("consumed pairs", "consumed-pairs", "sasrec-llm2rec"),
    Entry("causal, smoothed", "smoothed", "sasrec-backbone-causal"),
    Entry("+ CSFT, causal, smoothed", "smoothed", "sasrec-csft-causal"),
)
# The paper's IEM and vectors as they are, whatever those of the recipe; what the recipe leaves out.
AS_IN_THE_PAPER = ("iem.attention=bidirectional", "iem.contrastive.positives=dropout", "recommender.smoothing=0")
MNTP_STEPS = 100
SMOOTHING = 0.5
# Of the CSFT budget.
SHARES = (Fraction(1, 48), Fraction(1, 16), Fraction(1, 4), Fraction(1, 2), Fraction(1))
SMALL_SHARES = (Fraction(1, 4), Fraction(1))
ENTRIES_OF_TRANSFER = (
    Entry("untrained", "one", "sasrec-backbone-bidirectional"),
    Entry("CSFT on one", "one", "sasrec-csft-bidirectional"),
    Entry("CSFT on the mix", "mix", "sasrec-csft-bidirectional"),
    Entry("LLM2Rec on one", "one", "sasrec-llm2rec"),
    Entry("LLM2Rec on the mix", "mix", "sasrec-llm2rec"),
)
# The log that one variant trains the language model on, the one that the mix adds, and one that neither reads.
DOMAINS = {"games": "amazon-games", "tools": "amazon-industrial", "films": "movielens-100k"}


def ablation(small: bool, folder: Path, recipe: str) -> Study:
    """Every step of the paper, the same without CSFT, consumed pairs for IEM, smoothed vectors.

    All but one row pool the mean. Smoothing brings in what is consumed together without training a language model:
    what its stages compete with.
    """
    given = load_recipe(recipe)
    mntp_steps = given.iem.mntp.steps or MNTP_STEPS
    smoothing = given.recommender.smoothing or SMOOTHING
    steps = dict.fromkeys(entry.row for entry in LADDER if entry.variant == "steps")
    world = World("games", users=60)
    return Study(
        question="What does each step from the language model to the item encoder add?",
        recipe=recipe,
        overrides=(
            *AS_IN_THE_PAPER,
            "encode.pooling=mean",
            f"iem.mntp.steps={mntp_steps}",
            *((*SMALL, *over_world(world, folder)) if small else ()),
        ),
        variants=(
            Variant("steps", "every step, one after the other", (rows_of(steps),)),
            Variant(
                "last-token",
                "the untrained model as it reads by nature: the last token's state stands for the title",
                (rows_of(["sasrec-backbone-causal"]), "encode.pooling=last"),
            ),
            Variant(
                "no-csft",
                "MNTP and contrastive learning from the untrained model",
                (rows_of(["sasrec-llm2rec"]), "csft.max_tokens=0"),
            ),
            Variant(
                "contrastive-alone",
                "contrastive learning from the untrained model",
                (rows_of(["sasrec-llm2rec"]), "csft.max_tokens=0", "iem.mntp.steps=0"),
            ),
            Variant(
                "consumed-pairs",
                "from CSFT, causal: contrastive learning on titles consumed one after the other, without MNTP",
                (
                    rows_of(["sasrec-llm2rec"]),
                    "iem.attention=causal",
                    "iem.mntp.steps=0",
                    "iem.contrastive.positives=consumed-next",
                ),
            ),
            Variant(
                "smoothed",
                f"vectors smoothed by {smoothing:g} over what is consumed together, untrained and after CSFT",
                (rows_of(["sasrec-backbone-causal", "sasrec-csft-causal"]), f"recommender.smoothing={smoothing}"),
            ),
        ),
        judge=_judge_ablation,
        needs=("csft.max_tokens", "iem.mntp.steps", "iem.contrastive.steps"),
        worlds=(world,) if small else (),
    )


def _judge_ablation(runs: Runs, folder: Path) -> list[Judged]:
    per_user = gathered(runs, LADDER)
    share = runs["smoothed"].recipe.recommender.smoothing
    steps = (
        "From the top: learned ids; the untrained model, its last token causal, its mean causal and "
        "bidirectional; CSFT, causal and bidirectional; then each step with those before it. The next two "
        "leave CSFT out, and CSFT and MNTP. `consumed pairs` is CSFT and then, causal and without MNTP, "
        "contrastive learning on titles consumed one after the other: compare it with `+ CSFT, causal`. "
        f"`smoothed` are the vectors of both causal rows, {share:g} of each "
        "replaced by the mean of the items consumed right before or after it: what a language stage should be "
        "worth more than. All but `last token` pool the mean."
    )
    return [
        Judged("Steps against the untrained model", steps, "bidirectional", per_user),
        Judged("Steps against all of them", steps, "+ contrastive", per_user),
        Judged("Steps against CSFT, read causally", steps, "+ CSFT, causal", per_user),
    ]


def budget(small: bool, folder: Path, recipe: str) -> Study:
    """CSFT of growing budgets, each going on from the one before, by itself and as the start of IEM."""
    world = World("games", users=60)
    shares = SMALL_SHARES if small else SHARES
    rows = rows_of(["sasrec-csft-causal", "sasrec-llm2rec"])
    variants = [
        Variant(
            "none",
            "no CSFT: the untrained model, and IEM from it",
            (rows_of(["sasrec-backbone-causal", "sasrec-llm2rec"]), "csft.max_tokens=0"),
        )
    ]
    for shorter, share in zip((None, *shares), shares, strict=False):
        extends = "null" if shorter is None else json.dumps(str(folder / RUNS / _name_of(shorter)))
        meaning = f"{share} of the CSFT budget" if share != 1 else "the whole CSFT budget"
        variants.append(Variant(_name_of(share), meaning, (rows, f"csft.extends={extends}"), float(share)))
    return Study(
        question="From which budget on does CSFT help, and how much of it is left after IEM?",
        recipe=recipe,
        overrides=(*SMALL, *over_world(world, folder)) if small else (),
        fixed=("csft.schedule=wsd", "csft.evaluations=0", "csft.patience=null"),
        variants=tuple(variants),
        judge=_judge_budget,
        needs=("csft.checkpoints",),  # without them nothing is kept that the next share could go on from
        worlds=(world,) if small else (),
        cumulative=True,
    )


def _name_of(share: Fraction) -> str:
    return f"csft-{share.numerator}-{share.denominator}"


def _judge_budget(runs: Runs, folder: Path) -> list[Judged]:
    tokens = {
        name: f"{artifacts.require(run.csft, 'csft').summary['tokens']:,} tokens"
        for name, run in runs.items()
        if name != "none"
    }
    alone = [Entry("no CSFT", "none", "sasrec-backbone-causal")]
    alone += [Entry(label, name, "sasrec-csft-causal") for name, label in tokens.items()]
    after = [Entry("no CSFT", "none", "sasrec-llm2rec")]
    after += [Entry(label, name, "sasrec-llm2rec") for name, label in tokens.items()]
    schedule = "Every training goes on from what the one before it had before its decay; its own decay follows."
    return [
        Judged(
            "Vectors of the CSFT model",
            f"Means over the title, read causally, by the tokens that CSFT was trained on. {schedule}",
            "no CSFT",
            gathered(runs, alone),
        ),
        Judged(
            "Vectors after IEM",
            "LLM2Rec vectors, by the tokens of the CSFT that IEM started from; the reference started from the "
            "untrained model.",
            "no CSFT",
            gathered(runs, after),
        ),
    ]


@dataclass(frozen=True)
class _OfDomains:
    """Judges every domain by the rows of both variants."""

    domains: Sequence[str]

    def __call__(self, runs: Runs, folder: Path) -> list[Judged]:
        seen = ("both language models were trained on it", "the mix alone was trained on it", "neither was")
        return [
            Judged(
                f"Judged on {domain}",
                f"{words[0].upper()}{words[1:]}; recommenders are trained on {domain} in every row.",
                "LLM2Rec on one",
                gathered(runs, ENTRIES_OF_TRANSFER, domain),
                domain=domain,
            )
            for domain, words in zip(self.domains, seen, strict=True)
        ]


def transfer(small: bool, folder: Path, recipe: str) -> Study:
    """CSFT and IEM on one domain or on a mix with the same budget of tokens, judged inside and outside of both.

    Raises:
        ConfigError: a recipe whose domains are not three.
    """
    worlds = tuple(World(name, users=60) for name in DOMAINS) if small else ()
    (first, second, third), origins = _domains(recipe)
    made = tuple(part for world in worlds for part in over_world(world, folder, f"domains.{world.name}"))
    rows = rows_of(["sasrec-backbone-bidirectional", "sasrec-csft-bidirectional", "sasrec-llm2rec"])
    return Study(
        question="Does a language model trained on one log, or on several, serve another one?",
        recipe=recipe,
        overrides=("data=null", *((*SMALL, *made) if small else origins), rows),
        fixed=(f"domains.{first}.role=in", f"domains.{third}.role=out"),
        variants=(
            Variant("one", f"the language model is trained on {first} alone", (f"domains.{second}.role=out",)),
            Variant(
                "mix", f"the language model is trained on {first} and {second}", (f"domains.{second}.role=in",)
            ),
        ),
        judge=_OfDomains((first, second, third)),
        equal_tokens=True,
        worlds=worlds,
    )


def _domains(recipe: str) -> tuple[Sequence[str], tuple[str, ...]]:
    """The three domains of a recipe, or those of the study and the overrides that name their logs."""
    if recipe in recipe_names():
        return tuple(DOMAINS), tuple(f"domains.{name}.source={source}" for name, source in DOMAINS.items())
    domains = tuple(load_recipe(recipe).domains or ())
    if len(domains) != 3:
        raise ConfigError(
            "the study transfer takes a recipe with three domains (trained on, added by the mix, outside); "
            f"{recipe} has {len(domains) or 'none'}"
        )
    return domains, ()
