"""Stage `csft`: the language model learns to write the next item's title from the titles before it.

Mode `packed`: a window of up to `history_length + 1` items is one sequence, its titles each ended by a line
break, and one causal pass supervises every title after the first. Mode `paper`: the authors' samples, one a
target, with 4.8 times as many tokens on amazon-games. Mode `tree`: the same samples, what they share computed
once. Source: LLM2Rec section 3.2; packing and trees are ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llm2rec import artifacts, progress
from llm2rec.batches import Batch, Batches
from llm2rec.checkpoints import go_on_from, keep_stable, last_complete, processes_of, step_of
from llm2rec.data.sequences import VALIDATION, Sequences
from llm2rec.errors import ArtifactError, ConfigError
from llm2rec.lm import backbone as backbones
from llm2rec.lm import samples as sampling
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.learner import Learner
from llm2rec.lm.objectives import token_loss
from llm2rec.lm.packing import (
    TokenisedTexts,
    added_tokens,
    gather_texts,
    pack,
    shuffled_pass,
    to_device,
    token_budget_batches,
    tokenise,
)
from llm2rec.lm.samples import Samples
from llm2rec.lm.text import SEPARATOR, item_texts
from llm2rec.processes import processes
from llm2rec.training import TrainSettings

EVALUATED_USERS = 128
MODES = ("packed", "paper", "tree")


def csft(
    sequences: Sequences,
    titles: list[str],
    learner: Learner,
    *,
    history_length: int,
    max_tokens: int | None,
    epochs: float | None,
    batch_tokens: int,
    micro_batch_tokens: int,
    checkpoints: int,
    mode: str = "packed",
    paper_separator: bool = False,
    evaluations: int = 0,
    patience: int | None = None,
    user_shares: np.ndarray | None = None,
    extends: Path | None = None,
) -> dict[str, Any]:
    """Fine-tunes a causal language model on the training events and writes it to the learner's folder.

    Args:
        sequences: only training events are read for training, validation events for the perplexity.
        titles: (N,) title of item_index i + 1.
        max_tokens, epochs: the budget, exactly one of them.
        paper_separator: modes `paper` and `tree` only; see `samples.make_samples`.
        evaluations: held-out perplexities in the course of the stage; with any, the weights with the lowest
            one win (of those, not of the model that the stage started from), and checkpoints are written then
            instead of `checkpoints` times.
        patience: evaluations without a gain before the stage stops.
        user_shares: (U,) in (0, 1], the probability that a pass trains on a sequence of the user; None = 1.
        extends: what a shorter training under `wsd`, with equal arguments beside budget, warm-up and decay, had
            before its decay (its folder `stable`): this one goes on from there, with the same weights in the
            end as had it taken those steps itself.

    Returns:
        Summary: tokens and targets trained on, tokens per second, held-out perplexity before and after; of an
        extended training all of it, the part that it did not repeat included.

    Raises:
        ConfigError: the budget is smaller than one optimizer step, or ends before the decay of the training
            that it extends; arguments that exclude each other.
        ArtifactError: what it goes on from was trained by a number of processes that makes other micro-batches.
    """
    began = time.perf_counter()
    _check_arguments(mode, paper_separator, evaluations, patience)
    gone_on_from = last_complete(learner.out / artifacts.CHECKPOINTS) or extends
    if gone_on_from:
        _check_processes(gone_on_from, batch_tokens, micro_batch_tokens)
    lm, merge = learner.load("csft", causal=True)
    micro, accumulation = _cut(batch_tokens, micro_batch_tokens, processes().count)
    budget = Budget(micro, max_tokens, epochs)
    form = Form(mode, history_length, learner.max_title_tokens, paper_separator)
    seed = learner.seed_of("csft")
    batches, held_out = training_data(lm, sequences, titles, form, budget, seed, user_shares)
    course = _course(batches, accumulation, batch_tokens, checkpoints, evaluations)
    settings = learner.settings("csft", **course, patience=patience)
    if extends:
        settings = replace(settings, warmup_share=0.0)  # it is behind
        _check_extends(extends, settings)
        go_on_from(extends, learner.out, settings.intervals)
    summary = _train(lm, batches, held_out, settings, learner, merge)
    return summary | {"seconds": round(time.perf_counter() - began, 1)}


def _train(
    lm: Backbone,
    batches: BudgetBatches,
    held_out: list[Batch],
    settings: TrainSettings,
    learner: Learner,
    merge: Callable[[], None],
) -> dict[str, Any]:
    """Trains, merges and saves; the summary of `csft` without its total time."""
    before = perplexity(lm, held_out)
    measure = (lambda: {"perplexity": perplexity(lm, held_out)}) if settings.evaluate_every else None
    objective = TokenObjective(lm)
    summary = learner.train(lm, batches, objective, settings, description="csft", evaluate=measure)
    merge()
    after = perplexity(lm, held_out)
    _say_of_harm(round(before, 3), round(after, 3))
    backbones.save_once(lm, learner.out)
    if settings.stable_steps:
        keep_stable(learner.out, settings.stable_steps)
    tokens, targets = batches.spent(summary.steps * settings.accumulation)
    return {
        "steps": summary.steps,
        "tokens": tokens,
        "targets": targets,
        "train_seconds": round(summary.seconds, 1),
        "tokens_per_second": round(tokens / summary.seconds, 1),
        "perplexity_before": round(before, 3),
        "perplexity_after": round(after, 3),
    }


def _say_of_harm(before: float, after: float) -> None:
    if after > before:
        progress.say(
            f"note: csft raised the perplexity of held-out titles from {before} to {after}; lower "
            "csft.learning_rate, or leave the stage out (csft.max_tokens=0)"
        )


def _check_arguments(mode: str, paper_separator: bool, evaluations: int, patience: int | None) -> None:
    if mode not in MODES:
        raise ConfigError(f"csft.mode must be one of {', '.join(MODES)}; got {mode!r}")
    if paper_separator and mode == "packed":
        raise ConfigError(
            "csft.paper_separator belongs to the modes paper and tree; packed titles are always separated"
        )
    if patience is not None and not evaluations:
        raise ConfigError("csft.patience counts evaluations: set csft.evaluations as well, or leave it out")


def _cut(batch_tokens: int, micro_batch_tokens: int, sharing: int) -> tuple[int, int]:
    """Tokens of a micro-batch and how many make a step, which is about as large with any number of processes."""
    micro = min(micro_batch_tokens, max(1, batch_tokens // sharing))
    return micro, sharing * max(1, round(batch_tokens / (sharing * micro)))


def _check_processes(checkpoint: Path, batch_tokens: int, micro_batch_tokens: int) -> None:
    """Refuses to skip other micro-batches than those that a checkpoint has behind it."""
    theirs, ours = processes_of(checkpoint), processes().count
    if _cut(batch_tokens, micro_batch_tokens, theirs) != _cut(batch_tokens, micro_batch_tokens, ours):
        raise ArtifactError(
            f"{checkpoint} was trained by {theirs} processes, and {ours} would cut the data into other "
            f"micro-batches: some would come twice, some never; start {theirs}, or train from the beginning"
        )


def _check_extends(stable: Path, settings: TrainSettings) -> None:
    taken = step_of(stable)
    if settings.stable_steps is None or taken > settings.stable_steps:
        raise ConfigError(
            f"csft.extends: {stable.parent} took {taken} steps before its decay, this training only "
            f"{settings.stable_steps or 0}; raise its budget, or let it extend a shorter one"
        )


@dataclass(frozen=True)
class Form:
    """How histories become sequences of tokens."""

    mode: str
    history_length: int
    max_title_tokens: int
    paper_separator: bool

    def samples(
        self, tokenizer: Any, titles: list[str], item_sequences: list[np.ndarray], trees: np.ndarray
    ) -> Samples:
        """`make_samples` in this form, which is not `packed`."""
        options: dict[str, Any] = {"max_title_tokens": self.max_title_tokens, "separator": self.paper_separator}
        return sampling.make_samples(tokenizer, titles, item_sequences, trees, **options)


@dataclass(frozen=True)
class Budget:
    """What is trained on: `max_tokens` tokens or `epochs` passes, in micro-batches of `micro_batch_tokens`."""

    micro_batch_tokens: int
    max_tokens: int | None
    epochs: float | None


def _course(
    batches: BudgetBatches, accumulation: int, batch_tokens: int, checkpoints: int, evaluations: int
) -> dict[str, Any]:
    """How many steps, of `accumulation` micro-batches, and what happens how often."""
    steps = len(batches) // accumulation
    if steps == 0:
        raise ConfigError(
            f"the csft budget gives {batches.tokens:,} tokens in {len(batches)} micro-batches, under one step of "
            f"{batch_tokens:,} tokens; raise csft.max_tokens (or csft.epochs), or lower csft.batch_tokens"
        )
    return {
        "max_steps": steps,
        "accumulation": accumulation,
        "checkpoint_every": math.ceil(steps / checkpoints) if checkpoints else 0,
        "evaluate_every": math.ceil(steps / evaluations) if evaluations else 0,
        "metric": "perplexity",
        "greater_is_better": False,
    }


def training_data(
    lm: Backbone,
    sequences: Sequences,
    titles: list[str],
    form: Form,
    budget: Budget,
    seed: int,
    user_shares: np.ndarray | None = None,
) -> tuple[BudgetBatches, list[Batch]]:
    """The training's micro-batches, and the held-out ones that its perplexity is measured on.

    Raises:
        ConfigError, ArtifactError: the model cannot read them (`Backbone.check_readable`).
    """
    shares = np.ones(sequences.n_users) if user_shares is None else user_shares
    spent: dict[str, Any] = {"max_tokens": budget.max_tokens, "epochs": budget.epochs, "seed": seed}
    offsets = sequences.training()[1]
    micro = budget.micro_batch_tokens
    batches: BudgetBatches
    if form.mode == "packed":
        texts = csft_texts(lm.tokenizer, titles, form.max_title_tokens)
        owners = np.searchsorted(offsets, sequences.windows(form.history_length)[0], side="right") - 1
        batches = WindowBatches(texts, sequences, form.history_length, micro, shares=shares[owners], **spent)
    else:
        items, trees = sampling.training_items(sequences, form.history_length)
        samples = form.samples(lm.tokenizer, titles, items, trees)
        texts = samples.texts
        owned = np.repeat(shares, np.maximum(np.diff(offsets) - 1, 0))  # a target each event but the first
        batches = SampleBatches(samples, micro, shared=form.mode == "tree", shares=owned, **spent)
    held_out = last_title_batches(
        lm.tokenizer, titles, held_out_items(sequences, form.history_length, seed), form, micro
    )
    evaluated = max(int(batch["segments"]["lengths"].max()) for batch in held_out)
    lm.check_readable(texts, max(batches.longest, evaluated))
    return batches, held_out


def csft_texts(tokenizer: Any, titles: list[str], max_title_tokens: int) -> TokenisedTexts:
    r"""Each title's tokens followed by the separator's, as they stand inside a window.

    Titles and separator are tokenised apart, so that a title has the same tokens wherever it stands. Mostly the
    joint text gives these as well; but Qwen2's tokenizer joins "\n" to a title's end that is no letter or digit.
    """
    plain = tokenise(tokenizer, item_texts(titles), max_title_tokens, special_tokens=False)
    separator = np.array(tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"], dtype=np.int64)
    tokens = np.insert(plain.tokens, np.repeat(plain.offsets[1:], len(separator)), np.tile(separator, len(plain)))
    offsets = plain.offsets + len(separator) * np.arange(len(plain) + 1)
    return TokenisedTexts(tokens, offsets, prefix=added_tokens(tokenizer)[0])


def supervise(texts: TokenisedTexts, item_sequences: list[np.ndarray], first_target: list[int]) -> Batch:
    """A packed row of item sequences with the positions and labels of its targets.

    Each sequence stands after the prefix of the texts, which is no label.

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
    starts, size = np.cumsum(lengths) - lengths, len(texts.prefix)
    tokens = np.insert(tokens, np.repeat(starts, size), np.tile(texts.prefix, len(starts)))
    positions = np.flatnonzero(np.insert(is_target, np.repeat(starts, size), False))
    return {
        **pack(tokens, lengths + size),
        "rows": torch.from_numpy(positions - 1),
        "labels": torch.from_numpy(tokens[positions]),
        "n_targets": len(positions),
    }


