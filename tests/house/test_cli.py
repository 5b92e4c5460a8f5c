"""The `foveal` command: every subcommand, and one line with the right exit status for every mistake of a user."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from typer.testing import CliRunner

import foveal
from foveal.cli import app
from foveal.errors import Interrupted, RunError
from foveal.kernels import BackendError


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model classifies grey images by brightness: "dark" or "bright"."""
    model = timm.create_model("test_foveal_nat", num_classes=2, in_chans=1, global_pool="avg")
    model.pretrained_cfg |= {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.bias.fill_(1.0)  # the features are constant; the answer is the bias of the classifier
        model.head.bias.copy_(torch.tensor([0.0, 3.0]))
    folder = tmp_path_factory.mktemp("runs") / "run"
    labels = {"label_names": ["dark", "bright"]}
    save_for_hf(model, str(folder / "best"), model_config=labels, model_args={"in_chans": 1}, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "x.png"
    Image.fromarray(np.full((8, 8), 200, dtype=np.uint8)).save(path)
    return path


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"foveal {foveal.__version__}\n")


def test_list() -> None:
    result = call("list", "DINAT_[mt]*")
    assert result.exit_code == 0
    rows = result.stdout.splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["dinat_mini", "dinat_tiny"]
    facts = ["224x224", "yes", "82.7", "in1k", "mit", "mit", "all,", "dynamic", "size"]
    assert rows[2].split() == ["dinat_tiny", "DiNAT", "27.90", "M", "4.30", *facts]
    (row,) = json.loads(call("list", "nat_mini", "--json").stdout)
    assert row == {
        "name": "nat_mini",
        "family": "NAT",
        "parameters": row["parameters"],
        "macs": row["macs"],
        "input": [3, 224, 224],
        "any_size": True,
        "top1": 81.8,
        "tags": ["in1k"],
        "code_licence": "mit",
        "weights_licence": "mit",
        "exports": "all, dynamic size",
    }
    assert (f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.1f}") == ("19.98", "2.7")  # as published


def test_list_chooses() -> None:
    """The best first, within a size, of any input size; models without published weights have no licence of them."""
    rows = json.loads(call("list", "--sort", "top1", "--max-params", "30M", "--any-size", "--json").stdout)
    scores = [row["top1"] or 0 for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 83
    assert all(row["parameters"] <= 30e6 and row["any_size"] for row in rows)
    assert "vitrpb_isotropic_small" not in {row["name"] for row in rows}
    without = {row["name"]: row["weights_licence"] for row in json.loads(call("list", "--json").stdout)}
    assert {without["ascan_tiny"], without["halo_h1"]} == {""}
    assert call("list", "--max-params", "few").exit_code == 2


def test_info() -> None:
    text = call("info", "dinat_s_tiny").stdout
    for part in (
        f"{sum(p.numel() for p in timm.create_model('dinat_s_tiny').parameters()):,}",
        "4.491",
        "1, 8  1, 4  1, 2, 1, 2, 1, 2  1, 1",
        "mit",
        "arXiv:2209.15001",
        "in1k  https://",
    ):
        assert part in text
    facts = json.loads(call("info", "dinat_large.in22k", "--json").stdout)
    assert facts["classes"] == 21841
    assert set(facts["weights"]) == {"in22k", "in22k_ft_in1k"}


@pytest.mark.parametrize("name", [name for name in foveal.list_models() if name.startswith("test_")])
def test_every_family_has_a_card(name: str) -> None:
    """Source, licence, differences and how they were checked, for the family of each model."""
    result = call("info", name, "--card")
    assert result.exit_code == 0
    for part in ("arXiv", "## Variants", "## Differences", "## Verified"):
        assert part in result.stdout
    assert any(licence in result.stdout for licence in ("Apache-2.0", "MIT", "licence"))


def test_what_users_must_know_is_said() -> None:
    assert "reconstruction" in call("info", "ascan_tiny").stdout
    assert "no licence" in call("info", "care_s0").stdout
    assert call("info", "resnet18", "--card").exit_code == 2


def test_predict(run: Path, image: Path) -> None:
    result = call("predict", image, "--model", run, "--top", 5)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [str(image), "   95.26 %  bright", "    4.74 %  dark"]


def test_predict_goes_on_after_a_bad_image(run: Path, image: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    result = call("predict", bad, image, "--model", run, "--top", 1)
    assert result.exit_code == 1
    assert "bright" in result.stdout
    assert f"error: {bad}: " in result.stderr


def test_predict_goes_on_after_a_bomb(run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    result = call("predict", tmp_path / "large.png", image, "--model", run, "--top", 1)
    assert result.exit_code == 1
    assert "bright" in result.stdout
    assert result.stderr.startswith(f"error: {tmp_path / 'large.png'}: ")
    assert result.stderr.count("\n") == 1


def test_predict_takes_the_newest_run(run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nothing = call("predict", image)
    assert nothing.exit_code == 2
    assert "`foveal train classify digits`" in nothing.stderr
    assert "--model" in nothing.stderr
    assert nothing.stderr.count("\n") == 1
    for age, name in enumerate(["digits", "demo/run", "unfinished"]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "unfinished":
            shutil.copytree(run / "best", tmp_path / "runs" / name / "best")
            os.utime(tmp_path / "runs" / name / "best" / "config.json", (1000 * age, 1000 * age))
    result = call("predict", image)
    assert (result.exit_code, result.stderr) == (0, "model: runs/demo/run\n")
    assert "bright" in result.stdout


def test_demo_into_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = call("demo", "--output", tmp_path / "file" / "demo")
    assert result.exit_code == 1
    assert re.fullmatch(rf"error: .*{tmp_path / 'file' / 'demo'}: {os.strerror(errno.ENOTDIR)}\n", result.stderr)


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveal.benchmarks import run as bench

    def fail(error: Exception) -> Any:
        def main(*_):
            raise error

        monkeypatch.setattr(bench, "main", main)
        return call("bench")

    assert isinstance(fail(RuntimeError("ours")).exception, RuntimeError)
    memory = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 120000000000 bytes"
    assert fail(RuntimeError(memory)).stderr == f"error: {memory}\n"
    assert fail(MemoryError()).stderr == "error: MemoryError\n"
    assert fail(BackendError("message")).stderr == "error: message\n"


def test_exit_statuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveal.benchmarks import run as bench

    def status(error: BaseException) -> int:
        def main(*_):
            raise error

        monkeypatch.setattr(bench, "main", main)
        return call("bench").exit_code

    assert status(ValueError("8")) == status(FileNotFoundError("x.yaml")) == 2
    assert status(RunError("nan")) == status(OSError("full")) == status(ImportError("x")) == 1
    assert status(Interrupted(0, "saved")) == 0
    assert status(Interrupted(130, "saved")) == status(KeyboardInterrupt()) == 130


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveal.benchmarks import run as bench

    def main(*_):
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    monkeypatch.setattr(bench, "main", main)
    assert "foveal[export]" in call("bench").stderr


def test_names_of_folders(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `foveal.load` takes, of detectors and segmenters too; an export of one is said to be one."""
    from foveal.heads.build import build_segmenter
    from foveal.heads.checkpoint import save_dense

    monkeypatch.setenv("HOME", str(tmp_path))
    model = build_segmenter("test_foveal_care", "semantic_fpn", num_classes=2)
    save_dense(tmp_path / "dense", model, ["cat", "dog"], {"in_chans": 3})
    (tmp_path / "dense" / "README.md").write_text("# a card\n")
    for name in (tmp_path / "dense", f"local-dir:{tmp_path / 'dense'}", "~/dense", "local-dir:~/dense"):
        result = call("predict", image, "--model", name)
        assert result.exit_code == 0, result.output
        assert "cat" in result.stdout or "dog" in result.stdout
        assert call("info", name, "--card").stdout == "# a card\n"
    (tmp_path / "dense" / "model.safetensors").rename(tmp_path / "dense" / "model.onnx")
    assert "model.onnx" in call("predict", image, "--model", "~/dense").stderr


def test_export(run: Path, tmp_path: Path) -> None:
    result = call("export", run, "--to", "SafeTensors", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "README.md, config.json, model.safetensors" in result.stdout
    assert "largest difference 0.0e+00" in result.stdout


def test_train_and_evaluate_pass_on_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveal.train import evaluation, run

    calls = []
    monkeypatch.setattr(run, "train", lambda config, overrides, task: calls.append((task, config, overrides)))
    monkeypatch.setattr(evaluation, "evaluate", lambda source, overrides, console: calls.append((source, overrides)))
    assert call("train", "classify", "digits", "schedule.epochs=2", "augment.scale=[0.5,1]").exit_code == 0
    assert call("evaluate", "runs/digits").exit_code == 0
    assert calls == [("classify", "digits", ["schedule.epochs=2", "augment.scale=[0.5,1]"]), ("runs/digits", [])]


def test_train_refuses_an_unknown_recipe() -> None:
    assert call("train", "classify", "digitz").exit_code == 2


def test_bench_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveal.benchmarks import run as bench

    calls = []
    monkeypatch.setattr(bench, "main", lambda arguments: calls.append(arguments) or 0)
    assert call("bench", "kernels", "--help", "--repeat", 3).exit_code == 0
    assert calls == [["kernels", "--help", "--repeat", "3"]]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["list", "zebra*"], 2, "zebra*"),
        (["info", ""], 2, "name"),
        (["info", "dinat_tinny"], 2, "dinat_tiny"),
        (["info", "dinat_tiny.in2k"], 2, "in1k"),
        (["info", "dinat_tiny.in1k", "--markdown", "--json"], 2, "--json and --markdown"),
        (["predict", "x.png", "--model", "test_foveal_nat"], 2, "test_foveal_nat"),
        (["predict", "x.png", "--model", "runs/none"], 2, "runs/none"),
        (["export", "test_foveal_nat", "--to", "tflite", "--output", "x"], 2, "safetensors, onnx"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], status: int, message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == status
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [["nothing"], ["predict"], ["export", "x"], ["list", "--nothing"]])
def test_wrong_usage(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEAL_DEBUG", "1")
    assert isinstance(call("info", "dinat_tinny").exception, ValueError)
    monkeypatch.setenv("FOVEAL_DEBUG", "0")
    assert isinstance(call("info", "dinat_tinny").exception, SystemExit)
    monkeypatch.delenv("FOVEAL_DEBUG")
    assert isinstance(call("--debug", "info", "dinat_tinny").exception, ValueError)


def modules_after(code: str) -> set[str]:
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_foveal_loads_neither_torch_nor_timm() -> None:
    assert not {"torch", "timm", "numpy", "yaml"} & modules_after("import foveal")
    assert not {"torch", "timm"} & modules_after(
        "from foveal.cli import app; from typer.testing import CliRunner; CliRunner().invoke(app, ['list'])"
    )


@pytest.mark.parametrize("imports", ["import foveal, timm", "import timm, foveal", "import foveal.kernels, timm"])
def test_models_are_registered_with_timm(imports: str) -> None:
    code = f"{imports}; timm.create_model('test_foveal_nat', num_classes=2)"
    heavy = {"accelerate", "matplotlib", "omegaconf", "onnx", "onnxruntime", "sklearn", "tensorboard"}
    assert not heavy & modules_after(code)


def cpu_seconds(*command: str) -> float:
    """User and system time of a process, the smallest of three."""

    def once() -> float:
        before = os.times()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return min(once() for _ in range(3))


@pytest.mark.slow
def test_start_up_takes_little_cpu_time() -> None:
    """Limits are about twice what was measured: 0.2, 0.2 and 4.6 s; `import foveal` alone 0.05 s, timm 4.4 s."""
    command = str(Path(sys.executable).with_name("foveal"))
    assert cpu_seconds(command, "--help") < 0.7
    assert cpu_seconds(command, "list") < 1.5
    assert cpu_seconds(command, "info", "dinat_tiny") < 10
    with_timm = cpu_seconds(sys.executable, "-c", "import foveal, timm")
    assert with_timm < cpu_seconds(sys.executable, "-c", "import timm") + 1.0


@pytest.mark.parametrize("command", ["list", "list --json", "--version"])  # by rich, by print, at the end
def test_a_reader_of_the_output_that_is_gone_ends_it_quietly(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "foveal", *command.split()], stdout=gone, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "foveal", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"foveal {foveal.__version__}\n"


def test_other_libraries_may_import_our_folder_of_kernels() -> None:
    """transformers probes for a package "kernels"; with the checkout as working directory it finds this folder."""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", "import kernels, foveal.kernels"], cwd=root, check=True)
