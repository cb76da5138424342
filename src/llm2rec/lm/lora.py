"""Low-rank adapters (LoRA) through peft, an optional dependency: trained in the model's place, then merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm2rec.errors import ConfigError, first_few
from llm2rec.lm.backbone import Backbone


@dataclass(frozen=True)
class Lora:
    """Adapters of rank `rank`, scaled by alpha / rank, on the linear layers named by `targets`.

    A target is a layer's name or the end of its dotted path: `q_proj`, `mlp.up_proj`. Source: Hu et al. 2021,
    arXiv 2106.09685.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not self.targets:
            raise ConfigError(
                f"LoRA needs rank >= 1, alpha > 0 and at least one target; got {self.rank}, {self.alpha} and "
                f"{list(self.targets)}"
            )


def attach(lm: Backbone, lora: Lora, seed: int) -> Callable[[], None]:
    """Freezes the model and adds trainable adapters to it; the function returned merges them into it.

    The adapters change nothing until they are trained. After merging the model has its own layers again,
    their weights changed, none of them frozen.

    Raises:
        ConfigError: a target that matches no linear layer of the model, or peft is not installed.
    """
    layers = [name for name, module in lm.body.named_modules() if isinstance(module, nn.Linear)]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            names = sorted({name.rpartition(".")[2] for name in layers})
            raise ConfigError(
                f"the LoRA target {target!r} matches no linear layer; there are {first_few(names, 20)}"
            )
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ConfigError("LoRA needs the package peft: pip install 'llm2rec[lora]', or leave it out") from error
    values: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.targets)}
    config = LoraConfig(**values)  # peft says `lora_alpha: int`, and takes any number
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = LoraModel(lm.model, config, "default")
    for name, parameter in lm.model.named_parameters():
        parameter.requires_grad_("lora_" in name)

    def merge() -> None:
        adapted.merge_and_unload()
        vars(lm.model).pop("peft_config", None)
        lm.model.requires_grad_(True)

    return merge
