"""The stages of a run: what each one's inputs are, and how it is executed.

A stage is described without importing torch; what trains is imported when it is executed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2rec import artifacts
from llm2rec.artifacts import Inputs, flatten
from llm2rec.config import FLOORS, OptimizerConfig
from llm2rec.data import sources
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.runs import Run, row_parts

if TYPE_CHECKING:
    from llm2rec.data.sequences import Sequences

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


def prepare_stage(run: Run) -> Stage:
    """Source or files -> canonical tables and sequences."""

    def inputs() -> Inputs:
        return {
            "data": _data_hash(run),
            "data.holdout": run.recipe.data.holdout,
            "data.short_histories": run.recipe.data.short_histories,
        }

    def execute(summary: Summary) -> None:
        from llm2rec.data import readers, sequences

        data = run.recipe.data
        if data.source:
            interactions, catalogue = sources.fetch_data(data.source)
        else:
            assert data.interactions and data.items
            interactions = readers.read_interactions(data.interactions)
            catalogue = readers.read_items(data.items)
        summary |= sequences.prepare(
            interactions,
            catalogue,
            holdout=data.holdout,
            short_histories=data.short_histories,
            out=run.data,
        )
        summary["item_ids"] = artifacts.hash_json(catalogue.item_ids)

    return Stage("prepare", run.data, inputs, execute)


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
    """One stage a vector set that the rows of the recipe need."""
    return [_encode_stage(run, name) for name in vector_sets(run)]


def fit_stages(run: Run) -> list[Stage]:
    """One stage a trained row and seed; for rows with variants, each variant and then the choice."""
    stages = []
    for row in run.recipe.recommender.rows:
        if row in FLOORS:
            continue
        variants = row_variants(row)
        seeds = range(run.recipe.recommender.seeds)
        stages += [_fit_stage(run, name, vectors, seed) for name, vectors in variants.items() for seed in seeds]
        if len(variants) > 1:
            stages += [_choice_stage(run, row, list(variants), seed) for seed in seeds]
    return stages


def evaluate_stage(run: Run) -> Stage:
    """Every row of the recipe on the test events: metrics, per-user ranks, report."""

    def inputs() -> Inputs:
        trained = [stage.folder for stage in fit_stages(run)]
        parents = {f"recommender {folder.parent.name}/{folder.name}": _parent(folder, "fit") for folder in trained}
        vectors = {f"vectors {name}": _parent(run.embeddings(name), "encode") for name in vector_sets(run)}
        evaluation = flatten("evaluation", run.recipe.evaluation.model_dump(mode="json"))
        rows = {"recommender.rows": list(run.recipe.recommender.rows)}
        return {"data": _parent(run.data, "prepare"), **evaluation, **rows, **parents, **vectors}

    def execute(summary: Summary) -> None:
        from llm2rec.judging import judge

        summary |= judge(run)

    return Stage("evaluate", run.evaluation, inputs, execute)


def vector_sets(run: Run) -> list[str]:
    """Names of the vector sets that the rows of the recipe need."""
    names = [row_parts(row)[1] for row in run.recipe.recommender.rows]
    wanted = [name for name in names if name not in (None, "id")]
    return list(dict.fromkeys(name for kind in wanted for name in VARIANTS.get(str(kind), (str(kind),))))


def row_variants(row: str) -> dict[str, str | None]:
    """Trained row -> its vector set; rows of the untrained and the CSFT model come in two variants."""
    architecture, vectors = row_parts(row)
    if vectors not in VARIANTS:
        return {row: None if vectors == "id" else vectors}
    bidirectional, causal = VARIANTS[str(vectors)]
    return {f"{row}-bidirectional": bidirectional, f"{row}-causal": causal}


def model_path(run: Run) -> str | Path:
    """Where the language model is loaded from; a named one is fetched first.

    Raises:
        DataError: no mirror of a named model can be reached.
    """
    source = run.recipe.model.source
    if source == TINY_RANDOM:
        return run.backbone
    return sources.fetch_model(source) if source in sources.MODELS else source


def load_data(run: Run) -> tuple[Sequences, list[str], list[str]]:
    """Checked sequences, item ids and titles of a prepared run.

    Raises:
        DataError: a training event is later than a held-out one, or another leak.
    """
    from llm2rec.data.sequences import Sequences, check_leakage
    from llm2rec.data.tables import Catalogue, Interactions

    artifacts.require(run.data, "prepare")
    sequences = Sequences.load(run.data)
    interactions = Interactions.read(run.data / "interactions.parquet")
    data = run.recipe.data
    check_leakage(sequences, interactions, holdout=data.holdout, history_length=data.history_length)
    catalogue = Catalogue.read(run.data / "catalogue.parquet")
    return sequences, catalogue.item_ids, catalogue.titles


def _tiny_random_stage(run: Run) -> Stage:
    def execute(summary: Summary) -> None:
        from llm2rec.lm.backbone import make_tiny_random
        from llm2rec.lm.text import item_texts
        from llm2rec.training import stage_seed

        _, _, titles = load_data(run)
        make_tiny_random(item_texts(titles), run.backbone, stage_seed(run.recipe.seed, "backbone"))

    return Stage(
        "csft",
        run.backbone,
        lambda: {"seed": run.recipe.seed, "catalogue": _catalogue_hash(run)},
        execute,
    )


def _csft_stage(run: Run) -> Stage:
    def inputs() -> Inputs:
        settings = flatten("csft", run.recipe.csft.model_dump(mode="json"))
        window = {"data.history_length": run.recipe.data.history_length}
        return {**_sequence_inputs(run), **_model_inputs(run), **settings, **window}

    def execute(summary: Summary) -> None:
        from llm2rec.lm.backbone import resolve_dtype
        from llm2rec.lm.csft import csft

        sequences, _, titles = load_data(run)
        summary |= csft(
            sequences,
            titles,
            model=model_path(run),
            dtype=resolve_dtype(run.recipe.model.dtype),
            history_length=run.recipe.data.history_length,
            max_title_tokens=run.recipe.model.max_title_tokens,
            seed=run.recipe.seed,
            out=run.csft,
            **_arguments(run.recipe.csft),
        )

    return Stage("csft", run.csft, inputs, execute)


def _mntp_stage(run: Run) -> Stage:
    def inputs() -> Inputs:
        settings = flatten("iem.mntp", run.recipe.iem.mntp.model_dump(mode="json"))
        return {"csft": _parent(run.csft, "csft"), **_text_inputs(run), **settings}

    def execute(summary: Summary) -> None:
        from llm2rec.lm.backbone import resolve_dtype
        from llm2rec.lm.iem import mntp

        _, _, titles = load_data(run)
        summary |= mntp(
            titles,
            model=run.csft,
            dtype=resolve_dtype(run.recipe.model.dtype),
            max_title_tokens=run.recipe.model.max_title_tokens,
            seed=run.recipe.seed,
            out=run.mntp,
            **_arguments(run.recipe.iem.mntp),
        )

    return Stage("iem", run.mntp, inputs, execute)


def _contrastive_stage(run: Run) -> Stage:
    start = run.mntp if run.recipe.iem.mntp.steps else run.csft

    def inputs() -> Inputs:
        settings = flatten("iem.contrastive", run.recipe.iem.contrastive.model_dump(mode="json"))
        return {start.name: _parent(start, "iem"), **_sequence_inputs(run), **_text_inputs(run), **settings}

    def execute(summary: Summary) -> None:
        from llm2rec.lm.backbone import resolve_dtype
        from llm2rec.lm.iem import contrastive

        sequences, _, titles = load_data(run)
        summary |= contrastive(
            sequences,
            titles,
            model=start,
            dtype=resolve_dtype(run.recipe.model.dtype),
            max_title_tokens=run.recipe.model.max_title_tokens,
            seed=run.recipe.seed,
            out=run.iem,
            **_arguments(run.recipe.iem.contrastive),
        )

    return Stage("iem", run.iem, inputs, execute)


def _encode_stage(run: Run, name: str) -> Stage:
    trained = {"csft": run.csft, "csft-causal": run.csft, "mntp": run.mntp, "llm2rec": run.iem}

    def inputs() -> Inputs:
        parent = {trained[name].name: _parent(trained[name], "iem")} if name in trained else {}
        settings = flatten("encode", run.recipe.encode.model_dump(mode="json"))
        return {
            **parent,
            **_text_inputs(run),
            **(_model_inputs(run) if name not in trained else {}),
            **settings,
        }

    def execute(summary: Summary) -> None:
        from llm2rec.lm.backbone import resolve_dtype
        from llm2rec.lm.encode import encode

        _, item_ids, titles = load_data(run)
        summary |= encode(
            item_ids,
            titles,
            model=trained[name] if name in trained else model_path(run),
            causal=name.endswith("-causal"),
            dtype=resolve_dtype(run.recipe.model.dtype),
            max_title_tokens=run.recipe.model.max_title_tokens,
            batch_tokens=run.recipe.encode.batch_tokens,
            name=name,
            out=run.embeddings(name),
        )

    return Stage("encode", run.embeddings(name), inputs, execute)


def _arguments(section: OptimizerConfig) -> dict[str, Any]:
    """The values of a language stage's section, those of its optimizer as one `Optimizer`."""
    from llm2rec.training import Optimizer

    values = dict(section)
    optimizer = Optimizer(**{name: values.pop(name) for name in OptimizerConfig.model_fields})
    return values | {"optimizer": optimizer}


