"""Imports go down only: runtime <- passes <- calibration <- training <- optimizer; nothing imports models."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("runtime", "passes", "calibration", "training", "optimizer")
DEMO = "optimizer/demo.py"  # the one module of the product that may use models


def modules() -> Iterator[Path]:
    for package in (*FLOORS, "models"):
        yield from sorted((ROOT / package).glob("**/*.py"))


def imports(path: Path) -> set[str]:
    """The packages of edgewise that a module imports anywhere, functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = (
                [node.module or ""]
                if node.module != "edgewise"
                else [f"edgewise.{a.name}" for a in node.names]
            )
        found |= {name.split(".")[1] for name in names if name.startswith("edgewise.")}
    return found


def third_party(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", list(modules()), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = {"models", "runtime"} if package == "models" else set(FLOORS[: FLOORS.index(package) + 1])
    if str(path.relative_to(ROOT)) == DEMO:
        allowed.add("models")
    assert imports(path) <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("*.py")), ids=lambda p: p.name)
def test_passes_need_no_torch(path: Path) -> None:
    assert "torch" not in third_party(path)


def test_every_package_is_walked() -> None:
    assert {p.relative_to(ROOT).parts[0] for p in modules()} == {*FLOORS, "models"}
