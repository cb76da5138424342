"""Verb `serve`: a row and a vector set of a run answer over HTTP, with a page to try them. No transformers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from llm2rec import artifacts, progress
from llm2rec.data.sequences import Sequences
from llm2rec.data.tables import ITEM, TITLE
from llm2rec.data.texts import clean
from llm2rec.errors import ArtifactError, ConfigError, DataError, Llm2RecError, first_few
from llm2rec.evaluation.report import TEMPLATES
from llm2rec.rows import Row
from llm2rec.runs import Run
from llm2rec.serve.recommender import ScoredItem, ServedRow, load_row, made_sets, opened
from llm2rec.serve.similar import ServedVectors, load_set
from llm2rec.version import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

LONGEST_LIST = 1_000
LONGEST_HISTORY = 10_000
LOOKED_EVERY = 1.0  # seconds between two looks at the run's folder
PAGE = "service.html"

Places = Annotated[int, Field(ge=1, le=LONGEST_LIST, description="items of the list")]
ItemId = Annotated[str | int, Field(union_mode="left_to_right")]


class RecommendRequest(BaseModel):
    """A history, oldest event first, and what list is wanted; as in `recommend`."""

    model_config = ConfigDict(extra="forbid")

    history: list[ItemId] = Field(min_length=1, max_length=LONGEST_HISTORY, description="item ids, oldest first")
    k: Places = 10
    new_items: int | None = Field(None, ge=0, description="exactly so many of the list have no training event")
    with_history: bool = Field(False, description="items of the history may be listed again")


class ListedItem(BaseModel):
    """One item of a list; `score` is a logit, or a cosine; `new` says that no training event holds the item."""

    item_id: str
    title: str
    score: float
    new: bool


class RecommendAnswer(BaseModel):
    """The list of a row, best first, and the ids of the history that it could not heed."""

    row: str
    items: list[ListedItem]
    unknown: list[str]


class SimilarAnswer(BaseModel):
    """The items nearest to one by the cosine of a vector set, nearest first."""

    vectors: str
    items: list[ListedItem]


class FoundItem(BaseModel):
    """An item whose title was searched, and in how many training events it stands."""

    item_id: str
    title: str
    events: int


class Health(BaseModel):
    """What a service answers from."""

    status: str
    version: str
    row: str
    vectors: str | None
    items: int
    new_items: int


@dataclass(frozen=True)
class Served:
    """All that a service answers from, in memory. vectors: None of a run that made none."""

    row: ServedRow
    vectors: ServedVectors | None

    @cached_property
    def search_table(self) -> pl.DataFrame:
        """item_id, title, its lower case, and training events of each item, most events first."""
        counts = Sequences.load(self.row.domain.data).training_counts()
        items = self.row.catalogue.frame.select(ITEM, TITLE)
        events = np.pad(counts, (0, len(items) - len(counts)))  # added items have none
        titles = pl.Series(TITLE, [clean(title) for title in items[TITLE]])
        table = pl.DataFrame(
            [items[ITEM], titles, titles.str.to_lowercase().alias("lower"), pl.Series("events", events)]
        )
        return table.sort("events", descending=True, maintain_order=True)

    def find(self, text: str, k: int) -> pl.DataFrame:
        """The `k` items of most training events whose title holds every word of `text`, which may have none."""
        held = [pl.col("lower").str.contains(word, literal=True) for word in text.lower().split()]
        return self.search_table.lazy().filter(*held).head(k).collect()

    @property
    def folders(self) -> list[Path]:
        """The artifacts that it was loaded from."""
        place, name = self.row.domain, self.row.row
        trained = [place.recommender(one, 0) for one in (name, *(Row.parse(name).parents or ()))]
        shown = [place.embeddings(self.vectors.name)] if self.vectors else []
        return [place.data, place.added, *trained, *shown]


class Service:
    """Keeps what is `served` up to date with the run's folder: items added or rows trained since are taken up.

    While they are loaded the earlier ones answer, and go on where they cannot be loaded.
    """

    def __init__(self, load: Callable[[], Served]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._served = load()
        self._stamp = _stamp(self._served)
        self._looked = time.monotonic()

    @property
    def served(self) -> Served:
        """What to answer from, now."""
        if time.monotonic() - self._looked > LOOKED_EVERY and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._looked = time.monotonic()
                self._lock.release()
        return self._served

    def _look(self) -> None:
        stamp = _stamp(self._served)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._served = self._load()
        except (Llm2RecError, OSError) as error:
            progress.say(
                f"note: the run has changed and cannot be loaded; what was loaded before answers: {error}"
            )
        else:
            self._stamp = _stamp(self._served)
            progress.say(f"the run has changed: loaded anew, {len(self._served.row.new):,} items")


def _stamp(served: Served) -> list[int]:
    """When each artifact was finished, in ns; 0 where there is none."""
    manifests = (folder / artifacts.MANIFEST for folder in served.folders)
    return [path.stat().st_mtime_ns if path.exists() else 0 for path in manifests]


def create_app(
    run: str | Path | Run, row: str | None = None, vectors: str | None = None, domain: str | None = None
) -> FastAPI:
    """A web application (ASGI) that answers from a finished run, loaded once; what `serve` runs.

    POST /recommend, GET /similar, GET /items (search of titles), GET /health, GET / (a page to try them), and
    /openapi.json, which describes them. Items of a history that the run does not know are left out and named in
    the answer. Items added to the run, and rows trained anew, are taken up without a restart.

    Args:
        run: a finished run, or its folder.
        row: which recommender of the run (its seed 0). None: `preferred_row`.
        vectors: what /similar compares by. None: `preferred_set`.
        domain: which log of the run, where it has several.

    Raises:
        ConfigError: FastAPI is not installed, no such row, or one that needs the times of events.
        ArtifactError: the row is not trained, or the run has no such vector set.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise ConfigError("serving over HTTP needs FastAPI and uvicorn: pip install 'llm2rec[serve]'")
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import HTMLResponse, JSONResponse

    folder = (run.folder if isinstance(run, Run) else Path(run)).resolve()
    service = Service(lambda: _load(folder, row, vectors, domain))
    computing = threading.Lock()  # lists made at the same time take each other's cores: the slowest wait longer
    app = FastAPI(title="llm2rec", version=__version__, description=f"Recommendations of {folder.name}")

    @app.exception_handler(Llm2RecError)
    def refuse(_: Request, error: Llm2RecError) -> JSONResponse:
        status = 503 if isinstance(error, ArtifactError) else 422
        return JSONResponse({"detail": str(error)}, status)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> str:
        return _page(service.served, folder.name)

    @app.get("/health")
    def health() -> Health:
        row, near = service.served.row, service.served.vectors
        names = {"row": row.row, "vectors": near and near.name}
        return Health(status="ok", version=__version__, **names, items=len(row.new), new_items=int(row.new.sum()))

    @app.post("/recommend")
    def recommend(wanted: RecommendRequest) -> RecommendAnswer:
        row = service.served.row
        history = [str(item_id) for item_id in wanted.history]
        known = [item_id for item_id in history if row.reads(item_id)]
        unknown = list(dict.fromkeys(item_id for item_id in history if not row.reads(item_id)))
        if not known:
            raise DataError(f"row {row.row!r} knows no item of the history: {first_few(unknown)}")
        with computing:
            items = row.recommend(known, wanted.k, not wanted.with_history, wanted.new_items)
        return RecommendAnswer(row=row.row, items=_items(items), unknown=unknown)

    @app.get("/similar")
    def similar(item: str, k: Places = 10) -> SimilarAnswer:
        near = service.served.vectors
        if near is None:
            raise HTTPException(404, "the run has no item vectors, so that no item is like another")
        if item not in near.index:
            raise HTTPException(404, f"there is no item {item!r}; GET /items?title= searches titles")
        with computing:
            items = near.similar(item, k)
        return SimilarAnswer(vectors=near.name, items=_items(items))

    @app.get("/items")
    def items(title: str = "", k: Places = 20) -> list[FoundItem]:
        found = service.served.find(title, k).drop("lower")
        return [FoundItem(**item) for item in found.iter_rows(named=True)]

    return app


