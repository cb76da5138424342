"""llm2rec: language models as item encoders for sequential recommendation (LLM2Rec, KDD 2025).

Every verb of the command line is the public function of the same name (`serve` runs what `create_app` makes):

    import llm2rec as lr
    run = lr.run("demo", out="runs/demo")
    lr.recommend(run, history=["50", "181"], k=10)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llm2rec.version import __version__

if TYPE_CHECKING:
    from llm2rec import data, models
    from llm2rec.additions import add_items
    from llm2rec.comparison import compare
    from llm2rec.data.embeddings import ItemEmbeddings
    from llm2rec.data.sequences import Sequences
    from llm2rec.data.tables import Catalogue, Interactions
    from llm2rec.errors import ArtifactError, ConfigError, DataError, Llm2RecError
    from llm2rec.pipeline import csft, demo, encode, evaluate, fit, iem, prepare, run
    from llm2rec.probing import probe
    from llm2rec.runs import Run, open_run
    from llm2rec.serve.lists import recommend_users
    from llm2rec.serve.recommender import ScoredItem, ServedRow, load_row, recommend
    from llm2rec.serve.service import create_app
    from llm2rec.serve.similar import ServedVectors, load_set, similar
    from llm2rec.studies import study

_HOMES = {
    "add_items": "llm2rec.additions",
    "compare": "llm2rec.comparison",
    "ItemEmbeddings": "llm2rec.data.embeddings",
    "Sequences": "llm2rec.data.sequences",
    **dict.fromkeys(("Catalogue", "Interactions"), "llm2rec.data.tables"),
    **dict.fromkeys(("ArtifactError", "ConfigError", "DataError", "Llm2RecError"), "llm2rec.errors"),
    **dict.fromkeys(("csft", "demo", "encode", "evaluate", "fit", "iem", "prepare", "run"), "llm2rec.pipeline"),
    "probe": "llm2rec.probing",
    **dict.fromkeys(("Run", "open_run"), "llm2rec.runs"),
    **dict.fromkeys(("ScoredItem", "ServedRow", "load_row", "recommend"), "llm2rec.serve.recommender"),
    **dict.fromkeys(("ServedVectors", "load_set", "similar"), "llm2rec.serve.similar"),
    "create_app": "llm2rec.serve.service",
    "recommend_users": "llm2rec.serve.lists",
    "study": "llm2rec.studies",
}
_MODULES = ("data", "models")

__all__ = [
    "ArtifactError",
    "Catalogue",
    "ConfigError",
    "DataError",
    "Interactions",
    "ItemEmbeddings",
    "Llm2RecError",
    "Run",
    "ScoredItem",
    "Sequences",
    "ServedRow",
    "ServedVectors",
    "__version__",
    "add_items",
    "compare",
    "create_app",
    "csft",
    "data",
    "demo",
    "encode",
    "evaluate",
    "fit",
    "iem",
    "load_row",
    "load_set",
    "models",
    "open_run",
    "prepare",
    "probe",
    "recommend",
    "recommend_users",
    "run",
    "similar",
    "study",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `import llm2rec` stays cheap."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"llm2rec.{name}")
    raise AttributeError(f"module 'llm2rec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
