"""What a stage is, and what every stage is described with: rows, vector sets, data, hashes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm2rec import artifacts, processes
from llm2rec.artifacts import Inputs
from llm2rec.config import TINY_RANDOM, DataConfig
from llm2rec.data import sources
from llm2rec.errors import ArtifactError
from llm2rec.loggers import Loggers
from llm2rec.rows import Row
from llm2rec.runs import Domain, Run

if TYPE_CHECKING:
    from llm2rec.data.mixture import Mixture
    from llm2rec.data.sequences import Sequences
    from llm2rec.data.splits import Split

# The untrained and the CSFT model are encoded both ways; validation decides which one is the row.
VARIANTS = {"backbone": ("backbone", "backbone-causal"), "csft": ("csft", "csft-causal")}

AUTO, DTYPE = "auto", "dtype.json"
Summary = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One artifact: its folder, the inputs that determine it, and how to make it.

    shared: whether all processes that torchrun started execute it together, rather than the main one alone.
    unread: keys of the inputs that it does not look at as the others are: a change of these alone keeps it.
    """

    verb: str
    folder: Path
    inputs: Callable[[], Inputs]
    execute: Callable[[Summary], None]
    shared: bool = False
    unread: frozenset[str] = frozenset()

    def decide(self) -> artifacts.Decision:
        """Whether what lies in its folder is kept."""
        return artifacts.decide(self.folder, self.inputs(), self.unread)


def require_current(run: Run, stage: Stage) -> None:
    """Raises ArtifactError where a stage is unfinished, or was made from what has changed since."""
    decision = stage.decide()
    if not decision.keep:
        name = stage.folder.relative_to(run.folder)
        raise ArtifactError(
            f"{name} is not up to date ({decision.in_words}); run `llm2rec {stage.verb} {run.folder}` first"
        )


def trained_rows(run: Run) -> list[Row]:
    """The rows that are trained: neither counted nor made of other rows."""
    rows = [Row.parse(name) for name in run.recipe.recommender.rows]
    return [row for row in rows if row.architecture and not row.parents]


def averaged_rows(run: Run) -> list[Row]:
    """The rows whose scores are the average of two other rows'."""
    rows = [Row.parse(name) for name in run.recipe.recommender.rows]
    return [row for row in rows if row.parents]


def vector_sets(run: Run) -> list[str]:
    """Names of the vector sets that the rows of the recipe need."""
    wanted = [name for row in trained_rows(run) for name in row_variants(row).values()]
    return list(dict.fromkeys(name for name in wanted if name))


def language_sets(run: Run) -> list[str]:
    """The vector sets among them that the language model of the recipe makes."""
    return [name for name in vector_sets(run) if name not in run.recipe.encode.text_encoders]


def row_variants(row: Row) -> dict[str, str | None]:
    """Trained row -> its vector set.

    Rows of the untrained and the CSFT model come in two variants, unless their name says which.
    """
    if row.vectors not in VARIANTS:
        return {row.name: row.vectors}
    bidirectional, causal = VARIANTS[str(row.vectors)]
    if row.attention:
        return {row.name: causal if row.attention == "causal" else bidirectional}
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


def text_encoder_path(run: Run, name: str) -> str | Path:
    """Where a text encoder of the recipe is loaded from; a publicly named one is fetched first.

    Raises:
        DataError: no mirror of a named text encoder can be reached.
    """
    source = run.recipe.encode.text_encoders[name]
    return sources.fetch_text_encoder(source) if source in sources.TEXT_ENCODERS else source


def dtype_of(run: Run, wanted: str) -> str:
    """The number format that a run trains or encodes in: `auto` is what it measured the first time.

    What goes on after a kill, or comes later on another machine (`add-items`), is thus of one piece with what is
    there. Of several processes all must come here.
    """
    if wanted != AUTO:
        return wanted
    from llm2rec.precision import resolve_dtype

    file = run.folder / DTYPE
    known = _recorded_dtype(file) if processes.is_main() and file.exists() else None
    name = processes.processes().agreed(known) or str(resolve_dtype(AUTO)).removeprefix("torch.")
    if processes.is_main() and known is None:
        artifacts.write_json(file, {AUTO: name})
    return name


def _recorded_dtype(file: Path) -> str:
    content = artifacts.read_json(file)
    name = content.get(AUTO) if isinstance(content, dict) else None
    if name not in ("float32", "bfloat16"):
        raise ArtifactError(f'{file} should say {{"{AUTO}": "bfloat16"}} or "float32"; remove it to measure anew')
    return str(name)


def loggers_of(run: Run) -> Loggers:
    """What is told of the trainings of a run."""
    return Loggers(run.recipe.loggers, run.folder)


