"""Stage `iem`, item-level embedding modelling: the language model becomes an encoder of items, seeing both ways.

Masked next-token prediction (MNTP) teaches it to use the future, contrastive learning on two dropout views
of each title spreads the vectors. Both read titles of the whole catalogue, no interactions; validation
pairs only decide when the contrastive part stops. Source: LLM2Rec section 3.3.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llm2rec import progress
from llm2rec.batches import Batch, Batches
from llm2rec.data.sequences import VALIDATION, Sequences
from llm2rec.errors import ArtifactError, ConfigError, DataError
from llm2rec.lm import attention
from llm2rec.lm import backbone as backbones
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.csft import TokenObjective
from llm2rec.lm.encode import encode_tokens
from llm2rec.lm.export import export
from llm2rec.lm.learner import Learner
from llm2rec.lm.objectives import cached_gradient_loss, contrastive_loss, gather_rows
from llm2rec.lm.packing import (
    Packed,
    TokenisedTexts,
    added_tokens,
    gather_texts,
    pack,
    positions_within,
    shuffled_pass,
    token_budget_batches,
    tokenise,
)
from llm2rec.lm.pooling import MEAN, Pooling, embed
from llm2rec.lm.positives import consumed_next, distinct_batches
from llm2rec.lm.text import item_texts
from llm2rec.processes import processes
from llm2rec.training import TrainSettings, stage_seed

MASK_TEXT = "_"  # the authors' mask token: decoders have none of their own
EVALUATED_PAIRS = 512


def mntp(
    titles: list[str],
    learner: Learner,
    *,
    steps: int,
    batch_size: int,
    mask_share: float,
    checkpoints: int,
    shares: np.ndarray | None = None,
) -> dict[str, Any]:
    """Trains a bidirectional model to fill in masked title tokens and writes it, with its head.

    Args:
        shares: (N,) in [0, 1], the probability that a pass trains on a title; 0 for held-out items. None = 1.

    Returns:
        Summary: steps, tokens, tokens per second, loss of the first and last logged steps.
    """
    lm, merge = learner.load("mntp", causal=False)
    plain, of_texts = trained_texts(titles, shares)
    texts = tokenise(lm.tokenizer, plain, learner.max_title_tokens, special_tokens=True)
    lm.check_readable(texts, int(texts.lengths.max()))
    parts, mask, seed = processes().count, _mask_token(lm.tokenizer), learner.seed_of("mntp")
    added = sum(added_tokens(lm.tokenizer), ())
    batches = MaskedBatches(texts, mask, steps, batch_size, mask_share, seed, parts, of_texts, added)
    every = math.ceil(steps / checkpoints) if checkpoints else 0
    settings = learner.settings("mntp", max_steps=steps, accumulation=parts, checkpoint_every=every)
    summary = learner.train(lm, batches, TokenObjective(lm), settings, description="mntp")
    merge()
    backbones.save_once(lm, learner.out)
    losses = [log["loss"] for log in summary.history if "loss" in log]
    return {
        "steps": summary.steps,
        "tokens": batches.tokens,
        "tokens_per_second": round(batches.tokens / summary.seconds, 1),
        "loss_first": round(losses[0], 4) if losses else None,
        "loss_last": round(losses[-1], 4) if losses else None,
    }


def contrastive(
    sequences: Sequences,
    titles: list[str],
    learner: Learner,
    *,
    steps: int,
    batch_size: int,
    temperature: float,
    dropout: float,
    evaluations: int,
    patience: int,
    micro_batch_tokens: int,
    causal: bool = False,
    positives: str = "dropout",
    pooling: Pooling = MEAN,
    shares: np.ndarray | None = None,
) -> dict[str, Any]:
    """Trains the item encoder and writes it as a SentenceTransformer folder.

    Validation is the AUC of held-out co-consumption: how often the item a user consumed next is nearer to
    the item before it than what another user consumed next. The best validated state wins, also where all are
    worse than the model that the stage started from, which is said then.

    Args:
        causal: whether the encoder's tokens see only those before them, as the model was pretrained. Ours, because
            a model switched to bidirectional attention first loses what it knows, and a short stage may not
            make up for it.
        positives: `dropout`, two views of each title by attention dropout; or `consumed-next`, the titles of
            two items consumed one after the other in the training events. `dropout` then merely regularises, and
            a model whose attention has none goes without.
        shares: (N,) in [0, 1], the probability that a pass trains on a title; 0 for held-out items. None = 1.

    Returns:
        Summary: steps, titles a step, seconds of training, AUC before and after, the step of the best state.

    Raises:
        ConfigError: dropout views of a model without attention dropout, or as `contrastive_batches`.
        ArtifactError: the exported folder cannot express the pooling, or does not give the encoder's vectors.
    """
    pooling.exported()  # refused before it is trained for
    lm, merge = learner.load("contrastive", causal=causal, head=False)
    if steps:
        check_views(lm.model, positives, dropout)
    length, seed = learner.max_title_tokens, learner.seed_of("contrastive")
    pairs = ValidationPairs(sequences, item_texts(titles), lm.tokenizer, length, seed, pooling)
    summary: dict[str, Any] = {"auc_before": round(pairs.auc(lm), 4)}
    if steps:
        pairing = positives, steps, batch_size, micro_batch_tokens, learner.seed, shares
        batches = contrastive_batches(lm, sequences, titles, length, *pairing)
        course: dict[str, Any] = {"max_steps": steps, "evaluate_every": math.ceil(steps / evaluations)}
        course |= {"patience": patience, "metric": "auc", "accumulation": processes().count}
        settings = learner.settings("contrastive", **course)
        objective = ContrastiveObjective(lm, temperature, pooling)
        summary |= _train(lm, batches, objective, pairs, dropout, settings, learner)
        _say_of_harm(summary["auc_before"], summary["auc_after"])
    merge()
    export(lm, titles, length, learner.out, pooling)
    return summary


def _train(
    lm: Backbone,
    batches: TitleBatches,
    objective: ContrastiveObjective,
    pairs: ValidationPairs,
    dropout: float,
    settings: TrainSettings,
    learner: Learner,
) -> dict[str, Any]:
    """The contrastive training itself; its part of the summary."""

    def measure() -> dict[str, float]:
        return {"auc": pairs.auc(lm)}

    with attention.dropout(lm.model, dropout):
        trained = learner.train(lm, batches, objective, settings, description="contrastive", evaluate=measure)
    summary = {"steps": trained.steps, "best_step": trained.best_step, "batch_size": batches.batch_size}
    return summary | {"train_seconds": round(trained.seconds, 1), "auc_after": round(pairs.auc(lm), 4)}


def _say_of_harm(before: float, after: float) -> None:
    if after < before:
        progress.say(
            f"note: the contrastive stage lowered the AUC of validation pairs from {before} to {after}; lower "
            "iem.contrastive.learning_rate, or leave the stage out (iem.contrastive.steps=0)"
        )


def distinct_texts(
    tokenizer: Any, titles: list[str], max_title_tokens: int, special_tokens: bool
) -> TokenisedTexts:
    """Each distinct item text once, tokenised; a repeated title would be its own negative."""
    return tokenise(tokenizer, sorted(set(item_texts(titles))), max_title_tokens, special_tokens)


def check_titles(titles: list[str], model: str | Path, max_title_tokens: int) -> None:
    """Refuses, before CSFT is paid for, titles that the item encoder cannot be trained on.

    Raises:
        DataError: all titles are equal, or each is a single token.
    """
    texts = distinct_texts(backbones.load_tokenizer(model), titles, max_title_tokens, special_tokens=False)
    if len(texts) < 2:
        raise DataError(f"every item has the title {titles[0]!r}; titles must tell items apart")
    if texts.lengths.max() < 2:
        raise DataError(
            f"every title is a single token (for example {titles[0]!r}): there is no text to learn from; "
            "give titles in words"
        )


def check_views(model: nn.Module, positives: str, dropout: float) -> None:
    """Refuses two views by dropout of a model whose attention has none.

    Args:
        model: with or without weights (`backbone.outline`).

    Raises:
        ConfigError: it has none.
    """
    if positives == "dropout" and dropout and not attention.has_attention_dropout(model):
        raise ConfigError(
            f"{type(model).__name__} has no attention dropout to make two views of a title with; use "
            "iem.contrastive.positives=consumed-next, or another model"
        )


def contrastive_batches(
    lm: Backbone,
    sequences: Sequences,
    titles: list[str],
    max_title_tokens: int,
    positives: str,
    steps: int,
    batch_size: int,
    micro_batch_tokens: int,
    seed: int,
    shares: np.ndarray | None = None,
) -> TitleBatches:
    """Batches of the pairs of titles that `contrastive_pairs` chooses.

    Args:
        seed: of the recipe.

    Raises:
        ConfigError: see `contrastive_pairs`; or a batch that cannot be shared out.
        ArtifactError: the model cannot read the titles.
    """
    distinct, pairs = contrastive_pairs(sequences, titles, positives, steps, batch_size, seed, shares)
    texts = tokenise(lm.tokenizer, distinct, max_title_tokens, special_tokens=True)
    lm.check_readable(texts, int(texts.lengths.max()))
    return TitleBatches(texts, pairs, micro_batch_tokens, processes().count)


def contrastive_pairs(
    sequences: Sequences,
    titles: list[str],
    positives: str,
    steps: int,
    batch_size: int,
    seed: int,
    shares: np.ndarray | None = None,
) -> tuple[list[str], list[np.ndarray]]:
    """The distinct texts, and of each step the numbers (B, 2) of those that it pairs; see `contrastive`.

    Needs no language model, so that what the data cannot give is refused before one is trained.

    Args:
        seed: of the recipe.

    Raises:
        ConfigError: unknown positives, fewer than two titles, or a batch that cannot be filled.
    """
    distinct, of_texts = trained_texts(titles, shares)
    if len(distinct) < 2:
        raise ConfigError("contrastive learning needs at least two different titles")
    seed = stage_seed(seed, "contrastive")
    if positives == "dropout":
        views = shuffled_batches(of_texts, steps, batch_size, seed)
        return distinct, [np.stack([rows, rows], axis=1) for rows in views]
    if positives == "consumed-next":
        number = {text: place for place, text in enumerate(distinct)}
        text_of_item = np.array([number.get(text, -1) for text in item_texts(titles)])  # held-out: never consumed
        following = consumed_next(sequences, text_of_item)
        return distinct, distinct_batches(following, steps, batch_size, seed, of_texts)
    raise ConfigError(f"positives must be dropout or consumed-next; got {positives!r}")


def _mask_token(tokenizer: Any) -> int:
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    ids = tokenizer(MASK_TEXT, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ArtifactError(f"the tokenizer writes the mask {MASK_TEXT!r} as {len(ids)} tokens, not one")
    return int(ids[0])


def trained_texts(titles: list[str], shares: np.ndarray | None) -> tuple[list[str], np.ndarray]:
    """The distinct texts of the titles with a share above 0, and the largest share of each text."""
    shares = np.ones(len(titles)) if shares is None else shares
    plain = np.array(item_texts(titles), dtype=object)[shares > 0]
    distinct, place = np.unique(plain, return_inverse=True)
    of_texts = np.zeros(len(distinct))
    np.maximum.at(of_texts, place, shares[shares > 0])
    return distinct.tolist(), of_texts


def shuffled_batches(shares: np.ndarray, steps: int, batch_size: int, seed: int) -> list[np.ndarray]:
    """`steps` batches of text numbers from shuffled passes, none with the same text twice.

    Args:
        shares: (texts,) the probability that a pass has each text; a batch is no larger than most passes.
    """
    size = min(batch_size, len(shares) if (shares == 1).all() else max(1, int(0.9 * shares.sum())))
    generator = np.random.default_rng(seed)
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        order = shuffled_pass(shares, generator)
        batches += [order[first : first + size] for first in range(0, len(order) - size + 1, size)]
    return batches[:steps]


class MaskedBatches(Batches):
    """Packed titles with a share of their tokens masked; the masked tokens are the labels.

    Never masked are position 0, because no position before it could predict it, and the tokens `added` by the
    tokenizer. A title without another token is left out; any other has at least one masked token. A step's titles
    come in `parts` micro-batches, one a process, masked as they would be in one.
    """

    def __init__(
        self,
        texts: TokenisedTexts,
        mask_token: int,
        steps: int,
        batch_size: int,
        share: float,
        seed: int,
        parts: int = 1,
        shares: np.ndarray | None = None,
        added: tuple[int, ...] = (),
    ) -> None:
        maskable = (positions_within(texts.lengths) > 0) & ~np.isin(texts.tokens, added)
        usable = np.flatnonzero(np.logical_or.reduceat(maskable, texts.offsets[:-1]))  # some are: see check_titles
        tokens, lengths = gather_texts(texts, usable)
        self._texts = TokenisedTexts(tokens, np.concatenate([[0], np.cumsum(lengths)]))
        of_usable = np.ones(len(usable)) if shares is None else shares[usable]
        self._chosen = shuffled_batches(of_usable, steps, batch_size, seed)
        self._mask_token, self._share, self._seed, self._parts = mask_token, share, seed, parts
        self._added = added
        self.tokens = int(sum(self._texts.lengths[chosen].sum() for chosen in self._chosen))
        if len(self._chosen[0]) < parts:
            raise ConfigError(f"{len(self._chosen[0])} titles a step cannot be shared by {parts} processes")

    def __len__(self) -> int:
        return len(self._chosen) * self._parts

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self._parts)
        tokens, lengths = gather_texts(self._texts, self._chosen[step])
        generator = np.random.default_rng([self._seed, step])
        barred = (positions_within(lengths) == 0) | np.isin(tokens, self._added)
        noise = np.where(barred, np.inf, generator.random(len(tokens)))
        starts = np.cumsum(lengths) - lengths
        lowest = np.repeat(np.minimum.reduceat(noise, starts), lengths)
        hidden = (noise < self._share) | (noise == lowest)
        rows = np.array_split(np.arange(len(lengths)), self._parts)[part]
        own = slice(starts[rows[0]], starts[rows[-1]] + lengths[rows[-1]])
        masked = np.flatnonzero(hidden[own])
        return {
            **pack(np.where(hidden[own], self._mask_token, tokens[own]), lengths[rows]),
            "rows": torch.from_numpy(masked - 1),
            "labels": torch.from_numpy(tokens[own][masked]),
            "n_targets": len(masked),
        }


class TitleBatches(Batches):
    """Pairs of titles in chunks of `micro_batch_tokens`, in a chunk all first ones, then all second ones.

    Args:
        pairs: of each step, text numbers (B, 2); a view of a title pairs it with itself.
        parts: micro-batches that a step's pairs come in, one a process.
    """

    def __init__(
        self, texts: TokenisedTexts, pairs: list[np.ndarray], micro_batch_tokens: int, parts: int = 1
    ) -> None:
        self._texts, self._pairs, self._parts = texts, pairs, parts
        self._micro_batch_tokens = micro_batch_tokens
        self.batch_size = len(pairs[0])
        if self.batch_size % parts:
            raise ConfigError(
                f"{self.batch_size} pairs of titles a step cannot be shared evenly by {parts} processes; make "
                "iem.contrastive.batch_size a multiple"
            )

    def __len__(self) -> int:
        return len(self._pairs) * self._parts

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self._parts)
        parts = [self._cut(pairs) for pairs in np.split(self._pairs[step], self._parts)]
        own = _split_up(parts[part], max(len(chunks) for chunks in parts))
        packed = [pack(*gather_texts(self._texts, pairs.T.ravel())) for pairs in own]
        chunks: dict[str, Packed] = {f"chunk{number}": chunk for number, chunk in enumerate(packed)}
        return {"chunks": chunks, "n_targets": sum(len(pairs) for pairs in own)}

    def _cut(self, pairs: np.ndarray) -> list[np.ndarray]:
        """Pairs (B, 2) in chunks within the budget of tokens, longest first."""
        lengths = self._texts.lengths[pairs].sum(axis=1)
        order = np.argsort(-lengths, kind="stable")
        return [pairs[order[rows]] for rows in token_budget_batches(lengths[order], self._micro_batch_tokens)]


def _split_up(chunks: list[np.ndarray], count: int) -> list[np.ndarray]:
    """`count` chunks instead of fewer, the ones with most pairs halved.

    Every process has as many, because layers shared out among them are called by all or by none.
    """
    chunks = list(chunks)
    while len(chunks) < count:
        largest = max(range(len(chunks)), key=lambda number: len(chunks[number]))
        chunks[largest : largest + 1] = np.array_split(chunks[largest], 2)
    return chunks


class ContrastiveObjective:
    """The summed InfoNCE of a batch from `TitleBatches`, over all its chunks at once."""

    def __init__(self, lm: Backbone, temperature: float, pooling: Pooling = MEAN) -> None:
        self._lm, self._temperature, self._pooling = lm, temperature, pooling

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of one micro-batch, summed over its targets, among the titles of all processes."""
        chunks = list(batch["chunks"].values())

        def encode(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            first, second = embed(self._lm, chunks[number], self._pooling).chunk(2)
            return first, second

        def loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return contrastive_loss(gather_rows(first), gather_rows(second), self._temperature) * len(first)

        return cached_gradient_loss(encode, len(chunks), loss)


class ValidationPairs:
    """Held-out co-consumption: (the item before it, validation item) of a sample of validation events.

    The item before is what the same user consumed last, in validation too where several of his events are.
    """

    def __init__(
        self,
        sequences: Sequences,
        texts: list[str],
        tokenizer: Any,
        max_title_tokens: int,
        seed: int,
        pooling: Pooling = MEAN,
    ) -> None:
        positions = sequences.held_out(VALIDATION)
        last = sequences.histories(positions, 1)[:, 0]
        positions, last = positions[last > 0], last[last > 0]
        generator = np.random.default_rng(seed)
        chosen = generator.choice(len(positions), min(EVALUATED_PAIRS, len(positions)), replace=False)
        pairs = np.stack([last[chosen], np.asarray(sequences.items)[positions[chosen]]]) - 1  # (2, P)
        items, self._pairs = np.unique(pairs, return_inverse=True)
        self._pairs = self._pairs.reshape(pairs.shape)
        self._texts = tokenise(tokenizer, [texts[item] for item in items], max_title_tokens, True)
        self._pooling = pooling

    def auc(self, lm: Backbone, batch_tokens: int = 4096) -> float:
        """Share of (pair, other user's target) whose own target is nearer; 0.5 is chance. In [0, 1]."""
        vectors = encode_tokens(lm, self._texts, batch_tokens, "validation titles", self._pooling)
        vectors = vectors - vectors.mean(axis=0)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        sources, targets = self._pairs
        scores = vectors[sources] @ vectors[targets].T  # (P, P)
        own = np.diag(scores)[:, None]
        other = targets[None, :] != targets[:, None]
        wins = np.where(other, (own > scores) + 0.5 * (own == scores), 0.0)
        return float(wins.sum() / max(other.sum(), 1))
