"""Our side: the training engine as the stage `fit` calls it, and `protocol.evaluate`.

Kept as it ships: products in the dtype that the machine multiplies faster (`--dtype` of the driver), gradients
clipped at 1, which the peers do not do, and dropout of a share rounded to 1/256.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch
from side import (
    CUTOFF,
    DROPOUT,
    HEADS,
    HIDDEN,
    LAYERS,
    LEARNING_RATE,
    LENGTH,
    LISTS,
    RANKS,
    TRAINING,
    Done,
    Log,
    Side,
    serve,
    share_of,
)

import llm2rec
from llm2rec.batches import Batch
from llm2rec.data.sequences import Sequences
from llm2rec.data.splits import TEST, TRAIN, VALIDATION
from llm2rec.evaluation import protocol
from llm2rec.evaluation.ranking import measure
from llm2rec.rec import model as models
from llm2rec.rec.architecture import Architecture
from llm2rec.rec.fit import NextItemObjective, Optimisation, WindowBatches
from llm2rec.training import TrainSettings, train


class Clocked(WindowBatches):
    """Windows that note when the first batch is asked for."""

    began = 0.0

    def __getitem__(self, index: int) -> Batch:
        self.began = self.began or time.perf_counter()
        return super().__getitem__(index)


class Counted(NextItemObjective):
    """The objective, counting the targets that it has seen."""

    targets = 0

    def __call__(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Counts, and passes on."""
        self.targets += batch["n_targets"]
        return super().__call__(model, batch)


def sequences_of(log: Log) -> Sequences:
    """The log as the package knows it."""
    ends = log.offsets[1:]
    parts = np.full(len(log.items), TRAIN, dtype=np.uint8)
    parts[ends - 1], parts[ends - 2] = TEST, VALIDATION
    item_ids = [str(item) for item in range(1, log.n_items + 1)]
    users = pl.Series("user_id", [str(user) for user in range(log.n_users)])
    return Sequences(log.items, log.offsets, parts, item_ids, users)


def build(sequences: Sequences) -> models.Recommender:
    """SASRec over learned ids."""
    shape = Architecture("sasrec", "id", HIDDEN, LAYERS, HEADS, DROPOUT, LENGTH)
    return models.build(shape, n_items=sequences.n_items, seed=0)


def make(log: Log, round_targets: int) -> Side:
    """Our side over a log."""
    sequences = sequences_of(log)
    recommender, dtype = build(sequences), os.environ.get("OUR_DTYPE", "auto")

    def training(batch: int) -> Done:
        batches = Clocked(sequences, LENGTH, batch, seed=0)
        objective = Counted(recommender, Optimisation(LEARNING_RATE, 0.0, batch, 1, 1, dtype=dtype))
        steps = share_of(len(batches), log, round_targets)
        settings = TrainSettings(max_steps=steps, learning_rate=LEARNING_RATE, seed=0)
        with tempfile.TemporaryDirectory() as out:
            train(recommender, batches, objective, out=Path(out), settings=settings, description="benchmark")
        return objective.targets, time.perf_counter() - batches.began

    def ranking(batch: int, list_length: int) -> Done:
        began = time.perf_counter()
        recommender.eval()
        ranked = protocol.evaluate(
            recommender, sequences, TEST, LENGTH, batch, description=None, list_length=list_length
        )
        for name in ("recall@10", "ndcg@10", "mrr@10"):
            measure(torch.from_numpy(ranked["rank"].to_numpy().copy()), name).mean()
        return ranked.height, time.perf_counter() - began

    return Side(
        f"llm2rec {llm2rec.__version__}",
        sequences.n_items,
        {TRAINING: training, RANKS: lambda batch: ranking(batch, 0), LISTS: lambda batch: ranking(batch, CUTOFF)},
        {TRAINING: (64, 128, 256, 512), RANKS: (128, 256, 512), LISTS: (128, 256, 512)},
    )


if __name__ == "__main__":
    serve(make)
