"""Imports run downward only, and in no circle.

Floors: `common` is below `actors` and `learner`, which do not know each other, and these are below `deploy`. Inside a
floor its rooms have an order too, `ROOMS`: a module imports its own room and the rooms in lower rows, not the room next
door. All imports count: those inside functions and under TYPE_CHECKING as well, for they tie two files together just
the same.

In `common`, the config knows nothing of the rest, and the readers of data sets nothing of prompts. In `actors`,
kernels know nothing of the sampler but its cache, the sampler and the teacher do not know each other, and the rollout
actor uses all. In `deploy`, what watches a run (monitoring, and the page that reads what monitoring writes) is below
the loop; evaluation and ablations are above it, as they use its checks or run it; then the demo, which reports on
evaluations; then the server, and exported folders; then the commands; the command line registers these.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools

from common.config.file import REPOSITORY

FLOORS = (("common",), ("actors", "learner"), ("deploy",))
ROOMS = {
    "common": (("common.config", "common.parameters"), ("common.datasets",), ("common", "common.weights")),
    "actors": (
        ("actors.sampler.cache",),
        ("actors.sampler.kernels",),
        ("actors.sampler", "actors.teacher"),
        ("actors.evaluation",),
        ("actors",),
    ),
    "learner": (("learner",),),
    "deploy": (
        ("deploy.child_environment", "deploy.errors", "deploy.files", "deploy.roles", "deploy.versions"),
        ("deploy.monitoring",),
        ("deploy.dashboard",),
        ("deploy",),
        ("deploy.ablation", "deploy.evaluation"),
        ("deploy.export", "deploy.serving"),
        ("deploy.demo",),
        ("deploy.commands",),
        ("deploy.cli",),
        ("deploy.__main__",),
    ),
}
Graph = dict[str, set[str]]


def name_of(file: Path, root: Path) -> str:
    """The module's dotted name; a package's own for its `__init__`."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(root: Path) -> Graph:
    """Every module of the floors and the modules among them that it imports, anywhere in its file."""
    files = {name_of(file, root): file for floor in sum(FLOORS, ()) for file in (root / floor).rglob("*.py")}
    return {name: {m for m in imported(name, file, set(files)) if m in files} for name, file in files.items()}


def imported(name: str, file: Path, known: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import module` means the module
            yield from (f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names)


def place(module: str) -> tuple[str, int, str, int]:
    """(floor, its row, room, its row): the room with the longest name that holds the module."""
    floor = module.split(".")[0]
    rooms = {room: row for row, rooms in enumerate(ROOMS[floor]) for room in rooms}
    room = max((r for r in rooms if f"{module}.".startswith(f"{r}.")), key=len)
    return floor, next(row for row, floors in enumerate(FLOORS) if floor in floors), room, rooms[room]


def allowed(importer: str, imported: str) -> bool:
    floor, floor_row, room, row = place(importer)
    other_floor, other_floor_row, other_room, other_row = place(imported)
    if floor != other_floor:
        return other_floor_row < floor_row
    return room == other_room or other_row < row


def circle_in(graph: Graph) -> list[str]:
    """Modules that import each other in this order, the first one repeated at the end; empty where there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if circle := search(other, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := search(module, []))), [])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph(REPOSITORY)


def test_imports_run_downward(graph):
    upward = [f"{a} imports {b}" for a, others in sorted(graph.items()) for b in sorted(others) if not allowed(a, b)]
    assert upward == []


def test_no_files_import_each_other_in_a_circle(graph):
    assert " -> ".join(circle_in(graph)) == ""


def test_every_folder_of_python_files_is_a_package_that_is_installed():
    found = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert found["namespaces"] is False
    packages = set(setuptools.find_packages(str(REPOSITORY), include=found["include"]))
    folders = {
        f.parent.relative_to(REPOSITORY) for floor in sum(FLOORS, ()) for f in (REPOSITORY / floor).rglob("*.py")
    }
    assert {".".join(folder.parts) for folder in folders} == packages


def test_the_check_sees_every_kind_of_import(tmp_path):
    """Upward, sideways, lazy, for types only, relative; and a circle through a lazy import is printed."""
    files = {
        "common/a.py": "def f():\n    import deploy.cli\n",
        "actors/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from learner import c\n",
        "learner/c.py": "from common.config import run\nfrom . import d\n",
        "learner/d.py": "def f():\n    from learner.c import anything\n",
        "common/config/run.py": "",
        "deploy/cli.py": "import os\nfrom common import a\n",
        "deploy/evaluation/e.py": "from deploy.ablation.g import x\nfrom deploy import pipeline\n",
        "deploy/ablation/g.py": "",
        "deploy/pipeline.py": "from .evaluation import e\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = import_graph(tmp_path)
    upward = {(a, b) for a, others in graph.items() for b in others if not allowed(a, b)}
    assert upward == {
        ("common.a", "deploy.cli"),
        ("actors.b", "learner.c"),
        ("deploy.evaluation.e", "deploy.ablation.g"),
        ("deploy.pipeline", "deploy.evaluation.e"),
    }
    assert graph["learner.c"] == {"common.config.run", "learner.d"}
    assert circle_in(graph) == ["learner.c", "learner.d", "learner.c"]
    graph["learner.d"].clear()
    assert circle_in(graph) == ["common.a", "deploy.cli", "common.a"]
    graph["common.a"].clear()
    assert circle_in(graph) == ["deploy.evaluation.e", "deploy.pipeline", "deploy.evaluation.e"]
    graph["deploy.pipeline"].clear()
    assert circle_in(graph) == []
