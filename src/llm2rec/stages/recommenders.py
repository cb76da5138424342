"""Stage `fit`: what goes in, and how it is executed."""

from __future__ import annotations

import shutil
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from llm2rec import artifacts
from llm2rec.artifacts import Inputs, flatten
from llm2rec.config import RecommenderConfig
from llm2rec.rows import CONTEXT, Row
from llm2rec.runs import Domain, Run
from llm2rec.stages.base import (
    Stage,
    Summary,
    averaged_rows,
    catalogue_hash,
    dtype_of,
    load_sequences,
    loggers_of,
    parent_hash,
    row_variants,
    sequence_inputs,
    trained_rows,
)

if TYPE_CHECKING:
    from llm2rec.rec.items import Categories


OF_VECTORS = {
    "smoothing",
    "adapter",
    "adapter_size",
    "whitening",
    "dimensions",
    "delta_share",
}  # what rows over ids alone do not read


def fit_stages(run: Run) -> list[Stage]:
    """The trainings of every domain."""
    return [stage for domain in run.domains for stage in fit_stages_of(run, domain)]


def fit_stages_of(run: Run, domain: Domain) -> list[Stage]:
    """One stage a trained row and seed; for rows with variants each variant, then the choice; averages last."""
    stages = []
    seeds = range(run.recipe.recommender.seeds)
    for row in trained_rows(run):
        variants = row_variants(row)
        stages += [
            _fit_stage(run, domain, row, name, kind, seed) for name, kind in variants.items() for seed in seeds
        ]
        if len(variants) > 1:
            stages += [_choice_stage(run, domain, row.name, list(variants), seed) for seed in seeds]
    stages += [_average_stage(run, domain, row, seed) for row in averaged_rows(run) for seed in seeds]
    return list({stage.folder: stage for stage in stages}.values())  # a variant may be a row of its own as well


def _fit_stage(run: Run, domain: Domain, row: Row, name: str, vectors: str | None, seed: int) -> Stage:
    folder = domain.recommender(name, seed)
    config = settings_of(run.recipe.recommender, row.name)

    def inputs() -> Inputs:
        parent = {"vectors": parent_hash(domain.embeddings(vectors), "encode")} if vectors else {}
        left_out = {"rows", "seeds", "per_row"} | (OF_VECTORS if vectors is None else set())
        if config.smoothing == 0:
            left_out.add("smoothing")  # which runs of before it have not
        settings = flatten("recommender", config.model_dump(mode="json", exclude=left_out))
        window: Inputs = {"data.history_length": domain.config.history_length, "seed": seed}
        if row.name == CONTEXT:
            window |= {"catalogue": catalogue_hash(domain), "data.categories": domain.config.categories}
        return {**sequence_inputs(domain), **parent, **window, **settings, **_validation_inputs(run)}

    def execute(summary: Summary) -> None:
        from llm2rec.data.embeddings import ItemEmbeddings
        from llm2rec.rec.architecture import Architecture
        from llm2rec.rec.fit import Optimisation, fit

        sequences, trainable = load_sequences(domain)
        table = ItemEmbeddings.load(domain.embeddings(vectors)).aligned_to(sequences.item_ids) if vectors else None
        result = fit(
            sequences,
            Architecture(
                name=str(row.architecture),
                items=row.fusion or ("text" if vectors else "id"),
                history_length=domain.config.history_length,
                **_values_of(Architecture, config),
            ),
            Optimisation(**_values_of(Optimisation, config) | {"dtype": dtype_of(run, config.dtype)}),
            vectors=table,
            categories=_categories(domain) if row.name == CONTEXT else None,
            trainable=trainable,
            seed=seed,
            out=folder,
            mask_history=run.recipe.evaluation.mask_history,
            description=f"fit {name}",
            loggers=loggers_of(run),
        )
        summary |= {"epochs": result.epochs, "best_epoch": result.best_epoch}
        summary |= {"vectors": vectors, "dtype": result.dtype, "validation_ndcg@10": result.best_metric}

    return Stage("fit", folder, inputs, execute, unread=unread_by(row, config))


