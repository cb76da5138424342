"""Kills (-9) every stage of a run at random moments: does it go on to the results of an undisturbed one?

    python benchmarks/kills.py [--kills 20] [--verbs prepare csft iem encode fit evaluate] [--seed 0]

A tiny random decoder on a small log. For each verb its stages are taken out of a finished run and run again in a
process that is killed at a moment drawn from the time the verb takes, then started again, killed again, until it
ends; all of that until the verb was killed so often. Whenever it ends, its tensors, tables and metrics must equal
those of the undisturbed run to the byte. Processes are forked from one that has imported everything and computed
nothing (thread pools do not survive a fork): so a kill meets the stage, not its imports.
Exits with status 1 where a result differs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}  # before the fork
os.environ |= {"TRANSFORMERS_VERBOSITY": "error"}

import numpy as np
import torch

import llm2rec as lr
import llm2rec.lm.iem
import llm2rec.rec.fit
import llm2rec.stages.judging
from llm2rec import artifacts, progress, stages

SETTINGS = (
    "model.source=tiny-random",
    "model.dtype=float32",
    "data.history_length=4",
    "data.categories=null",
    "csft.max_tokens=20000",
    "csft.batch_tokens=256",
    "csft.checkpoints=6",
    "iem.mntp.steps=60",
    "iem.mntp.checkpoints=6",
    "iem.contrastive.steps=30",
    "iem.contrastive.batch_size=8",
    "iem.contrastive.evaluations=6",
    "encode.shard_texts=4",
    "recommender.rows=[popularity, sasrec-id, sasrec-llm2rec]",
    "recommender.max_epochs=6",
    "recommender.hidden_size=16",
    "evaluation.k=[1, 5]",
    "evaluation.bootstrap_samples=2000",
)
COMPARED = (".safetensors", ".parquet", ".npy")


def write_log(folder: Path, users: int = 60, items: int = 24, events: int = 8) -> None:
    """Every user walks round the same circle of items."""
    walk = (np.arange(users)[:, None] + np.arange(events)) % items
    lines = [f"u{user:03d},i{item:02d},{time}" for user, row in enumerate(walk) for time, item in enumerate(row)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    colours = ("blue", "red")
    lines = [f"i{item:02d},The {colours[item % 2]} boat ({1980 + item})" for item in range(items)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *lines]) + "\n")


def stage_folders(run: lr.Run, verb: str) -> list[Path]:
    """The folders that a verb writes, relative to the run."""
    found = {
        "prepare": stages.prepare_stages(run),
        "csft": [stage for stage in stages.language_stages(run) if stage.verb == "csft"],
        "iem": [stage for stage in stages.language_stages(run) if stage.verb == "iem"],
        "encode": stages.encode_stages(run),
        "fit": stages.fit_stages(run),
        "evaluate": stages.evaluate_stages(run),
    }
    return [stage.folder.relative_to(run.folder) for stage in found[verb]]


def results(folder: Path, parts: list[Path]) -> dict[str, str]:
    """What must be equal: hashes of tensors, tables and metrics of the stages."""
    files = [path for part in parts for path in sorted((folder / part).rglob("*")) if path.suffix in COMPARED]
    files += [folder / part / "metrics.json" for part in parts if (folder / part / "metrics.json").exists()]
    unfinished = [str(part) for part in parts if not (folder / part / artifacts.MANIFEST).exists()]
    hashed = {str(path.relative_to(folder)): artifacts.hash_file(path) for path in files}
    return hashed | {part: "unfinished" for part in unfinished}


def forked(verb: str, *arguments: object) -> BaseProcess:
    """A verb, running in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=getattr(lr, verb), args=arguments)
    process.start()
    return process


def killed_until_done(verb: str, folder: Path, seconds: float, left: int, generator: random.Random) -> int:
    """Starts the verb until it ends well, killing it up to `left` times; how often it was killed."""
    kills = 0
    while True:
        process = forked(verb, folder)
        if kills < left:
            process.join(generator.uniform(0, seconds))
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
                kills += 1
        process.join()
        if process.exitcode == 0:
            return kills
        if process.exitcode != -signal.SIGKILL:
            raise SystemExit(f"`{verb}` failed with status {process.exitcode} after {kills} kills; see {folder}")


def attack(reference: lr.Run, verb: str, kills: int, generator: random.Random, root: Path) -> bool:
    """Kills a verb `kills` times in all, and prints a line of the table; whether all results were equal."""
    parts = stage_folders(reference, verb)
    expected = results(reference.folder, parts)
    done, rounds, differing, seconds = 0, 0, set(), 0.0
    while done < kills:
        folder = root / f"{verb}-{rounds}"
        shutil.copytree(reference.folder, folder)
        for part in parts:
            shutil.rmtree(folder / part)
        if rounds == 0:  # undisturbed, for the time that it takes, and to prove that it is deterministic
            began = time.perf_counter()
            killed_until_done(verb, folder, 0.0, 0, generator)
            seconds = time.perf_counter() - began
        else:
            done += killed_until_done(verb, folder, seconds, kills - done, generator)
        found = results(folder, parts)
        differing |= {path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)}
        shutil.rmtree(folder)
        rounds += 1
    verdict = "equal" if not differing else f"DIFFERENT: {', '.join(sorted(differing)[:3])}"
    print(f"| {verb} | {seconds:.1f} | {done} | {rounds - 1} | {len(expected)} | {verdict} |", flush=True)
    return not differing


def main() -> None:
    """Runs once undisturbed, then attacks each verb, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each verb")
    parser.add_argument("--verbs", nargs="+", default=["prepare", "csft", "iem", "encode", "fit", "evaluate"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    generator, equal = random.Random(arguments.seed), True
    torch.set_num_threads(1)
    progress.console.quiet = True
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_log(root)
        files = (f"data.interactions={root}/interactions.csv", f"data.items={root}/items.csv")
        undisturbed = forked("run", "demo", root / "reference", (*files, *SETTINGS))
        undisturbed.join()
        if undisturbed.exitcode:
            raise SystemExit(f"the undisturbed run failed with status {undisturbed.exitcode}")
        reference = lr.open_run(root / "reference")
        print("| verb | seconds | kills | ended well after kills | files compared | results |")
        print("| --- | ---: | ---: | ---: | ---: | --- |")
        for verb in arguments.verbs:
            equal &= attack(reference, verb, arguments.kills, generator, root)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
