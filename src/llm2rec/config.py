"""Recipes: one frozen pydantic class a stage, sparse YAML in, every value resolved.

Configuration never enters a module: stage functions unpack these classes into plain arguments.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llm2rec.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"
FLOORS = ("popularity", "markov", "item-knn", "ease")
ARCHITECTURES = ("sasrec", "gru4rec", "esasrec")
CONTEXT = "sasrec-context"
VECTORS = ("id", "backbone", "csft", "mntp", "llm2rec")
FUSIONS = ("sum", "concatenation", "delta", "average")
ROW_NAMES = (
    f"{', '.join(FLOORS)}, {CONTEXT}, or ARCHITECTURE-VECTORS of {', '.join(ARCHITECTURES)} and "
    f"{', '.join(VECTORS)}, with learned ids beside text as +{', +'.join(FUSIONS)} (sasrec-llm2rec+sum)"
)
CSFT_BUDGETS = {"max_tokens", "epochs"}

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
DomainName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
DOMAIN = "main"  # the only domain of a recipe that names none
ORIGINS = ("source", "folder", "interactions", "items")


@dataclass(frozen=True)
class Row:
    """A row name taken apart: `sasrec-llm2rec+sum` -> sasrec over llm2rec vectors, summed with learned ids.

    Attributes:
        architecture: None for floors.
        vectors: vector set, None for floors and learned ids.
        fusion: how learned ids stand beside the vectors, None where they do not.
    """

    name: str
    architecture: str | None = None
    vectors: str | None = None
    fusion: str | None = None

    @classmethod
    def parse(cls, name: str) -> Row:
        """The parts of a row name.

        Raises:
            ConfigError: there is no such row.
        """
        if name in FLOORS:
            return cls(name)
        if name == CONTEXT:
            return cls(name, CONTEXT)
        stem, plus, fusion = name.partition("+")
        architecture, _, vectors = stem.partition("-")
        known = architecture in ARCHITECTURES and vectors in VECTORS
        if not known or (plus and (fusion not in FUSIONS or vectors == "id")):
            raise ConfigError(f"unknown row {name!r}; rows are {ROW_NAMES}")
        return cls(name, architecture, None if vectors == "id" else vectors, fusion or None)

    @property
    def parents(self) -> tuple[str, ...]:
        """The rows that an averaged row is made of; a trained row has none."""
        if self.fusion != "average":
            return ()
        return f"{self.architecture}-id", f"{self.architecture}-{self.vectors}"


class Section(BaseModel):
    """A part of a recipe: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ColumnsConfig(Section):
    """What the columns of your own tables are called; None: as we call them."""

    user: str | None = Field(None, description="user_id of the interactions")
    item: str | None = Field(None, description="item_id of the interactions, and of the items unless `items_item`")
    time: str | None = Field(None, description="timestamp of the interactions")
    rating: str | None = Field(None, description="rating of the interactions, for `filters.min_rating`")
    part: str | None = Field(None, description="part of the interactions, for `split.by: given`")
    items_item: str | None = Field(None, description="item_id of the items, where the two tables differ")
    title: str | None = Field(None, description="title of the items")

    def of_interactions(self) -> dict[str, str]:
        """Our name -> theirs, for the columns of the interactions that are mapped."""
        named = {"user_id": self.user, "item_id": self.item, "timestamp": self.time}
        named |= {"rating": self.rating, "part": self.part}
        return {ours: theirs for ours, theirs in named.items() if theirs}

    def of_items(self) -> dict[str, str]:
        """Our name -> theirs, for the columns of the items that are mapped."""
        named = {"item_id": self.items_item or self.item, "title": self.title}
        return {ours: theirs for ours, theirs in named.items() if theirs}


class FiltersConfig(Section):
    """Which events are kept; every loss is counted and reported by reason."""

    min_rating: float | None = Field(None, description="events rated lower are left out")
    users: Annotated[int, Field(ge=2)] | None = Field(None, description="a sample of so many users, by their hash")
    repeats: Literal["keep", "drop-consecutive", "keep-first"] = Field(
        "keep", description="events of an item that the user consumed before"
    )
    k_core: Positive = Field(1, description="every user and every item has at least so many events")
    min_events: Positive = Field(1, description="users with fewer events are left out")
    max_events: Positive | None = Field(None, description="users with more events (robots) are left out")