def unread_by(row: Row, config: RecommenderConfig) -> frozenset[str]:
    """Keys of the recommender that the training of a row does not look at, as its others are set.

    They stay among its inputs, which those of runs of before hold, and are not compared.
    """
    unread = set() if config.loss == "gbce" else {"calibration"}
    if config.loss == "full":
        unread |= {"negatives", "sampling"}
    if row.fusion != "delta":
        unread.add("delta_share")
    if config.adapter == "linear":
        unread.add("adapter_size")
    if row.architecture == "gru4rec":
        unread.add("heads")
    return frozenset(f"recommender.{key}" for key in unread)


def settings_of(config: RecommenderConfig, row: str) -> RecommenderConfig:
    """The recommender's settings as one row has them."""
    own = config.per_row.get(row)
    return config if own is None else config.model_copy(update=own.model_dump(exclude_unset=True))


def _validation_inputs(run: Run) -> Inputs:
    """How validation ranks, where it is not the usual way."""
    return {"evaluation.mask_history": True} if run.recipe.evaluation.mask_history else {}


def _values_of(kind: type, config: RecommenderConfig) -> dict[str, Any]:
    """The recipe's values for the fields of a plain dataclass of the same names."""
    return {field.name: getattr(config, field.name) for field in fields(kind) if hasattr(config, field.name)}


def _categories(domain: Domain) -> Categories | None:
    """The categories of the items, where the recipe names a column of them."""
    from llm2rec.data.tables import Catalogue
    from llm2rec.rec.items import Categories

    if domain.config.categories is None:
        return None
    catalogue = Catalogue.read(domain.data / "catalogue.parquet")
    return Categories.of(catalogue.labels(domain.config.categories))


def _choice_stage(run: Run, domain: Domain, row: str, variants: list[str], seed: int) -> Stage:
    """The variant with the better validation NDCG@10, averaged over seeds, becomes the row."""
    folder = domain.recommender(row, seed)
    seeds = range(run.recipe.recommender.seeds)

    def inputs() -> Inputs:
        return {
            f"{variant}/seed-{one}": parent_hash(domain.recommender(variant, one), "fit")
            for variant in variants
            for one in seeds
        }

    def execute(summary: Summary) -> None:
        validation = {
            variant: sum(fitted(domain, variant, one)["validation_ndcg@10"] for one in seeds) / len(seeds)
            for variant in variants
        }
        chosen = max(variants, key=lambda variant: validation[variant])
        for path in domain.recommender(chosen, seed).iterdir():
            if path.name != artifacts.MANIFEST:
                shutil.copyfile(path, folder / path.name)
        summary |= fitted(domain, chosen, seed) | {"chosen": chosen, "validation": validation}

    return Stage("fit", folder, inputs, execute)


def _average_stage(run: Run, domain: Domain, row: Row, seed: int) -> Stage:
    """The weight of an averaged row that is best on validation, of the trainings of one seed."""
    folder = domain.recommender(row.name, seed)

    def inputs() -> Inputs:
        parents = {parent: parent_hash(domain.recommender(parent, seed), "fit") for parent in row.parents}
        window = {"data.history_length": domain.config.history_length}
        return {**sequence_inputs(domain), **parents, **window, **_validation_inputs(run)}

    def execute(summary: Summary) -> None:
        from llm2rec.data.sequences import Sequences
        from llm2rec.rec.average import AVERAGE, ScoreAverage, best_weight, validation_by_weight
        from llm2rec.serve.recommender import load_trained

        average = ScoreAverage(*(load_trained(domain, parent, seed) for parent in row.parents))
        sequences = Sequences.load(domain.data)
        length = domain.config.history_length
        hidden = run.recipe.evaluation.mask_history
        by_weight = validation_by_weight(average, sequences, length, f"fit {row.name}", hidden)
        weight = best_weight(by_weight)
        artifacts.write_json(folder / AVERAGE, {"weight": weight})
        summary |= {"weight": weight, "validation_ndcg@10": by_weight[weight], "chosen": _weight_in_words(weight)}
        summary["validation"] = {_weight_in_words(one): value for one, value in by_weight.items()}

    return Stage("fit", folder, inputs, execute)


def _weight_in_words(weight: float) -> str:
    return f"{100 * weight:.0f} % ids"


def fitted(domain: Domain, row: str, seed: int) -> Summary:
    """The summary of a finished training: epochs, vectors, validation NDCG@10."""
    summary = dict(artifacts.require(domain.recommender(row, seed), "fit").summary)
    return {key: value for key, value in summary.items() if key not in ("seconds", "peak_memory_gb")}
