"""The stages of a run: what each one's inputs are, and how it is executed.

A stage is described without importing torch; what trains is imported when it is executed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2rec import artifacts
from llm2rec.artifacts import Inputs, flatten
from llm2rec.config import CONTEXT, DataConfig, RecommenderConfig, Row
from llm2rec.data import sources
from llm2rec.errors import ArtifactError
from llm2rec.runs import Domain, Run

if TYPE_CHECKING:
    import numpy as np

    from llm2rec.data.mixture import Mixture
    from llm2rec.data.sequences import Sequences
    from llm2rec.data.splits import Split
    from llm2rec.rec.items import Categories

TINY_RANDOM = "tiny-random"
# The untrained and the CSFT model are encoded both ways; validation decides which one is the row.
VARIANTS = {"backbone": ("backbone", "backbone-causal"), "csft": ("csft", "csft-causal")}

Summary = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One artifact: its folder, the inputs that determine it, and how to make it."""

    verb: str
    folder: Path
    inputs: Callable[[], Inputs]
    execute: Callable[[Summary], None]


def prepare_stages(run: Run) -> list[Stage]:
    """One stage a domain: source, layout or files -> canonical tables and sequences."""
    return [_prepare_stage(run, domain) for domain in run.domains]


def _prepare_stage(run: Run, domain: Domain) -> Stage:
    config = domain.config

    def inputs() -> Inputs:
        from llm2rec.data import origins

        chosen = flatten("data", config.model_dump(mode="json", include={"columns", "filters", "split"}))
        return {
            "data": origins.content_hash(config),
            "data.layout": config.layout,
            "data.short_histories": config.short_histories,
            "seed": run.recipe.seed,
            **chosen,
        }

    def execute(summary: Summary) -> None:
        from llm2rec.data import filters, origins, sequences

        log, catalogue, left_out = origins.read(config)
        log, filtered_out = filters.filtered(log, **dict(config.filters), seed=run.recipe.seed)
        prepared = sequences.prepare(
            log,
            catalogue,
            split=split_of(config, run.recipe.seed),
            short_histories=config.short_histories,
            only_consumed=config.filters.k_core > 1,
            out=domain.data,
        )
        prepared["dropped"] = left_out | filtered_out | prepared.pop("dropped", {})
        summary |= prepared
        summary["item_ids"] = artifacts.hash_json(sequences.Sequences.load(domain.data).item_ids)

    return Stage("prepare", domain.data, inputs, execute)


def split_of(config: DataConfig, seed: int) -> Split:
    """The split that a recipe asks for."""
    from llm2rec.data.splits import Split

    return Split(**dict(config.split), seed=seed)


def language_stages(run: Run) -> list[Stage]:
    """The stages that train the language model, as far as the rows of the recipe need them."""
    wanted = vector_sets(run)
    stages = []
    if wanted and run.recipe.model.source == TINY_RANDOM:
        stages.append(_tiny_random_stage(run))
    if any(name not in VARIANTS["backbone"] for name in wanted):
        stages.append(_csft_stage(run))
    if "mntp" in wanted or "llm2rec" in wanted:
        stages += iem_stages(run)
    return stages


def iem_stages(run: Run) -> list[Stage]:
    """MNTP (unless it has 0 steps) and contrastive learning."""
    stages = [_mntp_stage(run)] if run.recipe.iem.mntp.steps else []
    return [*stages, _contrastive_stage(run)]


def encode_stages(run: Run) -> list[Stage]:
    """One stage a domain and vector set that the rows of the recipe need."""
    return [_encode_stage(run, domain, name) for domain in run.domains for name in vector_sets(run)]


def fit_stages(run: Run) -> list[Stage]:
    """The trainings of every domain."""
    return [stage for domain in run.domains for stage in fit_stages_of(run, domain)]


def fit_stages_of(run: Run, domain: Domain) -> list[Stage]:
    """One stage a trained row and seed; for rows with variants, each variant and then the choice."""
    stages = []
    seeds = range(run.recipe.recommender.seeds)
    for row in trained_rows(run):
        variants = row_variants(row)
        stages += [
            _fit_stage(run, domain, row, name, kind, seed) for name, kind in variants.items() for seed in seeds
        ]
        if len(variants) > 1:
            stages += [_choice_stage(run, domain, row.name, list(variants), seed) for seed in seeds]
    return stages


def trained_rows(run: Run) -> list[Row]:
    """The rows that are trained: neither counted nor made of other rows."""
    rows = [Row.parse(name) for name in run.recipe.recommender.rows]
    return [row for row in rows if row.architecture and not row.parents]


