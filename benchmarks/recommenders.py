"""SASRec over item vectors: training, the engine's overhead, ranking, memory against the size of the catalogue.

    LLM2REC_DATA_DIR=... python benchmarks/recommenders.py [--data amazon-games] [--rounds 5]
    python benchmarks/recommenders.py --memory [10000 100000 1000000]

The authors' way, written from their description: one sample a target and only its last position supervised,
batches of 256, float32, the adapter over the whole catalogue in each batch, whole logits; ranking in batches of
32 by `topk` and a loop over users and places. "torch top-k" ranks our model's scores with matmul and `topk` in
batches of 256. Vectors are random (576 wide): speed does not depend on what they hold. The ways run in turn in one
process; printed are medians with their spread, and ratios. `--memory` trains a few steps in a process of its own a
catalogue and prints what that added to the anonymous memory of the process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from interleaved import prepared
from torch import nn

from llm2rec.batches import Batch, Batches
from llm2rec.data import sources
from llm2rec.data.sequences import TEST, TRAIN, Sequences
from llm2rec.evaluation import protocol, ranking
from llm2rec.rec import model as models
from llm2rec.rec.architecture import Architecture
from llm2rec.rec.fit import NextItemObjective, Optimisation, WindowBatches
from llm2rec.rec.losses import FULL, SAMPLED_SOFTMAX, UNIFORM, NegativeSampler
from llm2rec.training import TrainSettings, train

WIDTH, HIDDEN, LENGTH = 576, 128, 10
STEPS = 6
NEGATIVES = 2048  # of the sampled softmax
SHAPE = Architecture("sasrec", "text", HIDDEN, 2, 2, 0.3, LENGTH)  # the paper's, with a linear adapter
BENT = replace(SHAPE, adapter="mlp", adapter_size=512)  # the default


class PlainSASRec(nn.Module):
    """SASRec from torch's own layers, the adapter applied to the whole catalogue in each call."""

    def __init__(self, vectors: torch.Tensor) -> None:
        super().__init__()
        self.vectors = nn.Embedding.from_pretrained(torch.cat([torch.zeros(1, WIDTH), vectors]), freeze=True)
        self.adapter = nn.Linear(WIDTH, HIDDEN)
        self.positions = nn.Embedding(LENGTH, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, 2, HIDDEN, 0.3, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(HIDDEN), enable_nested_tensor=False)

    def forward(self, histories: torch.Tensor) -> torch.Tensor:
        """Logits (B, N + 1) after left-padded histories (B, L)."""
        table = self.adapter(self.vectors.weight)
        states = table[histories] + self.positions.weight
        future = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)
        states = self.body(states, mask=future)
        return states[:, -1] @ table.T


