"""The language stages against the usual way: training, encoding, memory of the loss, tokenising.

    LLM2REC_DATA_DIR=... python benchmarks/language.py [--only csft mntp ...] [--rounds 5] [--json FILE]
    python benchmarks/language.py --profile
    python benchmarks/language.py --quick [--profile]

SmolLM2-135M on the titles and histories of amazon-games (movielens-100k where LLM2REC_DATA_DIR is not set). Both
sides run in turn in one process, each at the batch that a first pass finds best; printed are medians with their
spread, and the median and spread of the ratio within a round. Ours is the training engine itself; neither side's
set-up is counted.
The matrix product's peak is measured before and after: where it drifts by more than 5 % the run is void.
`--quick` runs everything on a tiny random decoder and a small log: it proves that the figures can be had.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import loss_memory
import numpy as np
import plain_language as plain
import polars as pl
import torch
from interleaved import Figure, Run, compare, prepared, timed

from llm2rec.batches import Batch, Batches
from llm2rec.data import sources
from llm2rec.data.sequences import Sequences
from llm2rec.data.tables import Catalogue, Interactions
from llm2rec.errors import ConfigError
from llm2rec.lm import attention
from llm2rec.lm import backbone as backbones
from llm2rec.lm import samples as sampling
from llm2rec.lm.backbone import Backbone
from llm2rec.lm.csft import Budget, BudgetBatches, Form, TokenObjective, WindowBatches, csft_texts, training_data
from llm2rec.lm.encode import encode_tokens
from llm2rec.lm.export import export
from llm2rec.lm.iem import (
    ContrastiveObjective,
    MaskedBatches,
    contrastive_batches,
    distinct_texts,
)
from llm2rec.lm.text import item_texts
from llm2rec.lm.tiny import make_tiny_random
from llm2rec.precision import resolve_dtype
from llm2rec.training import Objective, TrainSettings, train

MODEL = "smollm2-135m-instruct-q4"
HISTORY, TITLE_TOKENS, TEMPERATURE = 10, 64, 0.1
DRIFT = 0.05
PROFILED = 14  # operations shown


@dataclass(frozen=True)
class Sizes:
    """How much a side does in a round, and the batches it may choose from."""

    csft_tokens: int = 4096
    csft_targets: int = 64
    csft_micro_tokens: tuple[int, ...] = (1024, 2048, 4096)
    csft_micro_samples: tuple[int, ...] = (4, 8, 16)
    mntp_titles: int = 96
    mntp_batch: int = 32
    contrastive_titles: int = 256
    contrastive_micro_tokens: tuple[int, ...] = (1024, 2048, 4096)
    encoded_titles: int = 1024
    encode_tokens: tuple[int, ...] = (2048, 4096, 8192)
    encode_batches: tuple[int, ...] = (8, 16, 32, 64, 128)
    row_calls: int = 40_000
    loss_tokens: tuple[int, ...] = (1024, 2048, 4096)
    loss_vocabularies: tuple[int, ...] = (16_384, 49_152, 151_936)
    loss_width: int = 576
    matmul: tuple[int, float] = (4096, 2.0)  # side, seconds


QUICK = Sizes(
    csft_tokens=256,
    csft_targets=8,
    csft_micro_tokens=(128, 256),
    csft_micro_samples=(4, 8),
    mntp_titles=8,
    mntp_batch=4,
    contrastive_titles=8,
    contrastive_micro_tokens=(64, 128),
    encoded_titles=12,
    encode_tokens=(64, 128),
    encode_batches=(4, 8),
    row_calls=20,
    loss_tokens=(64, 256),
    loss_vocabularies=(1024, 8192),
    loss_width=16,
    matmul=(128, 0.01),
)


@dataclass(frozen=True)
class World:
    """What is measured on."""

    sequences: Sequences
    titles: list[str]
    model: str | Path
    dtype: torch.dtype
    sizes: Sizes
    rounds: int

    def load(self, *, head: bool = True) -> Backbone:
        """A model of its own for one side."""
        return backbones.load(self.model, self.dtype, head=head)

    def chosen_titles(self, count: int) -> list[str]:
        """A fixed sample of different titles."""
        distinct = np.array(sorted(set(item_texts(self.titles))), dtype=object)
        generator = np.random.default_rng(0)
        return generator.permutation(distinct)[:count].tolist()


class Clocked(Batches):
    """Batches that note when the first of them is asked for."""

    def __init__(self, batches: Batches) -> None:
        self._batches, self.began = batches, 0.0

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        self.began = self.began or time.perf_counter()
        return self._batches[index]


def engine(lm: Backbone, batches: Batches, objective: Objective, count: int, accumulation: int = 1) -> Run:
    """How many of `count` a second: a training over `batches`, from its first batch to its end."""
    steps = len(batches) // accumulation
    settings = TrainSettings(max_steps=steps, accumulation=accumulation, seed=0, learning_rate=plain.LEARNING_RATE)

    def run() -> float:
        clocked = Clocked(batches)
        with tempfile.TemporaryDirectory() as out:
            train(lm.model, clocked, objective, out=Path(out), settings=settings, description="benchmark")
        return count / (time.perf_counter() - clocked.began)

    return run


def packed_batches(world: World, lm: Backbone, micro_tokens: int) -> BudgetBatches:
    """Our CSFT micro-batches of one optimizer step."""
    form, budget = (
        Form("packed", HISTORY, TITLE_TOKENS, False),
        Budget(micro_tokens, world.sizes.csft_tokens, None),
    )
    return training_data(lm, world.sequences, world.titles, form, budget, seed=0)[0]


def packed_ways(lm: Backbone, made: dict[int, BudgetBatches]) -> dict[str, Run]:
    """Our CSFT step with each size of micro-batch."""
    return {
        f"{micro} tokens": engine(lm, batches, TokenObjective(lm), batches.targets, len(batches))
        for micro, batches in made.items()
    }


def measure_csft(world: World) -> list[Figure]:
    """Targets a second of CSFT, one optimizer step a round, and the useful share of the machine's peak."""
    sizes, ours, theirs = world.sizes, world.load(), world.load()
    for lm in (ours, theirs):
        lm.set_causal(True)
    made = {micro: packed_batches(world, ours, micro) for micro in sizes.csft_micro_tokens}
    sides = {"ours, packed": packed_ways(ours, made)}
    with suppress(ConfigError):  # no C++ compiler
        compiled = world.load()
        compiled.set_causal(True)
        compiled.compile_layers()
        sides["ours, packed, compiled"] = packed_ways(compiled, made)
    items, _ = sampling.training_items(world.sequences, HISTORY)
    chosen = np.random.default_rng(0).permutation(len(items))[: sizes.csft_targets]
    samples = sampling.make_samples(
        ours.tokenizer,
        world.titles,
        [items[row] for row in chosen],
        np.arange(len(chosen)),
        max_title_tokens=TITLE_TOKENS,
        separator=False,
    )
    padded = {f"{size} samples": plain.csft(theirs, samples, size) for size in sizes.csft_micro_samples}
    sides["authors' samples"] = padded
    before = matmul_peak(sizes)
    figures = compare("CSFT", "targets/s", sides, world.rounds)
    after = matmul_peak(sizes)
    show_useful(figures, minimal_flops(ours, made[sizes.csft_micro_tokens[0]]), before, after)
    return figures


