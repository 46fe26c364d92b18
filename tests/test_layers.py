"""Imports go down only, and nothing heavy is imported before it is needed. Read off the source, nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import minigpt
from minigpt.stages import STAGES

ROOT = Path(minigpt.__file__).parent
# Bottom to top. Rooms of one row are siblings: they do not import each other.
LAYERS = (
    ("core.errors",),
    ("core.config", "core.files", "core.report", "core.machine", "core.world"),
    ("core.groups",),
    ("core.runtime",),
    ("core.nn", "core.data"),
    ("core.models",),
    ("core.train", "core.infer", "core.convert"),
    ("core.eval",),  # may use core.infer
    ("core.rl",),
    ("stages",),
    ("cli",),
)
LEVEL = {room: level for level, row in enumerate(LAYERS) for room in row}
HEAVY = {"torch", "transformers", "numpy", "tokenizers", "safetensors", "jinja2", "rich", "pydantic"}
# Rooms whose files never import torch at module level: worker processes and pre-flight checks read them.
TORCH_FREE = (
    "core.config",
    "core.errors",
    "core.files",
    "core.report",
    "core.world",
    "core.groups",
    "core.data",
    "stages",
    "cli",
)
TENSORS = {"core.data.batch", "core.data.source"}  # the two files of core.data that hold tensors


def modules() -> dict[str, Path]:
    """Every module by name, without the leading `minigpt.`; packages as their `__init__`."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, *, late: bool) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of a file's imports, without TYPE_CHECKING blocks. late: those inside functions as well."""
    pending: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.removeprefix("minigpt.") in MODULES else str(node.module), node.lineno
        elif late or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))


def room(module: str) -> str | None:
    """The layer row's entry that a module belongs to."""
    return next((r for r in LEVEL if module == r or module.startswith(r + ".")), None)


def test_every_module_has_a_layer():
    """A new room must be given its place before anything is built on it."""
    homeless = [m for m in MODULES if room(m) is None]
    assert set(homeless) <= {"", "core", "__main__"}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m)])
def test_imports_go_down_only(module):
    """A module imports lower layers and its own room, never a higher layer or a sibling, not even inside a function."""
    here = room(module)
    for name, line in imports(MODULES[module], late=True):
        if name.startswith("minigpt.") and (there := room(name.removeprefix("minigpt."))):
            assert there == here or LEVEL[there] < LEVEL[here], f"{MODULES[module]}:{line}: {here} imports {there}"


def eager(module: str, seen: set[str]) -> Iterator[tuple[str, str, int]]:
    """What importing a module imports from outside, recursively: (top-level name, importing module, line)."""
    if module in seen:
        return
    seen.add(module)
    parent = module.rpartition(".")[0]
    if parent in MODULES:
        yield from eager(parent, seen)
    for name, line in imports(MODULES[module], late=False):
        inner = name.removeprefix("minigpt.") if name != "minigpt" else ""
        if name.split(".")[0] == "minigpt" and inner in MODULES:
            yield from eager(inner, seen)
        else:
            yield name.split(".")[0], module, line


EARLY = [*(f"stages.{name}" for name, _ in STAGES.values()), *(m for m in MODULES if m.startswith("cli"))]


@pytest.mark.parametrize("module", [*EARLY, "core.models.folder", "core.models.presets", ""])
def test_the_command_line_imports_nothing_heavy(module):
    """Help, flags and pre-flight checks stay fast: torch and its like are imported inside `run` only."""
    for top, where, line in eager(module, set()):
        assert top not in HEAVY, f"importing minigpt.{module} imports {top} at {where}:{line}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(TORCH_FREE) and m not in TENSORS])
def test_torch_free_rooms(module):
    """Reading, tokenising and packing data need no torch, so that their processes start fast and stay small."""
    for top, where, line in eager(module, set()):
        assert top not in {"torch", "transformers"}, f"importing minigpt.{module} imports {top} at {where}:{line}"


def test_nobody_imports_click():
    """typer carries its own copy; the package of that name is not a dependency and its objects do not mix."""
    for module, path in MODULES.items():
        for name, line in imports(path, late=True):
            assert name.split(".")[0] != "click" and "_click" not in name, f"{module}:{line}"
