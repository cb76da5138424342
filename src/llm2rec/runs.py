"""A run folder: its recipe, where each artifact lies, its log. Reads and writes JSON only."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from platform import platform, python_version
from typing import Any

from llm2rec import artifacts
from llm2rec.config import DomainConfig, Recipe
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.loading import load_recipe, parse_recipe, recipe_path
from llm2rec.version import __version__

ORIGIN = ("overrides", "recipe_folder", "overrides_folder", "recipe_sha256")  # in RESOLVED
RECIPE, RESOLVED, LOG, LOCK = "recipe.yaml", "resolved.json", "log.jsonl", ".lock"
VERSIONED = ("torch", "transformers", "sentence-transformers", "accelerate", "polars", "numpy")


@dataclass(frozen=True)
class Domain:
    """One log of a run: where its data, vectors, recommenders and evaluation lie."""

    folder: Path
    name: str
    config: DomainConfig
    alone: bool

    @property
    def data(self) -> Path:
        """Stage `prepare`: canonical tables and sequences."""
        return self.folder / "data" / self.name

    def embeddings(self, name: str) -> Path:
        """Stage `encode`: one vector set of the catalogue."""
        return self.folder / "embeddings" / self.name / name

    def recommender(self, row: str, seed: int) -> Path:
        """Stage `fit`: one training of one row."""
        return self.folder / "recommender" / self.name / row / f"seed-{seed}"

    @property
    def evaluation(self) -> Path:
        """Stage `evaluate`: metrics, per-user ranks and the report."""
        return self.folder / "evaluation" / ("" if self.alone else self.name)

    @property
    def added(self) -> Path:
        """Items added after the training, with their vectors (`add_items`)."""
        return self.folder / "added" / self.name


@dataclass(frozen=True)
class Run:
    """A recipe in a folder. The paths are where stages write and everything else reads.

    origin: where the recipe was read from, which `resolved.json` records beside its values.
    """

    folder: Path
    recipe: Recipe
    origin: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def domains(self) -> list[Domain]:
        """The logs of the run, in the order of the recipe."""
        configs = self.recipe.by_domain
        return [Domain(self.folder, name, config, len(configs) == 1) for name, config in configs.items()]

    def domain(self, name: str | None = None) -> Domain:
        """A log by its name; without a name the only one.

        Raises:
            ConfigError: no such domain, or no name where there are several.
        """
        if name is None and len(self.domains) == 1:
            return self.domains[0]
        for domain in self.domains:
            if domain.name == name:
                return domain
        known = ", ".join(domain.name for domain in self.domains)
        got = "has several domains (--domain); name one" if name is None else f"has no domain {name!r}"
        raise ConfigError(f"{self.folder} {got}: {known}")

    @property
    def data(self) -> Path:
        """`Domain.data` of the only domain."""
        return self.domain().data

    def embeddings(self, name: str) -> Path:
        """`Domain.embeddings` of the only domain."""
        return self.domain().embeddings(name)

    def recommender(self, row: str, seed: int) -> Path:
        """`Domain.recommender` of the only domain."""
        return self.domain().recommender(row, seed)

    @property
    def evaluation(self) -> Path:
        """`Domain.evaluation` of the only domain."""
        return self.domain().evaluation

    @property
    def backbone(self) -> Path:
        """The random decoder of `model.source: tiny-random`."""
        return self.folder / "backbone"

    @property
    def csft(self) -> Path:
        """Stage `csft`: the collaborative language model."""
        return self.folder / "csft"

    @property
    def mntp(self) -> Path:
        """First half of stage `iem`: the bidirectional model after MNTP."""
        return self.folder / "mntp"

    @property
    def iem(self) -> Path:
        """Second half of stage `iem`: the item encoder, a SentenceTransformer folder."""
        return self.folder / "iem"

    def log(self, **entry: Any) -> None:
        """Appends one line to `log.jsonl`."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **entry}, ensure_ascii=False)
        with (self.folder / LOG).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def unfinished(self) -> str | None:
        """What to say where a stage was begun and not ended, so that what depends on it is from before that."""
        begun = self.begun()
        if not begun:
            return None
        stage = begun[0].relative_to(self.folder)
        return (
            f"{self.folder}: {stage} was begun and not finished, so the results are not of its present recipe; "
            "if no process works on it, give the command that was interrupted again (without --fresh)"
        )

    def begun(self) -> list[Path]:
        """Folders of stages that were begun and not ended; those of a run within this one's folder are its own."""
        found = []
        for folder, inner, files in os.walk(self.folder):
            of_another = folder != str(self.folder) and RESOLVED in files
            inner[:] = [] if of_another else sorted(name for name in inner if name != artifacts.SUPERSEDED)
            if artifacts.STARTED in files and not of_another:
                found.append(Path(folder))
        return sorted(found)

    def metrics(self, domain: str | None = None) -> dict[str, Any]:
        """The content of `metrics.json` of a domain, of the only one without a name.

        Raises:
            ArtifactError: the run is not evaluated.
            ConfigError: see `domain`.
        """
        folder = self.domain(domain).evaluation
        artifacts.require(folder, "evaluate")
        return dict(artifacts.read_json(folder / "metrics.json"))