def show_useful(figures: list[Figure], flops: float, before: float, after: float) -> None:
    """Prints useful-MFU: targets x minimal FLOPs a target / (seconds x measured peak)."""
    peak = (before + after) / 2
    drift = abs(before - after) / peak
    note = f"VOID: the peak drifted by {drift:.0%}" if drift > DRIFT else f"drift {drift:.1%}"
    print(f"\npeak {peak / 1e12:.3g} TFLOP/s ({note}); minimal {flops / 1e9:.3g} GFLOP a target")
    for figure in figures:
        print(f"useful-MFU of {figure.side}: {figure.median * flops / peak:.1%}")
    print(flush=True)


def minimal_flops(lm: Backbone, batches: BudgetBatches) -> float:
    """FLOPs a target of one unpadded causal pass, forward and backward, the head only where there is a label."""
    config = lm.body.config
    matrices = sum(layer.weight.numel() for layer in lm.body.modules() if isinstance(layer, torch.nn.Linear))
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    total = 0.0
    for batch in (batches[number] for number in range(len(batches))):
        lengths = batch["segments"]["lengths"]
        seen = int((lengths * (lengths + 1) // 2).sum())
        total += 6 * matrices * batch["input_ids"].shape[1] + 6 * lm.head.numel() * batch["n_targets"]
        total += 3 * 4 * config.num_hidden_layers * width * seen
    return total / batches.targets


def matmul_peak(sizes: Sizes) -> float:
    """FLOP/s of the faster of the bfloat16 and the float32 matrix product, sustained."""
    side, seconds = sizes.matmul
    best = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
        out = left @ right
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            torch.mm(left, right, out=out)
            count += 1
        best = max(best, 2 * side**3 * count / (time.perf_counter() - began))
    return best


def measure_mntp(world: World) -> list[Figure]:
    """Titles a second of MNTP; the authors' evaluations, half of their stage, are left out."""
    sizes, titles = world.sizes, world.chosen_titles(world.sizes.mntp_titles)
    ours, theirs = world.load(), world.load()
    ours.set_causal(False)
    mask = ours.tokenizer("_", add_special_tokens=False)["input_ids"][0]
    texts = distinct_texts(ours.tokenizer, titles, TITLE_TOKENS, special_tokens=False)
    steps = len(titles) // sizes.mntp_batch
    batches = MaskedBatches(texts, mask, steps, sizes.mntp_batch, plain.MASK_SHARE, seed=0)
    batch = f"{sizes.mntp_batch} titles"
    sides = {
        "ours": {batch: engine(ours, batches, TokenObjective(ours), steps * sizes.mntp_batch)},
        "padded": {batch: alone(theirs, plain.mntp, titles, mask, sizes.mntp_batch, recompute=False)},
        "padded, recomputing": {batch: alone(theirs, plain.mntp, titles, mask, sizes.mntp_batch, recompute=True)},
    }
    return compare("MNTP", "titles/s", sides, world.rounds)


def alone(lm: Backbone, way: Callable[..., Run], *arguments: object, recompute: bool) -> Run:
    """A plain way that sets its model up before each round, because another one changes it."""
    run = way(lm, *arguments, recompute=recompute)

    def again() -> float:
        plain.recompute_activations(lm.model, recompute)
        return run()

    return again


def measure_contrastive(world: World) -> list[Figure]:
    """Titles a second of a contrastive step with the authors' batch; the batch is part of the objective."""
    sizes, titles = world.sizes, world.chosen_titles(world.sizes.contrastive_titles)
    ours, theirs = world.load(head=False), world.load(head=False)
    ours.set_causal(False)
    objective = ContrastiveObjective(ours, TEMPERATURE)
    ways = {}
    for micro in sizes.contrastive_micro_tokens:
        options = ("dropout", 1, len(titles), micro, 0)
        batches = contrastive_batches(ours, world.sequences, titles, TITLE_TOKENS, *options)
        ways[f"{micro} tokens"] = dropped_out(ours, engine(ours, batches, objective, len(titles)))
    sides = {
        "ours": ways,
        "padded, recomputing": {
            f"{len(titles)} titles": plain.contrastive(theirs, titles, TITLE_TOKENS, TEMPERATURE, recompute=True)
        },
    }
    return compare("contrastive", "titles/s", sides, world.rounds)


def dropped_out(lm: Backbone, run: Run) -> Run:
    """The same with the attention dropout that makes two views."""

    def with_dropout() -> float:
        with attention.dropout(lm.model, plain.DROPOUT):
            return run()

    return with_dropout


def measure_encode(world: World) -> list[Figure]:
    """Titles a second of encoding against sentence-transformers on the same exported folder."""
    from sentence_transformers import SentenceTransformer

    titles = world.chosen_titles(world.sizes.encoded_titles)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "encoder"
        lm = world.load(head=False)
        lm.set_causal(False)
        export(lm, titles, TITLE_TOKENS, folder)  # fails where the two sides give different vectors
        theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": world.dtype})
        shipped = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})

    def ours(batch_tokens: int) -> Run:
        def encode() -> None:
            texts = distinct_texts(lm.tokenizer, titles, TITLE_TOKENS, special_tokens=True)
            encode_tokens(lm, texts, batch_tokens, "titles")

        return timed(len(titles), encode)

    def peer(encoder: SentenceTransformer, batch: int) -> Run:
        return timed(len(titles), lambda: encoder.encode(titles, batch_size=batch, show_progress_bar=False))

    tuned = {f"{batch} titles": peer(theirs, batch) for batch in world.sizes.encode_batches}
    sides = {
        "ours": {f"{tokens} tokens": ours(tokens) for tokens in world.sizes.encode_tokens},
        f"sentence-transformers, {str(world.dtype).removeprefix('torch.')}": tuned,
        "sentence-transformers as it comes": {"32 titles": peer(shipped, 32)},
    }
    return compare("encode", "titles/s", sides, world.rounds)


