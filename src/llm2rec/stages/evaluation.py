"""Stage `evaluate`: what goes in; `judging` is how it is executed."""

from __future__ import annotations

from llm2rec.artifacts import Inputs, flatten
from llm2rec.rows import FLOORS
from llm2rec.runs import Domain, Run
from llm2rec.stages.base import Stage, Summary, parent_hash, vector_sets
from llm2rec.stages.recommenders import fit_stages_of


def evaluate_stages(run: Run) -> list[Stage]:
    """One stage a domain: every row of the recipe on its test events."""
    return [_evaluate_stage(run, domain) for domain in run.domains]


def _evaluate_stage(run: Run, domain: Domain) -> Stage:
    def inputs() -> Inputs:
        trained = [stage.folder for stage in fit_stages_of(run, domain)]
        parents = {
            f"recommender {folder.parent.name}/{folder.name}": parent_hash(folder, "fit") for folder in trained
        }
        vectors = {f"vectors {name}": parent_hash(domain.embeddings(name), "encode") for name in vector_sets(run)}
        settings = run.recipe.evaluation.model_dump(mode="json", exclude={"direct_users"})  # of a study
        evaluation = flatten("evaluation", settings)
        rows = {"recommender.rows": list(run.recipe.recommender.rows)}
        window: Inputs = {"data.history_length": domain.config.history_length}
        reference = reference_row(run)
        if reference not in (
            settings["reference"],
            run.recipe.recommender.rows[0],
        ):  # a floor in its place once was
            window |= {"reference": reference}
        if domain.config.categories:  # which colour the maps
            window |= {"data.categories": domain.config.categories}
        return {"data": parent_hash(domain.data, "prepare"), **evaluation, **rows, **window, **parents, **vectors}

    def execute(summary: Summary) -> None:
        from llm2rec.stages.judging import judge

        summary |= judge(run, domain)

    return Stage("evaluate", domain.evaluation, inputs, execute)


def reference_row(run: Run) -> str:
    """The row that the others are tested against: the recipe's; without the default the first trained one."""
    rows = run.recipe.recommender.rows
    wanted = run.recipe.evaluation.reference
    return wanted if wanted in rows else next((row for row in rows if row not in FLOORS), rows[0])
