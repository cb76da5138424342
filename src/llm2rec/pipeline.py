"""Runs a recipe: ordered stages, each kept while its inputs are unchanged, else rerun, saying why."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2rec import artifacts, loggers, memory, processes, progress, stages
from llm2rec.artifacts import Inputs
from llm2rec.config import TINY_RANDOM
from llm2rec.data import sources
from llm2rec.errors import Llm2RecError, first_few
from llm2rec.loading import load_recipe, parse_recipe
from llm2rec.runs import Run, create_run, open_run, refuse_foreign, write_resolved
from llm2rec.stages import Stage
from llm2rec.stages.base import DTYPE, require_current
from llm2rec.stages.checks import check_prepared

VERBS = ("prepare", "csft", "iem", "encode", "fit", "evaluate")
SHARED_VERBS = ("csft", "iem", "encode")


def run(
    recipe: str | Path,
    out: str | Path | None = None,
    overrides: tuple[str, ...] = (),
    fresh: bool = False,
    siblings: Sequence[Path] = (),
    until: str = VERBS[-1],
) -> Run:
    """Runs a whole recipe and returns the finished run.

    Finished stages whose inputs did not change are kept; an interrupted stage goes on from its last
    checkpoint; results that no longer hold are moved to `superseded/`. Of several processes (torchrun) the main
    one does so; the others take part in the language stages and return when these are over.

    Args:
        recipe: a shipped name or a path.
        out: the run folder; by default `runs/<name of the recipe>`.
        overrides: `KEY=VALUE`, as with `--set`.
        fresh: rerun every stage; to go on with a fresh run that was interrupted, leave it out.
        siblings: run folders whose finished stages are taken over where their inputs are the same; what the first
            of them measured `dtype: auto` to be holds here as well.
        until: the last of VERBS to be carried out; called again without it, the run goes on.

    Raises:
        Llm2RecError: whatever is wrong with recipe, data, model or folder, before the first training.
    """
    folder = Path(out) if out else Path("runs") / Path(recipe).stem
    if not processes.is_main():
        _follow()
        return Run(folder, load_recipe(recipe, overrides))
    planned = Run(folder, load_recipe(recipe, overrides))  # a bad recipe leaves no folder behind
    refuse_foreign(folder)
    _check(planned, VERBS)  # nor another recipe in a finished run
    with artifacts.run_lock(folder):
        started = create_run(recipe, folder, tuple(overrides))
        progress.say(_plan(started))
        _say_what_is_of_no_row(started)
        if fresh:
            for name in (
                "data",
                "backbone",
                "csft",
                "mntp",
                "iem",
                "embeddings",
                "recommender",
                "evaluation",
                DTYPE,
            ):
                artifacts.move_aside(folder / name, folder)
        _agree_on_dtype(started, siblings)
        _carry_out(started, VERBS[: VERBS.index(until) + 1], siblings)
    return started


def demo(out: str | Path = "runs/demo", overrides: tuple[str, ...] = (), fresh: bool = False) -> Run:
    """The main job on the embedded default, MovieLens 100K and SmolLM2-135M: `run("demo", out)`."""
    return run("demo", out, overrides, fresh)


def prepare(folder: str | Path | Run) -> Run:
    """Stage 1 of a run: tables, split, sequences, leakage check."""
    return _verb(folder, "prepare")


def csft(folder: str | Path | Run) -> Run:
    """Stage 2 of a run: collaborative supervised fine-tuning."""
    return _verb(folder, "csft")


def iem(folder: str | Path | Run) -> Run:
    """Stage 3 of a run: MNTP and contrastive learning."""
    return _verb(folder, "iem")


def encode(folder: str | Path | Run) -> Run:
    """Stage 4 of a run: item vectors of every set its rows need."""
    return _verb(folder, "encode")


def fit(folder: str | Path | Run) -> Run:
    """Stage 5 of a run: the sequential recommenders."""
    return _verb(folder, "fit")


def evaluate(folder: str | Path | Run) -> Run:
    """Stage 6 of a run: full ranking of the test events, statistics, report."""
    return _verb(folder, "evaluate")


def _verb(folder: str | Path | Run, verb: str) -> Run:
    path = folder.folder if isinstance(folder, Run) else Path(folder)
    if not processes.is_main():
        _follow()
        return open_run(path)
    opened = open_run(path)
    with artifacts.run_lock(path):
        _require_current(opened, VERBS[: VERBS.index(verb)])
        _check(opened, (verb,))
        write_resolved(opened)
        _carry_out(opened, (verb,))
        if not _stages_of(opened, verb):
            progress.say(f"skip   {verb}  ({_why_left_out(opened, verb)})")
    return opened


def _why_left_out(run: Run, verb: str) -> str:
    if verb == "csft" and stages.language_sets(run) and run.recipe.csft.max_tokens == 0:
        return "csft.max_tokens is 0"
    return f"no row of this run needs it: {', '.join(run.recipe.recommender.rows)}"


def _require_current(run: Run, verbs: tuple[str, ...]) -> None:
    """Raises ArtifactError where an earlier stage is unfinished, or was made from what has changed since."""
    for verb in verbs:
        for stage in _stages_of(run, verb):
            require_current(run, stage)


def _carry_out(run: Run, verbs: tuple[str, ...], siblings: Sequence[Path] = ()) -> None:
    for position, verb in enumerate(verbs):
        if set(verbs[position:]).isdisjoint(SHARED_VERBS):
            _dismiss()
        if verb == "evaluate" and len(run.domains) > 1:
            _put_single_evaluation_aside(run)
        for stage in _stages_of(run, verb):
            _carry_out_stage(run, stage, siblings)
        if verb == "prepare":
            check_prepared(run)
    _dismiss()
    if verbs == VERBS:
        _put_abandoned_aside(run)
    if "evaluate" in verbs and len(run.domains) > 1:
        by_domain = {domain.name: run.metrics(domain.name) for domain in run.domains}
        artifacts.write_json(run.folder / "evaluation" / "metrics.json", by_domain)
    write_resolved(run)


def _agree_on_dtype(run: Run, siblings: Sequence[Path]) -> None:
    """Takes over what a sibling measured `auto` to be: runs that are compared multiply in one format."""
    known = next((folder / DTYPE for folder in siblings if (folder / DTYPE).exists()), None)
    if known is not None and not (run.folder / DTYPE).exists():
        shutil.copyfile(known, run.folder / DTYPE)


def _put_single_evaluation_aside(run: Run) -> None:
    """The evaluation of when a run of several logs had only one, where theirs are about to lie."""
    folder = run.folder / "evaluation"
    if any((folder / name).exists() for name in (artifacts.MANIFEST, artifacts.STARTED)):
        artifacts.move_aside(folder, run.folder)


def _put_abandoned_aside(run: Run) -> None:
    """Of a run whose stages are all finished: what was begun once and is no stage of the recipe any more.

    Checkpoints go: nothing of the recipe goes on from them.
    """
    for folder in run.begun():
        artifacts.move_aside(folder, run.folder)
    artifacts.tidy_superseded(run.folder)


def _stages_of(run: Run, verb: str) -> list[Stage]:
    """The stages of one verb; built when their turn comes, because inputs are hashes of finished parents."""
    if verb == "prepare":
        return stages.prepare_stages(run)
    if verb in ("csft", "iem"):
        return [stage for stage in stages.language_stages(run) if stage.verb == verb]
    if verb == "encode":
        return stages.encode_stages(run)
    if verb == "fit":
        return stages.fit_stages(run)
    return stages.evaluate_stages(run)


def _check(run: Run, verbs: tuple[str, ...]) -> None:
    """Fetches named models, and refuses a missing one or a missing logger, before anything is written."""
    loggers.require(run.recipe.loggers)
    if set(SHARED_VERBS).isdisjoint(verbs):
        return
    source = run.recipe.model.source
    own = [*stages.language_stages(run), *_encoding(run, stages.language_sets(run))]
    if source != TINY_RANDOM and not all(_is_kept(stage) for stage in own):
        sources.check_model(source)
    for name, encoder in run.recipe.encode.text_encoders.items():
        if not all(_is_kept(stage) for stage in _encoding(run, [name])):
            sources.check_text_encoder(name, encoder)


def _encoding(run: Run, sets: Sequence[str]) -> list[Stage]:
    """The stages that make some vector sets, of every domain."""
    folders = [domain.embeddings(name) for domain in run.domains for name in sets]
    return [stage for stage in stages.encode_stages(run) if stage.folder in folders]


def _is_kept(stage: Stage) -> bool:
    """Whether a stage is finished as the recipe wants it, as far as the stages before it let one tell."""
    try:
        return stage.decide().keep
    except Llm2RecError:  # what it depends on is not finished
        return False


def _plan(run: Run) -> str:
    """One line before the first stage: what goes in, and the budgets of the stages that its rows need."""
    recipe = run.recipe
    data = ", ".join(domain.config.origin for domain in run.domains)
    csft = f"{recipe.csft.epochs:g} epochs" if recipe.csft.epochs else f"{recipe.csft.max_tokens:,} tokens"
    budgets = {
        run.csft: f"CSFT {csft}, ",
        run.mntp: f"MNTP {recipe.iem.mntp.steps} steps, ",
        run.iem: f"contrastive {recipe.iem.contrastive.steps} steps, ",
    }
    language = "".join(budgets.get(stage.folder, "") for stage in stages.language_stages(run))
    rows = f"{len(recipe.recommender.rows)} rows x {recipe.recommender.seeds} seeds"
    return f"{run.folder}: {data}, {recipe.model.source}; {language}{rows}"


def _say_what_is_of_no_row(run: Run) -> None:
    idle = [name for name in run.recipe.recommender.per_row if name not in run.recipe.recommender.rows]
    if idle:
        progress.say(f"note: recommender.per_row: {first_few(idle)}: no row of this run, so nothing heeds it")


def _carry_out_stage(run: Run, stage: Stage, siblings: Sequence[Path]) -> None:
    name = str(stage.folder.relative_to(run.folder))
    inputs = stage.inputs()
    decision = artifacts.decide(stage.folder, inputs, stage.unread)
    if decision.keep:
        artifacts.tidy(stage.folder, run.folder)
        progress.say(f"keep   {name}")
        run.log(stage=name, event="keep")
        return
    shared = _finished_elsewhere(stage, name, inputs, siblings)
    if shared is not None:
        artifacts.take_over(shared, stage.folder, run.folder)
        progress.say(f"share  {name}  (as in {shared})")
        run.log(stage=name, event="share", source=str(shared))
        return
    progress.say(f"run    {name}  ({decision.in_words})")
    run.log(stage=name, event="run", reasons=list(decision.reasons))
    memory.reset_peak()
    with artifacts.stage(stage.folder, stage.verb, inputs, run.folder, stage.unread) as summary:
        _execute(run, stage, summary)
        summary["peak_memory_gb"] = memory.peak_gib()
    memory.release()
    progress.say(f"done   {name}  {_in_words(summary)}")
    run.log(stage=name, event="done", summary=summary)


def _finished_elsewhere(stage: Stage, name: str, inputs: Inputs, siblings: Sequence[Path]) -> Path | None:
    """The same stage of a sibling, finished with the same inputs.

    Of the same name as well: the vectors of a model that looks back and of one that does not have equal inputs.
    A report names its run, so an evaluation is the run's own.
    """
    if stage.verb == "evaluate":
        return None
    folders = [sibling / name for sibling in siblings]
    return next((folder for folder in folders if artifacts.decide(folder, inputs, stage.unread).keep), None)


def _execute(run: Run, stage: Stage, summary: dict[str, Any]) -> None:
    """Executes a stage, a shared one with all processes."""
    if not (stage.shared and processes.are_several()):
        return stage.execute(summary)
    everyone = processes.processes()
    everyone.agreed((str(run.folder), run.recipe.model_dump(mode="json"), str(stage.folder)))
    stage.execute(summary)
    everyone.wait()


def _follow() -> None:
    """What a process that does not lead does: its part of each stage that the main one announces, then part."""
    everyone = processes.processes()
    while announced := everyone.agreed(None):
        folder, recipe, wanted = announced
        run = Run(Path(folder), parse_recipe(recipe, folder))
        stage = next(one for verb in SHARED_VERBS for one in _stages_of(run, verb) if str(one.folder) == wanted)
        stage.execute({})
        everyone.wait()
    processes.part()


def _dismiss() -> None:
    """Tells the other processes that no stage of theirs is left; this one goes on by itself."""
    if processes.are_several():
        processes.processes().agreed(None)
        processes.part()


def _in_words(summary: dict[str, Any]) -> str:
    shown = {key: value for key, value in summary.items() if isinstance(value, int | float) and key != "seconds"}
    parts = [f"{summary['seconds']:.0f} s"]
    parts += [f"{key.replace('_', ' ')} {_short(value)}" for key, value in shown.items()]
    parts += [f"left out: {count:,} ({reason})" for reason, count in summary.get("dropped", {}).items()]
    return ", ".join(parts)


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