def measure_tokenising(world: World) -> list[Figure]:
    """Targets a second from titles to tensors: each title once, the rows batched, each row alone."""
    tokenizer, sequences, titles = backbones.load_tokenizer(world.model), world.sequences, world.titles
    items, trees = sampling.training_items(sequences, HISTORY)
    chosen = np.random.default_rng(0).permutation(len(items))[: world.sizes.row_calls]
    rows = [items[row] for row in chosen]
    options = {"max_title_tokens": TITLE_TOKENS, "separator": False}

    def once() -> None:
        texts = csft_texts(tokenizer, titles, TITLE_TOKENS)
        batches = WindowBatches(texts, sequences, HISTORY, 2048, max_tokens=None, epochs=1, seed=0)
        for number in range(len(batches)):
            batches[number]

    def batched() -> None:
        made = sampling.make_samples(tokenizer, titles, rows, trees[chosen], **options)
        for start in range(0, len(made), 4):
            sampling.supervise_samples(made, np.arange(start, min(start + 4, len(made))))

    texts = item_texts(titles)
    histories = [sampling.JOINT.join(texts[item - 1] for item in row[:-1]) for row in rows]
    targets = [texts[row[-1] - 1] + sampling.END for row in rows]
    sides = {
        "ours, each title once": {"2048 tokens": timed(len(items), once)},
        "ours, authors' samples": {"4 samples": timed(len(rows), batched)},
        "one call a row": {"4 samples": plain.rows_one_by_one(tokenizer, histories, targets, 4)},
    }
    return compare("tokenise and pack", "targets/s", sides, world.rounds)