def evaluate_stages(run: Run) -> list[Stage]:
    """One stage a domain: every row of the recipe on its test events."""
    return [_evaluate_stage(run, domain) for domain in run.domains]


def _evaluate_stage(run: Run, domain: Domain) -> Stage:
    def inputs() -> Inputs:
        trained = [stage.folder for stage in fit_stages_of(run, domain)]
        parents = {f"recommender {folder.parent.name}/{folder.name}": _parent(folder, "fit") for folder in trained}
        vectors = {f"vectors {name}": _parent(domain.embeddings(name), "encode") for name in vector_sets(run)}
        evaluation = flatten("evaluation", run.recipe.evaluation.model_dump(mode="json"))
        rows = {"recommender.rows": list(run.recipe.recommender.rows)}
        window = {"data.history_length": domain.config.history_length}
        return {"data": _parent(domain.data, "prepare"), **evaluation, **rows, **window, **parents, **vectors}

    def execute(summary: Summary) -> None:
        from llm2rec.judging import judge

        summary |= judge(run, domain)

    return Stage("evaluate", domain.evaluation, inputs, execute)


def vector_sets(run: Run) -> list[str]:
    """Names of the vector sets that the rows of the recipe need."""
    wanted = [row.vectors for row in trained_rows(run) if row.vectors]
    return list(dict.fromkeys(name for kind in wanted for name in VARIANTS.get(kind, (kind,))))


def row_variants(row: Row) -> dict[str, str | None]:
    """Trained row -> its vector set; rows of the untrained and the CSFT model come in two variants."""
    if row.vectors not in VARIANTS:
        return {row.name: row.vectors}
    bidirectional, causal = VARIANTS[str(row.vectors)]
    return {f"{row.name}-bidirectional": bidirectional, f"{row.name}-causal": causal}


def model_path(run: Run) -> str | Path:
    """Where the language model is loaded from; a named one is fetched first.

    Raises:
        DataError: no mirror of a named model can be reached.
    """
    source = run.recipe.model.source
    if source == TINY_RANDOM:
        return run.backbone
    return sources.fetch_model(source) if source in sources.MODELS else source


@dataclass(frozen=True)
class Loaded:
    """A prepared domain in memory: sequences, and the id and text of each item (N,).

    `trainable` (N,) is False for held-out items, whose text and id no training may use.
    """

    sequences: Sequences
    item_ids: list[str]
    texts: list[str]
    trainable: np.ndarray


def load_domain(run: Run, domain: Domain) -> Loaded:
    """The checked data of a prepared domain.

    Raises:
        DataError: a training event is later than a held-out one, or another leak.
        ConfigError: the text template names a column that the items lack.
    """
    from llm2rec.data.sequences import Sequences, check_leakage, cold_items
    from llm2rec.data.tables import Catalogue, Interactions
    from llm2rec.data.texts import item_texts

    artifacts.require(domain.data, "prepare")
    sequences, cold = Sequences.load(domain.data), cold_items(domain.data)
    check_leakage(
        sequences,
        Interactions.read(domain.data / "interactions.parquet"),
        split=split_of(domain.config, run.recipe.seed),
        cold=cold,
        history_length=domain.config.history_length,
    )
    catalogue = Catalogue.read(domain.data / "catalogue.parquet")
    trainable = ~catalogue.frame["item_id"].is_in(cold.implode()).to_numpy()
    return Loaded(sequences, catalogue.item_ids, item_texts(catalogue, domain.config.text), trainable)


def load_mixture(run: Run) -> Mixture:
    """What the language model is trained on: the domains of the run whose role is `in`, as one.

    Raises:
        DataError, ConfigError: see `load_domain`.
    """
    from llm2rec.data.mixture import Part, mix

    parts = []
    for domain in trained_domains(run):
        loaded = load_domain(run, domain)
        weight = domain.config.weight
        parts.append(Part(domain.name, loaded.sequences, loaded.texts, loaded.trainable, weight))
    return mix(parts)


def trained_domains(run: Run) -> list[Domain]:
    """The domains that the language model is trained on."""
    return [domain for domain in run.domains if domain.config.role == "in"]


def _history_length(run: Run) -> int:
    return trained_domains(run)[0].config.history_length  # one for all: see Recipe


def _of_each(run: Run, inputs: Callable[[Domain], Inputs]) -> Inputs:
    """Inputs of every trained domain; where there are several, under the name of the domain."""
    domains = trained_domains(run)
    if len(domains) == 1:
        return inputs(domains[0])
    weights = {f"{domain.name}.weight": domain.config.weight for domain in domains}
    return weights | {f"{one.name}.{key}": value for one in domains for key, value in inputs(one).items()}


