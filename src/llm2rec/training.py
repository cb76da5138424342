"""The one training engine: every stage that trains gives it batches, an objective and a validation measure.

A thin layer over `transformers.Trainer`, which brings resume, distributed training, loggers and callbacks.
Added here: ready-made batches, a loss normalised by the targets of the whole optimizer step, an optimizer
that keeps small updates of bfloat16 weights, checkpoints that count only once complete, early stopping that
survives a resume, and one progress bar.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from llm2rec import artifacts, checkpoints, memory, optimizers, progress
from llm2rec.batches import Batch, Batches, Numbered, only
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.loggers import NO_LOGGERS, PROJECT, Loggers
from llm2rec.processes import processes
from llm2rec.sharding import average_gradients, clip_gradients, is_shared, shared_out, whole_state

# Our name of a schedule -> transformers'; its plain `constant` would leave the warm-up out.
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
SCHEDULES |= {"wsd": "warmup_stable_decay"}
DECAYS = ("1-sqrt", "linear")
TRIM_SECONDS = 30.0  # between two returns of freed memory, which takes some tenths of a second
# Of the parent trainer, overridden or set here: a release that lacks one would ignore ours in silence.
RELIED_ON = ("_clip_grad_norm", "get_batch_samples", "loss_is_scaled_for_ga")
Objective = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How AdamW steps: size, decay, clipping and the course of the learning rate.

    learning_rate: the peak, reached after a linear warm-up over `warmup_share` of the steps.
    schedule: what follows. `constant`; `linear` or `cosine`, down to 0 at the end; or `wsd`
        (warm-up, stable, decay): constant, then down to 0 over the last `decay_share` of the steps.
    decay: the shape of that last part, with p running from 0 to 1 in it: `1-sqrt` (1 - sqrt(p), which
        Haegele et al. 2024, arXiv 2405.18392, find best) or `linear` (1 - p). Read by `wsd` alone, as is
        `decay_share`.

    Raises:
        ConfigError: a value out of its range, or shares of `wsd` that sum to more than 1.
    """

    learning_rate: float
    weight_decay: float = 0.0
    warmup_share: float = 0.0
    schedule: str = "constant"
    decay_share: float = 0.2
    decay: str = "1-sqrt"
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name, value, allowed in (("schedule", self.schedule, SCHEDULES), ("decay", self.decay, DECAYS)):
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0 and finite; got {getattr(self, name)}")
        shares = self.warmup_share, self.decay_share
        if not 0 <= shares[0] < 1 or not 0 < shares[1] <= 1 or (self.schedule == "wsd" and sum(shares) > 1):
            raise ConfigError(
                "warmup_share must be in [0, 1), decay_share in (0, 1], with wsd their sum at most 1; got "
                f"{shares[0]} and {shares[1]}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Optimizer):
    """Plain numbers of one training; steps are optimizer steps, of `accumulation` micro-batches each.

    With several processes the micro-batches of a step are shared out evenly among them.

    metric: what validation is judged by, greater being better unless `greater_is_better` is False.
    patience: validations without a gain before the training stops; None never stops it.
    loggers: what is told of the training's course, by the main process.
    """

    max_steps: int
    seed: int
    accumulation: int = 1
    checkpoint_every: int = 0
    evaluate_every: int = 0
    patience: int | None = None
    metric: str = "ndcg@10"
    greater_is_better: bool = True
    loggers: Loggers = NO_LOGGERS

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up, rounded up."""
        # The rate is 0 in the first step of a warm-up: a training of one step has none.
        return min(math.ceil(self.warmup_share * self.max_steps), self.max_steps - 1)

    @property
    def decay_steps(self) -> int:
        """Steps of the last part of `wsd`; with the warm-up never more than all steps."""
        return min(math.ceil(self.decay_share * self.max_steps), self.max_steps - self.warmup_steps)

    @property
    def intervals(self) -> dict[str, int]:
        """Steps between logged values, between validations and between checkpoints."""
        every = self.evaluate_every or self.checkpoint_every or 1
        return {"logging_steps": max(1, self.max_steps // 100), "eval_steps": every, "save_steps": every}

    @property
    def stable_steps(self) -> int | None:
        """Under `wsd` the steps before the decay, after which a longer training can go on.

        None where validation chooses the weights: which are the best would hang on another training's checkpoints.
        """
        if self.schedule != "wsd" or self.evaluate_every:
            return None
        return self.max_steps - self.decay_steps


@dataclass(frozen=True)
class TrainSummary:
    """How a training went: optimizer steps taken, the best validation and every logged value.

    seconds: that the steps took, validations included; of an interrupted training all parts together, without
        what was lost after the last checkpoint of each.
    """

    steps: int
    seconds: float
    best_step: int | None
    best_metric: float | None
    history: list[dict[str, float]] = field(default_factory=list)


def stage_seed(seed: int, name: str) -> int:
    """A 31-bit seed of its own for each named stage, so that adding a stage changes no other."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


def default_device() -> torch.device:
    """The device that training and encoding use: an accelerator, each process its own, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def train(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    *,
    out: Path,
    settings: TrainSettings,
    evaluate: Callable[[], dict[str, float]] | None = None,
    sharded: nn.ModuleList | None = None,
    description: str,
) -> TrainSummary:
    """Trains `model` in place and returns a summary; afterwards it holds the best weights, in eval mode.

    Args:
        model: any module; parameters that require no gradient stay as they are.
        batches: micro-batches with `n_targets`; see `Batches`.
        objective: the loss of one micro-batch, *summed* over its targets. The engine divides by the targets
            of the whole optimizer step, across micro-batches and processes. It is given the bare model,
            never a wrapper, and may call any part of it: gradients are averaged by the engine.
        out: stage folder; checkpoints go to `out/checkpoints`, the logged values to `out/metrics.jsonl`.
        settings: plain numbers.
        evaluate: validation measure under `settings.metric`; called every `evaluate_every` steps, by the
            main process alone unless layers are shared out. With it the best weights win, without it the last.
        sharded: layers of `model` that the processes share out while they train (`sharding.shared_out`).
        description: what the progress bar says.

    Raises:
        ArtifactError: a non-finite loss or gradient, too little disk for a checkpoint, or a checkpoint that
            another number of processes shared out.
        ConfigError: micro-batches that cannot be shared out evenly among the processes, layers without any
            process to share them with, or a release of transformers that would train otherwise.
    """
    _check_release()
    if len(batches) == 0:
        raise ArtifactError(f"{description}: there is not one training batch; check the data of this stage")
    if settings.accumulation % processes().count:
        raise ConfigError(
            f"{description}: {settings.accumulation} micro-batches a step cannot be shared by {processes().count} "
            "processes; make their number a multiple of the processes, or start one process"
        )
    folder = out / artifacts.CHECKPOINTS
    last = checkpoints.last_complete(folder)
    clock = _Clock(0.0 if last is None else checkpoints.seconds_before(last))
    bar = progress.bar(description, settings.max_steps)
    with _own_randomness(), settings.loggers.around(out), shared_out(sharded), bar as running:
        watch = _Watch(settings, running, clock)
        trainer = _StageTrainer(model, batches, objective, folder, settings, evaluate, watch)
        state = None if last is None else TrainerState.load_from_json(str(last / checkpoints.STATE))
        if last is not None and state is not None and _is_over(state, settings, evaluate is not None):
            best = last if state.best_model_checkpoint is None else folder / Path(state.best_model_checkpoint).name
            checkpoints.load_weights(model, best)  # by its name: the folder may have been moved
            seconds = clock.before
        else:
            if settings.checkpoint_every or settings.evaluate_every:
                checkpoints.require_disk(model, out)
            trainer.train(resume_from_checkpoint=str(last) if last else None)
            state, seconds = trainer.state, clock.seconds
    model.eval()
    if processes().is_main:
        _write_metrics(out / artifacts.METRICS, state.log_history)
    validations = [log for log in state.log_history if f"eval_{settings.metric}" in log]
    winner = validations[_best(state, settings)] if validations else None
    return TrainSummary(
        steps=state.global_step,
        seconds=seconds,
        best_step=None if winner is None else int(winner["step"]),
        best_metric=None if winner is None else float(winner[f"eval_{settings.metric}"]),
        history=state.log_history,
    )


def _check_release() -> None:
    missing = [name for name in RELIED_ON if not hasattr(Trainer, name)]
    if missing:
        raise ConfigError(
            f"the Trainer of transformers {transformers.__version__} has no {', '.join(missing)}, which trainings "
            "rely on; install a release that pyproject.toml allows: pip install 'transformers>=5.19'"
        )


class _StageTrainer(Trainer):
    """`transformers.Trainer` over ready-made batches, a summed objective and a validation function."""

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        objective: Objective,
        folder: Path,
        settings: TrainSettings,
        evaluate: Callable[[], dict[str, float]] | None,
        watch: _Watch,
    ) -> None:
        super().__init__(
            model=model,
            args=_arguments(folder, settings, evaluate is not None),
            train_dataset=batches,
            eval_dataset=batches if evaluate else None,  # only so that the parent agrees to evaluate
            callbacks=[watch],
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by all targets of the optimizer step
        self._objective, self._measure = objective, evaluate
        self._sharded = any(is_shared(parameter) for parameter in model.parameters())
        if self._sharded:
            model._is_accelerate_prepared = True  # accelerate would wrap it once more

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(Numbered(self.train_dataset), batch_size=1, shuffle=False, collate_fn=only)
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        targets = torch.tensor(sum(batch["n_targets"] for batch in batches), device=device)
        return batches, self.accelerator.gather(targets).sum()

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        loss = self._objective(self.model, inputs)
        if not torch.isfinite(loss):
            raise ArtifactError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} (batch {inputs['index']} with "
                f"{inputs['n_targets']} targets); the last checkpoint is kept: lower the learning rate, run again"
            )
        return loss * self.accelerator.num_processes / num_items_in_batch

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            average_gradients(self.model)  # the parent's wrapper never sees the objective's forward passes
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        limit = self.args.max_grad_norm
        norm = clip_gradients(self.model, limit) if self._sharded else super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            raise ArtifactError(
                f"the gradient is {float(norm)} at step {self.state.global_step + 1}; the last checkpoint is "
                "kept: lower the learning rate and run again"
            )
        return norm

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            groups = _weights_of(self.model, self.args.weight_decay, decayed)
            self.optimizer = optimizers.adamw(groups, self.args.learning_rate)
        return self.optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        assert self._measure is not None
        self.model.eval()
        with torch.no_grad():
            measured = self._measure() if processes().is_main or self._sharded else {}
        measured = processes().agreed(measured)  # all stop, or none
        metrics = {f"eval_{name}": value for name, value in measured.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self._sharded:
            super().save_model(output_dir, _internal_call)
            return
        state = whole_state(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._sharded and not self.args.should_save:
            checkpoints.save_moments(self.optimizer, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._sharded:
            checkpoints.load_moments(self.optimizer, Path(checkpoint), default_device())

    def _load_best_model(self) -> None:
        checkpoints.load_weights(self.model, Path(str(self.state.best_model_checkpoint)))

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0  # the parent's estimate assumes padded `input_ids`


class _Clock:
    """Seconds of training from now on, and those `before`, of the parts that a resumed training goes on from."""

    def __init__(self, before: float) -> None:
        self.before, self._began = before, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._began


class _Watch(TrainerCallback):
    """Moves the bar, marks checkpoints complete, stops without a gain in validation, gives freed memory back."""

    def __init__(self, settings: TrainSettings, running: progress.Bar, clock: _Clock) -> None:
        self._settings, self._running, self._clock = settings, running, clock
        self._saves = bool(settings.checkpoint_every or settings.evaluate_every)
        self._trimmed = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._running.move_to(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._running.advance()
        if time.perf_counter() - self._trimmed > TRIM_SECONDS:
            memory.trim()
            self._trimmed = time.perf_counter()
        if self._saves and state.global_step == self._settings.stable_steps:
            control.should_save = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        log = state.log_history[-1]
        for name in ("loss", f"eval_{self._settings.metric}"):
            if name in log:
                self._running.advance(0, note=f"{name.removeprefix('eval_')} {log[name]:.4g}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._settings.patience and _evaluations_without_gain(state, self._settings) >= self._settings.patience:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir) / checkpoints.name_of(state.global_step)
        processes().wait()  # each process writes a file of its own
        if state.is_world_process_zero:
            stable = self._settings.stable_steps
            keep = set() if stable is None else {checkpoints.name_of(stable)}
            if state.best_model_checkpoint is not None:
                keep.add(Path(state.best_model_checkpoint).name)
            checkpoints.complete(folder, self._clock.seconds, keep)


def _arguments(folder: Path, settings: TrainSettings, evaluates: bool) -> TrainingArguments:
    every = settings.evaluate_every if evaluates else settings.checkpoint_every
    loggers = settings.loggers
    decay = {"num_decay_steps": settings.decay_steps, "decay_type": settings.decay}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.max_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.accumulation // processes().count,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        lr_scheduler_kwargs=decay if settings.schedule == "wsd" else None,
        max_grad_norm=settings.max_grad_norm,
        save_strategy="steps" if every else "no",
        eval_strategy="steps" if evaluates else "no",
        load_best_model_at_end=evaluates,
        metric_for_best_model=settings.metric if evaluates else None,
        greater_is_better=settings.greater_is_better if evaluates else None,
        **settings.intervals,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(loggers.names),
        run_name=loggers.name_of(folder.parent),
        project=PROJECT,
        use_cpu=default_device().type == "cpu",
        dataloader_pin_memory=default_device().type != "cpu",
    )


def _weights_of(model: nn.Module, decay: float, decayed: set[str]) -> list[dict[str, Any]]:
    """The weights that are trained, as the groups of an optimizer: those named in `decayed` apart."""
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # one group holds either whole tensors or parts of tensors
            kinds.setdefault((name in decayed, is_shared(parameter)), []).append(parameter)
    return [{"params": kinds[kind], "weight_decay": decay if kind[0] else 0.0} for kind in sorted(kinds)[::-1]]


def _best(state: TrainerState, settings: TrainSettings) -> int:
    """Which validation was the best, counted from 0; the first among equals."""
    values = [log[f"eval_{settings.metric}"] for log in state.log_history if f"eval_{settings.metric}" in log]
    return int(np.argmax(values) if settings.greater_is_better else np.argmin(values))


def _evaluations_without_gain(state: TrainerState, settings: TrainSettings) -> int:
    count = sum(f"eval_{settings.metric}" in log for log in state.log_history)
    return count - 1 - _best(state, settings) if count else 0


def _is_over(state: TrainerState, settings: TrainSettings, evaluates: bool) -> bool:
    """Whether a checkpoint already ends its training, so that a resume must not take another step."""
    stale = evaluates and settings.patience and _evaluations_without_gain(state, settings) >= settings.patience
    return state.global_step >= settings.max_steps or bool(stale)


def _write_metrics(path: Path, history: list[dict[str, float]]) -> None:
    """One line a log, without the timing that ends a training.

    Equal trainings that were not interrupted leave equal files; after a resume keys stand in another order, and
    the first loss is the mean over the steps since then.
    """
    lines = [json.dumps(log) + "\n" for log in history if "train_runtime" not in log]
    path.write_text("".join(lines), encoding="utf-8")


@contextmanager
def _own_randomness() -> Iterator[None]:
    """The engine seeds the global generators (dropout draws from them); the caller's are put back."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
