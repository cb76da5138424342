"""Verb `study`: grids of recipes that share stages, and the tables that answer the question behind them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from llm2rec import artifacts, pipeline, progress
from llm2rec.artifacts import SUPERSEDED
from llm2rec.config import TINY_RANDOM, EvaluationConfig, Recipe
from llm2rec.data.sequences import Sequences
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.evaluation import protocol, report
from llm2rec.evaluation.ranking import metric_names
from llm2rec.loading import key_of, load_recipe
from llm2rec.runs import LOCK, Run
from llm2rec.studies.base import RUNS, WORLD, Judged, Study, Variant, base_recipe, rows_of
from llm2rec.studies.cold_start import cold_start
from llm2rec.studies.context import context
from llm2rec.studies.direct import csft_direct
from llm2rec.studies.language import ablation, budget, transfer

LEAST_STEPS = 2  # of a share of the CSFT budget: one before its decay at least
STUDIES: dict[str, Callable[[bool, Path, str], Study]] = {
    "ablation": ablation,
    "budget": budget,
    "cold-start": cold_start,
    "context": context,
    "transfer": transfer,
    "csft-direct": csft_direct,
}
BUDGETS = {"csft.max_tokens", "iem.mntp.steps"}  # a variant may leave the stage out; the others have the budget
PLAN, RESULT, PAGE = "plan.json", "study.json", "study.html"
SO_FAR = "so-far.json"  # the result while variants are still to be run


def study(
    name: str,
    out: str | Path | None = None,
    small: bool = False,
    overrides: tuple[str, ...] = (),
    recipe: str | Path | None = None,
) -> dict[str, Any]:
    """Runs every variant of a study and writes `study.json` and the page `study.html`.

    Stages that variants share are computed once, also those that another study beside it in the same folder has
    computed. Called again, an interrupted study goes on and a finished one is kept, as with `run`. The study
    `budget`, the longest, writes its page and `so-far.json` after every variant from the second on.

    Args:
        name: one of STUDIES.
        out: the study's folder; by default `runs/studies/NAME`, with `-small` behind it.
        small: a made log and a random two-layer decoder: ends within minutes and shows that the study runs.
        overrides: `KEY=VALUE` for every variant; what a variant is made of stays as the study has it.
        recipe: the data, model and budgets to study, a shipped name or a file; by default `games` where
            LLM2REC_DATA_DIR is set, else `demo`. Its rows and reference are the study's own. `transfer` takes a
            file with three domains, the other studies one with a single log.

    Returns:
        `study`, `question`, `facts` (name -> value), `page`, `variants` (name -> `meaning`, `overrides`, `run`),
        `pending` (variants still to be run), `settings` (recipe key -> value by variant, of those that differ) and
        `tables` (title -> `meaning`, `reference`, `users`, `rows`, `comparisons` and `protocol`, as in
        `metrics.json`).

    Raises:
        ConfigError: no such study, or an override or a recipe that does not fit.
        ArtifactError: the folder holds something else, or the variants' runs cannot be compared.
    """
    if name not in STUDIES:
        raise ConfigError(f"there is no study {name!r}; studies: {', '.join(STUDIES)}")
    if small and recipe is not None:
        raise ConfigError("--small is a made log and a random decoder; leave --small or --recipe out")
    folder = Path(out) if out else Path("runs/studies") / (f"{name}-small" if small else name)
    chosen = STUDIES[name](small, folder, str(recipe or ("demo" if small else base_recipe())))
    _refuse_single_log(name, chosen, overrides)
    _refuse_fixed(name, chosen, overrides)
    reference = f"evaluation.reference={EvaluationConfig().reference}"
    shared = (*chosen.overrides, *chosen.fixed, reference, *overrides)
    base = load_recipe(chosen.recipe, (*shared, rows_of(["popularity"])))  # its own rows are not run
    _refuse_left_out(name, chosen, base)
    _refuse_epochs(name, chosen, base)
    settings = {one.name: (*shared, *_share_of_budget(one, base), *one.overrides) for one in chosen.variants}
    for changes in settings.values():
        _refuse_several_logs(name, chosen, load_recipe(chosen.recipe, changes))  # said before anything is written
    _refuse_foreign(folder, name, small)
    with artifacts.run_lock(folder):
        plan = {"study": name, "small": small, "overrides": list(overrides), "recipe": chosen.recipe}
        _keep_results_of_another(folder, plan)
        artifacts.write_json(folder / PLAN, plan)
        for world in chosen.worlds:
            world.write(folder / WORLD)
        runs: dict[str, Run] = {}
        beside = _runs_beside(folder)
        beside = [*_begun_share(chosen, base, folder, settings, beside), *beside]
        for variant in chosen.variants:
            progress.say(f"study  {name}, {variant.name}: {variant.meaning}")
            siblings = [run.folder for run in runs.values()] + beside
            place = folder / RUNS / variant.name
            runs[variant.name] = pipeline.run(chosen.recipe, place, settings[variant.name], siblings=siblings)
            if chosen.cumulative and 1 < len(runs) < len(chosen.variants) and not (folder / RESULT).exists():
                _write(folder, SO_FAR, name, small, _answer(chosen, runs, folder))
        content = _write(folder, RESULT, name, small, _answer(chosen, runs, folder))
        (folder / SO_FAR).unlink(missing_ok=True)
    return content


def _write(folder: Path, file: str, name: str, small: bool, answer: dict[str, Any]) -> dict[str, Any]:
    """Writes the answer as a file and as the study's page."""
    content = {"study": name, "page": str(folder / PAGE), **answer}
    artifacts.write_json(folder / file, content)
    title = f"llm2rec study: {name}" + (" (small: a trial)" if small else "")
    (folder / PAGE).write_text(report.render_study_html(title, content), encoding="utf-8")
    return content