def _tiny_random_stage(run: Run) -> Stage:
    def execute(summary: Summary) -> None:
        from llm2rec.lm.backbone import make_tiny_random
        from llm2rec.training import stage_seed

        make_tiny_random(load_mixture(run).training_texts, run.backbone, stage_seed(run.recipe.seed, "backbone"))

    def inputs() -> Inputs:
        return {"seed": run.recipe.seed, **_of_each(run, lambda one: _text_inputs(run, one))}

    return Stage("csft", run.backbone, inputs, execute)


def _csft_stage(run: Run) -> Stage:
    def inputs() -> Inputs:
        settings = flatten("csft", run.recipe.csft.model_dump(mode="json"))
        window = {"data.history_length": _history_length(run)}
        data = _of_each(run, lambda one: {**_sequence_inputs(one), **_text_inputs(run, one)})
        return {**data, **_model_inputs(run), **settings, **window}

    def execute(summary: Summary) -> None:
        from llm2rec.lm.backbone import resolve_dtype
        from llm2rec.lm.csft import csft
        from llm2rec.lm.iem import check_titles

        mixture = load_mixture(run)
        check_titles(mixture.training_texts, model_path(run), run.recipe.model.max_title_tokens)
        summary |= csft(
            mixture.sequences,
            mixture.texts,
            model=model_path(run),
            dtype=resolve_dtype(run.recipe.model.dtype),
            history_length=_history_length(run),
            max_title_tokens=run.recipe.model.max_title_tokens,
            seed=run.recipe.seed,
            out=run.csft,
            **dict(run.recipe.csft),
        )

    return Stage("csft", run.csft, inputs, execute)


def _mntp_stage(run: Run) -> Stage:
    def inputs() -> Inputs:
        settings = flatten("iem.mntp", run.recipe.iem.mntp.model_dump(mode="json"))
        data = _of_each(run, lambda one: _text_inputs(run, one))
        return {"csft": _parent(run.csft, "csft"), **data, **settings}

    def execute(summary: Summary) -> None:
        from llm2rec.lm.backbone import resolve_dtype
        from llm2rec.lm.iem import mntp

        summary |= mntp(
            load_mixture(run).training_texts,
            model=run.csft,
            dtype=resolve_dtype(run.recipe.model.dtype),
            max_title_tokens=run.recipe.model.max_title_tokens,
            seed=run.recipe.seed,
            out=run.mntp,
            **dict(run.recipe.iem.mntp),
        )

    return Stage("iem", run.mntp, inputs, execute)


def _contrastive_stage(run: Run) -> Stage:
    start = run.mntp if run.recipe.iem.mntp.steps else run.csft

    def inputs() -> Inputs:
        settings = flatten("iem.contrastive", run.recipe.iem.contrastive.model_dump(mode="json"))
        data = _of_each(run, lambda one: {**_sequence_inputs(one), **_text_inputs(run, one)})
        return {start.name: _parent(start, "iem"), **data, **settings}

    def execute(summary: Summary) -> None:
        from llm2rec.lm.backbone import resolve_dtype
        from llm2rec.lm.iem import contrastive

        mixture = load_mixture(run)
        summary |= contrastive(
            mixture.sequences,
            mixture.texts,
            model=start,
            dtype=resolve_dtype(run.recipe.model.dtype),
            max_title_tokens=run.recipe.model.max_title_tokens,
            seed=run.recipe.seed,
            out=run.iem,
            **dict(run.recipe.iem.contrastive),
        )

    return Stage("iem", run.iem, inputs, execute)


def _encode_stage(run: Run, domain: Domain, name: str) -> Stage:
    trained = {"csft": run.csft, "csft-causal": run.csft, "mntp": run.mntp, "llm2rec": run.iem}

    def inputs() -> Inputs:
        parent = {trained[name].name: _parent(trained[name], "iem")} if name in trained else {}
        settings = flatten("encode", run.recipe.encode.model_dump(mode="json"))
        return {
            **parent,
            **_text_inputs(run, domain),
            **(_model_inputs(run) if name not in trained else {}),
            **settings,
        }

    def execute(summary: Summary) -> None:
        from llm2rec.lm.backbone import resolve_dtype
        from llm2rec.lm.encode import encode

        loaded = load_domain(run, domain)
        summary |= encode(
            loaded.item_ids,
            loaded.texts,
            model=trained[name] if name in trained else model_path(run),
            causal=name.endswith("-causal"),
            dtype=resolve_dtype(run.recipe.model.dtype),
            max_title_tokens=run.recipe.model.max_title_tokens,
            batch_tokens=run.recipe.encode.batch_tokens,
            name=name,
            out=domain.embeddings(name),
        )

    return Stage("encode", domain.embeddings(name), inputs, execute)