class BudgetBatches(Batches):
    """The whole training as micro-batches: shuffled passes over its sequences until the budget is spent.

    tokens: that go through the model. targets: items whose title is written. longest: tokens of a sequence.

    Args:
        lengths, targets: (S,) of each sequence, in tokens and in items.
    """

    longest: int

    def __init__(
        self,
        lengths: np.ndarray,
        targets: np.ndarray,
        micro_batch_tokens: int,
        *,
        max_tokens: int | None,
        epochs: float | None,
        seed: int,
        shares: np.ndarray | None,
    ) -> None:
        shares = np.ones(len(lengths)) if shares is None else shares
        a_pass = float((lengths * shares).sum())
        budget = max_tokens if max_tokens is not None else int(round((epochs or 0) * a_pass))
        self._order = _passes(lengths, shares, budget, np.random.default_rng(seed))
        chosen = token_budget_batches(lengths[self._order], micro_batch_tokens)
        self._batches = [self._order[rows] for rows in chosen]
        self._lengths, self._targets = lengths, targets
        self.tokens, self.targets = self.spent(len(self._batches))

    def __len__(self) -> int:
        return len(self._batches)

    def spent(self, micro_batches: int) -> tuple[int, int]:
        """Tokens and targets of the first micro-batches: a training may stop before the last."""
        rows = np.concatenate([self._order[:0], *self._batches[:micro_batches]])
        return int(self._lengths[rows].sum()), int(self._targets[rows].sum())


