"""Stage `fit`: sequences (and item vectors) -> a trained sequential recommender, chosen on validation alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llm2rec.batches import Batch, Batches
from llm2rec.data.sequences import TRAIN, VALIDATION, Sequences
from llm2rec.errors import ArtifactError, ConfigError, DataError
from llm2rec.evaluation import protocol
from llm2rec.loggers import NO_LOGGERS, Loggers
from llm2rec.precision import DTYPES, resolve_dtype
from llm2rec.rec import losses
from llm2rec.rec import model as models
from llm2rec.rec.architecture import Architecture, require_one_of
from llm2rec.rec.items import Categories
from llm2rec.rec.losses import NegativeSampler
from llm2rec.rec.model import Recommender
from llm2rec.rec.smoothing import Neighbours
from llm2rec.softmax import linear_cross_entropy
from llm2rec.training import TrainSettings, default_device, stage_seed, train

METRIC = "ndcg@10"
ALL, LAST = "all", "last"
VALIDATED_AT_ONCE = {"cpu": 256, "cuda": 4096}  # events


@dataclass(frozen=True)
class Optimisation:
    """How a recommender is trained; plain values.

    batch_size: windows a step. patience: epochs without a gain in validation NDCG@10 before stopping.
    loss: one of `losses.LOSSES`. targets: ALL positions of a window of up to history_length targets, or LAST: one
    window a target, supervised at its end, which is the authors' way and costs history_length times as much.
    negatives: K, sampled anew for each step and shared in it; sampling: one of `losses.SAMPLINGS`; calibration: t
    of gBCE. The full softmax looks at none of the three, the sampled softmax not at `calibration`. schedule,
    warmup_share: of the learning rate over `max_epochs`, as in `training.Optimizer`. dtype: of the matrix products
    of training (`precision.resolve_dtype`); weights, their updates and the ranking are float32 throughout.

    Raises:
        ConfigError: an unknown name, a value out of range, or gBCE with popularity sampling.
    """

    learning_rate: float
    weight_decay: float
    batch_size: int
    max_epochs: int
    patience: int
    loss: str = losses.FULL
    targets: str = ALL
    negatives: int = 256
    sampling: str = losses.UNIFORM
    calibration: float = 0.75
    schedule: str = "constant"
    warmup_share: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        require_one_of("loss", self.loss, losses.LOSSES)
        require_one_of("targets", self.targets, (ALL, LAST))
        require_one_of("dtype", self.dtype, DTYPES)
        require_one_of("sampling", self.sampling, losses.SAMPLINGS)
        for size in ("batch_size", "max_epochs", "patience", "negatives"):
            if getattr(self, size) < 1:
                raise ConfigError(f"{size} is {getattr(self, size)}; it must be at least 1")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ConfigError(
                f"learning_rate is {self.learning_rate} and weight_decay {self.weight_decay}; they must be above "
                "0 and at least 0"
            )
        if not 0 <= self.calibration <= 1:
            raise ConfigError(f"calibration is {self.calibration}; it must be from 0 to 1")
        if self.loss == losses.GBCE and self.sampling != losses.UNIFORM:
            raise ConfigError("gbce corrects for uniform negatives; choose sampling 'uniform', or another loss")


@dataclass(frozen=True)
class FitSummary:
    """How a training went; epochs count from 1, `best_metric` is the validation NDCG@10 of `best_epoch`.

    dtype: that the matrix products were taken in.
    """

    epochs: int
    best_epoch: int
    best_metric: float
    dtype: str


def fit(
    sequences: Sequences,
    architecture: Architecture,
    optimisation: Optimisation,
    *,
    vectors: np.ndarray | None = None,
    categories: Categories | None = None,
    trainable: np.ndarray | None = None,
    seed: int,
    out: Path,
    mask_history: bool = False,
    description: str = "fit",
    loggers: Loggers = NO_LOGGERS,
) -> FitSummary:
    """Trains a recommender on the training events and writes the weights best on validation to `out`.

    Every training event but a user's first is a target once an epoch. After each epoch the validation events
    are ranked over the whole catalogue. A killed training goes on from the last epoch's checkpoint in `out`.

    Args:
        vectors: (N, D) raw item vectors in the order of the catalogue, frozen; None for learned ids.
        categories: of the N items, beside learned ids.
        trainable: (N,) bool, False for held-out items, which must not stand in the softmax even as wrong answers,
            whose learned vectors are 0, and who have no say in the vectors' statistics; None trains against all.
        seed: initial weights, order of the windows, negatives and dropout derive from it.
        mask_history: of the validation, as in `protocol.evaluate`: it chooses by what the test will measure.

    Raises:
        ConfigError: parts that do not fit each other, too many negatives.
        ArtifactError: vectors that do not fit the catalogue or are not finite; a non-finite loss.
        DataError: categories that do not fit the items, or times that fall.
    """
    recommender = _untrained(sequences, architecture, vectors, categories, trainable, seed)
    batches = WindowBatches(
        sequences,
        architecture.history_length,
        optimisation.batch_size,
        stage_seed(seed, "recommender windows"),
        targets=optimisation.targets,
        with_times=recommender.needs_times,
        sampler=_sampler(sequences, optimisation, trainable),
    )
    objective = NextItemObjective(recommender, optimisation, trainable)
    summary = train(
        recommender,
        batches,
        objective,
        out=out,
        settings=_course(optimisation, len(batches), seed, loggers),
        evaluate=lambda: validate(recommender, sequences, architecture.history_length, mask_history),
        description=description,
    )
    models.save(recommender, out, sequences.item_ids)
    assert summary.best_step is not None and summary.best_metric is not None  # validated every epoch
    return FitSummary(
        epochs=summary.steps // len(batches),
        best_epoch=summary.best_step // len(batches),
        best_metric=summary.best_metric,
        dtype=str(objective.dtype).removeprefix("torch."),
    )


def _untrained(
    sequences: Sequences,
    architecture: Architecture,
    vectors: np.ndarray | None,
    categories: Categories | None,
    trainable: np.ndarray | None,
    seed: int,
) -> models.Recommender:
    """The recommender with its initial weights; arguments and errors as for `fit`."""
    recommender = models.build(
        architecture,
        n_items=sequences.n_items,
        seed=stage_seed(seed, "recommender weights"),
        vectors=vectors,
        categories=categories,
        neighbours=Neighbours.of(sequences) if vectors is not None and architecture.smoothing else None,
        trainable=trainable,
    )
    if trainable is not None:
        recommender.items.blank(torch.from_numpy(~trainable))
    if recommender.needs_times:
        _check_times(sequences)
    return recommender


def _course(optimisation: Optimisation, epoch_steps: int, seed: int, loggers: Loggers) -> TrainSettings:
    """The engine's settings of a training that validates after every epoch of `epoch_steps` steps."""
    return TrainSettings(
        max_steps=optimisation.max_epochs * epoch_steps,
        learning_rate=optimisation.learning_rate,
        weight_decay=optimisation.weight_decay,
        schedule=optimisation.schedule,
        warmup_share=optimisation.warmup_share,
        evaluate_every=epoch_steps,
        patience=optimisation.patience,
        metric=METRIC,
        seed=stage_seed(seed, "recommender dropout"),
        loggers=loggers,
    )


