"""Recipes: one frozen pydantic class a stage, sparse YAML in, every value resolved.

Configuration never enters a module: stage functions unpack these classes into plain arguments.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from llm2rec.errors import ConfigError
from llm2rec.loggers import LoggerName
from llm2rec.rows import ATTENTIONS, CONTEXT, ENCODER_NAME, RESERVED, ROW_NAMES, VECTORS, Row

TINY_RANDOM = "tiny-random"  # a decoder and a tokenizer made from the texts of the run
CSFT_BUDGETS = {"max_tokens", "epochs"}

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
DomainName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
DOMAIN = "main"  # the only domain of a recipe that names none
EncoderName = Annotated[str, Field(pattern=f"^{ENCODER_NAME}$")]
READY_ENCODERS = {"minilm": "all-minilm-l6-v2"}  # known without being named
ORIGINS = ("source", "folder", "interactions", "items")


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

    @field_validator("dates", mode="before")
    @classmethod
    def _dates_of_yaml(cls, value: Any) -> Any:
        """YAML reads 2018-01-01 as a date, not as text."""
        if isinstance(value, list | tuple):
            return tuple(one.isoformat() if isinstance(one, date) else one for one in value)
        return value

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
    text: str = Field(
        "{title}",
        description="the text of an item: columns of the items table in braces, '{title} ({brand})'; an empty one "
        "is left out with the plain text before it and what closes it",
    )
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

    @model_validator(mode="after")
    def _nothing_unread(self) -> DataConfig:
        if self.layout != "auto" and not self.folder:
            raise ValueError(f"`layout` {self.layout!r} is that of a `folder`, and none is given; leave it out")
        unread = [name for name in ("user", "time", "rating", "part") if getattr(self.columns, name)]
        if unread and not self.interactions:
            raise ValueError(
                f"`columns` maps {', '.join(unread)}, which are read of `interactions` only, and none are given; "
                "leave them out (item, items_item and title may stay: add-items reads them)"
            )
        return self

    @property
    def origin(self) -> str:
        """What messages call the data: a source, a folder, or the file of the interactions."""
        return str(self.source or self.folder or self.interactions)


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
    compile: bool = Field(False, description="compile its layers: some minutes first, same numbers up to rounding")


class OptimizerConfig(Section):
    """What every language stage sets for its optimizer (AdamW)."""

    learning_rate: Rate = Field(1e-4, description="peak learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of AdamW")
    warmup_share: Share = Field(0.1, description="share of the steps with linearly rising learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="of the learning rate; wsd: warm-up, stable, decay"
    )
    decay_share: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="last share of the steps, under wsd")
    decay: Literal["1-sqrt", "linear"] = Field("1-sqrt", description="shape of that decay")
    max_grad_norm: Rate = Field(1.0, description="longer gradients are cut to this length")

    @model_validator(mode="after")
    def _shares_of_wsd(self) -> OptimizerConfig:
        if self.schedule == "wsd" and self.warmup_share + self.decay_share > 1:
            raise ValueError(
                f"warmup_share {self.warmup_share} and decay_share {self.decay_share} are more than all steps"
            )
        return self


class LoraConfig(Section):
    """Low-rank adapters, trained in the place of the weights and merged (extra `lora`)."""

    rank: Positive = Field(16, description="of each adapter")
    alpha: Rate = Field(32.0, description="what an adapter adds is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="linear maps of a layer that get an adapter, by name",
    )


class LanguageConfig(OptimizerConfig):
    """What every language stage may set besides."""

    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third slower")
    lora: LoraConfig | None = Field(None, description="train adapters instead of the weights")
    shard: bool = Field(
        False,
        description="share gradients and optimizer state of the layers out among the processes (FSDP): for models "
        "whose weights fit a device, and whose training does not",
    )


class CsftConfig(LanguageConfig):
    """Collaborative supervised fine-tuning (paper section 3.2)."""

    learning_rate: Rate = 2e-4
    max_tokens: Count | None = Field(
        None, description="budget in tokens; give this or epochs; 0: no CSFT, IEM starts from the untrained model"
    )
    epochs: Rate | None = Field(None, description="budget in passes over the training windows")
    mode: Literal["packed", "paper", "tree"] = Field(
        "packed", description="one pass a window; the authors' samples; the same, shared starts computed once"
    )
    paper_separator: bool = Field(False, description="separate history and target, which the authors do not")
    batch_tokens: Positive = Field(
        4096, description="tokens of one optimizer step; rounded to whole forward passes"
    )
    micro_batch_tokens: Positive = Field(2048, description="tokens in one forward pass; bounds the memory")
    checkpoints: Count = Field(4, description="checkpoints in the course of the stage (0: none)")
    evaluations: Count = Field(0, description="held-out perplexities on the way; the best weights win (0: none)")
    patience: Positive | None = Field(None, description="evaluations without a gain before the stage stops")
    extends: str | None = Field(
        None,
        description="a run with a smaller budget under wsd, to go on from before its decay; its warm-up counts",
    )

    @model_validator(mode="after")
    def _extends_to_the_end(self) -> CsftConfig:
        if self.extends is not None and (self.schedule != "wsd" or self.evaluations):
            raise ValueError(
                "csft.extends goes on at the stable rate and to the end: set schedule wsd, and evaluations 0"
            )
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> CsftConfig:
        if (self.max_tokens is None) == (self.epochs is None):
            raise ValueError("give exactly one of `max_tokens` and `epochs`")
        if self.max_tokens and self.max_tokens < self.batch_tokens:
            raise ValueError(
                f"max_tokens {self.max_tokens:,} is less than one step of batch_tokens {self.batch_tokens:,}; "
                "raise the one or lower the other"
            )
        return self


class MntpConfig(LanguageConfig):
    """Masked next-token prediction on titles (paper section 3.3)."""

    steps: Count = Field(..., description="optimizer steps; 0 leaves the stage out")
    batch_size: Positive = Field(32, description="titles a step (paper: 32)")
    mask_share: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="masked title tokens (paper: 0.2)")
    checkpoints: Count = Field(4, description="checkpoints in the course of the stage (0: none)")


class ContrastiveConfig(LanguageConfig):
    """Contrastive learning on two dropout views (paper section 3.3), or on titles consumed one after the other."""

    learning_rate: Rate = 5e-5
    steps: Count = Field(..., description="most optimizer steps; 0 leaves the stage out")
    batch_size: Annotated[int, Field(ge=2)] = Field(256, description="titles a step (paper: 256)")
    temperature: Rate = Field(0.1, description="divides the cosine (paper: 0.2, authors' code: 0.1)")
    micro_batch_tokens: Positive = Field(2048, description="tokens in one forward pass; bounds the memory")
    positives: Literal["dropout", "consumed-next"] = Field(
        "dropout", description="two dropout views of a title, or titles consumed one after the other"
    )
    dropout: Share = Field(0.2, description="attention dropout: it makes the two views (paper: 0.2)")
    evaluations: Positive = Field(8, description="validations in the course of the stage")
    patience: Positive = Field(3, description="validations without a gain before the stage stops")


class IemConfig(Section):
    """Item-level embedding modelling: MNTP, then contrastive learning."""

    mntp: MntpConfig
    contrastive: ContrastiveConfig
    attention: Literal["bidirectional", "causal"] = Field(
        "bidirectional", description="of the item encoder (paper: bidirectional); a causal one goes without MNTP"
    )

    @model_validator(mode="after")
    def _mntp_sees_both_ways(self) -> IemConfig:
        if self.attention == "causal" and self.mntp.steps:
            raise ValueError(
                "MNTP is what makes a model bidirectional; with iem.attention causal set mntp.steps 0"
            )
        return self


class EncodeConfig(Section):
    """Turning titles into vectors."""

    batch_tokens: Positive = Field(8192, description="tokens in one forward pass")
    pooling: Literal["mean", "last", "weighted-mean"] = Field("mean", description="of a title's hidden states")
    layer: Annotated[int, Field(ge=-1)] = Field(
        -1, description="whose states, -1: the last; llm2rec vectors are always of the last"
    )
    text_encoders: dict[EncoderName, str] = Field(
        READY_ENCODERS,
        description="ready text encoders by the name that rows have them under: a public one (`llm2rec models "
        "list`), a hub id, a SentenceTransformer folder, or `csft/` (read causally), `mntp/` or `iem/` of "
        "another run",
    )
    shard_texts: Positive = Field(65_536, description="titles in memory, and what a killed encoding loses")

    @field_validator("text_encoders", mode="before")
    @classmethod
    def _ready_ones_besides(cls, value: Any) -> Any:
        return READY_ENCODERS | value if isinstance(value, dict) else value

    @field_validator("text_encoders")
    @classmethod
    def _names_of_their_own(cls, value: dict[str, str]) -> dict[str, str]:
        taken = sorted(set(value) & set(VECTORS))
        if taken:
            raise ValueError(f"{taken[0]!r} is what our own vectors are called; take another name")
        reserved = sorted(set(value) & set(RESERVED))
        if reserved:
            raise ValueError(
                f"{reserved[0]!r} means something else (the log, the row {CONTEXT}); take another name"
            )
        return value


class CourseConfig(Section):
    """The course of a recommender's training, which each row may have of its own."""

    max_epochs: Positive = Field(
        16, description="passes over the training events; the best one by validation is kept"
    )
    patience: Positive = Field(
        16, description="epochs without a gain in validation NDCG@10 before stopping; a falling rate wants none"
    )
    batch_size: Positive = Field(128, description="windows a step; each supervises up to history_length items")
    learning_rate: Rate = Field(2e-3, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine",
        description="of the learning rate; one that falls over max_epochs needs half as many as a constant one",
    )
    warmup_share: Share = Field(0.1, description="share of the steps with linearly rising learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(1e-4, description="of AdamW")
    dropout: Share = Field(0.3, description="in the recommender (paper: 0.3)")


class RecommenderConfig(CourseConfig):
    """The sequential recommender (paper section 4.1: 2 layers, 2 heads, 128 wide, dropout 0.3)."""

    rows: tuple[str, ...] = Field(
        ("popularity", "markov", "sasrec-id", "sasrec-backbone", "sasrec-csft", "sasrec-llm2rec"),
        description='what is compared (README, "Rows")',
    )
    seeds: Positive = Field(1, description="trainings of each row, with seeds 0, 1, ...")
    loss: Literal["full", "sampled_softmax", "gbce"] = Field("full", description="of the next item")
    targets: Literal["all", "last"] = Field("all", description="positions of a window that are supervised")
    negatives: Positive = Field(256, description="sampled items a step; the full softmax samples none")
    sampling: Literal["uniform", "popularity"] = Field("uniform", description="how negatives are drawn")
    calibration: Annotated[float, Field(ge=0, le=1)] = Field(0.75, description="of gBCE, its t")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the matrix products of training; auto takes the faster; ranking is float32"
    )
    hidden_size: Positive = Field(128, description="width of the recommender (paper: 128)")
    layers: Positive = Field(2, description="of the recommender (paper: 2)")
    heads: Positive = Field(2, description="of attention, in SASRec and eSASRec (paper: 2)")
    adapter: Literal["linear", "mlp"] = Field(
        "mlp", description="from item vectors to hidden_size (paper: linear, which holds text back)"
    )
    adapter_size: Positive = Field(512, description="hidden units of an mlp adapter")
    smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="share of an item's vector that is the mean of the items consumed right before or after it",
    )
    whitening: Literal["none", "half", "full"] = Field(
        "half", description="of item vectors, beyond centring and scaling each dimension"
    )
    dimensions: Positive | None = Field(None, description="principal components kept of item vectors; null: all")
    delta_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="how far +delta may move an item vector, in its own length"
    )
    temperature: Rate | None = Field(None, description="cosine over temperature; null: dot product")
    per_row: dict[str, CourseConfig] = Field(
        {}, description="where a row's training differs from the others', e.g. {sasrec-id: {max_epochs: 10}}"
    )

    @field_serializer("per_row")
    def _only_what_differs(self, per_row: dict[str, CourseConfig]) -> dict[str, dict[str, Any]]:
        return {row: course.model_dump(mode="json", exclude_unset=True) for row, course in per_row.items()}

    @field_validator("per_row")
    @classmethod
    def _trained_rows(cls, value: dict[str, CourseConfig]) -> dict[str, CourseConfig]:
        for name in value:
            row = _parsed(name)
            if row.architecture is None or row.parents:
                raise ValueError(f"row {name!r} is not trained, so it has no training of its own")
        return value

    @model_validator(mode="after")
    def _known_rows(self) -> RecommenderConfig:
        if len(set(self.rows)) != len(self.rows) or not self.rows:
            raise ValueError("`rows` must name at least one row, each once")
        for name in self.rows:
            row = _parsed(name)
            missing = [parent for parent in row.parents if parent not in self.rows]
            if missing:
                raise ValueError(f"row {name!r} averages {' and '.join(row.parents)}; name {missing[0]!r} as well")
            for variant in (f"{name}-{attention}" for attention in ATTENTIONS):
                if variant in self.rows and self.per_row.get(variant) != self.per_row.get(name):
                    raise ValueError(
                        f"row {name!r} tries {variant!r}, which is a row as well: give both the same `per_row`"
                    )
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        if self.loss == "gbce" and self.sampling != "uniform":
            raise ValueError("gbce corrects for uniform negatives; set sampling: uniform, or another loss")
        return self


