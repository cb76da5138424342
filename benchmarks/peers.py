"""SASRec against RecTools and RecBole: training and full ranking at equal settings; metrics against ranx as well.

    LLM2REC_DATA_DIR=... python benchmarks/peers.py --rectools-python PYTHON --recbole-python PYTHON
    python benchmarks/peers.py --parity --recbole-python PYTHON --ranx-python PYTHON
    python benchmarks/peers.py --quick

Each side is a process in an interpreter of its own (`peer_sides/`), because the peers need older libraries:

    python -m venv rectools && rectools/bin/pip install torch==2.13.0
    rectools/bin/pip install "rectools[torch]==0.19.*"
    python -m venv recbole && recbole/bin/pip install torch==2.13.0
    recbole/bin/pip install recbole==1.2.1 ranx==0.3.21 "numpy==1.26.*" "pandas<3"

All read one log and build one model: 128 wide, 2 layers, 2 heads, window 10, dropout 0.3, learned ids, softmax
over all items, Adam at 1e-3, and train through their own loaders and trainers. A round trains each side on a share
of an epoch, or has it rank all users; the sides take turns, each at its fastest batch. Where they still differ is
said in the files of the sides. `--quick` takes a small made log.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import polars as pl
import torch
from interleaved import prepared
from peer_sides.side import LENGTH, LISTS, RANKS, TRAINING, Done, Log

from llm2rec.data import sources
from llm2rec.data.sequences import Sequences
from llm2rec.data.splits import TEST, TRAIN, VALIDATION
from llm2rec.evaluation.ranking import measure, ranks

SIDES = Path(__file__).parent / "peer_sides"
UNITS = {TRAINING: "targets/s", RANKS: "users/s", LISTS: "users/s"}
OURS = "llm2rec"


class Worker:
    """A side in its interpreter; a context that ends it."""

    def __init__(self, name: str, python: str, log: Path, round_targets: int, threads: int) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix=f"{name}-")
        self._errors = Path(self._folder.name) / "errors.txt"
        bounds = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [python, str(SIDES / f"with_{name}.py"), str(log), str(round_targets)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=self._folder.name,
                env=os.environ | bounds | {"POLARS_MAX_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"},
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()  # the end of its input ends it
        self._folder.cleanup()

    def start(self) -> dict:
        """What the side says of itself once it is built."""
        return self._answer()

    def measure(self, what: str, batch: int) -> Done:
        """How many targets or users in how many seconds, measured now."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, "batch": batch}) + "\n")
        self._process.stdin.flush()
        done = self._answer()
        return done["count"], done["seconds"]

    def rate(self, what: str, batch: int) -> float:
        """The same, a second."""
        count, seconds = self.measure(what, batch)
        return count / seconds

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = "\n".join(self._errors.read_text().splitlines()[-20:])
            raise SystemExit(f"the side {self.name} ended; it said last:\n{said}")
        return json.loads(line)


@dataclass(frozen=True)
class Figure:
    """One line of the table: a side at its fastest batch. rates, ratios: one a round, ratios ours over theirs."""

    what: str
    side: str
    batch: int
    rates: list[float]
    ratios: list[float]

    def line(self, whole: int) -> str:
        """As a row; `whole` is the number of targets or users whose time is given."""
        middle = statistics.median(self.rates)
        ratio = f"{statistics.median(self.ratios):.2f} ({min(self.ratios):.2f}–{max(self.ratios):.2f})"
        return (
            f"| {self.what} | {self.side} | {self.batch} | {middle:,.0f} {UNITS[self.what]} | "
            f"{min(self.rates):,.0f}–{max(self.rates):,.0f} | {whole / middle:,.2f} s | {ratio} |"
        )


def compare(what: str, sides: dict[str, Worker], batches: dict[str, list[int]], rounds: int) -> list[Figure]:
    """Every side at the fastest of its batches, in turn; ratios are taken within a round."""
    best = {}
    for name, worker in sides.items():
        worker.rate(what, batches[name][0])  # warm
        tried = {batch: worker.rate(what, batch) for batch in batches[name]}
        best[name] = max(tried, key=lambda batch: tried[batch])
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, worker in sides.items():
            rates[name].append(worker.rate(what, best[name]))
    ours = rates[OURS]
    return [
        Figure(what, name, best[name], found, [mine / other for mine, other in zip(ours, found, strict=True)])
        for name, found in rates.items()
    ]


def measure_sides(log: Log, pythons: dict[str, str | None], arguments: argparse.Namespace) -> None:
    """Starts the sides that have an interpreter, measures what each can do, and prints the table."""
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log.npz"
        log.save(path)
        workers, says = {}, {}
        for name, python in pythons.items():
            if python is not None:
                worker = Worker(name, python, path, arguments.targets, arguments.threads)
                workers[name] = stack.enter_context(worker)
                says[name] = worker.start()  # one after the other: they share the cores
        show_head(log, says, arguments)
        for what in arguments.only:
            able = {name: worker for name, worker in workers.items() if what in says[name]["batches"]}
            batches = {name: says[name]["batches"][what] for name in able}
            for figure in compare(what, able, batches, arguments.rounds):
                print(figure.line(log.targets if what == TRAINING else log.n_users), flush=True)
    for name in pythons:
        if name not in workers:
            print(f"| all | {name} | left out: no --{name}-python | | | | |")