def validate(
    scorer: protocol.Scorer, sequences: Sequences, history_length: int, mask_history: bool = False
) -> dict[str, float]:
    """NDCG@10 of the validation events, ranked over the whole catalogue."""
    try:
        ranked = protocol.evaluate(
            scorer,
            sequences,
            VALIDATION,
            history_length,
            batch_size=VALIDATED_AT_ONCE[default_device().type],
            description=None,
            mask_history=mask_history,
        )
    except ValueError as error:  # a score that is not finite
        raise ArtifactError(f"the recommender has diverged ({error}); lower recommender.learning_rate") from error
    return {METRIC: protocol.mean_metric(ranked, METRIC)}


class WindowBatches(Batches):
    """Shuffled windows of the training events, every target once an epoch, as ready-made batches.

    A batch holds `histories` (B, L) int64, left-aligned, 0 = padding, as long as its longest window needs;
    `rows` (M,) int64, the places with a target in the flattened (B * L,); `targets` (M,) int64 in 0..N - 1,
    columns of the scores; `n_targets` = M. With times it holds `times` (B, L) int64 as well, with a
    sampler `negatives` (K,) int64 in 0..N - 1 and `log_expected` (K,) float32.
    """

    def __init__(
        self,
        sequences: Sequences,
        history_length: int,
        batch_size: int,
        seed: int,
        *,
        targets: str = ALL,
        with_times: bool = False,
        sampler: NegativeSampler | None = None,
    ) -> None:
        items, offsets = sequences.training()
        self._items = np.asarray(items, dtype=np.int64)
        self._times = sequences.times[np.asarray(sequences.parts) == TRAIN] if with_times else None
        self._every_place = targets == ALL
        if self._every_place:
            self._starts, self._ends = sequences.windows(history_length)
        else:
            self._starts, self._ends = _prefixes(offsets, history_length)
        self._batch_size, self._seed, self._sampler = batch_size, seed, sampler
        self.set_epoch(0)

    def __len__(self) -> int:
        return -(-len(self._starts) // self._batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Puts the windows in the order of `epoch`, from (seed, epoch) alone."""
        self._epoch = epoch
        self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._starts))

    def __getitem__(self, index: int) -> Batch:
        windows = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        starts, ends = self._starts[windows, None], self._ends[windows, None]  # (B, 1)
        places = starts + np.arange((ends - starts).max() - 1)  # (B, L)
        real = places < ends - 1  # a window's last event is a target only
        rows = np.flatnonzero(real if self._every_place else places == ends - 2)
        safe = np.where(real, places, 0)
        batch: Batch = {
            "histories": torch.from_numpy(np.where(real, self._items[safe], 0)),
            "rows": torch.from_numpy(rows),
            "targets": torch.from_numpy(self._items[places.ravel()[rows] + 1] - 1),
            "n_targets": len(rows),
        }
        if self._times is not None:
            batch["times"] = torch.from_numpy(np.where(real, self._times[safe], 0))
        if self._sampler is not None:
            generator = np.random.default_rng((self._seed, self._epoch, index))
            batch["negatives"], batch["log_expected"] = self._sampler.draw(generator)
        return batch


