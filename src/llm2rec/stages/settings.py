"""What the results of a run were made with, as its manifests record it, against what its recipe says now."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm2rec import artifacts
from llm2rec.artifacts import Inputs
from llm2rec.config import TINY_RANDOM, DataConfig
from llm2rec.data import sources
from llm2rec.errors import ArtifactError
from llm2rec.runs import Domain, Run
from llm2rec.stages.base import averaged_rows, row_variants, trained_domains, trained_rows, vector_sets
from llm2rec.stages.recommenders import settings_of, unread_by

Settings = dict[str, Any]  # a recipe as nested mappings

_NAMED = {**sources.MODELS, **sources.TEXT_ENCODERS}
_HASHES = {str(source.content_hash) for source in _NAMED.values()}
_HASH = re.compile(r"[0-9a-f]{64}")
_UNKNOWN = object()


def require_settings(run: Run, domain: Domain) -> None:
    """Raises ArtifactError where a result of a domain was made with another setting than the recipe now has.

    Only manifests are read, so that neither raw data nor models need be there. What a recipe names by its place
    (data, a model in a folder, a CSFT to go on from) is not compared, nor what an older version did not record.
    """
    for folder, recorded, recipe in _made_with(run, domain):
        for key, value in recorded.items():
            now = _now(recipe, key)
            if now is not _UNKNOWN and _differ(run, value, now):
                stage = folder.relative_to(run.folder)
                raise ArtifactError(
                    f"{run.folder}: {stage} was made with {key} {_shown(value)}, the recipe now says "
                    f"{_shown(now)}; run the stages from there on again, or set it back"
                )


def _made_with(run: Run, domain: Domain) -> Iterator[tuple[Path, Inputs, Settings]]:
    """Each finished stage behind the results: its folder, the settings it records, the recipe as it reads it."""
    ours, trained = _recipe(run, domain.config), _recipe(run, trained_domains(run)[0].config)
    yield domain.data, _recorded(domain.data), ours
    for folder in _encoded_and_trained(run, domain):
        yield folder, _recorded(folder) | _left_out(run, folder), trained if folder.parent == run.folder else ours
    for seed in range(run.recipe.recommender.seeds):
        for row in trained_rows(run):
            settings = settings_of(run.recipe.recommender, row.name)
            recipe = ours | {"recommender": settings.model_dump(mode="json")}
            for name, vectors in row_variants(row).items():
                folder = domain.recommender(name, seed)
                yield folder, _of_training(folder, vectors, unread_by(row, settings)), recipe
        for row in averaged_rows(run):
            yield domain.recommender(row.name, seed), _recorded(domain.recommender(row.name, seed)), ours
    yield domain.evaluation, _recorded(domain.evaluation) | _seeds(domain.evaluation), ours


def _recipe(run: Run, data: DataConfig) -> Settings:
    """The recipe with one of its logs as `data`; under each log's name what stages over several logs read."""
    whole = run.recipe.model_dump(mode="json")
    logs = {
        name: whole | {"data": config.model_dump(mode="json"), "weight": config.weight}
        for name, config in run.recipe.by_domain.items()
    }
    return logs | whole | {"data": data.model_dump(mode="json")}


def _inputs(folder: Path) -> Inputs:
    manifest = artifacts.read_manifest(folder)
    return {} if manifest is None else manifest.inputs


def _recorded(folder: Path) -> Inputs:
    """The settings among the inputs of a finished stage; the others are contents of files and parents."""
    return {key: value for key, value in _inputs(folder).items() if "." in key or key == "seed"}


def _encoded_and_trained(run: Run, domain: Domain) -> list[Path]:
    """The vector sets that the recipe asks for and the language stages that they were made by."""
    language = {folder.name: folder for folder in (run.csft, run.mntp, run.iem)}
    folders = [domain.embeddings(name) for name in vector_sets(run)]
    for folder in folders:  # which grows
        parents = [language[key] for key in _inputs(folder) if key in language]
        folders += [parent for parent in parents if parent not in folders]
    return folders


def _left_out(run: Run, folder: Path) -> Inputs:
    """The budgets of 0 that a part of IEM shows by what it started from."""
    inputs = _inputs(folder)
    if folder not in (run.mntp, run.iem) or not inputs:
        return {}
    without_mntp = {"iem.mntp.steps": 0} if folder == run.iem and "mntp" not in inputs else {}
    return without_mntp | ({} if {"mntp", "csft"} & inputs.keys() else {"csft.max_tokens": 0})


def _of_training(folder: Path, vectors: str | None, unread: frozenset[str]) -> Inputs:
    """The settings that a recommender's training read; its seed is its own, and no smoothing is not recorded."""
    recorded = {key: value for key, value in _recorded(folder).items() if key not in unread | {"seed"}}
    return {"recommender.smoothing": 0.0, **recorded} if recorded and vectors else recorded


def _seeds(evaluation: Path) -> Inputs:
    """How many trainings of each row were evaluated; nothing where none was trained."""
    trainings = [key for key in _inputs(evaluation) if key.startswith("recommender ")]
    seeds = {key.rpartition("/")[2] for key in trainings}
    return {"recommender.seeds": len(seeds)} if seeds else {}


def _now(recipe: Settings, key: str) -> Any:
    """What a recipe says under a dotted key: None in a part that is left out, _UNKNOWN of no such key."""
    value: Any = recipe
    for name in key.split("."):
        if not isinstance(value, Mapping):
            return value
        if name not in value:
            return _UNKNOWN
        value = value[name]
    return value


def _differ(run: Run, recorded: Any, now: Any) -> bool:
    """Whether a setting changed; models are recorded as hashes, but for those of the hub."""
    if not (isinstance(recorded, str) and _HASH.fullmatch(recorded)):
        return bool(recorded != now)
    if now in _NAMED:
        return recorded != str(_NAMED[now].content_hash)
    if now == TINY_RANDOM:
        made = artifacts.read_manifest(run.backbone)
        return recorded in _HASHES if made is None else recorded != made.fingerprint
    return now is None or not (Path(now).exists() or sources.looks_like_a_path(now))


def _shown(value: Any) -> str:
    return "another model" if isinstance(value, str) and _HASH.fullmatch(value) else repr(value)