class SplitConfig(Section):
    """Which events are held out."""

    by: Literal["last", "time", "users", "given"] = Field(
        "last",
        description="last: each user's last events; time: everything from a moment on; users: a share of the "
        "users is never trained on; given: the column `part`",
    )
    holdout: Positive = Field(1, description="last events held out as test, under `last` as many for validation")
    ratio: tuple[Rate, Rate, Rate] = Field(
        (0.8, 0.1, 0.1), description="training, validation, test: of the events (time) or the users (users)"
    )
    dates: tuple[str, str] | None = Field(
        None, description="under `time`, instead of the ratio: first moment of validation and of test, ISO 8601"
    )
    cold_items: Share = Field(0.0, description="share of the items that appear as test targets only")

    @model_validator(mode="after")
    def _whole(self) -> SplitConfig:
        if abs(sum(self.ratio) - 1) > 1e-6:
            raise ValueError(f"`ratio` must add up to 1, got {list(self.ratio)}")
        if self.dates and self.by != "time":
            raise ValueError(f"`dates` belong to `by: time`, not to {self.by!r}")
        return self


class DataConfig(Section):
    """Where the interactions come from, which are kept, and how they are split."""

    source: str | None = Field(None, description="a named public data set (`llm2rec data list`)")
    folder: Path | None = Field(None, description="a folder in a published layout")
    layout: str = Field("auto", description="which layout `folder` is in; auto looks at its files")
    interactions: Path | None = Field(None, description="table with user_id, item_id, timestamp: file or folder")
    items: Path | None = Field(None, description="table with item_id, title and further text columns")
    columns: ColumnsConfig = ColumnsConfig()
    text: str = Field("{title}", description="the text of an item: columns of the items table in braces")
    filters: FiltersConfig = FiltersConfig()
    split: SplitConfig = SplitConfig()
    categories: str | None = Field(
        None,
        description="column of the items, joined by '|' or ','; for sasrec-context and reports",
    )
    history_length: Annotated[int, Field(gt=0, le=1000)] = Field(
        10, description="items that one prediction looks at (paper: 10)"
    )
    short_histories: Literal["error", "drop"] = Field(
        "error", description="users with too few events for the split: refuse the log, or drop them"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> DataConfig:
        given = [bool(self.source), bool(self.folder), bool(self.interactions or self.items)]
        if sum(given) > 1:
            raise ValueError("give only one of `source`, `folder`, and `interactions` with `items`")
        if not any(given) or (given[2] and not (self.interactions and self.items)):
            raise ValueError("give `source`, or `folder`, or both `interactions` and `items`")
        return self


class DomainConfig(DataConfig):
    """One of several logs that share the language model; each has its own recommender and evaluation."""

    weight: Rate = Field(1.0, description="how often it is trained on, relative to the others")
    role: Literal["in", "out"] = Field("in", description="out: none of its titles enters CSFT or IEM")


class ModelConfig(Section):
    """The language model that everything starts from."""

    source: str = Field(
        ..., description="a named model (`llm2rec models list`), hub id, folder, GGUF file or tiny-random"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="weights and arithmetic; auto takes the faster matrix product of this machine"
    )
    max_title_tokens: Annotated[int, Field(ge=2)] = Field(64, description="longer titles are truncated")


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
        if self.max_tokens is not None and self.max_tokens < self.batch_tokens:
            raise ValueError(
                f"max_tokens {self.max_tokens:,} is less than one step of batch_tokens {self.batch_tokens:,}; "
                "raise the one or lower the other"
            )
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
    loss: Literal["full", "sampled_softmax", "gbce"] = Field("full", description="of the next item")
    targets: Literal["all", "last"] = Field("all", description="positions of a window that are supervised")
    negatives: Positive = Field(256, description="sampled items a step; the full softmax samples none")
    sampling: Literal["uniform", "popularity"] = "uniform"
    calibration: Annotated[float, Field(ge=0, le=1)] = Field(0.75, description="of gBCE, its t")
    hidden_size: Positive = 128
    layers: Positive = 2
    heads: Positive = 2
    dropout: Share = 0.3
    adapter: Literal["linear", "mlp"] = Field("linear", description="from item vectors to hidden_size")
    whitening: Literal["none", "half", "full"] = Field(
        "none", description="of item vectors, beyond centring and scaling each dimension"
    )
    dimensions: Positive | None = Field(None, description="principal components kept of item vectors; null: all")
    delta_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="how far +delta may move an item vector, in its own length"
    )
    temperature: Rate | None = Field(None, description="cosine over temperature; null: dot product")

    @model_validator(mode="after")
    def _known_rows(self) -> RecommenderConfig:
        if len(set(self.rows)) != len(self.rows) or not self.rows:
            raise ValueError("`rows` must name at least one row, each once")
        for name in self.rows:
            try:
                row = Row.parse(name)
            except ConfigError as error:
                raise ValueError(str(error)) from error
            missing = [parent for parent in row.parents if parent not in self.rows]
            if missing:
                raise ValueError(f"row {name!r} averages {' and '.join(row.parents)}; name {missing[0]!r} as well")
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        if self.loss == "gbce" and self.sampling != "uniform":
            raise ValueError("gbce corrects for uniform negatives; set sampling: uniform, or another loss")
        return self


