"""Peak memory and seconds of the language model's loss with its gradients: in chunks, and over the full logits.

    python benchmarks/loss_memory.py [--tokens 1024 2048 4096] [--vocabularies 16384 49152 151936]

Each measurement is a process of its own; memory is what comes on top of the inputs. Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from llm2rec.softmax import linear_cross_entropy

WAYS = ("ours", "full logits")


def measure(tokens: Sequence[int], vocabularies: Sequence[int], width: int) -> list[dict[str, float | str]]:
    """Prints and returns the figures: every vocabulary at the most tokens, all tokens at the middle vocabulary."""
    print("| loss | tokens | vocabulary | peak MB beyond the inputs | seconds |")
    print("| --- | ---: | ---: | ---: | ---: |")
    middle = vocabularies[len(vocabularies) // 2]
    grid = [(one, middle) for one in tokens] + [(tokens[-1], vocabulary) for vocabulary in vocabularies]
    found: list[dict[str, float | str]] = []
    for count, vocabulary in dict.fromkeys(grid):
        for way in WAYS:
            command = [sys.executable, __file__, "--run", way, "--shape", f"{count},{vocabulary},{width}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"the loss {way!r} of {count} x {vocabulary} failed:\n{done.stderr[-2000:]}")
            one = {"loss": way, "tokens": count, "vocabulary": vocabulary, **json.loads(done.stdout)}
            found.append(one)
            print(f"| {way} | {count:,} | {vocabulary:,} | {one['mb']:,.1f} | {one['seconds']:.3g} |", flush=True)
    return found


def run_one(way: str, tokens: int, vocabulary: int, width: int) -> dict[str, float]:
    """Megabytes beyond the inputs, and seconds, of one loss with its gradients in bfloat16."""
    hidden = torch.randn(tokens, width).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, width).mul_(0.02).bfloat16().requires_grad_()
    labels = torch.randint(vocabulary, (tokens,))
    linear_cross_entropy(hidden[:8], weight[:64], labels[:8] % 64).backward()  # what the first call sets up
    hidden.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, began = _memory_kb("VmRSS"), time.perf_counter()
    if way == "ours":
        loss = linear_cross_entropy(hidden, weight, labels)
    else:
        loss = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    loss.backward()
    return {"mb": (_memory_kb("VmHWM") - before) / 1024, "seconds": time.perf_counter() - began}


def _memory_kb(kind: str) -> int:
    """Resident memory now (VmRSS) or at its highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[16_384, 49_152, 151_936])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return print(json.dumps(run_one(arguments.run, *map(int, arguments.shape.split(",")))))
    measure(arguments.tokens, arguments.vocabularies, arguments.width)


if __name__ == "__main__":
    main()
