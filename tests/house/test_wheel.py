"""The package as users get it: the built wheel, in an environment of its own, far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from foveal.figures import figures

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


def fresh_environment(folder: Path, wheel: Path) -> tuple[Path, Path]:
    """The interpreter and the site-packages of a new environment that holds the wheel alone."""
    call(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    installer = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    call(*installer, wheel, cwd=folder)
    return python, Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )


@pytest.fixture(scope="module")
def python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel, and borrows the dependencies of this one.

    A path file lends the folder of the dependencies, and path files in it are not read: the editable installation of
    this checkout, which hangs on one, is not there.
    """
    python, packages = fresh_environment(tmp_path_factory.mktemp("fresh"), built[1])
    lent = {str(metadata.distribution(name).locate_file("")) for name in ("torch", "timm")}
    (packages / "lent.pth").write_text("\n".join(lent) + "\n")
    return python


def required(name: str) -> set[str]:
    """The distributions that ``pip install name`` brings, without any extra, as far as they are installed here."""
    found: set[str] = set()
    queue = [name]
    while queue:
        for text in metadata.requires(queue.pop()) or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if requirement.name not in found:
                found.add(requirement.name)
                queue.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def bare_python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with what ``pip install foveal`` brings, and nothing of the extras."""
    python, packages = fresh_environment(tmp_path_factory.mktemp("bare"), built[1])
    for name in required("foveal"):
        distribution = metadata.distribution(name)
        root = Path(str(distribution.locate_file("")))
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(root / top)
    return python


def test_foveal_comes_from_the_wheel(python: Path, tmp_path: Path) -> None:
    file = call(
        python, "-c", "import foveal.kernels.window as w, foveal; print(foveal.__file__, w.__file__)", cwd=tmp_path
    )
    for each in file.split():
        assert Path(each).is_relative_to(python.parents[1])
        assert not Path(each).is_relative_to(ROOT)
    assert (Path(file.split()[1]).parent / "neighborhood" / "native.cpp").is_file()


def test_create_a_model_by_name(python: Path, tmp_path: Path) -> None:
    code = (
        "import foveal, timm, torch\n"
        "model = timm.create_model('test_foveal_dinat', num_classes=3).eval()\n"
        "print(tuple(model(torch.randn(2, 3, 64, 64)).shape))\n"
    )
    assert call(python, "-c", code, cwd=tmp_path) == "(2, 3)\n"


def test_every_family_runs_without_extras(bare_python: Path, tmp_path: Path) -> None:
    code = (
        "import foveal, timm, torch\n"
        "from importlib.util import find_spec\n"
        "assert not any(map(find_spec, ('accelerate', 'sklearn', 'matplotlib', 'onnx', 'pytest', 'transformers')))\n"
        "names = [name for name in foveal.list_models() if name.startswith('test_')]\n"
        "for name in names:\n"
        "    assert timm.create_model(name, num_classes=3).eval()(torch.randn(1, 3, 64, 96)).shape == (1, 3)\n"
        "    maps = timm.create_model(name, features_only=True)(torch.randn(1, 3, 64, 96))\n"
        "for name in foveal.list_models():\n"
        "    with torch.device('meta'):\n"
        "        timm.create_model(name)\n"
        "print(len(names), len(foveal.list_models()))\n"
    )
    tests, models = call(bare_python, "-c", code, cwd=tmp_path).split()
    assert int(tests) >= 7
    assert int(models) == len(figures())


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ("train classify digits", "train"),
        pytest.param("evaluate runs/x", "train", marks=pytest.mark.slow),
        pytest.param("predict x.png --model runs/x", "train", marks=pytest.mark.slow),
        ("export test_foveal_nat --to onnx --output x", "export"),
        pytest.param("demo", "train", marks=pytest.mark.slow),
    ],
)
def test_a_command_names_the_extra_that_it_misses(
    bare_python: Path, tmp_path: Path, arguments: str, extra: str
) -> None:
    command = [bare_python.with_name("foveal"), *arguments.split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, ""), run.stderr
    assert f"foveal[{extra}]" in run.stderr


@pytest.mark.slow
def test_a_model_is_described_without_extras(bare_python: Path, tmp_path: Path) -> None:
    assert "dinat_tiny" in call(bare_python.with_name("foveal"), "info", "dinat_tiny", cwd=tmp_path)


def test_at_most_eight_packages_are_required() -> None:
    direct = [r for r in map(Requirement, metadata.requires("foveal") or ()) if r.marker is None]
    assert len(direct) <= 8


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
