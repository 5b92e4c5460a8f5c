"""The direction of imports inside the package, read from the source: a file may import only what stands below it.

Run as a script (the pre-commit hook does), it prints the violations and exits 1 if there are any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("foveal", "kernels", "backbones", "heads", "configs", "train", "weights", "benchmarks")

# Leaves without imports of ours: everyone may import them.
LEAVES = ("_version", "errors", "figures", "files")
# Who may import which of our packages, besides itself. The longest name that matches a module holds.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "configs": set(),
    "configs.mmdet": {"heads"},  # configurations that mmdet executes
    "backbones": set(),
    "backbones.attention": {"kernels"},
    "backbones.profile": {"kernels"},
    "heads": set(),
    "heads.body": {"backbones"},
    "heads.upsamplers": {"kernels"},
    "train": {"kernels", "backbones", "heads", "configs"},
    "train.probe": {"backbones", "heads", "configs", "foveal"},  # drawings of foveal.visualize
    "weights": {"kernels", "backbones", "heads", "configs", "train"},  # the scoring, for `foveal verify`
    "benchmarks": {"kernels", "backbones", "heads", "configs", "train", "weights"},
    "benchmarks.plots": {"foveal"},  # published accuracies, of foveal.zoo
    "foveal": {"kernels", "backbones", "heads"},
    "foveal.cli": set(PACKAGES),
    "foveal.demo": set(PACKAGES),
    "foveal.pictures": set(PACKAGES),
    "foveal.zoo": {"backbones", "weights"},
    **{f"foveal.{leaf}": set() for leaf in LEAVES},
}


def module_name(path: Path, root: Path) -> str:
    """``kernels/neighborhood/api.py`` is ``foveal.kernels.neighborhood.api``; ``foveal/cli.py`` is ``foveal.cli``."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] != "foveal":
        parts.insert(0, "foveal")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Every module of ours that a source imports, at any depth, with its line, as an absolute dotted name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: max(0, len(parents) - node.level + (1 if is_package else 0))]
                if not parents:
                    yield node.lineno, "(above the package)"
                    continue
                base = ".".join([*parents, *([base] if base else [])])
            # `from x import y` reaches y if y is a module; x itself, if it is not, is what counts
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in PACKAGES:
                yield node.lineno, name


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    own = _folder(module)
    rule = max(
        (key for key in ALLOWED if _inside(_short(module), key)),
        key=lambda key: key.count("."),
        default=None,
    )
    if rule is None:
        return [f"{module}: no rule for this folder"]
    found = []
    for line, name in imported(source, module, is_package):
        if any(f"{name}.".startswith(f"foveal.{leaf}.") for leaf in LEAVES):
            continue
        if not name.startswith("foveal"):
            found.append(f"{module}:{line} imports {name}: the folders import as foveal.<folder>")
        elif (target := _folder(name)) != own and target not in ALLOWED[rule]:
            found.append(
                f"{module}:{line} imports {name}: {rule} may import {sorted(ALLOWED[rule]) or 'nothing'} of ours"
            )
    return found


def _short(name: str) -> str:
    """The name as the rules have it: the folder first, and ``foveal.x`` for what lies in foveal/ itself."""
    parts = name.split(".")
    return ".".join(parts[1:]) + "." if len(parts) > 1 and parts[1] in PACKAGES[1:] else f"{name}."


def _folder(name: str) -> str:
    return _short(name).split(".")[0]


def _inside(name: str, key: str) -> bool:
    return name.startswith(f"{key}.")


def check(root: Path) -> list[str]:
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            found += violations(path.read_text(encoding="utf-8"), module_name(path, root), path.name == "__init__.py")
    return found


def test_the_package_keeps_the_direction() -> None:
    assert check(ROOT) == []


