"""Stage `csft`: the language model learns to write the next item's title from the titles before it.

Packed mode: a window of up to `history_length + 1` items is one sequence, its titles each ended by a line
break, and one causal pass supervises every title after the first. The authors train one sample a prefix
instead, with 4.8 times as many tokens on amazon-games. Source: LLM2Rec section 3.2; packing is ours.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llm2rec.data.sequences import VALIDATION, Sequences
from llm2rec.errors import ConfigError
from llm2rec.lm import backbone as backbones
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.objectives import token_loss
from llm2rec.lm.packing import Packed, TokenisedTexts, gather_texts, pack, token_budget_batches, tokenise
from llm2rec.lm.text import SEPARATOR, item_texts
from llm2rec.training import Batch, Batches, TrainSettings, default_device, stage_seed, train

EVALUATED_USERS = 128


def csft(
    sequences: Sequences,
    titles: list[str],
    *,
    model: str | Path,
    dtype: torch.dtype,
    history_length: int,
    max_title_tokens: int,
    max_tokens: int | None,
    epochs: float | None,
    batch_tokens: int,
    micro_batch_tokens: int,
    learning_rate: float,
    weight_decay: float,
    warmup_share: float,
    schedule: str,
    max_grad_norm: float,
    checkpoints: int,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    """Fine-tunes a causal language model on the training windows and writes it to `out`.

    Args:
        sequences: only training events are read for training, validation events for the perplexity.
        titles: (N,) title of item_index i + 1.
        max_tokens, epochs: the budget, exactly one of them.

    Returns:
        Summary: tokens and targets trained on, tokens per second, held-out perplexity before and after.

    Raises:
        ConfigError: the budget is smaller than one optimizer step.
    """
    began = time.perf_counter()
    lm = backbones.load(model, dtype)
    lm.set_causal(True)
    lm.model.to(default_device())
    texts = csft_texts(lm.tokenizer, titles, max_title_tokens)
    seed = stage_seed(seed, "csft")
    micro = min(micro_batch_tokens, batch_tokens)
    batches = WindowBatches(
        texts, sequences, history_length, micro, max_tokens=max_tokens, epochs=epochs, seed=seed
    )
    accumulation = max(1, round(batch_tokens / micro))
    steps = len(batches) // accumulation
    if steps == 0:
        raise ConfigError(
            f"the csft budget gives {batches.tokens:,} tokens in {len(batches)} micro-batches, under one step of "
            f"{batch_tokens:,} tokens; raise csft.max_tokens (or csft.epochs), or lower csft.batch_tokens"
        )
    held_out = held_out_batches(texts, sequences, history_length, micro, seed)
    before = perplexity(lm, held_out)
    trained = time.perf_counter()
    summary = train(
        lm.model,
        batches,
        TokenObjective(lm),
        out=out,
        settings=TrainSettings(
            max_steps=steps,
            accumulation=accumulation,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=math.ceil(warmup_share * steps),
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            checkpoint_every=math.ceil(steps / checkpoints) if checkpoints else 0,
            seed=seed,
        ),
        description="csft",
    )
    seconds = time.perf_counter() - trained
    after = perplexity(lm, held_out)
    backbones.save(lm, out)
    return {
        "steps": summary.steps,
        "tokens": batches.tokens,
        "targets": batches.targets,
        "train_seconds": round(seconds, 1),
        "tokens_per_second": round(batches.tokens / seconds, 1),
        "perplexity_before": round(before, 3),
        "perplexity_after": round(after, 3),
        "seconds": round(time.perf_counter() - began, 1),
    }


def csft_texts(tokenizer: Any, titles: list[str], max_title_tokens: int) -> TokenisedTexts:
    r"""Each title's tokens followed by the separator's, as they stand inside a window.

    Titles and separator are tokenised apart; with "\n" the joint text gives the same tokens (FACTS).
    """
    plain = tokenise(tokenizer, item_texts(titles), max_title_tokens, special_tokens=False)
    separator = np.array(tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"], dtype=np.int64)
    tokens = np.insert(plain.tokens, np.repeat(plain.offsets[1:], len(separator)), np.tile(separator, len(plain)))
    return TokenisedTexts(tokens, plain.offsets + len(separator) * np.arange(len(plain) + 1))


def supervise(texts: TokenisedTexts, item_sequences: list[np.ndarray], first_target: list[int]) -> Batch:
    """A packed row of item sequences with the positions and labels of its targets.

    Args:
        item_sequences: item indices (1..N) of each sequence, oldest first.
        first_target: in each sequence, the position of the first item that is a target (>= 1); titles
            from there on, with their separators, are the labels.

    Returns:
        `pack`'s inputs and `rows` (M,), `labels` (M,), `n_targets` = M.
    """
    tokens, title_lengths = gather_texts(texts, np.concatenate(item_sequences) - 1)
    owners = np.repeat(np.arange(len(item_sequences)), [len(items) for items in item_sequences])
    lengths = np.bincount(owners, weights=title_lengths).astype(np.int64)
    order = np.concatenate([np.arange(len(items)) for items in item_sequences])
    is_target = np.repeat(order >= np.repeat(first_target, [len(s) for s in item_sequences]), title_lengths)
    positions = np.flatnonzero(is_target)
    return {
        **pack(tokens, lengths),
        "rows": torch.from_numpy(positions - 1),
        "labels": torch.from_numpy(tokens[positions]),
        "n_targets": len(positions),
    }


class WindowBatches(Batches):
    """The whole training as micro-batches: shuffled passes over the windows until the budget is spent."""

    def __init__(
        self,
        texts: TokenisedTexts,
        sequences: Sequences,
        history_length: int,
        micro_batch_tokens: int,
        *,
        max_tokens: int | None,
        epochs: float | None,
        seed: int,
    ) -> None:
        self._texts = texts
        self._items, _ = sequences.training()
        self._starts, self._ends = sequences.windows(history_length)
        running = np.concatenate([[0], np.cumsum(texts.lengths[np.asarray(self._items) - 1])])
        lengths = running[self._ends] - running[self._starts]
        budget = max_tokens if max_tokens is not None else int(round((epochs or 0) * lengths.sum()))
        order = _passes(lengths, budget, np.random.default_rng(seed))
        chosen = lengths[order]
        self._batches = [order[rows] for rows in token_budget_batches(chosen, micro_batch_tokens)]
        self.tokens = int(chosen.sum())
        first = texts.lengths[np.asarray(self._items)[self._starts[order]] - 1]
        self.targets = int((self._ends - self._starts)[order].sum() - len(order))
        self.target_tokens = int(self.tokens - first.sum())

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        windows = [
            np.asarray(self._items[self._starts[window] : self._ends[window]]) for window in self._batches[index]
        ]
        return supervise(self._texts, windows, [1] * len(windows))


def _passes(lengths: np.ndarray, budget: int, generator: np.random.Generator) -> np.ndarray:
    """Window numbers in the order of training: shuffled passes, cut where `budget` tokens are reached."""
    total = int(lengths.sum())
    passes = max(1, math.ceil(budget / total))
    order = np.concatenate([generator.permutation(len(lengths)) for _ in range(passes)])
    return order[: int(np.searchsorted(np.cumsum(lengths[order]), budget, side="right"))]


class TokenObjective:
    """The summed loss of a packed row with `rows` and `labels`; for CSFT and MNTP."""

    def __init__(self, lm: Backbone) -> None:
        self._lm = lm

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of one micro-batch, summed over its targets."""
        return token_loss(self._lm.hidden_states(batch), self._lm.head, batch["rows"], batch["labels"])