class EvaluationConfig(Section):
    """Full ranking on the test events."""

    k: tuple[Positive, ...] = Field((5, 10, 20), min_length=1, description="cut-offs of recall and NDCG")
    reference: str = Field("sasrec-backbone", description="row that every other row is tested against")
    bootstrap_samples: Positive = 10_000
    mask_history: bool = Field(False, description="hide what the user consumed before from the ranking")

    @model_validator(mode="after")
    def _distinct_cutoffs(self) -> EvaluationConfig:
        if len(set(self.k)) != len(self.k):
            raise ValueError(f"`k` names a cut-off twice: {list(self.k)}")
        return self


class Recipe(Section):
    """A whole run."""

    seed: Count = Field(0, description="of the language stages; each stage derives its own generator from it")
    data: DataConfig | None = Field(None, description="the log; this, or several `domains`")
    domains: dict[DomainName, DomainConfig] | None = None
    model: ModelConfig
    csft: CsftConfig
    iem: IemConfig
    encode: EncodeConfig = EncodeConfig()
    recommender: RecommenderConfig = RecommenderConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def by_domain(self) -> dict[str, DomainConfig]:
        """The domains by name; the log of a recipe that names none is `main`."""
        if self.domains is not None:
            return self.domains
        assert self.data is not None
        return {DOMAIN: DomainConfig(**dict(self.data))}

    @model_validator(mode="after")
    def _some_data(self) -> Recipe:
        if (self.data is None) == (self.domains is None):
            raise ValueError("give either `data` or `domains`")
        if self.domains is not None and not any(domain.role == "in" for domain in self.domains.values()):
            raise ValueError("no domain has `role: in`: there is nothing to train the language model on")
        lengths = {one.history_length for one in self.by_domain.values() if one.role == "in"}
        if len(lengths) > 1:
            raise ValueError(f"domains that are trained together need one history_length, got {sorted(lengths)}")
        return self

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
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping with the keys {', '.join(Recipe.model_fields)}")
    _anchor_paths(content, path.parent)
    for override in overrides:
        apply_override(content, override)
    return parse_recipe(content, str(path))


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML whose mappings name no key twice: the first value would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key.value!r} stands twice; keep one")
        return super().construct_mapping(node, deep)


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
    if problem["type"] == "model_type":
        return f"{key}: a section with keys of its own (got {problem['input']!r})"
    if problem["type"] == "tuple_type":
        return f"{key}: a list, for example [{problem['input']}] (got {problem['input']!r})"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{key}: {message}" + ("" if problem["type"] == "value_error" else f" (got {problem['input']!r})")


def _siblings(location: tuple[Any, ...]) -> list[str]:
    section: Any = Recipe
    for part in location[:-1]:
        field = section.model_fields.get(part)
        if part == "domains" or field is None:  # `domains`, then the name of one
            section = DomainConfig
        else:
            classes = get_args(field.annotation) or (field.annotation,)
            section = next(one for one in classes if isinstance(one, type) and issubclass(one, Section))
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
    if parts[0] in ("data", "domains") and parts[-1] in ORIGINS:
        _replace_origin(section, parts[-1], parsed)


def _replace_origin(section: dict[str, Any], key: str, value: Any) -> None:
    """Another origin of the data takes the place of the one that the recipe names."""
    together = {"interactions", "items"} if key in ("interactions", "items") else {key}
    for other in set(ORIGINS) - together:
        section.pop(other, None)
    if key != "source":
        section[key] = _expand(str(value), Path.cwd())


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
    domains = content.get("domains")
    sections = [content.get("data"), *(domains.values() if isinstance(domains, dict) else ())]
    for section in sections:
        for key in set(ORIGINS) - {"source"}:
            if isinstance(section, dict) and isinstance(section.get(key), str):
                section[key] = _expand(section[key], base)


def _convert_numbers(section: dict[str, Any]) -> None:
    for key, value in section.items():
        if isinstance(value, dict):
            _convert_numbers(value)
        elif key not in ORIGINS:
            section[key] = _number(value)


def _expand(text: str, base: Path) -> str:
    expanded = os.path.expandvars(os.path.expanduser(text))
    if "$" in expanded:
        raise ConfigError(f"{text}: the environment variable is not set; set it to the folder of your data")
    return str((base / expanded).resolve())
