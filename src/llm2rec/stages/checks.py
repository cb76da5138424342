"""What a recipe asks for that its data cannot give: refused before anything is trained."""

from __future__ import annotations

from importlib.util import find_spec

from llm2rec.config import TINY_RANDOM
from llm2rec.data.sequences import cold_items
from llm2rec.data.tables import Catalogue
from llm2rec.data.texts import item_texts
from llm2rec.errors import ConfigError
from llm2rec.rows import LARGEST_EASE, Row
from llm2rec.runs import Domain, Run
from llm2rec.stages.base import language_sets, model_path


def check_prepared(run: Run) -> None:
    """Checks every prepared domain against what later stages will be asked to do.

    Raises:
        ConfigError, DataError: texts or categories of columns that are not there, more sampled negatives than
            items, EASE over too many items, adapters without the package they need, a layer that the language
            model lacks, more principal components than item vectors can have.
    """
    language = (run.recipe.csft, run.recipe.iem.mntp, run.recipe.iem.contrastive)
    if any(stage.lora for stage in language) and find_spec("peft") is None:
        raise ConfigError("LoRA needs the package peft: pip install 'llm2rec[lora]', or leave `lora` out")
    if language_sets(run):
        _check_shape(run)
    for domain in run.domains:
        _check_domain(run, domain)


def _check_shape(run: Run) -> None:
    """`encode.layer` and `recommender.dimensions`, where they are set, against the language model's shape."""
    layer, dimensions = run.recipe.encode.layer, run.recipe.recommender.dimensions
    if layer == -1 and dimensions is None:
        return  # so that an unchanged rerun of most runs need not import transformers
    from llm2rec.lm import backbone as backbones
    from llm2rec.lm import tiny

    if run.recipe.model.source == TINY_RANDOM:
        width, layers = tiny.HIDDEN_SIZE, tiny.LAYERS
    else:
        width, layers = backbones.model_shape(model_path(run))
    if layer > layers:
        raise ConfigError(
            f"encode.layer is {layer}, {run.recipe.model.source} has the layers 0 (embeddings) to {layers}; "
            "choose one of them, or -1 for the last"
        )
    if dimensions is not None and dimensions > width:
        raise ConfigError(
            f"recommender.dimensions is {dimensions:,}, vectors of {run.recipe.model.source} have {width:,}; "
            "take as many or fewer"
        )


def _check_domain(run: Run, domain: Domain) -> None:
    catalogue = Catalogue.read(domain.data / "catalogue.parquet")
    rows = [Row.parse(name) for name in run.recipe.recommender.rows]
    if any(row.vectors for row in rows):
        _check_components(run, domain, len(set(item_texts(catalogue, domain.config.text))))
    if domain.config.categories:
        catalogue.labels(domain.config.categories)
    settings = run.recipe.recommender
    trained = any(row.architecture for row in rows)
    items = len(catalogue) - len(cold_items(domain.data))  # those held out are never drawn
    if trained and settings.loss != "full" and settings.negatives >= items:
        raise ConfigError(
            f"recommender.negatives is {settings.negatives:,}, and {domain.name} has {items:,} items to train on; "
            "take fewer, or recommender.loss=full"
        )
    if "ease" in run.recipe.recommender.rows and len(catalogue) > LARGEST_EASE:
        raise ConfigError(
            f"row ease holds items x items numbers: {len(catalogue):,} items of {domain.name} are more than "
            f"{LARGEST_EASE:,}; leave it out, or filter the items (data.filters.k_core)"
        )


def _check_components(run: Run, domain: Domain, distinct_texts: int) -> None:
    dimensions = run.recipe.recommender.dimensions
    if dimensions is not None and dimensions >= distinct_texts:
        raise ConfigError(
            f"recommender.dimensions is {dimensions:,}, but the {distinct_texts:,} different item texts of "
            f"{domain.name} vary in at most {distinct_texts - 1:,} directions; take fewer"
        )
