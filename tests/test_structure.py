"""The house: which room may import which, and what must stay light."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
SOURCE = Path(__file__).parents[1] / "src" / "llm2rec"

# A module may import modules of its own level or of earlier ones; lm and rec share a level but never meet.
LEVELS = [
    {"version", "errors", "processes"},
    {"loggers", "rows"},
    {"progress", "artifacts", "config"},
    {"loading"},
    {"runs"},
    {"data"},
    {"evaluation"},
    {"softmax", "sharding", "optimizers", "checkpoints", "precision", "memory", "batches"},
    {"training"},
    {"lm", "rec"},
    {"models"},
    {"serve"},
    {"stages", "display"},
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


def test_what_runs_as_a_program_is_a_dependency():
    programs = {name for path in SOURCE.rglob("*.py") for name in re.findall(r'"-m", "(\w+)"', path.read_text())}
    declared = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    assert programs and programs <= {re.split(r"\W", name)[0] for name in declared}


MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.name != "__init__.py" or path.parent != SOURCE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room in ROOMS, f"{room} is a new room: give it a level"
    for other in imported_rooms(path):
        assert other in ROOMS, f"{path} imports llm2rec.{other}, which does not exist"
        assert ROOMS[other] <= ROOMS[room], f"{room} must not import {other}"
        assert {room, other} != {"lm", "rec"}, "lm and rec meet in data/embeddings.py only"


def test_the_readme_lists_every_module_and_no_other():
    section = README.read_text().partition("\n    src/llm2rec/\n")[2].partition("\n\n")[0]
    listed = set()
    for line in section.splitlines():
        folder = Path(line.split()[0]).parent  # of the first file named; the others of the line lie beside it
        listed |= {str(folder / Path(name).name) for name in re.findall(r"[\w/]+\.py|[\w/]+/(?=  )", line)}
    found = {str(path.relative_to(SOURCE)) for path in MODULES if path.name != "__init__.py"} | {"__init__.py"}
    folders = {name for name in listed if (SOURCE / name).is_dir()}  # of which no file is named
    assert listed - folders == {name for name in found if str(Path(name).parent) not in folders}


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
