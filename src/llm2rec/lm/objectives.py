"""The losses of the language stages: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from llm2rec.processes import processes
from llm2rec.softmax import linear_cross_entropy


def token_loss(hidden: Tensor, head: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross-entropy at the supervised positions only (scalar, nats, float32).

    Serves CSFT and MNTP alike: in both, position i - 1 of the row predicts token i (MNTP keeps the causal
    shift, so it needs no head of its own).

    Args:
        hidden: (1, T, H) last hidden states of a packed row.
        head: (V, H) output embedding.
        rows: (M,) positions whose next token is a target.
        labels: (M,) that token.
    Source: LLM2Rec sections 3.2 and 3.3.
    """
    return linear_cross_entropy(hidden[0].index_select(0, rows), head, labels)


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Mean InfoNCE between two dropout views of the same items (scalar, nats, float32).

    Row i of `first` and `second` is one item; every other row of `second` is its negative, so equal
    titles in a batch are false negatives: sample without duplicates.

    Args:
        first, second: (B, D), any float dtype; compared in float32, half precision ties scores.
        temperature: > 0, divides the cosine (the authors' code states its inverse, 10).

    Raises:
        ValueError: shapes differ, B < 2, or temperature <= 0.

    Source: LLM2Rec section 3.3; unsupervised SimCSE (Gao et al. 2021).
    """
    if first.shape != second.shape or first.ndim != 2 or len(first) < 2:
        raise ValueError(f"need two equal (B, D) views with B >= 2, got {first.shape} and {second.shape}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    cosine = F.normalize(first.float(), dim=-1) @ F.normalize(second.float(), dim=-1).T  # (B, B)
    return F.cross_entropy(cosine / temperature, torch.arange(len(first), device=first.device))


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, (processes * B, D), in the order of their ranks; gradients find their way back.

    Each process must give as many rows. What every process makes of the result counts: the gradient of
    `rows` is the sum over the processes. Of a single process, `rows` themselves.
    """
    return _GatheredRows.apply(rows) if processes().count > 1 else rows


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(processes().count)]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total.chunk(processes().count)[processes().rank]


def cached_gradient_loss(
    encode: Callable[[int], tuple[Tensor, Tensor]], chunks: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """A loss over all rows of a large batch with the memory of one chunk (scalar).

    Every chunk is encoded without gradients, the loss gives the gradient of each vector, and `backward` on
    the returned scalar encodes chunk after chunk again, with the same dropout, and passes those gradients
    on. Costs one more forward pass; the gradients equal those of the plain loss.

    Args:
        encode: chunk number -> its two views, (b, D) each; draws its dropout from the global generators.
        chunks: how many there are; a single one is encoded once, with gradients.
        loss: (B, D), (B, D) -> scalar.

    Source: GradCache (Gao et al. 2021, arXiv 2101.06983).
    """
    if chunks == 1:
        return loss(*encode(0))
    states, views = [], []
    with torch.no_grad():
        for chunk in range(chunks):
            states.append(_random_state())
            views.append(encode(chunk))
    first = torch.cat([view[0] for view in views]).requires_grad_()
    second = torch.cat([view[1] for view in views]).requires_grad_()
    with torch.enable_grad():
        value = loss(first, second)
    sizes = [len(view[0]) for view in views]
    gradients = [gradient.split(sizes) for gradient in torch.autograd.grad(value, (first, second))]

    def replay(scale: Tensor) -> None:
        after = _random_state()
        for chunk, state in enumerate(states):
            _set_random_state(state)
            with torch.enable_grad():
                pair = encode(chunk)
            torch.autograd.backward(pair, [gradient[chunk].to(pair[0]) * scale for gradient in gradients])
        _set_random_state(after)

    result = value.detach().requires_grad_()
    result.register_hook(replay)
    return result


def _random_state() -> Sequence[Tensor]:
    accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *accelerators]


def _set_random_state(state: Sequence[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(list(state[1:]))