def split_of(config: DataConfig, seed: int) -> Split:
    """The split that a recipe asks for."""
    from llm2rec.data.splits import Split

    return Split(**dict(config.split), seed=seed)


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
    from llm2rec.data.sequences import check_leakage, cold_items
    from llm2rec.data.tables import Catalogue, Interactions
    from llm2rec.data.texts import item_texts

    sequences, trainable = load_sequences(domain)
    check_leakage(
        sequences,
        Interactions.read(domain.data / "interactions.parquet"),
        split=split_of(domain.config, run.recipe.seed),
        cold=cold_items(domain.data),
        history_length=domain.config.history_length,
    )
    texts = item_texts(Catalogue.read(domain.data / "catalogue.parquet"), domain.config.text)
    return Loaded(sequences, sequences.item_ids, texts, trainable)


def load_sequences(domain: Domain) -> tuple[Sequences, np.ndarray]:
    """The sequences of a prepared domain as `prepare` checked them, and which of its items (N,) are trainable."""
    from llm2rec.data.sequences import Sequences, cold_items

    artifacts.require(domain.data, "prepare")
    sequences, cold = Sequences.load(domain.data), set(cold_items(domain.data))
    return sequences, np.array([item not in cold for item in sequences.item_ids])


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


def trained_history_length(run: Run) -> int:
    """The history length of the domains that the language model is trained on."""
    return trained_domains(run)[0].config.history_length  # one for all: see Recipe


def of_each(run: Run, inputs: Callable[[Domain], Inputs]) -> Inputs:
    """Inputs of every trained domain; where there are several, under the name of the domain."""
    domains = trained_domains(run)
    if len(domains) == 1:
        return inputs(domains[0])
    weights = {f"{domain.name}.weight": domain.config.weight for domain in domains}
    return weights | {f"{one.name}.{key}": value for one in domains for key, value in inputs(one).items()}


def parent_hash(folder: Path, verb: str) -> str:
    """The fingerprint of a finished stage.

    Raises:
        ArtifactError: it is not finished, or was changed.
    """
    return artifacts.require(folder, verb).fingerprint


def catalogue_hash(domain: Domain) -> str:
    """Hash of the items and their text columns."""
    outputs = artifacts.require(domain.data, "prepare").outputs
    return str(outputs["catalogue.parquet"]["sha256"])


def sequence_inputs(domain: Domain) -> Inputs:
    """Who consumed what; a corrected title leaves it as it is."""
    prepared = artifacts.require(domain.data, "prepare")
    files = {path: file["sha256"] for path, file in prepared.outputs.items() if path != "catalogue.parquet"}
    return {"sequences": artifacts.hash_json(files), "item_ids": prepared.summary["item_ids"]}


def text_inputs(run: Run, domain: Domain) -> Inputs:
    """What items become tokens with; a change of interactions alone leaves it as it is."""
    return {
        "catalogue": catalogue_hash(domain),
        "data.text": domain.config.text,
        "model.dtype": run.recipe.model.dtype,
        "model.max_title_tokens": run.recipe.model.max_title_tokens,
        "seed": run.recipe.seed,
    }


def training_text_inputs(run: Run, domain: Domain) -> Inputs:
    """What a language model reads of a domain in training: the texts of all items but those held out."""
    outputs = artifacts.require(domain.data, "prepare").outputs
    cold = {"cold": outputs["cold.parquet"]["sha256"]} if domain.config.split.cold_items else {}
    return {**text_inputs(run, domain), **cold}


def model_inputs(run: Run) -> Inputs:
    """What the language model is that everything starts from."""
    source = run.recipe.model.source
    own = parent_hash(run.backbone, "csft") if source == TINY_RANDOM else None
    return {"model.source": own or source_hash("model.source", source, sources.MODELS)}


def text_encoder_inputs(run: Run, domain: Domain, name: str) -> Inputs:
    """What determines the vectors of a text encoder."""
    key, source = f"encode.text_encoders.{name}", run.recipe.encode.text_encoders[name]
    if sources.is_of_a_run(source):
        mend = f"run that stage again, or remove {artifacts.MANIFEST}: then it is taken as any SentenceTransformer"
        return {**text_inputs(run, domain), key: artifacts.require(Path(source), "iem", mend).fingerprint}
    if Path(source).is_dir():  # the weights may lie in a folder of it
        encoder = sources.folder_hash(Path(source))
    else:
        encoder = source_hash(key, source, sources.TEXT_ENCODERS)
    return {"catalogue": catalogue_hash(domain), "data.text": domain.config.text, key: encoder}


def source_hash(key: str, source: str, named: Mapping[str, sources.Source]) -> str:
    """What a model is that a recipe names: the registered hash, the content of a file or folder, or a hub id."""
    path = Path(source)
    if source in named:
        return str(named[source].content_hash)
    if path.is_file():
        return artifacts.hash_file_once(path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ArtifactError(f"{key}: {path} holds no model (no config.json)")
        return sources.folder_hash(path)
    return source
