"""Small worlds for tests: a tiny random decoder, and logs with a known answer."""

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: workers of the suite must not wait for each other

import numpy as np  # noqa: E402
import polars as pl  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from llm2rec import artifacts  # noqa: E402
from llm2rec.data.sequences import Sequences, prepare  # noqa: E402
from llm2rec.data.splits import Split  # noqa: E402
from llm2rec.data.tables import Catalogue, Interactions  # noqa: E402
from llm2rec.lm import backbone as backbones  # noqa: E402
from llm2rec.lm.encode import encode_tokens  # noqa: E402
from llm2rec.lm.learner import Learner  # noqa: E402
from llm2rec.lm.packing import tokenise  # noqa: E402
from llm2rec.lm.pooling import MEAN  # noqa: E402
from llm2rec.lm.tiny import make_tiny_random  # noqa: E402
from llm2rec.training import Optimizer  # noqa: E402

TITLES = [
    f"The {colour} {thing} ({year})"
    for year, (colour, thing) in enumerate(
        [(c, t) for c in ("red", "blue", "old", "last") for t in ("boat", "road", "king", "river", "night")],
        1980,
    )
]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny random decoder with a tokenizer trained on TITLES."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_random(TITLES, folder, seed=0)
    return folder


@pytest.fixture
def tiny(tiny_folder):
    """The tiny random decoder, float32, with its head."""
    return backbones.load(tiny_folder, torch.float32)


def adding(tokenizer, template):
    """The tokenizer, made to add tokens that it knows to every text: `~ $A` begins it with ~, as a BOS would."""
    from tokenizers.processors import TemplateProcessing

    added = [(token, tokenizer.convert_tokens_to_ids(token)) for token in template.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=added)
    return tokenizer


def vectors_of(lm, titles, batch_tokens=1000, pooling=MEAN, max_title_tokens=64):
    """(N, D) float32 vectors of titles, in memory, by the packed pass that `encode` makes of a catalogue."""
    return encode_tokens(
        lm, tokenise(lm.tokenizer, titles, max_title_tokens, True), batch_tokens, "titles", pooling
    )


def cyclic_log(users=40, items=12, events=8):
    """Every user walks round the same circle of items: the next item is certain."""
    starts = np.arange(users) % items
    walk = (starts[:, None] + np.arange(events)) % items
    return pl.DataFrame(
        {
            "user_id": np.repeat([f"u{user:03d}" for user in range(users)], events),
            "item_id": [f"i{item:02d}" for item in walk.ravel()],
            "timestamp": np.tile(np.arange(events), users),
        }
    ), pl.DataFrame({"item_id": [f"i{item:02d}" for item in range(items)], "title": TITLES[:items]})


def prepared_cycle(folder, **sizes):
    """Sequences and titles of a cyclic log, prepared in `folder`; each user's last two events are held out."""
    log, items = cyclic_log(**sizes)
    catalogue = Catalogue.from_frame(items, "items")
    prepare(Interactions.from_frame(log, "log"), catalogue, split=Split(), short_histories="error", out=folder)
    return Sequences.load(folder), catalogue.titles


def printed(*parts, width=80):
    """What a terminal of that width shows of them."""
    console = Console(file=io.StringIO(), width=width)
    for part in parts:
        console.print(part)
    return console.file.getvalue()


@pytest.fixture
def by_two_at_once(monkeypatch):
    """Calls a function twice at once: both look into the cache before either has its turn to fetch."""
    both, turn = threading.Barrier(2, timeout=20), artifacts.turn

    def together(lock):
        both.wait()
        return turn(lock)

    def call(function, *args):
        monkeypatch.setattr(artifacts, "turn", together)
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(function, *args) for _ in range(2)]
        return [one.result() for one in calls]

    return call


@pytest.fixture
def cyclic_files(tmp_path):
    """`interactions.csv` and `items.csv` of the cyclic world."""
    interactions, items = cyclic_log()
    interactions.write_csv(tmp_path / "interactions.csv")
    items.write_csv(tmp_path / "items.csv")
    return tmp_path / "interactions.csv", tmp_path / "items.csv"


def train_stage(stage, *data, **options):
    """A language stage (`csft`, `mntp`, `contrastive`); those of the options that are its learner's go there."""
    values = {"dtype": torch.float32, "max_title_tokens": 16, "seed": 0}
    values |= {"optimizer": Optimizer(learning_rate=1e-2)}
    values |= {name: options.pop(name) for name in tuple(options) if name in Learner.__dataclass_fields__}
    return stage(*data, Learner(**values), **options)
