"""Stage `iem`, item-level embedding modelling: the language model becomes a bidirectional item encoder.

Masked next-token prediction (MNTP) teaches it to use the future, contrastive learning on two dropout views
of each title spreads the vectors. Both read titles of the whole catalogue, no interactions; validation
pairs only decide when the contrastive part stops. Source: LLM2Rec section 3.3.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llm2rec.data.sequences import VALIDATION, Sequences
from llm2rec.errors import ArtifactError, DataError
from llm2rec.lm import backbone as backbones
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.csft import TokenObjective
from llm2rec.lm.encode import embed, encode_tokens
from llm2rec.lm.objectives import cached_gradient_loss, contrastive_loss
from llm2rec.lm.packing import (
    Packed,
    TokenisedTexts,
    gather_texts,
    pack,
    positions_within,
    token_budget_batches,
    tokenise,
)
from llm2rec.lm.text import item_texts
from llm2rec.training import Batch, Batches, TrainSettings, default_device, stage_seed, train

MASK_TEXT = "_"  # the authors' mask token: decoders have none of their own
EVALUATED_PAIRS = 512


def mntp(
    titles: list[str],
    *,
    model: str | Path,
    dtype: torch.dtype,
    max_title_tokens: int,
    steps: int,
    batch_size: int,
    mask_share: float,
    learning_rate: float,
    weight_decay: float,
    warmup_share: float,
    schedule: str,
    max_grad_norm: float,
    checkpoints: int,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    """Trains a bidirectional model to fill in masked title tokens and writes it, with its head, to `out`.

    Returns:
        Summary: steps, tokens, tokens per second, loss of the first and last logged steps.
    """
    lm = backbones.load(model, dtype)
    lm.set_causal(False)
    lm.model.to(default_device())
    seed = stage_seed(seed, "mntp")
    texts = distinct_texts(lm.tokenizer, titles, max_title_tokens, special_tokens=False)
    batches = MaskedBatches(texts, _mask_token(lm.tokenizer), steps, batch_size, mask_share, seed)
    began = time.perf_counter()
    summary = train(
        lm.model,
        batches,
        TokenObjective(lm),
        out=out,
        settings=TrainSettings(
            max_steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=math.ceil(warmup_share * steps),
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            checkpoint_every=math.ceil(steps / checkpoints) if checkpoints else 0,
            seed=seed,
        ),
        description="mntp",
    )
    seconds = time.perf_counter() - began
    backbones.save(lm, out)
    losses = [log["loss"] for log in summary.history if "loss" in log]
    return {
        "steps": summary.steps,
        "tokens": batches.tokens,
        "tokens_per_second": round(batches.tokens / seconds, 1),
        "loss_first": round(losses[0], 4) if losses else None,
        "loss_last": round(losses[-1], 4) if losses else None,
    }


def contrastive(
    sequences: Sequences,
    titles: list[str],
    *,
    model: str | Path,
    dtype: torch.dtype,
    max_title_tokens: int,
    steps: int,
    batch_size: int,
    temperature: float,
    dropout: float,
    evaluations: int,
    patience: int,
    micro_batch_tokens: int,
    learning_rate: float,
    weight_decay: float,
    warmup_share: float,
    schedule: str,
    max_grad_norm: float,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    """Trains the item encoder and writes it to `out` as a SentenceTransformer folder.

    Validation is the AUC of held-out co-consumption: how often the item a user consumed next is nearer to
    the item before it than what another user consumed next. The best state wins.

    Returns:
        Summary: steps, tokens, AUC before and after, the step of the best state.

    Raises:
        ArtifactError: the exported folder does not give the encoder's vectors.
    """
    lm = backbones.load(model, dtype, head=False)
    lm.set_causal(False)
    lm.model.to(default_device())
    seed = stage_seed(seed, "contrastive")
    texts = distinct_texts(lm.tokenizer, titles, max_title_tokens, special_tokens=True)
    pairs = ValidationPairs(sequences, item_texts(titles), lm.tokenizer, max_title_tokens, seed)
    summary: dict[str, Any] = {"auc_before": round(pairs.auc(lm), 4)}
    if steps:
        batches = TitleBatches(texts, steps, min(batch_size, len(texts)), micro_batch_tokens, seed)
        began = time.perf_counter()
        with backbones.dropout(lm.model, dropout):
            trained = train(
                lm.model,
                batches,
                ContrastiveObjective(lm, temperature),
                out=out,
                settings=TrainSettings(
                    max_steps=steps,
                    learning_rate=learning_rate,
                    weight_decay=weight_decay,
                    warmup_steps=math.ceil(warmup_share * steps),
                    schedule=schedule,
                    max_grad_norm=max_grad_norm,
                    evaluate_every=math.ceil(steps / evaluations),
                    patience=patience,
                    metric="auc",
                    seed=seed,
                ),
                evaluate=lambda: {"auc": pairs.auc(lm)},
                description="contrastive",
            )
        seconds = time.perf_counter() - began
        summary |= {"steps": trained.steps, "best_step": trained.best_step, "batch_size": batches.batch_size}
        summary |= {"train_seconds": round(seconds, 1), "auc_after": round(pairs.auc(lm), 4)}
    export(lm, titles, max_title_tokens, out)
    return summary


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


def _mask_token(tokenizer: Any) -> int:
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    ids = tokenizer(MASK_TEXT, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ArtifactError(f"the tokenizer writes the mask {MASK_TEXT!r} as {len(ids)} tokens, not one")
    return int(ids[0])


class _ShuffledTexts(Batches):
    """Texts in shuffled passes, cut into `steps` batches of `batch_size`, none with the same text twice."""

    def __init__(self, texts: TokenisedTexts, steps: int, batch_size: int, seed: int) -> None:
        self._texts, self._seed = texts, seed
        self.batch_size = min(batch_size, len(texts))
        generator = np.random.default_rng(seed)
        each_pass = len(texts) // self.batch_size
        passes = [generator.permutation(len(texts)) for _ in range(math.ceil(steps / each_pass))]
        self._chosen = [
            order[number * self.batch_size : (number + 1) * self.batch_size]
            for order in passes
            for number in range(each_pass)
        ][:steps]

    def __len__(self) -> int:
        return len(self._chosen)


class MaskedBatches(_ShuffledTexts):
    """Packed titles with a share of their tokens masked; the masked tokens are the labels.

    Position 0 is never masked: no position before it could predict it. A title of one token is left whole;
    any other has at least one masked token.
    """

    def __init__(
        self, texts: TokenisedTexts, mask_token: int, steps: int, batch_size: int, share: float, seed: int
    ) -> None:
        usable = np.flatnonzero(texts.lengths > 1)  # some are: see check_titles
        tokens, lengths = gather_texts(texts, usable)
        super().__init__(
            TokenisedTexts(tokens, np.concatenate([[0], np.cumsum(lengths)])), steps, batch_size, seed
        )
        self._mask_token, self._share = mask_token, share
        self.tokens = int(sum(self._texts.lengths[chosen].sum() for chosen in self._chosen))

    def __getitem__(self, index: int) -> Batch:
        tokens, lengths = gather_texts(self._texts, self._chosen[index])
        generator = np.random.default_rng([self._seed, index])
        positions = positions_within(lengths)
        noise = np.where(positions == 0, np.inf, generator.random(len(tokens)))
        starts = np.cumsum(lengths) - lengths
        lowest = np.repeat(np.minimum.reduceat(noise, starts), lengths)
        masked = np.flatnonzero((noise < self._share) | (noise == lowest))
        return {
            **pack(np.where(np.isin(np.arange(len(tokens)), masked), self._mask_token, tokens), lengths),
            "rows": torch.from_numpy(masked - 1),
            "labels": torch.from_numpy(tokens[masked]),
            "n_targets": len(masked),
        }


class TitleBatches(_ShuffledTexts):
    """Batches of different titles in chunks of `micro_batch_tokens`, every chunk holding its titles twice."""

    def __init__(
        self, texts: TokenisedTexts, steps: int, batch_size: int, micro_batch_tokens: int, seed: int
    ) -> None:
        super().__init__(texts, steps, batch_size, seed)
        self._micro_batch_tokens = micro_batch_tokens

    def __getitem__(self, index: int) -> Batch:
        chosen = self._chosen[index]
        chosen = chosen[np.argsort(-self._texts.lengths[chosen], kind="stable")]
        chunks: dict[str, Packed] = {}
        for rows in token_budget_batches(2 * self._texts.lengths[chosen], self._micro_batch_tokens):
            twice = np.concatenate([chosen[rows], chosen[rows]])
            chunks[f"chunk{len(chunks)}"] = pack(*gather_texts(self._texts, twice))
        return {"chunks": chunks, "n_targets": len(chosen)}


class ContrastiveObjective:
    """The summed InfoNCE of a batch from `TitleBatches`, over all its chunks at once."""

    def __init__(self, lm: Backbone, temperature: float) -> None:
        self._lm, self._temperature = lm, temperature

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of one micro-batch, summed over its targets."""
        chunks = list(batch["chunks"].values())

        def encode(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            first, second = embed(self._lm, chunks[number]).chunk(2)
            return first, second

        def loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return contrastive_loss(first, second, self._temperature) * len(first)

        return cached_gradient_loss(encode, len(chunks), loss)


class ValidationPairs:
    """Held-out co-consumption: (last training item, validation item) of a sample of users."""

    def __init__(
        self, sequences: Sequences, texts: list[str], tokenizer: Any, max_title_tokens: int, seed: int
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

    def auc(self, lm: Backbone, batch_tokens: int = 4096) -> float:
        """Share of (pair, other user's target) whose own target is nearer; 0.5 is chance. In [0, 1]."""
        vectors = encode_tokens(lm, self._texts, batch_tokens, "validation titles")
        vectors = vectors - vectors.mean(axis=0)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        sources, targets = self._pairs
        scores = vectors[sources] @ vectors[targets].T  # (P, P)
        own = np.diag(scores)[:, None]
        other = targets[None, :] != targets[:, None]
        wins = np.where(other, (own > scores) + 0.5 * (own == scores), 0.0)
        return float(wins.sum() / max(other.sum(), 1))


def export(lm: Backbone, titles: list[str], max_title_tokens: int, out: Path) -> None:
    """Writes a SentenceTransformer folder and checks that it gives the encoder's vectors.

    Raises:
        ArtifactError: the reloaded folder's vectors differ by more than rounding.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        backbones.save(lm, Path(folder))
        transformer = Transformer(folder, max_seq_length=max_title_tokens)
        encoder = SentenceTransformer(
            modules=[transformer, Pooling(lm.body.config.hidden_size, pooling_mode="mean")], device="cpu"
        )
        encoder.save(str(out))
    sample = item_texts(titles)[:16]
    reloaded = SentenceTransformer(str(out), device="cpu")
    theirs = torch.from_numpy(reloaded.encode(sample, convert_to_numpy=True, show_progress_bar=False)).float()
    tokens = tokenise(lm.tokenizer, sample, max_title_tokens, special_tokens=True)
    ours = torch.from_numpy(encode_tokens(lm, tokens, 4096, "check"))
    similarity = torch.nn.functional.cosine_similarity(ours, theirs).min().item()
    if similarity < 0.999:
        raise ArtifactError(
            f"the exported encoder {out} gives other vectors than the trained one (cosine {similarity:.4f}); "
            "this version of sentence-transformers reads the model's attention, pooling or tokenizer otherwise"
        )
