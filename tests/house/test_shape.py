"""The size of functions and classes, and that nothing is written twice."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from .test_import_direction import PACKAGES, ROOT

FOUND = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FILES = sorted(path for path in FOUND if not any(parent.is_symlink() for parent in path.parents))  # foveal/ has links


def lines_of(node: ast.FunctionDef | ast.ClassDef) -> int:
    """Without the docstring, as those of public functions state every argument and error."""
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return node.end_lineno - node.lineno + 1 - docstring


def attributes(node: ast.ClassDef) -> set[str]:
    stored = (each for each in ast.walk(node) if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store))
    return {each.attr for each in stored if isinstance(each.value, ast.Name) and each.value.id == "self"}


def oversized(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and lines_of(node) > 60 and "triton" not in path.name:
            yield f"{path}: {node.name}"
        if isinstance(node, ast.ClassDef) and (lines_of(node) > 300 or len(attributes(node)) > 15):
            yield f"{path}: {node.name}"


def test_functions_and_classes_are_short() -> None:
    assert len(FILES) > 100
    assert [each for path in FILES for each in oversized(path)] == []


def test_no_ten_lines_stand_twice() -> None:
    places = defaultdict(list)
    for path in FILES:
        numbered = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        lines = [(number, line.strip()) for number, line in numbered if line.strip()]
        for start in range(len(lines) - 9):
            places[tuple(line for _, line in lines[start : start + 10])].append(f"{path}:{lines[start][0]}")
    assert [each for each in places.values() if len(each) > 1] == []