def import_graph(root: Path) -> dict[str, set[str]]:
    """Every module with those that it imports, at any depth; a name from a module leads to the module."""
    modules = {
        module_name(path, root): path
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
        if "mmdet" not in path.parts  # configurations that mmdet executes
    }
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = set()
        for _, name in imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            while name not in modules and "." in name:
                name = name.rpartition(".")[0]
            found.add(name)
        graph[module] = found & modules.keys() - {module}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """For every module in a cycle the shortest way by which it imports itself."""

    def path_to(start: str, goal: str) -> list[str] | None:
        paths, seen = [[start]], {start}
        for path in paths:
            for name in graph[path[-1]]:
                if name == goal:
                    return [*path, goal]
                if name not in seen:
                    seen.add(name)
                    paths.append([*path, name])
        return None

    return [path for module in sorted(graph) if (path := path_to(module, module)) is not None]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = import_graph(ROOT)
    assert len(graph) > 80
    assert "foveal.kernels.dispatch" in graph["foveal.kernels"]
    assert cycles(graph) == []


def test_a_cycle_is_found(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / package).mkdir()
    (tmp_path / "weights" / "a.py").write_text("def f():\n    from .b import x")
    (tmp_path / "weights" / "b.py").write_text("from ..train.c import y")
    (tmp_path / "train" / "c.py").write_text("from ..weights import a")
    names = ["foveal.train.c", "foveal.weights.a", "foveal.weights.b"]
    assert [path[0] for path in cycles(import_graph(tmp_path))] == names


def test_every_package_is_looked_at() -> None:
    seen = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")}
    assert seen - {"tests"} <= set(PACKAGES)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("foveal.kernels.window", "from ..backbones import nat"),
        ("foveal.kernels.window", "from .. import backbones"),
        ("foveal.kernels.neighborhood.api", "from ...configs.schema import Recipe"),
        ("foveal.kernels.neighborhood.api", "from ...train import engine"),
        ("foveal.kernels.neighborhood.api", "def f():\n    import foveal.train.engine"),
        ("foveal.kernels.window", "import foveal"),
        ("foveal.kernels.window", "from .... import x"),
        ("foveal.configs.schema", "from ..kernels import neighborhood_attention"),
        ("foveal.backbones.nat", "from ..kernels import neighborhood_attention"),
        ("foveal.backbones.nat", "from .. import kernels"),
        ("foveal.backbones.attention.window", "from ...train import engine"),
        ("foveal.backbones.nat", "from foveal.weights.export import export"),
        ("foveal.backbones.attention.window", "import kernels"),
        ("foveal.heads.necks.fpn", "from ...backbones import nat"),
        ("foveal.heads.body", "from ..kernels import neighborhood_attention"),
        ("foveal.train.engine", "from ..weights.export import export"),
        ("foveal.train.data.sources", "from ...benchmarks import run"),
        ("foveal.train.engine", "from ..benchmarks import run"),
        ("foveal.weights.export", "from ..benchmarks import run"),
        ("foveal.benchmarks.run", "from ..cli import app"),
        ("foveal.benchmarks.run", "from .. import zoo"),
        ("foveal", "from foveal.train import engine"),
        ("foveal.somewhere", "from .train import engine"),
        ("foveal.demonstration", "from .train import engine"),
        ("foveal.files", "from .kernels import window"),
    ],
)
def test_a_violation_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("foveal.kernels.neighborhood.api", "import torch\nfrom ..window import Window\nfrom . import tiled"),
        (
            "foveal.backbones.attention.window",
            "from ...kernels import neighborhood_attention\nfrom ..layers import Mlp",
        ),
        ("foveal.heads.body", "from ..backbones import list_models\nfrom .necks import fpn"),
        (
            "foveal.train.classify",
            "from ..configs.schema import Recipe\nfrom .engine import run\nimport foveal.backbones",
        ),
        ("foveal.weights.export", "from .._version import __version__\nfrom ..backbones.loading import load"),
        ("foveal.kernels.triton_common", "from ..files import atomic"),
        ("foveal.cli", "from . import __version__\nfrom .train import classify\nfrom .benchmarks import run"),
    ],
)
def test_what_is_allowed_is_left_alone(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_a_package_file_resolves_from_itself() -> None:
    assert violations("from .backbones import list_models", "foveal", is_package=True) == []
    assert len(violations("from ..train import engine", "foveal.kernels", is_package=True)) == 1
    assert violations("from .window import Window", "foveal.kernels", is_package=True) == []


if __name__ == "__main__":
    problems = check(ROOT)
    print("\n".join(problems))
    sys.exit(1 if problems else 0)