class WindowBatches(BudgetBatches):
    """Packed rows of windows; every item of a window but its first is a target."""

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
        shares: np.ndarray | None = None,
    ) -> None:
        self._texts = texts
        self._items, _ = sequences.training()
        self._starts, self._ends = sequences.windows(history_length)
        running = np.concatenate([[0], np.cumsum(texts.lengths[np.asarray(self._items) - 1])])
        lengths = len(texts.prefix) + running[self._ends] - running[self._starts]
        spent: dict[str, Any] = {"max_tokens": max_tokens, "epochs": epochs, "seed": seed}
        super().__init__(lengths, self._ends - self._starts - 1, micro_batch_tokens, shares=shares, **spent)
        self.longest = int(lengths.max(initial=0))

    def __getitem__(self, index: int) -> Batch:
        windows = [
            np.asarray(self._items[self._starts[window] : self._ends[window]]) for window in self._batches[index]
        ]
        return supervise(self._texts, windows, [1] * len(windows))


class SampleBatches(BudgetBatches):
    """Packed rows of the authors' samples: each by itself, or `shared`, as the trees that they form."""

    def __init__(
        self,
        samples: Samples,
        micro_batch_tokens: int,
        *,
        shared: bool,
        max_tokens: int | None,
        epochs: float | None,
        seed: int,
        shares: np.ndarray | None = None,
    ) -> None:
        self._samples, self._shared = samples, shared
        numbers = np.arange(len(samples))
        starts = np.flatnonzero(np.diff(samples.trees)) + 1 if shared else numbers[1:]
        self._groups = np.split(numbers, starts)
        lengths = samples.texts.lengths
        if shared:
            sizes = [sampling.tree_size([samples.texts[row] for row in group]) for group in self._groups]
            lengths = np.array(sizes, dtype=np.int64)
        of_groups = None if shares is None else shares[[group[0] for group in self._groups]]
        spent: dict[str, Any] = {"max_tokens": max_tokens, "epochs": epochs, "seed": seed}
        targets = np.array([len(group) for group in self._groups], dtype=np.int64)
        super().__init__(lengths, targets, micro_batch_tokens, shares=of_groups, **spent)
        self.longest = int(samples.texts.lengths.max(initial=0))

    def __getitem__(self, index: int) -> Batch:
        groups = [self._groups[group] for group in self._batches[index]]
        if self._shared:
            return sampling.supervise_trees(self._samples, groups)
        return sampling.supervise_samples(self._samples, np.concatenate(groups))


