"""A language model about to be trained: where it starts, how it steps, where it goes; the same for every stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llm2rec.batches import Batches
from llm2rec.lm import backbone as backbones
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.lora import Lora, attach
from llm2rec.loggers import NO_LOGGERS, Loggers
from llm2rec.training import Objective, Optimizer, TrainSettings, TrainSummary, stage_seed, train


@dataclass(frozen=True)
class Learner:
    """What the stages that train the language model (`csft`, `mntp`, `contrastive`) are told alike.

    model: hub id, folder or GGUF file that the stage starts from. dtype: of weights and arithmetic.
    max_title_tokens: longer titles are truncated. seed: of the recipe; each stage derives its own.
    out: the stage's folder. gradient_checkpointing: see `Backbone.checkpoint_gradients`.
    lora: trains adapters instead of the model's weights and merges them before saving.
    shard: the processes share the layers out while they train (`sharding.shared_out`).
    compiled: see `Backbone.compile_layers`.
    """

    model: str | Path
    dtype: torch.dtype
    max_title_tokens: int
    optimizer: Optimizer
    seed: int
    out: Path
    gradient_checkpointing: bool = False
    lora: Lora | None = None
    shard: bool = False
    loggers: Loggers = NO_LOGGERS
    compiled: bool = False

    def load(self, stage: str, *, causal: bool, head: bool = True) -> tuple[Backbone, Callable[[], None]]:
        """The model, attending as told, on the device that trains; and what merges its adapters in the end.

        Raises:
            ConfigError, ArtifactError: as `backbone.load_for_training` and `lora.attach`.
        """
        lm = backbones.load_for_training(
            self.model,
            self.dtype,
            causal=causal,
            head=head,
            gradient_checkpointing=self.gradient_checkpointing,
            compiled=self.compiled,
        )
        if self.lora is None:
            return lm, lambda: None
        return lm, attach(lm, self.lora, stage_seed(self.seed, f"{stage} adapters"))

    def seed_of(self, stage: str) -> int:
        """The seed that a stage derives from the recipe's."""
        return stage_seed(self.seed, stage)

    def settings(self, stage: str, **course: Any) -> TrainSettings:
        """The engine's settings of a stage; `course` are its steps, and what happens how often."""
        return TrainSettings(**asdict(self.optimizer), **course, seed=self.seed_of(stage), loggers=self.loggers)

    def train(
        self,
        lm: Backbone,
        batches: Batches,
        objective: Objective,
        settings: TrainSettings,
        *,
        description: str,
        evaluate: Callable[[], dict[str, float]] | None = None,
    ) -> TrainSummary:
        """`training.train` of the loaded model into the stage's folder."""
        return train(
            lm.model,
            batches,
            objective,
            out=self.out,
            settings=settings,
            evaluate=evaluate,
            sharded=lm.layers if self.shard else None,
            description=description,
        )