def serve(
    run: str | Path | Run,
    row: str | None = None,
    vectors: str | None = None,
    domain: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Answers over HTTP until it is interrupted; arguments and errors as in `create_app`."""
    app = create_app(run, row, vectors, domain)
    import uvicorn

    with suppress(KeyboardInterrupt):
        uvicorn.run(app, host=host, port=port)


def _load(folder: Path, row: str | None, vectors: str | None, domain: str | None) -> Served:
    run = opened(folder)
    served = load_row(run, row, domain)
    if served.lists(1, None).needs_times:
        raise ConfigError(
            f"row {served.row!r} looks at the times of events, which no request gives; serve another"
        )
    has_vectors = vectors is not None or made_sets(run.domain(domain))
    return Served(served, load_set(run, vectors, domain) if has_vectors else None)


def _items(items: list[ScoredItem]) -> list[ListedItem]:
    return [ListedItem(**asdict(item)) for item in items]


def _page(served: Served, name: str) -> str:
    templates = Environment(
        loader=FileSystemLoader([Path(__file__).parent, TEMPLATES]), autoescape=True, undefined=StrictUndefined
    )
    near = served.vectors.name if served.vectors else None
    data = {"title": name, "row": served.row.row, "vectors": near, "items": len(served.row.new)}
    return templates.get_template(PAGE).render(data=data)
