"""A service under load: requests a second and how long one takes, with so many clients at once.

    python benchmarks/service.py RUN [--row ROW] [--clients 1 8 32] [--requests 400] [--rounds 3]

Starts `llm2rec serve` on a free port and asks it for ten items after histories of eight random items, over kept
connections, from threads of this process on the same cores. The clients take turns in rounds; printed are medians
over the rounds, and the spread of requests a second.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection

HISTORY = 8


@contextmanager
def serving(run: str, row: str | None) -> Iterator[int]:
    """The port of a service of its own."""
    command = [sys.executable, "-m", "llm2rec.cli", "serve", run, "--port", "0", *(["--row", row] if row else [])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://127.0.0.1:(\d+)", line):
                break
        else:
            raise SystemExit("".join(said))
        yield int(found[1])
    finally:
        process.kill()
        process.communicate()


def ask(connection: HTTPConnection, path: str, body: dict[str, object] | None = None) -> bytes:
    """What is answered to GET, or to POST with a body."""
    content = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise SystemExit(f"{path}: {answer.status} {text.decode()}")
    return text


def one_client(port: int, item_ids: list[str], requests: int, seed: int) -> list[float]:
    """Seconds that each of some requests took, one after the other."""
    draw, connection, taken = random.Random(seed), HTTPConnection("127.0.0.1", port), []
    for _ in range(requests):
        start = time.perf_counter()
        ask(connection, "/recommend", {"history": draw.choices(item_ids, k=HISTORY)})
        taken.append(time.perf_counter() - start)
    return taken


def measure(port: int, item_ids: list[str], clients: int, requests: int) -> tuple[float, float, float]:
    """Requests a second, and the median and 95th percentile of what one took in milliseconds."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        each = max(1, requests // clients)
        taken = sum(pool.map(lambda seed: one_client(port, item_ids, each, seed), range(clients)), [])
    speed = len(taken) / (time.perf_counter() - start)
    return speed, 1e3 * statistics.median(taken), 1e3 * sorted(taken)[int(0.95 * len(taken))]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--row")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with serving(given.run, given.row) as port:
        item_ids = [
            item["item_id"] for item in json.loads(ask(HTTPConnection("127.0.0.1", port), "/items?k=1000"))
        ]
        measure(port, item_ids, 1, 20)  # warm
        found: dict[int, list[tuple[float, float, float]]] = {clients: [] for clients in given.clients}
        for _ in range(given.rounds):
            for clients, rounds in found.items():
                rounds.append(measure(port, item_ids, clients, given.requests))
    print(
        "| clients | requests/s | spread | median, ms | 95th percentile, ms |\n| ---: | ---: | --- | ---: | ---: |"
    )
    for clients, rounds in found.items():
        speeds, medians, slowest = zip(*rounds, strict=True)
        middle = " | ".join(f"{statistics.median(values):.1f}" for values in (medians, slowest))
        print(f"| {clients} | {statistics.median(speeds):.0f} | {min(speeds):.0f}–{max(speeds):.0f} | {middle} |")


if __name__ == "__main__":
    main()
