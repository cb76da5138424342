"""The house: which room may import which, and what must stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "llm2rec"

# A module may import modules of its own level or of earlier ones; lm and rec share a level but never meet.
LEVELS = [
    {"version", "errors", "processes"},
    {"loggers"},
    {"progress", "artifacts", "config"},
    {"loading"},
    {"runs"},
    {"data"},
    {"evaluation"},
    {"softmax", "training", "precision"},
    {"lm", "rec"},
    {"models"},
    {"serve"},
    {"stages", "judging", "display"},
    {"pipeline", "comparison", "additions", "probing"},
    {"studies"},
    {"cli"},
]
ROOMS = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "llm2rec":
            names = [f"llm2rec.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("llm2rec.")}
    return found


MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.name != "__init__.py" or path.parent != SOURCE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room in ROOMS, f"{room} is a new room: give it a level"
    for other in imported_rooms(path):
        assert other in ROOMS, f"{path} imports llm2rec.{other}, which does not exist"
        assert ROOMS[other] <= ROOMS[room], f"{room} must not import {other}"
        assert {room, other} != {"lm", "rec"}, "lm and rec meet in data/embeddings.py only"


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import llm2rec", ("torch", "transformers", "polars")),
        ("import llm2rec.pipeline, llm2rec.cli", ("torch", "transformers")),
        ("import llm2rec.display", ("torch", "transformers")),
        ("import llm2rec.serve.recommender", ("transformers",)),
    ],
)
def test_light_imports_stay_light(statement, heavy):
    probe = f"{statement}; import sys; print([name for name in {heavy!r} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_public_names_exist():
    import llm2rec

    assert all(getattr(llm2rec, name) is not None for name in llm2rec.__all__)
