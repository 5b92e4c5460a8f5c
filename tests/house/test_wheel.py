"""The package as users get it: the built wheel, in an environment of its own, far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("backbones", "benchmarks", "configs", "heads", "kernels", "train", "weights")


def call(*command: str | Path, cwd: Path) -> str:
    # nothing of the checkout may leak in: neither the working directory nor a path variable
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FOVEAL"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that was built from it (not from the checkout)."""
    output = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, ROOT, cwd=output)
    (sdist,) = output.glob("*.tar.gz")
    (wheel,) = output.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel, and borrows the dependencies of this one.

    A path file lends the folder of the dependencies, and path files in it are not read: the editable installation of
    this checkout, which hangs on one, is not there.
    """
    folder = tmp_path_factory.mktemp("fresh")
    call(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    own = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[1], cwd=folder)
    lent = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (own / "lent.pth").write_text("\n".join(lent) + "\n")
    return python


def test_foveal_comes_from_the_wheel(python: Path, tmp_path: Path) -> None:
    file = call(
        python, "-c", "import foveal.kernels.window as w, foveal; print(foveal.__file__, w.__file__)", cwd=tmp_path
    )
    for each in file.split():
        assert Path(each).is_relative_to(python.parents[1])
        assert not Path(each).is_relative_to(ROOT)


def test_create_a_model_by_name(python: Path, tmp_path: Path) -> None:
    code = (
        "import foveal, timm, torch\n"
        "model = timm.create_model('test_foveal_dinat', num_classes=3).eval()\n"
        "print(tuple(model(torch.randn(2, 3, 64, 64)).shape))\n"
    )
    assert call(python, "-c", code, cwd=tmp_path) == "(2, 3)\n"


def test_recipes_are_shipped(python: Path, tmp_path: Path) -> None:
    code = "from foveal.configs.schema import load_config; print(load_config('classify/digits').data.kind)"
    assert call(python, "-c", code, cwd=tmp_path) == "digits\n"


def test_the_command(python: Path, tmp_path: Path) -> None:
    command = python.with_name("foveal")
    assert "test_foveal_dinat" in call(command, "list", "test_*", cwd=tmp_path)


def files_of_the_checkout() -> set[str]:
    """Python files and recipes, under their names in the package."""
    found = {f"foveal/{p.relative_to(ROOT / 'foveal')}" for p in (ROOT / "foveal").rglob("*.py")} | {"foveal/py.typed"}
    for folder in FOLDERS:
        for pattern in ("*.py", "*.yaml", "*.html", "*.css", "figures.csv"):
            found |= {f"foveal/{p.relative_to(ROOT)}" for p in (ROOT / folder).rglob(pattern)}
    return found


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
    assert files_of_the_checkout() <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"foveal"}
    licences = {name.rsplit("/", 1)[1] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_the_source_distribution_holds_the_folders(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "LICENSE",
        "NOTICE",
        "README.md",
        "kernels/window.py",
        "configs/classify/digits.yaml",
    } <= names
