"""Verb `serve`: a row and a vector set of a run answer over HTTP, with a page to try them. No transformers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llm2rec import progress
from llm2rec.errors import ArtifactError, ConfigError, DataError, Llm2RecError, first_few
from llm2rec.evaluation.report import TEMPLATES
from llm2rec.runs import Run
from llm2rec.serve.loaded import Latest, Loaded, load
from llm2rec.serve.recommender import ScoredItem, ServedRow
from llm2rec.version import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

LONGEST_LIST = 1_000
LONGEST_HISTORY = 10_000
LARGEST_BODY = 2**20  # bytes
ERRORS_NAMED = 5
GRACE = 5  # seconds that requests have to end once the service is told to stop
PAGE = "service.html"

Places = Annotated[int, Field(ge=1, le=LONGEST_LIST, description="items of the list")]


def _utf8(item_id: str | int) -> str:
    item_id = str(item_id)
    item_id.encode()  # UnicodeEncodeError, a ValueError, of half a character: no answer could name it
    return item_id


class RecommendRequest(BaseModel):
    """A history, oldest event first, and what list is wanted; as in `recommend`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    history: list[Annotated[str | int, AfterValidator(_utf8)]] = Field(
        min_length=1, max_length=LONGEST_HISTORY, description="item ids, oldest first"
    )
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
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import HTMLResponse

    folder = (run.folder if isinstance(run, Run) else Path(run)).resolve()
    latest = Latest(lambda: load(folder, row, vectors, domain))
    computing = threading.Lock()  # lists made at the same time take each other's cores: the slowest wait longer
    app = FastAPI(
        title="llm2rec",
        version=__version__,
        description=f"Recommendations of {folder.name}",
        max_body_size=LARGEST_BODY,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
    )
    _refuse_in_words(app)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> str:
        return _page(latest.loaded, folder.name)

    @app.get("/health")
    def health() -> Health:
        row, near = latest.loaded.row, latest.loaded.vectors
        names = {"row": row.row, "vectors": near and near.name}
        return Health(status="ok", version=__version__, **names, items=len(row.new), new_items=int(row.new.sum()))

    @app.post("/recommend")
    def recommend(wanted: RecommendRequest) -> RecommendAnswer:
        with computing:
            return _recommended(latest.loaded.row, wanted)

    @app.get("/similar")
    def similar(item: str, k: Places = 10) -> SimilarAnswer:
        near = latest.loaded.vectors
        if near is None:
            raise HTTPException(404, "the run has no item vectors, so that no item is like another")
        if item not in near.index:
            raise HTTPException(404, f"there is no item {item!r}; GET /items?title= searches titles")
        with computing:
            items = near.similar(item, k)
        return SimilarAnswer(vectors=near.name, items=_items(items))

    @app.get("/items")
    def items(title: str = "", k: Places = 20) -> list[FoundItem]:
        return [FoundItem(**item) for item in latest.loaded.find(title, k).iter_rows(named=True)]

    return app


def serve(
    run: str | Path | Run,
    row: str | None = None,
    vectors: str | None = None,
    domain: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Answers over HTTP until it is interrupted; arguments and errors as in `create_app`.

    Args:
        host, port: where it listens; port 0 takes a free one.

    Raises:
        ConfigError: it cannot listen there.
    """
    with _listening(host, port) as listening:
        app = create_app(run, row, vectors, domain)
        import uvicorn

        address = f"[{host}]" if ":" in host else host
        progress.say(f"answers at http://{address}:{listening.getsockname()[1]} until interrupted (Ctrl-C)")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    try:
        if not host:  # for a socket that is every address
            raise OSError("it is empty")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on host {host!r}, port {port} ({error.strerror or error}); choose another of them"
        ) from error
    # Connections inherit it. asyncio sets it on sockets of its own alone, and without it an answer waits 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _refuse_in_words(app: FastAPI) -> None:
    """Every error is answered as {"detail": a sentence}."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    @app.exception_handler(Llm2RecError)
    def refuse(_: Request, error: Llm2RecError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503 if isinstance(error, ArtifactError) else 422)

    @app.exception_handler(RequestValidationError)
    def refuse_request(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _in_words(error.errors())}, 422)


def _in_words(errors: Sequence[Any]) -> str:
    """What is wrong with a request, without its content, which may be anything and of any size."""
    named = [
        f"{'.'.join(map(str, error['loc'][1:])) or 'body'}: {error['msg']}" for error in errors[:ERRORS_NAMED]
    ]
    more = [f"{len(errors) - ERRORS_NAMED:,} more"] if len(errors) > ERRORS_NAMED else []
    return "; ".join([*named, *more]).encode(errors="backslashreplace").decode()


def _recommended(row: ServedRow, wanted: RecommendRequest) -> RecommendAnswer:
    history = [str(item_id) for item_id in wanted.history]
    known = [item_id for item_id in history if row.reads(item_id)]
    unknown = list(dict.fromkeys(item_id for item_id in history if not row.reads(item_id)))
    if not known:
        raise DataError(f"row {row.row!r} knows no item of the history: {first_few(unknown)}")
    items = row.recommend(known, wanted.k, not wanted.with_history, wanted.new_items)
    return RecommendAnswer(row=row.row, items=_items(items), unknown=unknown)


def _items(items: list[ScoredItem]) -> list[ListedItem]:
    return [ListedItem(**asdict(item)) for item in items]


def _page(loaded: Loaded, name: str) -> str:
    templates = Environment(
        loader=FileSystemLoader([Path(__file__).parent, TEMPLATES]), autoescape=True, undefined=StrictUndefined
    )
    near = loaded.vectors.name if loaded.vectors else None
    data = {"title": name, "row": loaded.row.row, "vectors": near, "items": len(loaded.row.new)}
    return templates.get_template(PAGE).render(data=data)