def bare_training(
    sequences: Sequences,
    vectors: np.ndarray,
    batch_size: int,
    dtype: str,
    loss: str = FULL,
    shape: Architecture = SHAPE,
) -> Callable[[], float]:
    """Targets a second of our training without the engine: the steps alone."""
    recommender = models.build(shape, n_items=sequences.n_items, seed=0, vectors=vectors).train()
    sampler = None if loss == FULL else NegativeSampler(np.ones(sequences.n_items), NEGATIVES, UNIFORM)
    batches = WindowBatches(sequences, LENGTH, batch_size, 0, sampler=sampler)
    objective = NextItemObjective(recommender, Optimisation(1e-3, 1e-4, batch_size, 1, 1, loss=loss, dtype=dtype))
    optimizer = torch.optim.AdamW([p for p in recommender.parameters() if p.requires_grad], 1e-3, fused=True)

    def run() -> float:
        targets, began = 0, time.perf_counter()
        for number in range(STEPS):
            batch = batches[number]
            (objective(recommender, batch) / batch["n_targets"]).backward()
            torch.nn.utils.clip_grad_norm_(recommender.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            targets += batch["n_targets"]
        return targets / (time.perf_counter() - began)

    return run


def engine_training(sequences: Sequences, vectors: np.ndarray, batch_size: int, dtype: str) -> Callable[[], float]:
    """The same steps by the engine, as `fit` takes them, between its first and its last."""
    batches = Stopwatch(WindowBatches(sequences, LENGTH, batch_size, 0))

    def run() -> float:
        recommender = models.build(SHAPE, n_items=sequences.n_items, seed=0, vectors=vectors)
        objective = NextItemObjective(recommender, Optimisation(1e-3, 1e-4, batch_size, 1, 1, dtype=dtype))
        settings = TrainSettings(max_steps=STEPS + 1, learning_rate=1e-3, seed=0)
        batches.moments.clear()
        with tempfile.TemporaryDirectory() as folder:
            train(recommender, batches, objective, out=Path(folder), settings=settings, description="")
        targets = sum(batches[number]["n_targets"] for number in range(STEPS))
        return targets / (batches.moments[STEPS] - batches.moments[0])

    return run


class Stopwatch(Batches):
    """Batches that note when each was asked for."""

    def __init__(self, batches: WindowBatches) -> None:
        self._batches = batches
        self.moments: list[float] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        self.moments.append(time.perf_counter())
        return self._batches[index]

    def set_epoch(self, epoch: int) -> None:
        """Reshuffles."""
        self._batches.set_epoch(epoch)


def authors_training(sequences: Sequences, vectors: np.ndarray) -> Callable[[], float]:
    """Targets a second of the authors' way."""
    model = PlainSASRec(torch.from_numpy(vectors)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    samples = WindowBatches(sequences, LENGTH, 256, 0, targets="last")

    def run() -> float:
        targets, began = 0, time.perf_counter()
        for number in range(STEPS):
            batch = samples[number]
            loss = F.cross_entropy(model(_right_aligned(batch["histories"])), batch["targets"] + 1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            targets += batch["n_targets"]
        return targets / (time.perf_counter() - began)

    return run


def _right_aligned(histories: torch.Tensor) -> torch.Tensor:
    padded = F.pad(histories, (0, LENGTH - histories.shape[1]))
    shift = LENGTH - (padded > 0).sum(1, keepdim=True)
    places = torch.arange(LENGTH) - shift
    return torch.where(places >= 0, padded.gather(1, places.clamp(min=0)), 0)


def our_ranking(sequences: Sequences, vectors: np.ndarray) -> Callable[[], float]:
    """Users a second from histories to ranks, full ranking."""
    recommender = models.build(SHAPE, n_items=sequences.n_items, seed=0, vectors=vectors).eval()

    def run() -> float:
        began = time.perf_counter()
        ranked = protocol.evaluate(recommender, sequences, TEST, LENGTH, description=None)
        return ranked.height / (time.perf_counter() - began)

    return run


def at_once(run: Callable[[], float]) -> Callable[[], float]:
    """The same with all scores of a batch made before the first is counted."""

    def whole() -> float:
        block, ranking.BLOCK_SCORES = ranking.BLOCK_SCORES, 2**40
        try:
            return run()
        finally:
            ranking.BLOCK_SCORES = block

    return whole


def torch_ranking(sequences: Sequences, vectors: np.ndarray, users: int) -> Callable[[], float]:
    """The ten best items of our model by `topk`, and where the target stands among them."""
    recommender = models.build(SHAPE, n_items=sequences.n_items, seed=0, vectors=vectors).eval()
    positions = sequences.held_out(TEST)[:users]

    def run() -> float:
        began = time.perf_counter()
        for start in range(0, len(positions), 256):
            batch = positions[start : start + 256]
            histories = torch.from_numpy(sequences.histories(batch, LENGTH).astype(np.int64))
            best = recommender.score(histories).topk(10).indices
            (best == torch.from_numpy(sequences.items[batch] - 1)[:, None]).nonzero()
        return len(positions) / (time.perf_counter() - began)

    return run


def authors_ranking(sequences: Sequences, vectors: np.ndarray, users: int) -> Callable[[], float]:
    """The same of the authors' way, on a sample of users."""
    model = PlainSASRec(torch.from_numpy(vectors)).eval()
    positions = sequences.held_out(TEST)[:users]

    def run() -> float:
        began, hits = time.perf_counter(), 0
        with torch.no_grad():
            for start in range(0, len(positions), 32):
                batch = positions[start : start + 32]
                histories = torch.from_numpy(sequences.histories(batch, LENGTH).astype(np.int64))
                best, wanted = model(_right_aligned(histories)).topk(20).indices, sequences.items[batch]
                for user in range(len(batch)):
                    for place in range(20):
                        if best[user, place].tolist() == wanted[user].tolist():
                            hits += 1
                            break
        return len(positions) / (time.perf_counter() - began)

    return run


def compare(name: str, unit: str, ways: dict[str, Callable[[], float]], rounds: int) -> None:
    """Runs the ways in turn and prints one line each, with the ratio to the last."""
    for run in ways.values():
        run()  # warm
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            found[way].append(run())
    base = statistics.median(list(found.values())[-1])
    for way, values in found.items():
        middle = statistics.median(values)
        spread = f"{min(values):,.0f}–{max(values):,.0f}"
        print(f"| {name} | {way} | {middle:,.0f} {unit} | {spread} | {middle / base:.1f}x |", flush=True)


def measure_speed(arguments: argparse.Namespace) -> None:
    """The table of training, overhead and ranking."""
    sequences = prepared(*sources.fetch_data(arguments.data))
    vectors = np.random.default_rng(0).standard_normal((sequences.n_items, WIDTH)).astype(np.float32)
    print(f"{arguments.data}: {sequences.n_items:,} items, {torch.get_num_threads()} threads\n")
    print("| what | way | median | spread | ratio |\n| --- | --- | ---: | ---: | ---: |")
    training = {
        f"ours, {dtype}, {batch} windows": bare_training(sequences, vectors, batch, dtype)
        for dtype in ("bfloat16", "float32")
        for batch in arguments.batches
    }
    training |= {"authors' way": authors_training(sequences, vectors)}
    compare("training", "targets/s", training, arguments.rounds)
    batch = arguments.batches[0]
    engine = {
        "by the engine": engine_training(sequences, vectors, batch, "auto"),
        "the steps alone": bare_training(sequences, vectors, batch, "auto"),
    }
    compare(f"overhead, {batch} windows", "targets/s", engine, arguments.rounds)
    measure_adapters(sequences, vectors, arguments.rounds)
    ways = {
        "ours": our_ranking(sequences, vectors),
        "ours, all scores at once": at_once(our_ranking(sequences, vectors)),
        "torch top-k": torch_ranking(sequences, vectors, 8192),
        "authors' way": authors_ranking(sequences, vectors, 2048),
    }
    compare("ranking", "users/s", ways, arguments.rounds)


def measure_adapters(sequences: Sequences, vectors: np.ndarray, rounds: int) -> None:
    """The rows of training with either adapter and either loss."""
    ways = {
        f"{name}, {loss}": bare_training(sequences, vectors, 128, "auto", loss, shape)
        for loss in (SAMPLED_SOFTMAX, FULL)
        for name, shape in (("mlp of 512", BENT), ("linear", SHAPE))
    }
    compare("training, 128 windows", "targets/s", ways, rounds)


def measure_memory(sizes: list[int]) -> None:
    """The table of what training adds to the memory of a process, and how fast it is."""
    print(
        "| items | loss | GiB added by training | bytes an item | targets/s |\n| ---: | --- | ---: | ---: | ---: |"
    )
    for items, loss in itertools.product(sizes, (FULL, SAMPLED_SOFTMAX)):
        command = [sys.executable, __file__, "--items", str(items), "--loss", loss]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        added, speed = json.loads(done.stdout.splitlines()[-1])
        figures = f"{added / 2**30:.3f} | {added / items:,.0f} | {speed:,.0f}"
        print(f"| {items:,} | {loss} | {figures} |", flush=True)


def train_on(items: int, loss: str) -> None:
    """Trains on a made catalogue with vectors in a file, as in a run; prints bytes added and targets a second."""
    generator = np.random.default_rng(0)
    with tempfile.NamedTemporaryFile() as file:
        vectors = np.memmap(file.name, dtype=np.float32, mode="w+", shape=(items, WIDTH))
        for start in range(0, items, 10_000):
            part = vectors[start : start + 10_000]
            part[:] = generator.standard_normal(part.shape, dtype=np.float32)
        few = made(max(1_000, NEGATIVES + 1))
        bare_training(
            few, np.array(vectors[: few.n_items]), 128, "bfloat16", loss
        )()  # what does not depend on the size
        sequences = made(items)
        with PeakMemory() as memory:
            speed = bare_training(sequences, vectors, 128, "bfloat16", loss)()
    print(json.dumps([memory.added, speed]))


def made(items: int, users: int = 2_000, events: int = 8) -> Sequences:
    """Sequences of random items, all of them for training."""
    chosen = np.random.default_rng(0).integers(1, items + 1, users * events).astype(np.int32)
    parts = np.full(len(chosen), TRAIN, dtype=np.uint8)
    offsets = np.arange(0, len(chosen) + 1, events)
    return Sequences(chosen, offsets, parts, [str(item) for item in range(items)], pl.Series(range(users)))


class PeakMemory(threading.Thread):
    """The highest anonymous memory of the process inside a `with` block, beyond what it had before."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._before, self.added, self._over = self._anonymous(), 0, threading.Event()

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Looks every two milliseconds."""
        while not self._over.wait(0.002):
            self.added = max(self.added, self._anonymous() - self._before)

    @staticmethod
    def _anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def main() -> None:
    """Measures what is asked for and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="amazon-games")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512], help="windows a step of ours")
    parser.add_argument("--memory", type=int, nargs="*", help="sizes of catalogues; measures memory, not speed")
    parser.add_argument("--items", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--loss", default=FULL, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.items:
        train_on(arguments.items, arguments.loss)
    elif arguments.memory is not None:
        measure_memory(arguments.memory or [10_000, 100_000, 1_000_000])
    else:
        measure_speed(arguments)


if __name__ == "__main__":
    main()