def _parsed(name: str) -> Row:
    try:
        return Row.parse(name)
    except ConfigError as error:
        raise ValueError(str(error)) from error


class EvaluationConfig(Section):
    """Full ranking on the test events."""

    k: tuple[Annotated[int, Field(gt=0, le=1000)], ...] = Field(
        (5, 10, 20), min_length=1, description="cut-offs of recall and NDCG"
    )
    reference: str = Field(
        "sasrec-backbone",
        description="row that every other row is tested against; a run without the default: its first trained row",
    )
    bootstrap_samples: Annotated[int, Field(ge=100, le=1_000_000)] = Field(
        10_000,
        description="resamples of the users, and sign patterns of the second test; at least 40 a comparison",
    )
    mask_history: bool = Field(False, description="hide what the user consumed before from the ranking")
    direct_users: Positive = Field(
        200, description="users whose next titles the language model itself ranks in the study csft-direct"
    )

    @model_validator(mode="after")
    def _distinct_cutoffs(self) -> EvaluationConfig:
        if len(set(self.k)) != len(self.k):
            raise ValueError(f"`k` names a cut-off twice: {list(self.k)}")
        return self


class Recipe(Section):
    """A whole run."""

    seed: Count = Field(
        0,
        description="of the language stages, each with a generator of its own, and of which users and items are "
        "sampled or held out; recommenders have `recommender.seeds`",
    )
    data: DataConfig | None = Field(None, description="the log; this, or several `domains`")
    domains: dict[DomainName, DomainConfig] | None = Field(
        None, description="several logs by name, which share the language model"
    )
    model: ModelConfig
    csft: CsftConfig
    iem: IemConfig
    encode: EncodeConfig = EncodeConfig()
    recommender: RecommenderConfig = RecommenderConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    loggers: tuple[LoggerName, ...] = Field(
        (), description="told of every training, each to be installed; []: none"
    )

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
    def _known_encoders(self) -> Recipe:
        known = self.encode.text_encoders
        for name in (*self.recommender.rows, *self.recommender.per_row):
            if Row.parse(name).text_encoder not in (None, *known):
                raise ValueError(f"unknown row {name!r}; rows are {ROW_NAMES} (here: {', '.join(known)})")
        return self

    @model_validator(mode="after")
    def _compiled_or_recomputed(self) -> Recipe:
        for name, section in (
            ("csft", self.csft),
            ("iem.mntp", self.iem.mntp),
            ("iem.contrastive", self.iem.contrastive),
        ):
            if self.model.compile and section.gradient_checkpointing:
                raise ValueError(f"model.compile and {name}.gradient_checkpointing exclude each other")
        return self

    @model_validator(mode="after")
    def _trained_vectors(self) -> Recipe:
        over_csft = [name for name in self.recommender.rows if Row.parse(name).vectors == "csft"]
        if self.csft.max_tokens == 0 and over_csft:
            raise ValueError(
                f"row {over_csft[0]!r} needs the vectors of CSFT, which csft.max_tokens 0 leaves out; "
                "leave the row out as well, or give CSFT a budget"
            )
        over_mntp = [name for name in self.recommender.rows if Row.parse(name).vectors == "mntp"]
        if self.iem.mntp.steps == 0 and over_mntp:
            raise ValueError(
                f"row {over_mntp[0]!r} needs the vectors of MNTP, which iem.mntp.steps 0 leaves out; "
                "leave the row out as well, or give MNTP steps"
            )
        return self

    @model_validator(mode="after")
    def _known_reference(self) -> Recipe:
        reference, default = self.evaluation.reference, EvaluationConfig.model_fields["reference"].default
        if reference not in (*self.recommender.rows, default):
            raise ValueError(
                f"evaluation.reference {reference!r} is not a row of the run: {', '.join(self.recommender.rows)}"
            )
        return self
