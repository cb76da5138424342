"""Plain torch: our recommender's scores, one matrix product a batch, under `topk`."""

import time

import numpy as np
import torch
from side import CUTOFF, LENGTH, LISTS, RANKS, Done, Log, Side, serve
from with_llm2rec import build, sequences_of

from llm2rec.data.splits import TEST


def make(log: Log, round_targets: int) -> Side:
    """Ranking alone; ranks are the places of the targets in the lists, beyond which there is no telling."""
    sequences = sequences_of(log)
    recommender = build(sequences).eval()

    def lists(batch: int, with_ranks: bool = False) -> Done:
        began = time.perf_counter()
        positions = sequences.held_out(TEST)
        gains = []
        with torch.inference_mode():
            for start in range(0, len(positions), batch):
                rows = positions[start : start + batch]
                histories = torch.from_numpy(sequences.histories(rows, LENGTH).astype(np.int64))
                best = recommender.score(histories).topk(CUTOFF).indices + 1
                if with_ranks:
                    hits = best == torch.from_numpy(sequences.items[rows].astype(np.int64))[:, None]
                    gains.append(hits / torch.log2(torch.arange(CUTOFF) + 2.0))
        if with_ranks:
            torch.cat(gains).sum(1).mean()  # NDCG
        return len(positions), time.perf_counter() - began

    batches = (128, 512, 1024)
    return Side(
        f"torch {torch.__version__}",
        sequences.n_items,
        {RANKS: lambda batch: lists(batch, with_ranks=True), LISTS: lists},
        {RANKS: batches, LISTS: batches},
    )


if __name__ == "__main__":
    serve(make)
