"""Stages `csft`, `iem` and `encode`: what goes in, and how they are executed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2rec import artifacts, processes, progress
from llm2rec.artifacts import Inputs, flatten
from llm2rec.config import TINY_RANDOM, LanguageConfig, OptimizerConfig
from llm2rec.data import sources
from llm2rec.errors import ConfigError
from llm2rec.runs import Domain, Run
from llm2rec.stages.base import (
    AUTO,
    DTYPE,
    VARIANTS,
    Stage,
    Summary,
    dtype_of,
    language_sets,
    load_domain,
    load_mixture,
    loggers_of,
    model_inputs,
    model_path,
    of_each,
    parent_hash,
    sequence_inputs,
    text_encoder_inputs,
    text_encoder_path,
    text_inputs,
    trained_history_length,
    training_text_inputs,
    vector_sets,
)

if TYPE_CHECKING:
    from llm2rec.data.mixture import Mixture
    from llm2rec.lm.learner import Learner
    from llm2rec.lm.pooling import Pooling


# What may differ between a CSFT and the shorter one that it extends.
OF_LENGTH = {
    f"csft.{key}"
    for key in ("max_tokens", "epochs", "warmup_share", "decay_share", "decay", "checkpoints", "extends")
}


def language_stages(run: Run) -> list[Stage]:
    """The stages that train the language model, as far as the rows of the recipe need them."""
    wanted = language_sets(run)
    stages = []
    if wanted and run.recipe.model.source == TINY_RANDOM:
        stages.append(_tiny_random_stage(run))
    if run.recipe.csft.max_tokens != 0 and any(name not in VARIANTS["backbone"] for name in wanted):
        stages.append(_csft_stage(run))
    if "mntp" in wanted or "llm2rec" in wanted:
        stages += iem_stages(run)
    return stages


def iem_stages(run: Run) -> list[Stage]:
    """MNTP (unless it has 0 steps) and contrastive learning."""
    stages = [_mntp_stage(run)] if run.recipe.iem.mntp.steps else []
    return [*stages, _contrastive_stage(run)]


def _start_of_iem(run: Run) -> Path | None:
    """The CSFT model that IEM starts from; None where CSFT is left out: the model that everything starts from."""
    return run.csft if run.recipe.csft.max_tokens != 0 else None


def _checked_mixture(run: Run, start: Path | None) -> Mixture:
    """What is trained on, after the checks of what later stages need of it and of the model.

    Args:
        start: the trained model that the stage goes on with. None: this is the model's first training, and
            titles that it cannot tell apart are refused.

    Raises:
        DataError: see `check_titles`.
        ConfigError: contrastive batches that the events cannot fill, or views that the model cannot give.
    """
    from llm2rec.lm import backbone as backbones
    from llm2rec.lm.iem import check_titles, check_views, contrastive_pairs

    mixture = load_mixture(run)
    if start is None:
        check_titles(mixture.training_texts, model_path(run), run.recipe.model.max_title_tokens)
    wanted = run.recipe.iem.contrastive
    if "llm2rec" not in vector_sets(run) or not wanted.steps:
        return mixture
    check_views(backbones.outline(start or model_path(run)), wanted.positives, wanted.dropout)
    if wanted.positives == "consumed-next":
        sizes = wanted.steps, wanted.batch_size, run.recipe.seed
        contrastive_pairs(mixture.sequences, mixture.texts, wanted.positives, *sizes, mixture.item_shares)
    return mixture


def _parent_inputs(run: Run, parent: Path | None) -> Inputs:
    if parent is None:
        return model_inputs(run)
    return {parent.name: parent_hash(parent, "csft" if parent == run.csft else "iem")}


def _tiny_random_stage(run: Run) -> Stage:
    def execute(summary: Summary) -> None:
        from llm2rec.lm.tiny import make_tiny_random
        from llm2rec.training import stage_seed

        make_tiny_random(load_mixture(run).training_texts, run.backbone, stage_seed(run.recipe.seed, "backbone"))

    def inputs() -> Inputs:
        return {"seed": run.recipe.seed, **of_each(run, lambda one: training_text_inputs(run, one))}

    return Stage("csft", run.backbone, inputs, execute)


def _csft_stage(run: Run) -> Stage:
    def inputs() -> Inputs:
        settings = flatten("csft", run.recipe.csft.model_dump(mode="json"))
        if run.recipe.csft.extends:
            settings["csft.extends"] = parent_hash(Path(run.recipe.csft.extends, "csft"), "csft")
        window = {"data.history_length": trained_history_length(run)}
        data = of_each(run, lambda one: {**sequence_inputs(one), **text_inputs(run, one)})
        return {**data, **model_inputs(run), **settings, **window}

    def execute(summary: Summary) -> None:
        from llm2rec.lm.csft import csft

        mixture = _checked_mixture(run, None)
        arguments = _arguments(run.recipe.csft)
        arguments["extends"] = _extended(run, inputs()) if run.recipe.csft.extends else None
        summary |= csft(
            mixture.sequences,
            mixture.texts,
            _learner(run, run.recipe.csft, model_path(run), run.csft),
            history_length=trained_history_length(run),
            user_shares=mixture.user_shares,
            **arguments,
        )
        _record_commit(run, run.recipe.model.source, summary)

    return Stage("csft", run.csft, inputs, execute, shared=True)


def _extended(run: Run, inputs: Inputs) -> Path:
    """Where the shorter CSFT that this one extends was before its decay.

    Raises:
        ConfigError: it was trained with other settings or on other data, or without a checkpoint.
    """
    shorter = Path(str(run.recipe.csft.extends), "csft")
    theirs = artifacts.require(shorter, "csft").inputs
    differ = [key for key in artifacts.changed(theirs, inputs) if key not in OF_LENGTH]
    if differ:
        raise ConfigError(
            f"csft.extends: {shorter} was trained with other {', '.join(differ)}; only what makes a training "
            f"longer may differ ({', '.join(sorted(OF_LENGTH))})"
        )
    if not (shorter / artifacts.STABLE).exists():
        raise ConfigError(f"csft.extends: {shorter} kept nothing from before its decay; train it with checkpoints")
    _train_in_the_format_of(shorter / artifacts.STABLE, run)
    return shorter / artifacts.STABLE


def _train_in_the_format_of(stable: Path, run: Run) -> None:
    """Makes `auto` the number format of the training that a run extends: its moments are of no use in another.

    Raises:
        ConfigError: the run is bound to another one.
    """
    theirs = artifacts.read_json(stable / "config.json")["dtype"]
    file = run.folder / DTYPE
    if processes.is_main() and run.recipe.model.dtype == AUTO and not file.exists():
        artifacts.write_json(file, {AUTO: theirs})
    ours = dtype_of(run, run.recipe.model.dtype)
    if ours != theirs:
        raise ConfigError(
            f"csft.extends: {stable.parent} was trained in {theirs}, {run.folder} works in {ours}; extend it in a "
            "folder of its own"
        )


def _mntp_stage(run: Run) -> Stage:
    start = _start_of_iem(run)

    def inputs() -> Inputs:
        settings = flatten("iem.mntp", run.recipe.iem.mntp.model_dump(mode="json"))
        data = of_each(run, lambda one: training_text_inputs(run, one))
        return {**_parent_inputs(run, start), **data, **settings}

    def execute(summary: Summary) -> None:
        from llm2rec.lm.iem import mntp

        mixture = _checked_mixture(run, start)
        summary |= mntp(
            mixture.texts,
            _learner(run, run.recipe.iem.mntp, start or model_path(run), run.mntp),
            shares=mixture.item_shares,
            **_arguments(run.recipe.iem.mntp),
        )
        if start is None:
            _record_commit(run, run.recipe.model.source, summary)

    return Stage("iem", run.mntp, inputs, execute, shared=True)


def _contrastive_stage(run: Run) -> Stage:
    start = run.mntp if run.recipe.iem.mntp.steps else _start_of_iem(run)

    def inputs() -> Inputs:
        settings = flatten("iem.contrastive", run.recipe.iem.contrastive.model_dump(mode="json"))
        settings |= {"iem.attention": run.recipe.iem.attention, "encode.pooling": run.recipe.encode.pooling}
        data = of_each(run, lambda one: {**sequence_inputs(one), **text_inputs(run, one)})
        return {**_parent_inputs(run, start), **data, **settings}

    def execute(summary: Summary) -> None:
        from llm2rec.lm.iem import contrastive

        mixture = _checked_mixture(run, start)
        summary |= contrastive(
            mixture.sequences,
            mixture.texts,
            _learner(run, run.recipe.iem.contrastive, start or model_path(run), run.iem),
            causal=_is_causal(run, "llm2rec"),
            pooling=_pooling(run, "llm2rec"),
            shares=mixture.item_shares,
            **_arguments(run.recipe.iem.contrastive),
        )
        if start is None:
            _record_commit(run, run.recipe.model.source, summary)

    return Stage("iem", run.iem, inputs, execute, shared=True)


def _learner(run: Run, section: LanguageConfig, model: str | Path, out: Path) -> Learner:
    """What a language stage is told as all others are."""
    from llm2rec.lm.learner import Learner
    from llm2rec.lm.lora import Lora
    from llm2rec.precision import resolve_dtype
    from llm2rec.training import Optimizer

    return Learner(
        model=model,
        dtype=resolve_dtype(dtype_of(run, run.recipe.model.dtype)),
        max_title_tokens=run.recipe.model.max_title_tokens,
        optimizer=Optimizer(**{name: getattr(section, name) for name in OptimizerConfig.model_fields}),
        seed=run.recipe.seed,
        out=out,
        gradient_checkpointing=section.gradient_checkpointing,
        lora=Lora(**dict(section.lora)) if section.lora else None,
        shard=section.shard,
        loggers=loggers_of(run),
        compiled=run.recipe.model.compile,
    )


def _record_commit(run: Run, source: str, summary: Summary) -> None:
    """Notes in a summary at which commit a hub id was loaded, and says where the run had it at another one.

    A note, no input: a commit may change a page only, and finished trainings are not to be lost for that.
    """
    commit = sources.hub_commit(source)
    if commit is None:
        return
    summary["hub"] = f"{source}@{commit}"
    vectors = [domain.embeddings(name) for domain in run.domains for name in vector_sets(run)]
    for folder in (run.csft, run.mntp, run.iem, *vectors):
        manifest = artifacts.read_manifest(folder)
        before = str(manifest.summary.get("hub", "")) if manifest else ""
        if before.startswith(f"{source}@") and before != summary["hub"]:
            progress.say(
                f"note: {folder.relative_to(run.folder)} was made from {before}, the hub now has {commit}; where "
                "its weights or tokenizer changed, run again with --fresh"
            )


def _arguments(section: LanguageConfig) -> dict[str, Any]:
    """The values of a language stage's section that are its own."""
    return {name: value for name, value in section if name not in LanguageConfig.model_fields}