def _passes(lengths: np.ndarray, shares: np.ndarray, budget: int, generator: np.random.Generator) -> np.ndarray:
    """Numbers in the order of training: shuffled passes, cut where `budget` tokens are reached."""
    chosen = [shuffled_pass(shares, generator)]
    tokens = int(lengths[chosen[0]].sum())
    while 0 < tokens < budget:
        chosen.append(shuffled_pass(shares, generator))
        tokens += int(lengths[chosen[-1]].sum())
    order = np.concatenate(chosen)
    return order[: int(np.searchsorted(np.cumsum(lengths[order]), budget, side="right"))]


class TokenObjective:
    """The summed loss of a packed row with `rows` and `labels`; for CSFT and MNTP."""

    def __init__(self, lm: Backbone) -> None:
        self._lm = lm

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of one micro-batch, summed over its targets."""
        return token_loss(self._lm.hidden_states(batch), self._lm.head, batch["rows"], batch["labels"])


def last_title_batches(
    tokenizer: Any, titles: list[str], item_sequences: list[np.ndarray], form: Form, micro_batch_tokens: int
) -> list[Batch]:
    """Packed rows of item sequences as CSFT in this form reads them; only each last item's title is labelled.

    Args:
        titles: (N,) title of item_index i + 1.
        item_sequences: item indices (1..N) of each, at least two. Trees are read as the samples that they share.
    """
    used, places = np.unique(np.concatenate(item_sequences), return_inverse=True)  # few of the catalogue
    titles = [titles[item - 1] for item in used]
    sizes = [len(items) for items in item_sequences]
    whole = np.split(places + 1, np.cumsum(sizes)[:-1])
    if form.mode != "packed":
        samples = form.samples(tokenizer, titles, whole, np.arange(len(whole)))
        chosen = token_budget_batches(samples.texts.lengths, micro_batch_tokens)
        return [sampling.supervise_samples(samples, rows) for rows in chosen]
    texts = csft_texts(tokenizer, titles, form.max_title_tokens)
    lengths = np.array([len(texts.prefix) + int(texts.lengths[items - 1].sum()) for items in whole])
    return [
        supervise(texts, [whole[row] for row in rows], [sizes[row] - 1 for row in rows])
        for rows in token_budget_batches(lengths, micro_batch_tokens)
    ]


def held_out_items(sequences: Sequences, history_length: int, seed: int) -> list[np.ndarray]:
    """Item indices of the history and then the event, for validation events of a sample of users."""
    positions = sequences.held_out(VALIDATION)
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(positions, min(EVALUATED_USERS, len(positions)), replace=False))
    histories = sequences.histories(chosen, history_length)
    whole = [
        np.append(history[history > 0], target)
        for history, target in zip(histories, np.asarray(sequences.items)[chosen], strict=True)
    ]
    return [items for items in whole if len(items) > 1]


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
