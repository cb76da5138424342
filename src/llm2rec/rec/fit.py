"""Stage `fit`: sequences (and item vectors) -> a trained sequential recommender, chosen on validation alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llm2rec.data.sequences import VALIDATION, Sequences
from llm2rec.evaluation import protocol
from llm2rec.rec import model as models
from llm2rec.rec.model import Recommender
from llm2rec.softmax import linear_cross_entropy
from llm2rec.training import Batch, Batches, TrainSettings, stage_seed, train

METRIC = "ndcg@10"


@dataclass(frozen=True)
class FitSummary:
    """How a training went; epochs count from 1, `best_metric` is the validation NDCG@10 of `best_epoch`."""

    epochs: int
    best_epoch: int
    best_metric: float


def fit(
    sequences: Sequences,
    vectors: np.ndarray | None,
    *,
    architecture: str,
    hidden_size: int,
    layers: int,
    heads: int,
    dropout: float,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    max_epochs: int,
    patience: int,
    history_length: int,
    seed: int,
    out: Path,
    description: str = "fit",
) -> FitSummary:
    """Trains a recommender on the training events and writes the weights best on validation to `out`.

    Every training event but a user's first is a target once an epoch, under a full softmax over the
    catalogue. After each epoch the validation events are ranked over the whole catalogue. A killed training
    goes on from the last epoch's checkpoint in `out`.

    Args:
        vectors: (N, D) raw item vectors in the order of the catalogue, frozen; None for learned ids.
        batch_size: windows a step, each of up to `history_length` targets.
        patience: epochs without a gain in validation NDCG@10 before stopping.
        seed: initial weights, order of the windows and dropout derive from it.

    Raises:
        ConfigError: unknown architecture, or sizes that do not fit each other.
        ArtifactError: vectors that do not fit the catalogue or are not finite; a non-finite loss.
    """
    recommender = models.build(
        architecture=architecture,
        n_items=sequences.n_items,
        vectors=vectors,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        dropout=dropout,
        history_length=history_length,
        seed=stage_seed(seed, "recommender weights"),
    )
    batches = WindowBatches(sequences, history_length, batch_size, stage_seed(seed, "recommender windows"))
    summary = train(
        recommender,
        batches,
        NextItemObjective(recommender),
        out=out,
        settings=TrainSettings(
            max_steps=max_epochs * len(batches),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            evaluate_every=len(batches),
            patience=patience,
            metric=METRIC,
            seed=stage_seed(seed, "recommender dropout"),
        ),
        evaluate=lambda: validate(recommender, sequences, history_length),
        description=description,
    )
    models.save(recommender, out)
    assert summary.best_step is not None and summary.best_metric is not None  # validated every epoch
    return FitSummary(
        epochs=summary.steps // len(batches),
        best_epoch=summary.best_step // len(batches),
        best_metric=summary.best_metric,
    )


def validate(scorer: protocol.Scorer, sequences: Sequences, history_length: int) -> dict[str, float]:
    """NDCG@10 of the validation events, ranked over the whole catalogue."""
    ranked = protocol.evaluate(scorer, sequences, VALIDATION, history_length, description=None)
    return {METRIC: protocol.mean_metric(ranked, METRIC)}


class WindowBatches(Batches):
    """Shuffled windows of the training events, every target once an epoch, as ready-made batches.

    A batch holds `histories` (B, L) int64, left-aligned, 0 = padding, as long as its longest window needs;
    `rows` (M,) int64, the places with a target in the flattened (B * L,); `targets` (M,) int64 in 0..N - 1,
    columns of the scores; `n_targets` = M.
    """

    def __init__(self, sequences: Sequences, history_length: int, batch_size: int, seed: int) -> None:
        self._items = np.asarray(sequences.training()[0], dtype=np.int64)
        self._starts, self._ends = sequences.windows(history_length)
        self._batch_size, self._seed = batch_size, seed
        self.set_epoch(0)

    def __len__(self) -> int:
        return -(-len(self._starts) // self._batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Puts the windows in the order of `epoch`, from (seed, epoch) alone."""
        self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._starts))

    def __getitem__(self, index: int) -> Batch:
        windows = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        starts, ends = self._starts[windows, None], self._ends[windows, None]  # (B, 1)
        places = starts + np.arange((ends - starts).max() - 1)  # (B, L)
        real = places < ends - 1  # a window's last event is a target only
        rows = np.flatnonzero(real)
        return {
            "histories": torch.from_numpy(np.where(real, self._items[np.where(real, places, 0)], 0)),
            "rows": torch.from_numpy(rows),
            "targets": torch.from_numpy(self._items[places.ravel()[rows] + 1] - 1),
            "n_targets": len(rows),
        }


class NextItemObjective:
    """Summed cross-entropy of the next item at every position of a batch, over the whole catalogue."""

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of one batch from `WindowBatches`, summed over its targets."""
        # `model` may be the engine's wrapper of the recommender, which has only its forward.
        vectors = self._recommender.items.vectors()
        states = model(batch["histories"], vectors)
        labelled = states.flatten(0, 1).index_select(0, batch["rows"])  # (M, H)
        return linear_cross_entropy(labelled, vectors, batch["targets"])