def _is_causal(run: Run, name: str) -> bool:
    """Whether the tokens of a title see only those before them, where a vector set is made."""
    return name.endswith("-causal") or (name == "llm2rec" and run.recipe.iem.attention == "causal")


def _pooling(run: Run, name: str) -> Pooling:
    """How vectors are pooled; those of the trained encoder are what its folder gives, so of the last layer."""
    from llm2rec.lm.pooling import Pooling

    return Pooling(run.recipe.encode.pooling, -1 if name == "llm2rec" else run.recipe.encode.layer)


def encode_stages(run: Run) -> list[Stage]:
    """One stage a domain and vector set that the rows of the recipe need."""
    return [_encode_stage(run, domain, name) for domain in run.domains for name in vector_sets(run)]


def encode_texts(run: Run, name: str, item_ids: list[str], texts: list[str], out: Path) -> Summary:
    """Writes the vectors of a vector set for some items, made by the model that the set stands for.

    A text encoder that another run trained reads as it was trained to, but by our packed pass, which is several
    times as fast as sentence-transformers, and in this run's dtype and title length.
    """
    from llm2rec.lm.encode import encode, encode_by_text_encoder
    from llm2rec.lm.export import reading_of
    from llm2rec.precision import resolve_dtype

    model, causal, pooling = _trained_models(run).get(name), _is_causal(run, name), _pooling(run, name)
    if name in run.recipe.encode.text_encoders:
        model, shards = Path(text_encoder_path(run, name)), run.recipe.encode.shard_texts
        if not sources.is_of_a_run(model):
            return encode_by_text_encoder(item_ids, texts, model=model, name=name, out=out, shard_texts=shards)
        causal, pooling = reading_of(model)
    return encode(
        item_ids,
        texts,
        model=model or model_path(run),
        causal=causal,
        dtype=resolve_dtype(dtype_of(run, run.recipe.model.dtype)),
        max_title_tokens=run.recipe.model.max_title_tokens,
        batch_tokens=run.recipe.encode.batch_tokens,
        shard_texts=run.recipe.encode.shard_texts,
        compiled=run.recipe.model.compile,
        pooling=pooling,
        name=name,
        out=out,
    )


def _trained_models(run: Run) -> dict[str, Path]:
    """Vector set -> the trained model behind it; sets of the untrained model are not among them."""
    return {"csft": run.csft, "csft-causal": run.csft, "mntp": run.mntp, "llm2rec": run.iem}


def _encode_stage(run: Run, domain: Domain, name: str) -> Stage:
    trained = _trained_models(run)

    def inputs() -> Inputs:
        if name in run.recipe.encode.text_encoders:
            return text_encoder_inputs(run, domain, name)
        parent = _parent_inputs(run, trained[name]) if name in trained else model_inputs(run)
        settings = flatten("encode", run.recipe.encode.model_dump(mode="json", exclude={"text_encoders"}))
        return {
            **parent,
            **text_inputs(run, domain),
            **settings,
        }

    def execute(summary: Summary) -> None:
        loaded = load_domain(run, domain)
        summary |= encode_texts(run, name, loaded.item_ids, loaded.texts, domain.embeddings(name))
        if name not in trained:
            _record_commit(run, run.recipe.encode.text_encoders.get(name, run.recipe.model.source), summary)

    return Stage("encode", domain.embeddings(name), inputs, execute, shared=True)