_NOT_OF_A_TRAINING = ("rows", "seeds")


def _fit_stage(run: Run, row: str, vectors: str | None, seed: int) -> Stage:
    folder = run.recommender(row, seed)
    settings = run.recipe.recommender.model_dump(mode="json", exclude=set(_NOT_OF_A_TRAINING))

    def inputs() -> Inputs:
        parent = {"vectors": _parent(run.embeddings(vectors), "encode")} if vectors else {}
        window = {"data.history_length": run.recipe.data.history_length, "seed": seed}
        return {**_sequence_inputs(run), **parent, **window, **flatten("recommender", settings)}

    def execute(summary: Summary) -> None:
        from llm2rec.data.embeddings import ItemEmbeddings
        from llm2rec.rec.fit import fit

        sequences, item_ids, _ = load_data(run)
        table = ItemEmbeddings.load(run.embeddings(vectors)).aligned_to(item_ids) if vectors else None
        result = fit(
            sequences,
            table,
            architecture=row_parts(row)[0],
            history_length=run.recipe.data.history_length,
            seed=seed,
            out=folder,
            description=f"fit {row}",
            **settings,
        )
        summary |= {"epochs": result.epochs, "best_epoch": result.best_epoch}
        summary |= {"vectors": vectors, "validation_ndcg@10": result.best_metric}

    return Stage("fit", folder, inputs, execute)


