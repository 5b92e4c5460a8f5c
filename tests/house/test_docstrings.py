"""Every public name, which is what stands on the pages of docs/api/, has a docstring with an example, and those run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import foveal
from foveal import kernels
from foveal.heads import build, checkpoint, necks
from foveal.kernels import compat

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("docs/api/*.md"))
NAMES = [
    name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]


def find(name: str) -> Any:
    """What a dotted name stands for; where a function is called like its module, the function."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def example(name: str) -> doctest.DocTest:
    text = inspect.cleandoc(find(name).__doc__ or "")
    section = text.partition("\nExamples:\n")[2]
    return doctest.DocTestParser().get_doctest(section, {}, name, None, 0)


def exported(module: Any) -> set[str]:
    """The public functions and classes that are written in a module."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    return {
        node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
    }


def test_the_pages_hold_all_that_is_public() -> None:
    wanted = {f"foveal.{name}" for name in foveal.__all__ if not name.startswith("_")}
    wanted |= {f"foveal.kernels.{name}" for name in kernels.__all__}
    wanted |= {f"foveal.kernels.compat.{name}" for name in exported(compat)}
    wanted |= {f"foveal.backbones.{name}" for name in foveal.backbones.__all__}
    wanted |= {f"foveal.heads.build.{name}" for name in exported(build)}
    wanted |= {f"foveal.heads.checkpoint.{name}" for name in exported(checkpoint)}
    wanted |= {
        f"foveal.heads.necks.{name}"
        for name in necks.__all__
        if name[0].islower() or callable(find(f"foveal.heads.necks.{name}"))
    }
    assert wanted - set(NAMES) == set()
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_explained_and_its_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thing = find(name)
    assert thing.__doc__, "no docstring"
    if inspect.isfunction(thing) and len([p for p in inspect.signature(thing).parameters if p != "kwargs"]) > 2:
        assert re.search(r"^ *Args:$", thing.__doc__, re.MULTILINE), "more than two parameters, and no section Args:"
    if section := re.search(r"^Args:\n((?:(?: .*)?\n)+)", f"{inspect.cleandoc(thing.__doc__)}\n", re.MULTILINE):
        told = re.findall(r"^    \*{0,2}([^ \n][^:\n]*):", section[1], re.MULTILINE)
        told = [name for names in told for name in names.split(", ")]
        assert set(told) <= set(inspect.signature(thing).parameters), "Args: tells of other parameters"
    test = example(name)
    assert test.examples, "no section Examples: with >>> in it"
    assert any(each.want for each in test.examples), "an example that shows no answer"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


def findings(project: Path) -> list[dict[str, Any]]:
    """What basedpyright reports for a pyrightconfig.json or a pyproject.toml."""
    command = [sys.executable, "-m", "basedpyright", "--project", project, "--pythonpath", sys.executable]
    run = subprocess.run([*command, "--outputjson"], capture_output=True, text=True, cwd=ROOT)
    report = json.loads(run.stdout)
    assert report["summary"]["filesAnalyzed"] > 0
    return report["generalDiagnostics"]


def as_text(found: list[dict[str, Any]]) -> str:
    return "\n".join(f"{each['file']}:{each['range']['start']['line'] + 1}: {each['message']}" for each in found)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("basedpyright") is None, reason="basedpyright is not installed (the extra 'dev')")
def test_types_of_the_package() -> None:
    """In a checkout, without installing: few findings, and none in a module with a public name."""
    found = findings(ROOT / "pyproject.toml")
    modules = {getattr(find(name), "__module__", name.rpartition(".")[0]) for name in NAMES}
    public = {str(ROOT / module.replace(".", "/")) for module in modules}
    assert (
        as_text([each for each in found if each["file"].removesuffix(".py").removesuffix("/__init__") in public]) == ""
    )
    assert len(found) <= 200, as_text(found)
    assert [each for each in found if each.get("rule") == "reportMissingImports"] == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("basedpyright") is None, reason="basedpyright is not installed (the extra 'dev')")
def test_types_of_the_examples(tmp_path: Path) -> None:
    functions = []
    for number, name in enumerate(NAMES):
        body = [f"    {line}" for each in example(name).examples for line in each.source.splitlines()]
        functions += [f"def example_{number}() -> None:  # {name}", *body, ""]
    (tmp_path / "examples.py").write_text("\n".join(functions))
    settings = {
        "typeCheckingMode": "basic",
        "include": ["examples.py"],
        "extraPaths": [str(ROOT)],
        "pythonVersion": "3.10",
        "reportPrivateImportUsage": False,
        "reportUnusedExpression": False,  # the examples' outputs
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    assert as_text(findings(tmp_path)) == ""
