"""SASRec over item vectors: training targets a second, and users ranked a second, against the authors' way.

    LLM2REC_DATA_DIR=... python benchmarks/recommenders.py [--data amazon-games] [--rounds 5]

The authors' way, written from their description: one sample a target and only its last position supervised,
batches of 256, float32, the adapter over the whole catalogue in each batch, whole logits; ranking by `topk` and a
loop over users. Vectors are random (576 wide): speed does not depend on what they hold. Both sides run in turn in
one process; printed are medians with their spread, and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llm2rec.data import sources
from llm2rec.data.sequences import TEST, Sequences, prepare
from llm2rec.data.splits import Split
from llm2rec.evaluation import protocol
from llm2rec.rec import model as models
from llm2rec.rec.architecture import Architecture
from llm2rec.rec.fit import NextItemObjective, Optimisation, WindowBatches

WIDTH, HIDDEN, LENGTH = 576, 128, 10


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


def prepared(name: str) -> Sequences:
    """The sequences of a named data set, leave-one-out."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(*sources.fetch_data(name), split=Split(), short_histories="drop", out=Path(folder))
        loaded = Sequences.load(Path(folder))
        arrays = {key: np.array(getattr(loaded, key)) for key in ("items", "offsets", "parts", "times")}
        return Sequences(**arrays, item_ids=loaded.item_ids, user_ids=loaded.user_ids)


def ours_training(sequences: Sequences, vectors: np.ndarray, batch_size: int, steps: int) -> Callable[[], float]:
    """Targets a second of `steps` steps of our training."""
    shape = Architecture("sasrec", "text", HIDDEN, 2, 2, 0.3, LENGTH)
    recommender = models.build(shape, n_items=sequences.n_items, seed=0, vectors=vectors).train()
    batches = WindowBatches(sequences, LENGTH, batch_size, 0)
    objective = NextItemObjective(recommender, Optimisation(1e-3, 1e-4, batch_size, 1, 1))
    optimizer = torch.optim.AdamW([p for p in recommender.parameters() if p.requires_grad], 1e-3, fused=True)

    def run() -> float:
        targets, began = 0, time.perf_counter()
        for number in range(steps):
            batch = batches[number]
            (objective(recommender, batch) / batch["n_targets"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            targets += batch["n_targets"]
        return targets / (time.perf_counter() - began)

    return run


def authors_training(
    sequences: Sequences, vectors: np.ndarray, batch_size: int, steps: int
) -> Callable[[], float]:
    """The same of the authors' way."""
    model = PlainSASRec(torch.from_numpy(vectors)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    samples = WindowBatches(sequences, LENGTH, batch_size, 0, targets="last")

    def run() -> float:
        targets, began = 0, time.perf_counter()
        for number in range(steps):
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


def ours_ranking(sequences: Sequences, vectors: np.ndarray) -> Callable[[], float]:
    """Users a second from histories to ranks, full ranking."""
    shape = Architecture("sasrec", "text", HIDDEN, 2, 2, 0.3, LENGTH)
    recommender = models.build(shape, n_items=sequences.n_items, seed=0, vectors=vectors).eval()

    def run() -> float:
        began = time.perf_counter()
        ranked = protocol.evaluate(recommender, sequences, TEST, LENGTH, description=None)
        return ranked.height / (time.perf_counter() - began)

    return run


def authors_ranking(sequences: Sequences, vectors: np.ndarray, users: int) -> Callable[[], float]:
    """The same by `topk` of 100 and a loop over users, on a sample of users."""
    model = PlainSASRec(torch.from_numpy(vectors)).eval()
    positions = sequences.held_out(TEST)[:users]

    def run() -> float:
        began, hits = time.perf_counter(), 0.0
        with torch.no_grad():
            for start in range(0, len(positions), 256):
                batch = positions[start : start + 256]
                histories = torch.from_numpy(sequences.histories(batch, LENGTH).astype(np.int64))
                best = model(_right_aligned(histories)).topk(100).indices
                for row, target in zip(best.tolist(), sequences.items[batch].tolist(), strict=True):
                    hits += 1 / np.log2(row.index(target) + 2) if target in row else 0
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


def main() -> None:
    """Measures training and ranking and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="amazon-games")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128, help="windows a step of ours")
    arguments = parser.parse_args()
    sequences = prepared(arguments.data)
    vectors = np.random.default_rng(0).standard_normal((sequences.n_items, WIDTH)).astype(np.float32)
    print(f"{arguments.data}: {sequences.n_items:,} items, {torch.get_num_threads()} threads\n")
    print("| what | way | median | spread | ratio |\n| --- | --- | ---: | ---: | ---: |")
    training = {
        "ours": ours_training(sequences, vectors, arguments.batch, 4),
        "authors' way": authors_training(sequences, vectors, 256, 4),
    }
    compare("training", "targets/s", training, arguments.rounds)
    ranking = {
        "ours": ours_ranking(sequences, vectors),
        "authors' way": authors_ranking(sequences, vectors, 4096),
    }
    compare("ranking", "users/s", ranking, arguments.rounds)


if __name__ == "__main__":
    main()
