"""AdamW for the weights that a training moves: fused for float32, compensated for bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import optimi
import torch
from torch import Tensor, nn

BETAS, EPSILON = (0.9, 0.999), 1e-8
# Weights that are updated together: their update takes about ten passes over five arrays, which stay in the cache.
BLOCK = 64 * 1024


def adamw(model: nn.Module, decayed: set[str], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, `weight_decay` on the `decayed` ones.

    Weights in bfloat16 lose small updates: theirs are kept by Kahan summation.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": learning_rate, "betas": BETAS, "eps": EPSILON}
    if not any(parameter.dtype == torch.bfloat16 for _, parameter in trained):
        return torch.optim.AdamW(groups, fused=True, **options)
    if trained[0][1].device.type == "cpu":
        return BlockedAdamW(groups, **options)
    return optimi.AdamW(groups, kahan_sum=True, **options)


class BlockedAdamW(torch.optim.Optimizer):
    """`optimi.AdamW` with Kahan summation, the same to the bit, a block of weights after the other.

    Taken whole, every one of the update's passes over a matrix reads it from memory again.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            group["step"] = torch.tensor(0, dtype=torch.int32)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient; the gradients are used up.

        Raises:
            ValueError: a closure is given.
        """
        if closure is not None:
            raise ValueError("BlockedAdamW evaluates no closure; compute the gradients before its step")
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            columns: list[list[Tensor | None]] = [[], [], [], [], []]
            for parameter in moved:
                for column, blocks in zip(columns, _blocks(parameter, self._state_of(parameter)), strict=True):
                    column.extend(blocks)
            optimi.adamw(
                *columns,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                step=group["step"],
                kahan_sum=True,
            )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            names = ["exp_avg", "exp_avg_sq"]
            names += ["compensation"] if parameter.dtype == torch.bfloat16 else []
            state |= {name: torch.zeros_like(parameter) for name in names}
        return state


def _blocks(parameter: Tensor, state: dict[str, Tensor]) -> list[list[Tensor | None]]:
    """Weights, gradient, moments and compensation of a parameter, each as a list of blocks."""
    assert parameter.grad is not None
    tensors = [parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
    tensors += [state["compensation"]] if "compensation" in state else []
    if all(tensor.is_contiguous() for tensor in tensors):
        columns = [list(tensor.view(-1).split(BLOCK)) for tensor in tensors]
    else:
        columns = [[tensor] for tensor in tensors]
    return [*columns, *[[None] * len(columns[0])] * (5 - len(columns))]
