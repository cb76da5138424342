"""Time and peak memory of read -> 5-core -> split -> sequences against the size of the log.

    python benchmarks/data_scale.py [--millions 1 10 100] [--pandas 10] [--repeats 3]

Logs are made on the spot: string ids, Zipf items, log-normal lengths, one parquet file for 5 million events. Each
measurement is a process of its own, ours and pandas' in turn; printed are medians, with the spread.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

EVENTS_A_FILE = 5_000_000
EVENTS_A_USER = 20
K_CORE = 5


def make_log(folder: Path, events: int, seed: int = 0) -> None:
    """`log/part-*.parquet` and `items.parquet` of about `events` events."""
    generator = np.random.default_rng(seed)
    items = max(1000, events // 100)
    (folder / "log").mkdir(parents=True)
    shares = 1 / np.arange(1, items + 1)
    cumulative = np.cumsum(shares / shares.sum())
    first_user = 0
    for number in range(-(-events // EVENTS_A_FILE)):
        size = min(EVENTS_A_FILE, events - number * EVENTS_A_FILE)
        lengths = np.maximum(
            1, generator.lognormal(np.log(EVENTS_A_USER) - 0.5, 1.0, size // EVENTS_A_USER * 2)
        ).astype(int)
        users = np.repeat(np.arange(len(lengths)), lengths)[:size] + first_user
        first_user = int(users[-1]) + 1
        chosen = np.searchsorted(cumulative, generator.random(len(users)))
        table = pl.DataFrame(
            {
                "user_id": pl.Series(users),
                "item_id": pl.Series(np.minimum(chosen, items - 1)),
                "timestamp": generator.integers(1_300_000_000, 1_500_000_000, len(users)),
            }
        )
        named = table.with_columns(
            pl.format("A{}", "user_id").alias("user_id"), pl.format("B{}", "item_id").alias("item_id")
        )
        named.sample(fraction=1.0, shuffle=True, seed=number).write_parquet(
            folder / "log" / f"part-{number:03d}.parquet"
        )
    catalogue = pl.DataFrame({"item_id": [f"B{item}" for item in range(items)]})
    catalogue.with_columns(title=pl.format("Title of {}", "item_id")).write_parquet(folder / "items.parquet")


def ours(folder: Path) -> dict[str, int]:
    """The stage `prepare` on the log in `folder`."""
    from llm2rec.data.filters import filtered
    from llm2rec.data.readers import read_interactions, read_items
    from llm2rec.data.sequences import prepare
    from llm2rec.data.splits import Split

    log = read_interactions(folder / "log")
    catalogue = read_items(folder / "items.parquet")
    settings = {
        "min_rating": None,
        "users": None,
        "repeats": "keep",
        "min_events": 1,
        "max_events": None,
        "seed": 0,
    }
    log, _ = filtered(log, **settings, k_core=K_CORE)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        return prepare(log, catalogue, split=Split(), short_histories="drop", only_consumed=True, out=Path(out))


def pandas_way(folder: Path) -> dict[str, int]:
    """The same job as research scripts do it."""
    import pandas as pd

    log = pd.read_parquet(folder / "log")
    while True:
        before = len(log)
        log = log[log.groupby("user_id")["item_id"].transform("size") >= K_CORE]
        log = log[log.groupby("item_id")["user_id"].transform("size") >= K_CORE]
        if len(log) == before:
            break
    log = log.sort_values(["user_id", "timestamp", "item_id"])
    items = {item: index for index, item in enumerate(sorted(log["item_id"].unique()), 1)}
    sequences = log.assign(index=log["item_id"].map(items)).groupby("user_id")["index"].apply(list)
    splits = [(one[:-2], one[-2], one[-1]) for one in sequences]
    return {"users": len(splits), "items": len(items), "events": len(log)}


def measure(way: str, folder: Path) -> dict[str, float]:
    """Seconds, peak memory and events left of one way, in a process of its own."""
    command = [sys.executable, __file__, "--run", way, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} failed on {folder}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_one(way: str, folder: Path) -> None:
    """Runs a way and prints what it took as JSON."""
    began = time.perf_counter()
    found = {"ours": ours, "pandas": pandas_way}[way](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "gib": peak, "events": found["events"], "users": found["users"]}))


def main() -> None:
    """Makes the logs, measures, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument(
        "--pandas", type=float, default=10, help="size at which pandas is measured beside (0: not)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", choices=("ours", "pandas"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return run_one(arguments.run, arguments.folder)
    print("| millions | way | seconds (min–max) | peak GiB | events left | users left |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for millions in arguments.millions:
        with tempfile.TemporaryDirectory() as folder:
            make_log(Path(folder), int(millions * 1e6))
            ways = ["ours", "pandas"] if millions == arguments.pandas else ["ours"]
            results = {way: [] for way in ways}
            for _ in range(arguments.repeats):
                for way in ways:
                    results[way].append(measure(way, Path(folder)))
            for way, found in results.items():
                seconds = [one["seconds"] for one in found]
                spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})"
                peak = max(one["gib"] for one in found)
                left = f"{found[0]['events']:,} | {found[0]['users']:,}"
                print(f"| {millions:g} | {way} | {spread} | {peak:.2f} | {left} |", flush=True)


if __name__ == "__main__":
    main()
