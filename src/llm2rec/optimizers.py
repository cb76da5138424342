"""AdamW for the weights that a training has: torch's fused one in float32, one of our own in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as one_step

from llm2rec.sharding import is_shared

BETAS, EPSILON = (0.9, 0.999), 1e-8
# Values that are stepped at a time: on a CPU what is computed for them stays in its cache, on a GPU the small
# weights of many layers share the launches of one, and the copies in float32 stay below 2 GB.
CHUNK = {"cpu": 2**18, "cuda": 2**26}
Part = tuple[Tensor, ...]  # weight, gradient, first moment, second moment, rest; flat, of one length


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
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for parts in _chunks(part for weight in weights for part in self._parts(weight)):
                _step_parts(parts, int(group["step"]), group["lr"], group["weight_decay"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, with second moments that stay float32, where torch would round them."""
        super().load_state_dict(state_dict)
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for weight, number in zip(mine["params"], saved["params"], strict=True):
                if number in state_dict["state"]:
                    second = state_dict["state"][number]["exp_avg_sq"]
                    self.state[weight]["exp_avg_sq"] = _own(second).to(weight.device, torch.float32)

    def _parts(self, weight: nn.Parameter) -> Iterable[Part]:
        """A weight with its gradient and state, at most `CHUNK` values at a time."""
        state, own = self.state[weight], _own(weight)
        if not state:
            state["exp_avg"], state["kahan_comp"] = torch.zeros_like(own), torch.zeros_like(own)
            state["exp_avg_sq"] = torch.zeros_like(own, dtype=torch.float32)
        whole = own, _own(weight.grad).contiguous(), state["exp_avg"], state["exp_avg_sq"], state["kahan_comp"]
        flat, size = tuple(one.view(-1) for one in whole), CHUNK[own.device.type]
        return zip(*(one.split(size) for one in flat), strict=True) if own.numel() > size else [flat]


def _own(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds: all of it, unless it is shared out."""
    return tensor.to_local() if is_shared(tensor) else tensor


def _chunks(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts in their order, as many at a time as have `CHUNK` values together."""
    chunk: list[Part] = []
    values = 0
    for part in parts:
        values += len(part[0])
        if chunk and values > CHUNK[part[0].device.type]:
            yield chunk
            chunk, values = [], len(part[0])
        chunk.append(part)
    if chunk:
        yield chunk


def _step_parts(parts: list[Part], steps: int, rate: float, decay: float) -> None:
    """One step of torch's AdamW in float32: of weights with their rests, of which new rests are left over."""
    weights, gradients, firsts, seconds, rests = ([*kind] for kind in zip(*parts, strict=True))
    exact = _joined(weights).to(torch.float32, copy=True).add_(_joined(rests))
    moment, square = _joined(firsts).float(), _joined(seconds)
    before = torch.full((), steps - 1.0, device=exact.device)  # which torch adds one to
    one_step(
        [exact],
        [_joined(gradients).float()],
        [moment],
        [square],
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
    if len(parts) > 1:
        _spread(square, seconds)
    _spread(moment, firsts)
    _spread(exact, weights)
    _spread(exact.sub_(_joined(weights)), rests)


def _joined(parts: list[Tensor]) -> Tensor:
    """Flat tensors end to end; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _spread(values: Tensor, parts: list[Tensor]) -> None:
    """Writes what lies end to end in `values` back to the flat tensors, in their dtype."""
    torch._foreach_copy_(parts, list(values.split([len(part) for part in parts])))
