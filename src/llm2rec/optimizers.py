"""AdamW for the weights that a training has: torch's fused one in float32, one of our own in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as one_step

from llm2rec.sharding import is_shared

BETAS, EPSILON = (0.9, 0.999), 1e-8
CHUNK = 2**18  # values that a CPU steps at a time: what is computed for them stays in its cache


def adamw(groups: Iterable[dict[str, Any]], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW over groups of weights, each with a `weight_decay`; `RoundedAdamW` where any of them is bfloat16."""
    groups = list(groups)
    if any(weight.dtype == torch.bfloat16 for group in groups for weight in group["params"]):
        return RoundedAdamW(groups, learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPSILON, fused=True)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) for bfloat16 weights, as if they were not rounded.

    A step is mostly far below what a bfloat16 weight can show. What rounding takes from a weight is kept beside
    it and counts in its next step (Kahan summation), the decay of the weight included. The mean of squared
    gradients is float32: in bfloat16 it can rise and never fall, because .999 of a number rounds to that number,
    so that after some 500 steps the rate sinks unseen. 8 bytes a weight: the first moment and the rest in
    bfloat16, the second moment in float32.

    Args:
        groups: of weights, each with its `weight_decay`; weights of any dtype.
        learning_rate: of all groups, until a scheduler sets another one.
    """

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float) -> None:
        super().__init__(groups, {"lr": learning_rate, "weight_decay": 0.0, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step along the gradients of all weights that have one; `closure` is of torch and not called."""
        for group in self.param_groups:
            group["step"] += 1
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, with second moments that stay float32, where torch would round them."""
        super().load_state_dict(state_dict)
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for weight, number in zip(mine["params"], saved["params"], strict=True):
                if number in state_dict["state"]:
                    second = state_dict["state"][number]["exp_avg_sq"]
                    self.state[weight]["exp_avg_sq"] = _own(second).to(weight.device, torch.float32)

    def _step(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        state, own = self.state[weight], _own(weight)
        if not state:
            state["exp_avg"], state["kahan_comp"] = torch.zeros_like(own), torch.zeros_like(own)
            state["exp_avg_sq"] = torch.zeros_like(own, dtype=torch.float32)
        whole = own, _own(weight.grad).contiguous(), state["exp_avg"], state["exp_avg_sq"], state["kahan_comp"]
        size = CHUNK if own.device.type == "cpu" else own.numel()
        for parts in zip(*(one.view(-1).split(size) for one in whole), strict=True):
            _step_part(parts, int(group["step"]), group["lr"], group["weight_decay"])


def _own(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is shared out."""
    return tensor.to_local() if is_shared(tensor) else tensor


def _step_part(parts: tuple[Tensor, ...], steps: int, rate: float, decay: float) -> None:
    """One step of torch's AdamW in float32: of a weight with its rest, of which a new rest is left over."""
    weight, gradient, first, second, rest = parts
    exact, moment = weight.to(torch.float32, copy=True).add_(rest), first.float()
    before = torch.tensor(steps - 1.0, device=weight.device)  # which torch adds one to
    one_step(
        [exact],
        [gradient.float()],
        [moment],
        [second],
        [],
        [before],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPSILON,
        lr=rate,
        weight_decay=decay,
    )
    first.copy_(moment)
    weight.copy_(exact)
    rest.copy_(exact.sub_(weight))