def _fit_stage(run: Run, domain: Domain, row: Row, name: str, vectors: str | None, seed: int) -> Stage:
    folder = domain.recommender(name, seed)
    config = run.recipe.recommender

    def inputs() -> Inputs:
        parent = {"vectors": _parent(domain.embeddings(vectors), "encode")} if vectors else {}
        settings = flatten("recommender", config.model_dump(mode="json", exclude={"rows", "seeds"}))
        window: Inputs = {"data.history_length": domain.config.history_length, "seed": seed}
        if row.name == CONTEXT:
            window |= {"catalogue": _catalogue_hash(domain), "data.categories": domain.config.categories}
        return {**_sequence_inputs(domain), **parent, **window, **settings}

    def execute(summary: Summary) -> None:
        from llm2rec.data.embeddings import ItemEmbeddings
        from llm2rec.rec.architecture import Architecture
        from llm2rec.rec.fit import Optimisation, fit

        loaded = load_domain(run, domain)
        table = ItemEmbeddings.load(domain.embeddings(vectors)).aligned_to(loaded.item_ids) if vectors else None
        result = fit(
            loaded.sequences,
            Architecture(
                name=str(row.architecture),
                items=row.fusion or ("text" if vectors else "id"),
                history_length=domain.config.history_length,
                **_values_of(Architecture, config),
            ),
            Optimisation(**_values_of(Optimisation, config)),
            vectors=table,
            categories=_categories(domain) if row.name == CONTEXT else None,
            trainable=loaded.trainable,
            seed=seed,
            out=folder,
            description=f"fit {name}",
        )
        summary |= {"epochs": result.epochs, "best_epoch": result.best_epoch}
        summary |= {"vectors": vectors, "validation_ndcg@10": result.best_metric}

    return Stage("fit", folder, inputs, execute)


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
            f"{variant}/seed-{one}": _parent(domain.recommender(variant, one), "fit")
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


def fitted(domain: Domain, row: str, seed: int) -> Summary:
    """The summary of a finished training: epochs, vectors, validation NDCG@10."""
    summary = dict(artifacts.require(domain.recommender(row, seed), "fit").summary)
    return {key: value for key, value in summary.items() if key not in ("seconds", "peak_memory_gb")}


def _parent(folder: Path, verb: str) -> str:
    return artifacts.require(folder, verb).fingerprint


def _catalogue_hash(domain: Domain) -> str:
    outputs = artifacts.require(domain.data, "prepare").outputs
    return str(outputs["catalogue.parquet"]["sha256"])


def _sequence_inputs(domain: Domain) -> Inputs:
    """Who consumed what; a corrected title leaves it as it is."""
    prepared = artifacts.require(domain.data, "prepare")
    files = {path: file["sha256"] for path, file in prepared.outputs.items() if path != "catalogue.parquet"}
    return {"sequences": artifacts.hash_json(files), "item_ids": prepared.summary["item_ids"]}


def _text_inputs(run: Run, domain: Domain) -> Inputs:
    """What items become tokens with; a change of interactions alone leaves it as it is."""
    return {
        "catalogue": _catalogue_hash(domain),
        "data.text": domain.config.text,
        "model.dtype": run.recipe.model.dtype,
        "model.max_title_tokens": run.recipe.model.max_title_tokens,
        "seed": run.recipe.seed,
    }


def _model_inputs(run: Run) -> Inputs:
    return {"model.source": _model_hash(run)}


def _model_hash(run: Run) -> str:
    """What the language model is: the registered hash, the content of a file or folder, or a hub id."""
    source = run.recipe.model.source
    path = Path(source)
    if source == TINY_RANDOM:
        return _parent(run.backbone, "csft")
    if source in sources.MODELS:
        return str(sources.MODELS[source].content_hash)
    if path.is_file():
        return artifacts.hash_file(path)
    if path.is_dir():
        files = sorted(path.glob("*.json")) + sorted(path.glob("*.safetensors"))
        if not files:
            raise ArtifactError(f"model.source: {path} holds no model (no *.json, no *.safetensors)")
        return artifacts.hash_json({file.name: artifacts.hash_file(file) for file in files})
    return source