def open_run(folder: str | Path) -> Run:
    """The run in `folder`: from `resolved.json`, or from a `recipe.yaml` that was edited or lies there alone.

    Nothing is written: another process may be working there.

    Raises:
        ArtifactError: there is no run.
        ConfigError: its recipe does not fit this version.
    """
    folder = Path(folder)
    if (folder / RESOLVED).exists():
        resolved = _read_resolved(folder)
        if (folder / RECIPE).exists() and artifacts.hash_file(folder / RECIPE) != resolved.get("recipe_sha256"):
            base, here = (Path(resolved.get(name, folder)) for name in ("recipe_folder", "overrides_folder"))
            return _read_run(folder, folder / RECIPE, resolved["overrides"], base, here)
        origin = {name: resolved[name] for name in ORIGIN if name in resolved}
        return Run(folder, parse_recipe(resolved["recipe"], str(folder / RESOLVED)), origin)
    if (folder / RECIPE).exists():
        if (folder / LOG).exists():  # a run: its recipe alone does not say what --set changed
            raise ArtifactError(
                f"{folder / RESOLVED} is missing, so what --set changed is not known; give `llm2rec run RECIPE "
                f"--out {folder}` again with the same --set: finished stages are kept"
            )
        return _read_run(folder, folder / RECIPE, (), folder.resolve(), Path.cwd())
    raise ArtifactError(
        f"{folder} is not a run folder (no {RESOLVED}, no {RECIPE}); start one with "
        f"`llm2rec run RECIPE --out {folder}`, or put a {RECIPE} there"
    )


def create_run(recipe: str | Path, folder: Path, overrides: tuple[str, ...] = ()) -> Run:
    """The run of a recipe in `folder`, with `recipe.yaml` as given and `resolved.json` written.

    Raises:
        ArtifactError: the folder holds something that is not a run.
        ConfigError: the recipe is not valid.
    """
    source = recipe_path(recipe)
    run = _read_run(folder, source, overrides, source.parent.resolve(), Path.cwd())
    refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if source.resolve() != (folder / RECIPE).resolve():
        shutil.copyfile(source, folder / RECIPE)
    write_resolved(run)
    return run


def refuse_foreign(folder: Path) -> None:
    """Raises ArtifactError where `folder` exists and holds something that is not a run."""
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; --out takes a folder")
    if not folder.exists() or (folder / RESOLVED).exists() or (folder / RECIPE).exists():
        return
    strangers = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if strangers:
        raise ArtifactError(
            f"{folder} is not empty and not a run folder (it holds {strangers[0]!r}); choose another --out"
        )


def _read_run(folder: Path, recipe: Path, overrides: Sequence[str], base: Path, here: Path) -> Run:
    """The run in `folder` of a recipe file; its paths start from `base`, those of the overrides from `here`."""
    origin = {
        "overrides": list(overrides),
        "recipe_folder": str(base),
        "overrides_folder": str(here),
        "recipe_sha256": artifacts.hash_file(recipe),
    }
    return Run(folder, load_recipe(recipe, list(overrides), base, here), origin)


def write_resolved(run: Run) -> None:
    """Writes every value of the recipe, its origin, the versions, and the fingerprints of the finished stages.

    A recipe that was edited since it was read does not match its origin, so that the next `open_run` heeds it.
    """
    content = {
        "recipe": run.recipe.model_dump(mode="json"),
        **run.origin,
        "seed": run.recipe.seed,
        "versions": {"llm2rec": __version__, "python": python_version(), "platform": platform()}
        | {name: metadata.version(name) for name in VERSIONED},
        "stages": _fingerprints(run.folder),
    }
    artifacts.write_json(run.folder / RESOLVED, content)


def _read_resolved(folder: Path) -> dict[str, Any]:
    content = artifacts.read_json(folder / RESOLVED)
    known = isinstance(content, dict) and "recipe" in content and isinstance(content.get("overrides"), list)
    if not known or not all(
        isinstance(text, str) for text in [*content["overrides"], content.get("recipe_folder", "")]
    ):
        raise ArtifactError(f"{folder / RESOLVED} is damaged; `llm2rec run RECIPE --out {folder}` writes it anew")
    return content


def _fingerprints(folder: Path) -> dict[str, str]:
    """Stage folder -> fingerprint of every finished stage; a damaged manifest counts as unfinished."""
    found = {}
    for path in sorted(folder.rglob(artifacts.MANIFEST)):
        if not {artifacts.SUPERSEDED, artifacts.SCRATCH} & set(path.relative_to(folder).parts):
            with suppress(ArtifactError):
                manifest = artifacts.read_manifest(path.parent)
                if manifest is not None:
                    found[str(path.parent.relative_to(folder))] = manifest.fingerprint
    return found


def require_row(run: Run, row: str) -> None:
    """Raises ConfigError where the run has no such row."""
    rows = run.recipe.recommender.rows
    if row not in rows:
        raise ConfigError(f"this run has no row {row!r}; its rows (--row): {', '.join(rows)}")