def _share_of_budget(variant: Variant, base: Recipe) -> tuple[str, ...]:
    """The override that gives a variant its share of the CSFT budget."""
    if variant.csft_share is None:
        return ()
    if base.csft.max_tokens is None:
        return (f"csft.epochs={variant.csft_share * float(base.csft.epochs or 0)}",)
    tokens = round(variant.csft_share * base.csft.max_tokens)
    least = LEAST_STEPS * base.csft.batch_tokens
    if tokens < least:
        raise ConfigError(
            f"{variant.name}: its share of csft.max_tokens {base.csft.max_tokens:,} is {tokens:,} tokens, under "
            f"{LEAST_STEPS} steps of csft.batch_tokens {base.csft.batch_tokens:,}; set csft.max_tokens to "
            f"{math.ceil(least / variant.csft_share):,} or more, or csft.batch_tokens lower"
        )
    return (f"csft.max_tokens={tokens}",)


def _begun_share(
    chosen: Study, base: Recipe, folder: Path, settings: Mapping[str, tuple[str, ...]], siblings: Sequence[Path]
) -> list[Path]:
    """The run of the first and smallest share of `csft.epochs`, until its CSFT: only then its steps are known.

    Raises:
        ConfigError: they are too few for the next share to go on from.
    """
    smallest = next((one for one in chosen.variants if one.csft_share is not None), None)
    if base.csft.epochs is None or smallest is None:
        return []
    progress.say(f"steps of the smallest share of csft.epochs: {smallest.name}")
    place = folder / RUNS / smallest.name
    run = pipeline.run(chosen.recipe, place, settings[smallest.name], siblings=siblings, until="csft")
    steps = artifacts.require(run.csft, "csft").summary["steps"]
    if steps < LEAST_STEPS:
        raise ConfigError(
            f"{smallest.name}: its share of csft.epochs {base.csft.epochs:g} is {steps} step of csft.batch_tokens "
            f"{base.csft.batch_tokens:,}, {LEAST_STEPS} are the least; raise the one or lower the other"
        )
    return [place]


def _refuse_single_log(name: str, chosen: Study, overrides: tuple[str, ...]) -> None:
    """Raises ConfigError where a study over several logs is given one: it would be left out without a word."""
    of_one = [override for override in overrides if override.strip().startswith("data.")]
    if of_one and "data=null" in chosen.overrides:
        raise ConfigError(
            f"study {name!r} takes several logs, {of_one[0]!r} is of a single one; set domains.NAME.KEY instead"
        )


def _refuse_fixed(name: str, chosen: Study, overrides: tuple[str, ...]) -> None:
    """Raises ConfigError where an override sets what the study itself varies, reads or depends on."""
    fixed = {"recommender.rows", "evaluation.reference", *map(key_of, chosen.fixed)}
    fixed |= {key_of(override) for variant in chosen.variants for override in variant.overrides} - BUDGETS
    for override in overrides:
        key = key_of(override)
        if key in fixed:
            raise ConfigError(f"{key} is what the study {name!r} sets itself; leave {override!r} out")
        if within := sorted(one for one in fixed if one.startswith(f"{key}.")):
            raise ConfigError(
                f"{within[0]} is what the study {name!r} sets itself; set the other keys of {key} one by one"
            )


def _refuse_left_out(name: str, chosen: Study, base: Recipe) -> None:
    """Raises ConfigError where a stage that rows of the study are named after has no budget."""
    budgets = {
        **artifacts.flatten("csft", base.csft.model_dump()),
        **artifacts.flatten("iem", base.iem.model_dump()),
    }
    for key in chosen.needs:
        if budgets[key] == 0:
            raise ConfigError(
                f"study {name!r} cannot do without {key}, and it is 0; set it in {chosen.recipe} or by --set"
            )


def _refuse_epochs(name: str, chosen: Study, base: Recipe) -> None:
    """Raises ConfigError where variants over different logs would be trained on different numbers of tokens."""
    if chosen.equal_tokens and base.csft.epochs is not None:
        raise ConfigError(
            f"study {name!r} gives every variant the same CSFT budget, and csft.epochs {base.csft.epochs:g} is "
            "more tokens of two logs than of one; set csft.max_tokens instead"
        )