class NextItemObjective:
    """Summed loss of the next item at every labelled position of a batch."""

    def __init__(
        self,
        recommender: Recommender,
        optimisation: Optimisation | None = None,
        trainable: np.ndarray | None = None,
    ) -> None:
        """Takes the recommender whose items are scored; without an optimisation the loss is the full softmax.

        `dtype` is that of the products, resolved once.
        """
        self._recommender = recommender
        self._columns = self._places = None
        if trainable is not None and not trainable.all():
            self._columns = torch.from_numpy(np.flatnonzero(trainable))
            self._places = torch.from_numpy(np.cumsum(trainable) - 1)  # item -> column among the trainable
        self.dtype = torch.float32 if optimisation is None else resolve_dtype(optimisation.dtype)
        self._loss = losses.FULL if optimisation is None else optimisation.loss
        self._calibration = 0.0 if optimisation is None else optimisation.calibration

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of one batch from `WindowBatches`, summed over its targets."""
        wanted = None
        if self._loss != losses.FULL:
            wanted, batch = _of_wanted_items(batch)
        with torch.autocast(batch["histories"].device.type, self.dtype, enabled=self.dtype != torch.float32):
            # `model` may be the engine's wrapper of the recommender, which has only its forward.
            vectors = self._recommender.items.vectors(wanted)
            states = model(batch["histories"], vectors, batch.get("times"))
        labelled = states.flatten(0, 1).index_select(0, batch["rows"])  # (M, H)
        queries, candidates = (part.to(self.dtype) for part in self._recommender.comparable(labelled, vectors))
        targets = batch["targets"]
        if self._loss == losses.FULL:
            if self._columns is not None and self._places is not None:
                columns, places = (index.to(targets.device) for index in (self._columns, self._places))
                candidates, targets = candidates.index_select(0, columns), places[targets]
            return linear_cross_entropy(queries, candidates, targets)
        negatives = batch["negatives"]
        if self._loss == losses.SAMPLED_SOFTMAX:
            return losses.sampled_softmax(queries, candidates, targets, negatives, batch["log_expected"])
        n_items = self._recommender.n_items if self._columns is None else len(self._columns)
        beta = losses.gbce_beta(len(negatives), n_items, self._calibration)
        return losses.gbce(queries, candidates, targets, negatives, beta)


def _of_wanted_items(batch: Batch) -> tuple[Tensor, Batch]:
    """The catalogue rows (R,) that a step over sampled items needs, and its batch in terms of these alone."""
    histories, targets, negatives = batch["histories"], batch["targets"], batch["negatives"]
    seen = histories > 0
    wanted = torch.cat([histories[seen] - 1, targets, negatives]).unique()
    places = {name: torch.searchsorted(wanted, batch[name]) for name in ("targets", "negatives")}
    places["histories"] = torch.where(seen, torch.searchsorted(wanted, histories - 1) + 1, 0)
    return wanted, batch | places


def _prefixes(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends (W,) of one window a target: the event, and up to `length` of the same user before it."""
    places = np.arange(offsets[-1])
    first = np.repeat(offsets[:-1], np.diff(offsets))
    places, first = places[places > first], first[places > first]  # a user's first event has nothing before it
    return np.maximum(first, places - length), places + 1


def _sampler(
    sequences: Sequences, optimisation: Optimisation, trainable: np.ndarray | None
) -> NegativeSampler | None:
    if optimisation.loss == losses.FULL:
        return None
    n_items = sequences.n_items if trainable is None else int(trainable.sum())
    if optimisation.negatives >= n_items:
        raise ConfigError(
            f"{optimisation.negatives:,} negatives of {n_items:,} items; take fewer, or the loss 'full',"
            " which looks at all of them"
        )
    return NegativeSampler(sequences.training_counts(), optimisation.negatives, optimisation.sampling, trainable)


def _check_times(sequences: Sequences) -> None:
    falling = np.flatnonzero(np.diff(sequences.times) < 0) + 1
    if np.setdiff1d(falling, np.asarray(sequences.offsets)).size:
        raise DataError("times fall within a user's events, which must be in order of time; run `prepare` again")
