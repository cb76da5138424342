"""Recipes: one frozen pydantic class a stage, sparse YAML in, every value resolved.

Configuration never enters a module: stage functions unpack these classes into plain arguments.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llm2rec.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"
FLOORS = ("popularity", "markov")
ARCHITECTURES = ("sasrec",)
VECTORS = ("id", "backbone", "csft", "mntp", "llm2rec")
CSFT_BUDGETS = {"max_tokens", "epochs"}
ROWS = FLOORS + tuple(f"{architecture}-{vectors}" for architecture in ARCHITECTURES for vectors in VECTORS)

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class DataConfig(Section):
    """Where the interactions come from and how they are split."""

    source: str | None = Field(None, description="a named public data set (`llm2rec data list`)")
    interactions: Path | None = Field(None, description="table with user_id, item_id, timestamp")
    items: Path | None = Field(None, description="table with item_id, title and further text columns")
    history_length: Annotated[int, Field(gt=0, le=1000)] = Field(
        10, description="items that one prediction looks at (paper: 10)"
    )
    holdout: Positive = Field(1, description="last events a user held out as test; as many before: validation")
    short_histories: Literal["error", "drop"] = Field(
        "error", description="users with fewer than 2 * holdout + 1 events: refuse the log, or drop them"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> DataConfig:
        if self.source and (self.interactions or self.items):
            raise ValueError("give either `source` or `interactions` and `items`, not both")
        if not self.source and not (self.interactions and self.items):
            raise ValueError("give `source`, or both `interactions` and `items`")
        return self


class ModelConfig(Section):
    """The language model that everything starts from."""

    source: str = Field(
        ..., description="a named model (`llm2rec models list`), hub id, folder, GGUF file or tiny-random"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="weights and arithmetic; auto takes the faster matrix product of this machine"
    )
    max_title_tokens: Positive = Field(64, description="longer titles are truncated")


class OptimizerConfig(Section):
    """What every language stage sets for its optimizer (AdamW)."""

    learning_rate: Rate = Field(1e-4, description="peak learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_share: Share = Field(0.1, description="share of the steps with linearly rising learning rate")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: Rate = 1.0


class CsftConfig(OptimizerConfig):
    """Collaborative supervised fine-tuning (paper section 3.2)."""

    learning_rate: Rate = 2e-4
    max_tokens: Positive | None = Field(None, description="budget in tokens; give this or epochs")
    epochs: Rate | None = Field(None, description="budget in passes over the training windows")
    batch_tokens: Positive = Field(4096, description="tokens of one optimizer step")
    micro_batch_tokens: Positive = Field(2048, description="tokens in one forward pass; bounds the memory")
    checkpoints: Count = Field(4, description="checkpoints in the course of the stage (0: none)")

    @model_validator(mode="after")
    def _one_budget(self) -> CsftConfig:
        if (self.max_tokens is None) == (self.epochs is None):
            raise ValueError("give exactly one of `max_tokens` and `epochs`")
        return self


class MntpConfig(OptimizerConfig):
    """Masked next-token prediction on titles (paper section 3.3)."""

    steps: Count = Field(..., description="optimizer steps; 0 leaves the stage out")
    batch_size: Positive = Field(32, description="titles a step (paper: 32)")
    mask_share: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="masked title tokens (paper: 0.2)")
    checkpoints: Count = Field(4, description="checkpoints in the course of the stage (0: none)")


class ContrastiveConfig(OptimizerConfig):
    """Contrastive learning on two dropout views of each title (paper section 3.3)."""

    learning_rate: Rate = 5e-5
    steps: Count = Field(..., description="most optimizer steps; 0 leaves the stage out")
    batch_size: Annotated[int, Field(ge=2)] = Field(256, description="titles a step (paper: 256)")
    temperature: Rate = Field(0.1, description="divides the cosine (paper: 0.2, authors' code: 0.1)")
    micro_batch_tokens: Positive = Field(2048, description="tokens in one forward pass; bounds the memory")
    dropout: Share = Field(0.2, description="attention dropout that makes the two views (paper: 0.2)")
    evaluations: Positive = Field(8, description="validations in the course of the stage")
    patience: Positive = Field(3, description="validations without a gain before the stage stops")


class IemConfig(Section):
    """Item-level embedding modelling: MNTP, then contrastive learning."""

    mntp: MntpConfig
    contrastive: ContrastiveConfig


class EncodeConfig(Section):
    """Turning titles into vectors."""

    batch_tokens: Positive = Field(8192, description="tokens in one forward pass")


class RecommenderConfig(Section):
    """The sequential recommender (paper section 4.1: 2 layers, 2 heads, 128 wide, dropout 0.3)."""

    rows: tuple[str, ...] = (
        "popularity",
        "markov",
        "sasrec-id",
        "sasrec-backbone",
        "sasrec-csft",
        "sasrec-llm2rec",
    )
    seeds: Positive = Field(1, description="trainings of each row, with seeds 0, 1, ...")
    max_epochs: Positive = 100
    patience: Positive = Field(10, description="epochs without a gain in validation NDCG@10 before stopping")
    batch_size: Positive = Field(128, description="windows a step; each supervises up to history_length items")
    learning_rate: Rate = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    hidden_size: Positive = 128
    layers: Positive = 2
    heads: Positive = 2
    dropout: Share = 0.3

    @model_validator(mode="after")
    def _known_rows(self) -> RecommenderConfig:
        unknown = [row for row in self.rows if row not in ROWS]
        if unknown:
            raise ValueError(f"unknown row {unknown[0]!r}; known rows: {', '.join(ROWS)}")
        if len(set(self.rows)) != len(self.rows) or not self.rows:
            raise ValueError("`rows` must name at least one row, each once")
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        return self


class EvaluationConfig(Section):
    """Full ranking on the test events."""

    k: tuple[Positive, ...] = Field((5, 10, 20), min_length=1, description="cut-offs of recall and NDCG")
    reference: str = Field("sasrec-backbone", description="row that every other row is tested against")
    bootstrap_samples: Positive = 10_000


class Recipe(Section):
    """A whole run."""

    seed: Count = Field(0, description="of the language stages; each stage derives its own generator from it")
    data: DataConfig
    model: ModelConfig
    csft: CsftConfig
    iem: IemConfig
    encode: EncodeConfig = EncodeConfig()
    recommender: RecommenderConfig = RecommenderConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _known_reference(self) -> Recipe:
        reference, default = self.evaluation.reference, EvaluationConfig.model_fields["reference"].default
        if reference not in (*self.recommender.rows, default):
            raise ValueError(
                f"evaluation.reference {reference!r} is not a row of the run: {', '.join(self.recommender.rows)}"
            )
        return self


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str | Path) -> Path:
    """The file behind a shipped name or a path.

    Raises:
        ConfigError: there is neither.
    """
    shipped = RECIPES / f"{recipe}.yaml"
    if shipped.is_file():
        return shipped
    path = Path(recipe)
    if path.is_file():
        return path
    raise ConfigError(f"recipe {str(recipe)!r} is neither a file nor one of: {', '.join(recipe_names())}")


def load_recipe(recipe: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """The validated recipe of a shipped name or a path, with `KEY=VALUE` overrides applied.

    Paths inside a recipe file are relative to its folder, paths in overrides to the working directory;
    environment variables (`${NAME}`) are filled in.

    Raises:
        ConfigError: unknown recipe, key or row; a value of the wrong type; an undefined variable.
    """
    path = recipe_path(recipe)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    _anchor_paths(content, path.parent)
    for override in overrides:
        apply_override(content, override)
    return parse_recipe(content, str(path))


def parse_recipe(content: dict[str, Any], origin: str) -> Recipe:
    """Validates a nested mapping; `origin` names it in the error.

    Raises:
        ConfigError: naming each offending key, the value got and what is allowed.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError(f"{origin}:\n  " + "\n  ".join(lines)) from error


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"{key}: no such key; allowed here: {', '.join(_siblings(problem['loc']))}"
    if problem["type"] == "missing":
        return f"{key}: required, but missing"
    message = problem["msg"].removeprefix("Value error, ")
    return (
        f"{key}: {message} (got {problem['input']!r})"
        if problem["type"] != "value_error"
        else (f"{key}: {message}")
    )