def show_head(log: Log, says: dict[str, dict], arguments: argparse.Namespace) -> None:
    """What was measured on, by which versions, and what the columns mean."""
    share = min(1.0, arguments.targets / log.targets)
    print(f"{log.n_users:,} users, {log.n_items:,} items, {log.targets:,} targets; {arguments.threads} threads")
    print("; ".join(f"{said['version']} scores {said['n_items']:,} items" for said in says.values()))
    print(f"training: an epoch's seconds are computed from {share:.0%} of it a round; sets-up are not counted")
    print("ranks: from histories to recall, NDCG and MRR at 10 (torch: within the 10 best alone)")
    print("lists: from histories to the 10 best items (llm2rec: and to ranks; rectools: as a data frame)\n")
    print("| what | side | batch | median | min–max | epoch (computed), or all users | ours / theirs (min–max) |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)


def log_of(sequences: Sequences) -> Log:
    """Leave-one-out sequences as the sides read them."""
    items, _ = sequences.training()
    starts, ends = sequences.windows(LENGTH)
    windows = [items[start:end] for start, end in zip(starts, ends, strict=True)]
    return Log(
        np.asarray(sequences.items),
        np.asarray(sequences.offsets),
        np.concatenate(windows),
        np.concatenate([[0], np.cumsum(ends - starts)]),
        sequences.n_items,
    )


def quick_sequences(users: int = 200, n_items: int = 60) -> Sequences:
    """Users of 4 to 30 random events."""
    generator = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(generator.integers(4, 31, users))])
    items = generator.integers(1, n_items + 1, offsets[-1]).astype(np.int32)
    parts = np.full(len(items), TRAIN, dtype=np.uint8)
    parts[offsets[1:] - 2], parts[offsets[1:] - 1] = VALIDATION, TEST
    return Sequences(items, offsets, parts, [str(item) for item in range(n_items)], pl.Series(range(users)))


def parity(pythons: dict[str, str | None], rows: int = 500, n_items: int = 1000) -> dict[str, float]:
    """Largest difference between our metrics and each library's, at 1, 5, 10 and 20, on one matrix of scores.

    No two scores of a row are equal: with ties the libraries answer by their sort, and we against the target.
    """
    generator = np.random.default_rng(0)
    scores = generator.permuted(np.tile(np.arange(n_items, dtype=np.float32), (rows, 1)), axis=1)
    # Most targets stand far up: at random one in fifty would be among the first 20.
    places = np.minimum(generator.geometric(0.1, rows), n_items)
    targets = np.argsort(-scores, axis=1)[np.arange(rows), places - 1]
    rank = ranks(torch.from_numpy(scores), torch.from_numpy(targets) + 1)
    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.npz"
        np.savez(path, scores=scores, targets=targets)
        for library, python in pythons.items():
            if python is None:
                print(f"{library}: left out, no --{library}-python")
                continue
            command = [python, str(SIDES / "metrics.py"), library, str(path)]
            said = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
            if said.returncode:
                raise SystemExit(f"the metrics of {library} failed:\n{said.stderr[-2000:]}")
            theirs = json.loads(said.stdout)
            apart = {name: abs(float(measure(rank, name).mean()) - value) for name, value in theirs.items()}
            differences[library] = max(apart.values())
            print(f"{library}: {len(apart)} metrics, largest difference {differences[library]:.1e}")
    return differences


def main() -> None:
    """Measures, or compares metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="amazon-games")
    parser.add_argument("--quick", action="store_true", help="a small made log instead")
    parser.add_argument("--parity", action="store_true", help="compare metrics, not speed")
    parser.add_argument("--only", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--targets", type=int, default=32_768, help="training targets a round, about")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto", help="of our products in training; the peers' are float32")
    for name in ("rectools", "recbole", "ranx"):
        # Absolute, because a side runs in a folder of its own.
        about = f"path of an interpreter that has {name}"
        parser.add_argument(f"--{name}-python", type=os.path.abspath, metavar="PYTHON", help=about)
    arguments = parser.parse_args()
    if arguments.parity:
        differences = parity({"recbole": arguments.recbole_python, "ranx": arguments.ranx_python})
        raise SystemExit(any(difference > 1e-6 for difference in differences.values()))
    sequences = quick_sequences() if arguments.quick else prepared(*sources.fetch_data(arguments.data))
    ours = {OURS: sys.executable, "torch": sys.executable}
    theirs = {"rectools": arguments.rectools_python, "recbole": arguments.recbole_python}
    os.environ["OUR_DTYPE"] = arguments.dtype
    measure_sides(log_of(sequences), ours | theirs, arguments)


if __name__ == "__main__":
    main()