def measure_memory(world: World) -> list[dict[str, float | str]]:
    """Peak memory and seconds of the loss over growing tokens and vocabularies."""
    sizes = world.sizes
    return loss_memory.measure(sizes.loss_tokens, sizes.loss_vocabularies, sizes.loss_width)


def real_world(arguments: argparse.Namespace) -> World:
    """SmolLM2 and a named data set, leave-one-out."""
    name = arguments.data or ("amazon-games" if os.environ.get("LLM2REC_DATA_DIR") else "movielens-100k")
    interactions, catalogue = sources.fetch_data(name)
    sequences = prepared(interactions, catalogue)
    ids = {item: place for place, item in enumerate(catalogue.item_ids)}
    titles = [catalogue.titles[ids[item]] for item in sequences.item_ids]
    dtype = resolve_dtype(arguments.dtype)
    print(f"{name}, {MODEL}, {dtype}, {torch.get_num_threads()} threads\n")
    return World(sequences, titles, sources.fetch_model(MODEL), dtype, Sizes(), arguments.rounds)


def quick_world(arguments: argparse.Namespace, folder: Path) -> World:
    """A circle of items that every user walks, and a tiny random decoder."""
    users, items, events = 30, 24, 8
    walk = (np.arange(users)[:, None] + np.arange(events)) % items
    log = pl.DataFrame(
        {
            "user_id": np.repeat([f"u{user}" for user in range(users)], events),
            "item_id": [f"i{item:02d}" for item in walk.ravel()],
            "timestamp": np.tile(np.arange(events), users),
        }
    )
    titles = [f"The {'red' if item % 2 else 'blue'} boat ({1980 + item})" for item in range(items)]
    table = pl.DataFrame({"item_id": [f"i{item:02d}" for item in range(items)], "title": titles})
    sequences = prepared(Interactions.from_frame(log, "log"), Catalogue.from_frame(table, "items"))
    make_tiny_random(titles, folder, seed=0)
    return World(sequences, titles, folder, torch.float32, QUICK, arguments.rounds)


def profile_csft(world: World) -> None:
    """Prints where the time of one packed CSFT step goes, by operation, in its own time."""
    from torch.profiler import ProfilerActivity, profile

    lm = world.load()
    lm.set_causal(True)
    batches = packed_batches(world, lm, world.sizes.csft_micro_tokens[1])
    step = engine(lm, batches, TokenObjective(lm), batches.targets, len(batches))
    step()  # warm
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    spent = sorted(profiled.key_averages(), key=lambda one: -one.self_cpu_time_total)
    total = sum(one.self_cpu_time_total for one in spent)
    print(f"\nprofile of one CSFT step, {total / 1e6:.1f} s\n\n| operation | calls | share |")
    print("| --- | ---: | ---: |")
    for one in spent[:PROFILED]:
        print(f"| {one.key} | {one.count:,} | {one.self_cpu_time_total / total:.1%} |", flush=True)


MEASURES: dict[str, Callable[[World], list]] = {
    "memory": measure_memory,
    "tokenising": measure_tokenising,
    "encode": measure_encode,
    "csft": measure_csft,
    "mntp": measure_mntp,
    "contrastive": measure_contrastive,
}


def main() -> None:
    """Measures what is asked for and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--profile", action="store_true", help="only where the time of a CSFT step goes")
    parser.add_argument("--quick", action="store_true", help="a tiny random decoder and a small log")
    parser.add_argument("--json", type=Path, help="write the figures as JSON as well")
    arguments = parser.parse_args()
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # only the figures
    with tempfile.TemporaryDirectory() as folder:
        world = quick_world(arguments, Path(folder)) if arguments.quick else real_world(arguments)
        if arguments.profile:
            profile_csft(world)
            return
        found = {}
        for name in arguments.only:
            print(f"\n{name}\n\n| what | side | batch | median | spread | ratio |")
            print("| --- | --- | --- | ---: | ---: | ---: |")
            measured = MEASURES[name](world)
            found[name] = [one if isinstance(one, dict) else asdict(one) for one in measured]
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