def _siblings(location: tuple[Any, ...]) -> list[str]:
    section: Any = Recipe
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def apply_override(content: dict[str, Any], override: str) -> None:
    """Sets one `dotted.key=value` in a nested mapping; the value is read as YAML.

    Raises:
        ConfigError: no `=`, or the key goes through something that is not a section.
    """
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set takes KEY=VALUE, for example csft.max_tokens=140000; got {override!r}")
    section = content
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {part!r} is a value, not a section")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML ({error})") from error
    section[parts[-1]] = _number(parsed)
    if parts[0] == "csft" and parts[-1] in CSFT_BUDGETS:  # one budget replaces the other
        for other in CSFT_BUDGETS - {parts[-1]}:
            section.pop(other, None)
    if parts[0] == "data" and parts[-1] in ("interactions", "items"):
        section[parts[-1]] = _expand(str(parsed), Path.cwd())
        section.pop("source", None)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _anchor_paths(content: dict[str, Any], base: Path) -> None:
    _convert_numbers(content)
    data = content.get("data")
    if isinstance(data, dict):
        for key in ("interactions", "items"):
            if isinstance(data.get(key), str):
                data[key] = _expand(data[key], base)


def _convert_numbers(section: dict[str, Any]) -> None:
    for key, value in section.items():
        if isinstance(value, dict):
            _convert_numbers(value)
        elif key not in ("source", "interactions", "items"):
            section[key] = _number(value)


def _expand(text: str, base: Path) -> str:
    expanded = os.path.expandvars(os.path.expanduser(text))
    if "$" in expanded:
        raise ConfigError(f"{text}: the environment variable is not set; set it to the folder of your data")
    return str((base / expanded).resolve())