def _choice_stage(run: Run, row: str, variants: list[str], seed: int) -> Stage:
    """The variant with the better validation NDCG@10, averaged over seeds, becomes the row."""
    folder = run.recommender(row, seed)
    seeds = range(run.recipe.recommender.seeds)

    def inputs() -> Inputs:
        return {
            f"{variant}/seed-{one}": _parent(run.recommender(variant, one), "fit")
            for variant in variants
            for one in seeds
        }

    def execute(summary: Summary) -> None:
        validation = {
            variant: sum(fitted(run, variant, one)["validation_ndcg@10"] for one in seeds) / len(seeds)
            for variant in variants
        }
        chosen = max(variants, key=lambda variant: validation[variant])
        for path in run.recommender(chosen, seed).iterdir():
            if path.name != artifacts.MANIFEST:
                shutil.copyfile(path, folder / path.name)
        summary |= fitted(run, chosen, seed) | {"chosen": chosen, "validation": validation}

    return Stage("fit", folder, inputs, execute)


def fitted(run: Run, row: str, seed: int) -> Summary:
    """The summary of a finished training: epochs, vectors, validation NDCG@10."""
    summary = dict(artifacts.require(run.recommender(row, seed), "fit").summary)
    return {key: value for key, value in summary.items() if key not in ("seconds", "peak_memory_gb")}


def _parent(folder: Path, verb: str) -> str:
    return artifacts.require(folder, verb).fingerprint


def _catalogue_hash(run: Run) -> str:
    outputs = artifacts.require(run.data, "prepare").outputs
    return str(outputs["catalogue.parquet"]["sha256"])


def _sequence_inputs(run: Run) -> Inputs:
    """Who consumed what; a corrected title leaves it as it is."""
    prepared = artifacts.require(run.data, "prepare")
    files = {path: file["sha256"] for path, file in prepared.outputs.items() if path != "catalogue.parquet"}
    return {"sequences": artifacts.hash_json(files), "item_ids": prepared.summary["item_ids"]}


def _text_inputs(run: Run) -> Inputs:
    """What titles become tokens with; a change of interactions alone leaves it as it is."""
    return {
        "catalogue": _catalogue_hash(run),
        "model.dtype": run.recipe.model.dtype,
        "model.max_title_tokens": run.recipe.model.max_title_tokens,
        "seed": run.recipe.seed,
    }


def _model_inputs(run: Run) -> Inputs:
    return {"model.source": _model_hash(run), **_text_inputs(run)}


def _data_hash(run: Run) -> Any:
    data = run.recipe.data
    if data.source:
        return sources.data_content_hash(data.source)
    files = {"interactions": data.interactions, "items": data.items}
    for name, path in files.items():
        if path is None or not path.is_file():
            raise ConfigError(f"data.{name}: there is no file {path}")
    return {name: artifacts.hash_file(path) for name, path in files.items() if path}


def _model_hash(run: Run) -> str:
    """What the language model is: the registered hash, the content of a file or folder, or a hub id."""
    source = run.recipe.model.source
    path = Path(source)
    if source == TINY_RANDOM:
        return _parent(run.backbone, "csft")
    if source in sources.MODELS:
        return sources.MODELS[source].content_hash
    if path.is_file():
        return artifacts.hash_file(path)
    if path.is_dir():
        files = sorted(path.glob("*.json")) + sorted(path.glob("*.safetensors"))
        if not files:
            raise ArtifactError(f"model.source: {path} holds no model (no *.json, no *.safetensors)")
        return artifacts.hash_json({file.name: artifacts.hash_file(file) for file in files})
    return source
