"""Layers whose weights, gradients and moments are shared out among processes (FSDP), by torch's `fully_shard`.

What is not a layer (embeddings, final norm, head) stays whole in every process: objectives may use it outside the
model's own forward pass. Where nothing is shared out, nothing here imports torch.distributed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llm2rec.errors import ConfigError
from llm2rec.processes import processes


@contextmanager
def shared_out(layers: nn.ModuleList | None) -> Iterator[None]:
    """While this lasts each process keeps one part of every layer; then all have the whole, trained layers again.

    A layer is put together for its forward and its backward pass only; gradients are averaged over the processes
    in float32. All processes must call the layers alike.

    Args:
        layers: replaced in place; None shares out nothing.

    Raises:
        ConfigError: there is one process only.
    """
    if layers is None:
        yield
        return
    if processes().count == 1:
        raise ConfigError(
            "`shard` shares the layers out among processes, and there is one: start several (torchrun)"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blanks = [_without_values(layer) for layer in layers]
    mesh = init_device_mesh(next(layers.parameters()).device.type, (processes().count,))
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=exact)
    yield
    for place, blank in enumerate(blanks):
        blank.load_state_dict(whole_state(layers[place]), assign=True)
        layers[place] = blank


def _without_values(layer: nn.Module) -> nn.Module:
    """A copy of a layer that holds no weights, with the same attributes, the configuration among them."""
    known: dict[int, Any] = {
        id(value): value for module in layer.modules() for name, value in vars(module).items() if name[0] != "_"
    }
    known |= {id(one): nn.Parameter(one.detach().to("meta"), one.requires_grad) for one in layer.parameters()}
    return copy.deepcopy(layer, known)


def is_shared(tensor: Tensor | None) -> bool:
    """Whether this process holds only a part of it."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, whole in every process; each must come here."""
    state: Mapping[str, Any] = model.state_dict()
    return {name: value.full_tensor() if is_shared(value) else value for name, value in state.items()}


def parts_of(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Whole weights, as `model.load_state_dict` takes them: of what is shared out this process's part."""
    own = model.state_dict()
    return {
        name: _part(value, own[name]) if is_shared(own.get(name)) else value for name, value in weights.items()
    }


def _part(value: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def average_gradients(model: nn.Module) -> None:
    """Replaces every gradient by its mean over the processes, summed in float32; each must come here."""
    from torch.distributed import all_reduce

    for parameter in model.parameters():
        if parameter.grad is not None and not is_shared(parameter.grad):  # parts are means already
            total = parameter.grad.float()
            all_reduce(total)
            parameter.grad.copy_(total / processes().count)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients down to a norm of at most `max_norm`; their norm before, over all processes' parts."""
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    groups = [[one for one in trained if is_shared(one.grad) is shared] for shared in (True, False)]
    norms: list[Any] = [torch.nn.utils.get_total_norm([one.grad for one in group]) for group in groups if group]
    norm = torch.linalg.vector_norm(torch.stack([one.full_tensor() if is_shared(one) else one for one in norms]))
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
