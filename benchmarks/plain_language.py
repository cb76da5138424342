"""The language stages the usual way, written plainly: what `language.py` measures ours against.

A loop as `transformers.Trainer` runs it: padded batches, an attention mask, the model's own loss over its full
logits, torch's fused AdamW, clipped gradients. The authors' sizes: CSFT samples, one a target, in micro-batches of
4; MNTP batches of 32 titles; contrastive batches of 256 with one tokenizer call a title and view. They recompute
activations (gradient checkpointing) in the last two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm2rec.lm import attention
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.objectives import contrastive_loss
from llm2rec.lm.samples import Samples

IGNORED = -100
MASK_SHARE = 0.2
DROPOUT = 0.2
LEARNING_RATE = 1e-5


def padded(rows: list[np.ndarray], fill: int, *, left: bool = False) -> Tensor:
    """Rows of different lengths as one matrix (B, L), int64."""
    longest = max(len(row) for row in rows)
    matrix = np.full((len(rows), longest), fill, dtype=np.int64)
    for place, row in enumerate(rows):
        own = slice(longest - len(row), None) if left else slice(0, len(row))
        matrix[place, own] = row
    return torch.from_numpy(matrix)


class Loop:
    """One optimizer step over micro-batches."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.train()
        self._optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)

    def step(self, losses: list[Callable[[], Tensor]]) -> None:
        """Backward of each loss, then clip and step."""
        for loss in losses:
            loss().backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def csft(lm: Backbone, samples: Samples, micro_batch: int) -> Callable[[], float]:
    """Targets a second of one optimizer step over the samples, `micro_batch` of them at a time, left-padded."""
    loop = Loop(lm.model)
    texts, firsts = samples.texts, samples.first_label
    labelled = int((texts.lengths - firsts).sum())

    def loss_of(rows: np.ndarray) -> Tensor:
        tokens = [texts[row] for row in rows]
        labels = [np.where(np.arange(len(texts[row])) < firsts[row], IGNORED, texts[row]) for row in rows]
        seen = [np.ones(len(row), dtype=np.int64) for row in tokens]
        return lm.model(
            input_ids=padded(tokens, lm.tokenizer.pad_token_id, left=True),
            attention_mask=padded(seen, 0, left=True),
            labels=padded(labels, IGNORED, left=True),
            num_items_in_batch=labelled,
            use_cache=False,
        ).loss

    def run() -> float:
        began = time.perf_counter()
        starts = range(0, len(samples), micro_batch)
        parts = [np.arange(start, min(start + micro_batch, len(samples))) for start in starts]
        loop.step([lambda rows=rows: loss_of(rows) for rows in parts])
        return len(samples) / (time.perf_counter() - began)

    return run


def mntp(
    lm: Backbone, titles: list[str], mask_token: int, batch_size: int, *, recompute: bool
) -> Callable[[], float]:
    """Titles a second of masked prediction, full logits, one step a batch of `batch_size`."""
    lm.set_causal(False)
    recompute_activations(lm.model, recompute)
    loop, generator = Loop(lm.model), np.random.default_rng(0)

    def loss_of(batch: list[str]) -> Tensor:
        encoded = lm.tokenizer(batch, padding=True, return_tensors="pt", add_special_tokens=False)
        tokens, seen = encoded["input_ids"], encoded["attention_mask"]
        hidden = torch.from_numpy(generator.random(tokens.shape) < MASK_SHARE) & (seen == 1)
        hidden[:, 0] = False  # no position before it could predict it
        return lm.model(
            input_ids=tokens.masked_fill(hidden, mask_token),
            attention_mask=seen,
            labels=tokens.masked_fill(~hidden, IGNORED),
            use_cache=False,
        ).loss

    def run() -> float:
        began = time.perf_counter()
        for start in range(0, len(titles), batch_size):
            loop.step([lambda batch=titles[start : start + batch_size]: loss_of(batch)])
        return len(titles) / (time.perf_counter() - began)

    return run


def contrastive(
    lm: Backbone, titles: list[str], max_tokens: int, temperature: float, *, recompute: bool
) -> Callable[[], float]:
    """Titles a second of one contrastive step: two forward passes, one tokenizer call a title and view."""
    lm.set_causal(False)
    recompute_activations(lm.model, recompute)
    loop = Loop(lm.model)

    def view() -> Tensor:
        options: dict[str, Any] = {"truncation": True, "max_length": max_tokens}
        rows = [np.array(lm.tokenizer(title, **options)["input_ids"]) for title in titles]
        seen = padded([np.ones(len(row), dtype=np.int64) for row in rows], 0)
        tokens = padded(rows, lm.tokenizer.pad_token_id)
        states = lm.model(input_ids=tokens, attention_mask=seen, use_cache=False).last_hidden_state
        weights = seen[:, :, None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)

    def run() -> float:
        began = time.perf_counter()
        with attention.dropout(lm.model, DROPOUT):
            loop.step([lambda: contrastive_loss(view(), view(), temperature)])
        return len(titles) / (time.perf_counter() - began)

    return run


def recompute_activations(model: Any, wanted: bool) -> None:
    """Turns gradient checkpointing on or off, as transformers does it."""
    if wanted:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def rows_one_by_one(
    tokenizer: Any, histories: list[str], targets: list[str], micro_batch: int
) -> Callable[[], float]:
    """Targets a second of tokenising two texts a row, one call each, and padding `micro_batch` rows."""

    def run() -> float:
        began = time.perf_counter()
        for start in range(0, len(targets), micro_batch):
            rows = []
            for place in range(start, min(start + micro_batch, len(targets))):
                history = tokenizer(histories[place], add_special_tokens=False)["input_ids"]
                target = tokenizer(targets[place], add_special_tokens=False)["input_ids"]
                rows.append(np.array([*history, *target, tokenizer.eos_token_id]))
            padded(rows, tokenizer.pad_token_id, left=True)
        return len(targets) / (time.perf_counter() - began)

    return run