def held_out_batches(
    texts: TokenisedTexts, sequences: Sequences, history_length: int, micro_batch_tokens: int, seed: int
) -> list[Batch]:
    """Validation events of a sample of users, each after its history; only the event's title is labelled."""
    positions = sequences.held_out(VALIDATION)
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(positions, min(EVALUATED_USERS, len(positions)), replace=False))
    histories = sequences.histories(chosen, history_length)
    whole = [
        np.append(history[history > 0], target)
        for history, target in zip(histories, np.asarray(sequences.items)[chosen], strict=True)
    ]
    whole = [items for items in whole if len(items) > 1]
    lengths = np.array([int(texts.lengths[items - 1].sum()) for items in whole])
    batches = []
    for rows in token_budget_batches(lengths, micro_batch_tokens):
        members = [whole[row] for row in rows]
        batches.append(supervise(texts, members, [len(items) - 1 for items in members]))
    return batches


def perplexity(lm: Backbone, batches: list[Batch]) -> float:
    """Exp of the mean loss per labelled token (>= 1)."""
    lm.model.eval()
    total, targets = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            moved = to_device(batch, lm.model.device)
            total += float(TokenObjective(lm)(lm.model, moved))
            targets += batch["n_targets"]
    return math.exp(total / targets)


def to_device(batch: Packed, device: torch.device) -> Packed:
    """A batch with its tensors, also nested ones, on `device`."""
    return {
        name: to_device(value, device)
        if isinstance(value, dict)
        else (value.to(device) if isinstance(value, torch.Tensor) else value)
        for name, value in batch.items()
    }