def _refuse_several_logs(name: str, chosen: Study, recipe: Recipe) -> None:
    """Raises ConfigError where a study over one log is given several: which one it should judge is not said."""
    if recipe.domains is not None and "data=null" not in chosen.overrides:
        raise ConfigError(
            f"study {name!r} takes a recipe with a single log (`data`), {chosen.recipe} has the domains "
            f"{', '.join(recipe.domains)}"
        )


def _refuse_foreign(folder: Path, name: str, small: bool) -> None:
    """Raises ArtifactError where `folder` holds something that is not this study."""
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; --out takes a folder")
    if not folder.exists():
        return
    if (folder / PLAN).exists():
        plan = _read_plan(folder)
        if (plan["study"], plan["small"]) != (name, small):
            form = "small form of the " if plan["small"] else ""
            raise ArtifactError(f"{folder} holds the {form}study {plan['study']!r}; choose another --out")
        return
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, SUPERSEDED))
    if strangers:
        raise ArtifactError(
            f"{folder} is not empty and not a study (it holds {strangers[0]!r}); choose another --out"
        )


def _read_plan(folder: Path) -> dict[str, Any]:
    """What a study's folder holds.

    Raises:
        ArtifactError: its plan is damaged.
    """
    try:
        plan = artifacts.read_json(folder / PLAN)
    except ArtifactError:
        plan = None
    if not isinstance(plan, dict) or not {"study", "small"} <= plan.keys():
        example = json.dumps({"study": "context", "small": False})
        raise ArtifactError(
            f"{folder / PLAN} is damaged; write into it which study the folder holds, as {example}, and go on"
        )
    return plan


def _keep_results_of_another(folder: Path, plan: dict[str, Any]) -> None:
    """Moves result and page of other overrides or another recipe aside: results are never overwritten."""
    if not (folder / PLAN).exists() or _read_plan(folder) == plan:
        return
    for name in (RESULT, SO_FAR, PAGE):
        if (folder / name).exists():
            artifacts.move_aside(folder / name, folder)


def _runs_beside(folder: Path) -> list[Path]:
    """The runs of the other studies in the folder that holds this one."""
    others = [plan.parent / RUNS for plan in sorted(folder.parent.glob(f"*/{PLAN}")) if plan.parent != folder]
    return [run for runs in others if runs.is_dir() for run in sorted(runs.iterdir())]


def _answer(chosen: Study, runs: Mapping[str, Run], folder: Path) -> dict[str, Any]:
    """What the finished runs of a study say."""
    tables = {table.title: _statistics(table, next(iter(runs.values()))) for table in chosen.judge(runs, folder)}
    return {
        "question": chosen.question,
        "facts": _facts(runs),
        "variants": {one.name: _variant(one, runs[one.name]) for one in chosen.variants if one.name in runs},
        "pending": [one.name for one in chosen.variants if one.name not in runs],
        "settings": report.differing_settings(
            {name: run.recipe.model_dump(mode="json") for name, run in runs.items()}
        ),
        "tables": tables,
    }


def _facts(runs: Mapping[str, Run]) -> dict[str, Any]:
    """What was studied: the logs, the language model and the seeds."""
    recipe = next(iter(runs.values())).recipe
    model = recipe.model.source + (" (random weights: a trial)" if recipe.model.source == TINY_RANDOM else "")
    data = [
        domain.origin if len(recipe.by_domain) == 1 else f"{name}: {domain.origin}"
        for name, domain in recipe.by_domain.items()
    ]
    return {
        "data": data,
        "language model": model,
        "seed": recipe.seed,
        "recommender seeds": recipe.recommender.seeds,
    }


def _statistics(table: Judged, run: Run) -> dict[str, Any]:
    """Metrics of a table's rows, each tested against the reference, as in `metrics.json`.

    Args:
        run: any of the study's; all have the same test events and protocol.
    """
    settings = run.recipe.evaluation
    summary = protocol.summarise(table.per_user, metric_names(settings.k), settings.bootstrap_samples)
    compared = protocol.compare_rows(table.per_user, table.reference, settings.bootstrap_samples)
    users = table.per_user["user_id"].n_unique()
    content = {"meaning": table.meaning, "reference": table.reference, "users": users}
    ranking = protocol.ranking_in_words(
        settings.mask_history,
        protocol.never_repeats(Sequences.load(run.domain(table.domain).data)),
        table.candidates,
        table.known_length,
    )
    return {**content, **summary, "comparisons": compared, "protocol": {"ranking": ranking}}


def _variant(variant: Variant, run: Run) -> dict[str, Any]:
    return {"meaning": variant.meaning, "overrides": list(variant.overrides), "run": str(run.folder)}


def show_study(content: dict[str, Any]) -> list[RenderableType]:
    """The result of `study` for the terminal."""
    parts: list[RenderableType] = [content["question"]]
    for title, metrics in content["tables"].items():
        table = report.render_table(metrics)
        table.title = f"\n{title}, {metrics['users']:,} users; against {metrics['reference']}"
        parts += [table, metrics["meaning"]]
    return [*parts, f"page: {content['page']}"]
