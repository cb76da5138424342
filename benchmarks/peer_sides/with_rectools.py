"""RecTools: `SASRecModel.fit` under its Lightning trainer, and `recommend`.

Kept as it ships: Adam's betas (0.9, 0.98), pads up to LENGTH, whose logits are computed too, a class for the pad.
It trains on each user's last LENGTH + 1 events alone, so each of our windows stands for a user here: an epoch then
has the same targets as ours.
"""

import time

import numpy as np
import pandas as pd
import rectools
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from side import (
    CUTOFF,
    DROPOUT,
    HEADS,
    HIDDEN,
    LAYERS,
    LEARNING_RATE,
    LENGTH,
    LISTS,
    TRAINING,
    Done,
    Log,
    Side,
    serve,
    share_of,
)


class Stopwatch(Callback):
    """Clocks an epoch and counts its targets."""

    targets, seconds = 0, 0.0

    def on_train_epoch_start(self, trainer: Trainer, module) -> None:
        """Starts the clock."""
        self.seconds = -time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module, outputs, batch, batch_idx: int) -> None:
        """Counts: 0 is the pad."""
        self.targets += int((batch["y"] > 0).sum())

    def on_train_epoch_end(self, trainer: Trainer, module) -> None:
        """Stops the clock."""
        self.seconds += time.perf_counter()


def dataset(items: np.ndarray, offsets: np.ndarray) -> Dataset:
    """Sequences as interactions in order of time."""
    counts = np.diff(offsets)
    places = np.arange(len(items)) - np.repeat(offsets[:-1], counts)
    log = {
        Columns.User: np.repeat(np.arange(len(counts)), counts),
        Columns.Item: items,
        Columns.Weight: 1.0,
        Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(places, unit="D"),
    }
    return Dataset.construct(pd.DataFrame(log))


def fitted(windows: Dataset, batch: int, steps: int) -> tuple[SASRecModel, Stopwatch]:
    """A model trained for `steps` batches of an epoch."""

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=1,
            limit_train_batches=steps,
            callbacks=[Stopwatch()],
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    model = SASRecModel(
        n_blocks=LAYERS,
        n_heads=HEADS,
        n_factors=HIDDEN,
        dropout_rate=DROPOUT,
        session_max_len=LENGTH,
        loss="softmax",
        lr=LEARNING_RATE,
        batch_size=batch,
        get_trainer_func=trainer,
    )
    model.fit(windows)
    return model, next(one for one in model.fit_trainer.callbacks if isinstance(one, Stopwatch))


def make(log: Log, round_targets: int) -> Side:
    """RecTools over a log."""
    windows = dataset(log.window_items, log.window_offsets)
    known = np.delete(np.arange(len(log.items)), log.offsets[1:] - 1)  # all but the test events
    histories = dataset(log.items[known], log.offsets - np.arange(log.n_users + 1))
    model, _ = fitted(windows, batch=128, steps=1)

    def training(batch: int) -> Done:
        batches = -(-(len(log.window_offsets) - 1) // batch)
        _, clock = fitted(windows, batch, share_of(batches, log, round_targets))
        return clock.targets, clock.seconds

    def lists(batch: int) -> Done:
        model.recommend_batch_size = batch
        began = time.perf_counter()
        model.recommend(np.arange(log.n_users), histories, k=CUTOFF, filter_viewed=False)
        return log.n_users, time.perf_counter() - began

    return Side(
        f"RecTools {rectools.__version__}",
        len(model.data_preparator.get_known_item_ids()),
        {TRAINING: training, LISTS: lists},
        {TRAINING: (32, 64, 128, 256), LISTS: (256, 1024, 4096)},
    )


if __name__ == "__main__":
    serve(make)
