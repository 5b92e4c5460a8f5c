"""foveal bench gpu as far as a CPU can hold it: the cases, what is counted, the tables, the pictures, the script."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foveal.benchmarks import cases, gpu, plots
from foveal.kernels.window import Window

SCRIPT = Path(gpu.__file__).with_name("gpu.sh")
TOP = gpu.Ceilings(bandwidth=4e12, rate=8e14)


@pytest.fixture
def clock(monkeypatch):
    """Every call takes two milliseconds, after having been made once."""

    def median_ms(self, call, queued=True):
        call()
        return 2.0

    monkeypatch.setattr(gpu.Clock, "median_ms", median_ms)
    return gpu.Clock("cpu")


def test_the_layers_of_dinat_tiny_are_those_of_the_paper():
    layers = gpu.layers_of(cases.LayersCase("dinat_tiny", 128, 224, 224))
    found = {(layer.map, layer.rows.dilation): layer for layer in layers}
    first = found["56x56", 1]
    assert first.shape == (128, 56, 56, 2, 32) and first.bias == "table" and first.rows == Window(7)
    assert {(size, d) for size, d in found} == {
        ("56x56", 1), ("56x56", 8), ("28x28", 1), ("28x28", 4), ("14x14", 1), ("14x14", 2), ("7x7", 1)
    }  # fmt: skip
    assert sum(layer.count for layer in layers) == 3 + 4 + 18 + 5
    # q, k, v and the output of 128 * 56 * 56 * 2 queries of 32 channels, two bytes each
    tensor = 128 * 56 * 56 * 64
    assert first.bytes(backward=False) == 2 * 4 * tensor
    # and backward these and the output's gradient read, three gradients written
    assert first.bytes(backward=True) == 2 * (4 + 5 + 3) * tensor
    # 49 keys, a product for the logits and one for the values
    assert first.flops(backward=False) == 2 * tensor * 49 * 2
    assert first.flops(backward=True) == 2 * tensor * 49 * (2 + 5)
    assert TOP.floor_ms(first.bytes(False), first.flops(False)) == pytest.approx(2 * 4 * tensor / 4e12 * 1e3)


def test_the_layers_of_other_models():
    strided = gpu.Layer("attention", (1, 8, 8, 2, 16), (4, 4), 24, Window(6, 4), Window(6, 4), "factored")
    assert strided.bytes(False) == 2 * (16 * 2 * (16 + 24) + 64 * 2 * (16 + 24))
    assert strided.pairs == 16 * 2 * 36
    mix = gpu.Layer("mix", (1, 8, 8, 2, 16), (8, 8), 16, Window(5), Window(5), "table")
    assert mix.bytes(False) == 2 * (64 * 2 * 25 + 2 * 64 * 2 * 16)
    assert mix.flops(False) == 2 * 64 * 2 * 25 * 16
    kinds = {case.model: gpu.layers_of(case) for case in cases.TINY_LAYERS}
    assert {layer.operation for layer in kinds["test_foveal_overlock"]} == {"mix"}
    assert {layer.bias for layer in kinds["test_foveal_halonet"]} == {"factored"}
    assert any(layer.rows.dilation > 1 and gpu.windowed(layer) for layer in kinds["test_foveal_maxvit"])  # a grid


def test_a_convolution_is_counted():
    case = cases.ConvCase(64, 56, 17, 2)
    tensor = 2 * 64 * 56 * 56
    assert case.flops(False) == 2 * tensor * 289 and case.flops(True) == 3 * case.flops(False)
    assert case.bytes(False) == 2 * (2 * tensor + 64 * 289)


@pytest.mark.parametrize("case", cases.TINY_LAYERS, ids=lambda case: case.model)
def test_every_implementation_gives_one_answer(case, clock):
    rows = list(gpu.layer_rows(case, clock, TOP, torch.float32, gpu.Budget(60), slow=False))
    noted = {(row["by"], row["note"]) for row in rows if row["note"]}
    assert {by for by, _ in noted} <= {"natten, no bias"}  # which has no gradient on a CPU
    by = {row["by"] for row in rows}
    assert "foveal" in by
    expected = {"dinat": "sdpa, dense mask", "maxvit": "sdpa on windows", "overlock": "separate softmax, tiled"}
    for family, peer in expected.items():
        assert family not in case.model or peer in by
    assert all(row["ms"] == 2.0 for row in rows if not row["note"])


def test_wrong_answers_are_not_timed(clock, monkeypatch):
    monkeypatch.setattr(gpu, "windowed", lambda layer: lambda q, k, v, table=None: v + 1)
    rows = list(gpu.layer_rows(cases.TINY_LAYERS[2], clock, TOP, torch.float32, gpu.Budget(60), slow=False))
    wrong = [row for row in rows if row["by"] == "sdpa on windows"]
    assert wrong and all("another answer" in row["note"] and row["ms"] == "" for row in wrong)


def test_forward_and_backward_read_one_layout():
    layer = gpu.Layer("attention", (1, 8, 8, 2, 16), (8, 8), 16, Window(3), Window(3), "none")
    tensors, grad = gpu.inputs_of(layer, "cpu", torch.float32)
    seen = []

    def call(*given):
        seen.append([(t.stride(), t.data_ptr()) for t in given])
        return sum(given)

    for run in gpu._modes(call, tensors, grad):
        run()
    assert seen == [[(t.stride(), t.data_ptr()) for t in tensors]] * 2
    assert not tensors[0].is_contiguous() and not any(t.requires_grad for t in tensors)


@pytest.mark.parametrize(("part", "name"), [("convs", "conv_rows"), ("halo", "halo_rows")])
def test_what_fails_is_counted_and_the_rest_measured(part, name, tmp_path, clock, monkeypatch, capsys):
    def rows(*arguments):
        yield {"case": "first", "ms": 1.0}
        raise RuntimeError("no such luck")

    monkeypatch.setattr(gpu, name, rows)
    monkeypatch.setattr(gpu, "model_rows", lambda *arguments: iter([{"model": "m", "peer": "", "run": "eager"}]))
    monkeypatch.setattr(gpu, "model_ratios", lambda table: [f"{len(table)} rows of models"])
    arguments = ["--device", "cpu", "--tiny", "--output", str(tmp_path), "--parts", part, "models"]
    assert gpu.main(arguments) == 1
    out = capsys.readouterr().out
    assert f"{part}: {gpu.TINY[part][0].id} fails: RuntimeError: no such luck" in out and "rows of models" in out
    assert len(plots.read(tmp_path / f"gpu-{part}.csv")) == 1


def test_a_model_that_fails_is_an_error(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(gpu.timm, "create_model", lambda *arguments, **options: torch.nn.Linear(2, 2))
    arguments = ["--device", "cpu", "--tiny", "--output", str(tmp_path), "--parts", "models", "--only", "dinat"]
    assert gpu.main(arguments) == 1
    assert all(row["note"] and not row["ms"] for row in plots.read(tmp_path / "gpu-models.csv"))


def test_flex_attention_is_never_timed_in_eager_mode(monkeypatch):
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_WARNINGS_SHOWN", set())
    q = torch.randn(1, 1, 16, 16)
    for _ in range(2):
        with gpu._quiet(), pytest.raises(UserWarning, match=r"without torch\.compile"):
            flex_attention.flex_attention(q, q, q)


def test_geometric_means_and_ratios():
    key = {"case": "a", "map": "7x7", "heads": 1, "rule": "k7", "mode": "forward"}
    own = [
        {**key, "map": m, "by": "foveal", "ms": ms, "peak_mib": 10} for m, ms in (("1", 1.0), ("2", 2.0), ("3", 5.0))
    ]
    peer = [{**key, "map": m, "by": "flex", "ms": ms, "peak_mib": 40} for m, ms in (("1", 2.0), ("2", 16.0), ("3", ""))]
    assert gpu.geometric_means(own + peer) == ["forward: 4.00 times as fast as flex, 1/4.00 of its memory, 2 layers"]
    run = {"run": "eager", "mode": "training"}
    rows = [
        {**run, "model": "swin", "peer": "", "images_per_second": 100.0},
        {**run, "model": "dinat", "peer": "swin", "images_per_second": 150.0},
        {**run, "model": "nat", "peer": "swin", "images_per_second": ""},
    ]
    assert gpu.model_ratios(rows) == ["dinat, eager training: 1.50 times swin"]


def test_parts_within_their_seconds(tmp_path, clock, monkeypatch, capsys):
    arguments = ["--device", "cpu", "--tiny", "--output", str(tmp_path)]
    assert gpu.main([*arguments, "--parts", "convs"]) == 0
    assert gpu.main([*arguments, "--parts", "models", "--only", "dinat"]) == 0
    tables = {path.stem: plots.read(path) for path in tmp_path.glob("*.csv")}
    assert set(tables) == {"gpu-convs", "gpu-models"}
    assert {row["by"] for row in tables["gpu-convs"]} == {"cudnn, channels_last", "cudnn, contiguous"}
    assert len(tables["gpu-models"]) == 4 and all(
        float(row["images_per_second"]) == 500 for row in tables["gpu-models"]
    )
    assert tables["gpu-models"][0]["torch"] == torch.__version__ and tables["gpu-models"][0]["date"]
    assert gpu.main([*arguments, "--parts", "layers", "--seconds", "0"]) == 0
    assert "layers: the seconds are up" in capsys.readouterr().out
    assert not (tmp_path / "gpu-layers.csv").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_refuses_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert f"needs a CUDA GPU; torch {torch.__version__}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "is for dry runs" in capsys.readouterr().err


def test_pictures_of_a_table(tmp_path):
    fields = ["case", "map", "rule", "by", "mode", "share_of_floor", "gpu", "torch", "date"]
    with (tmp_path / "gpu-layers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for by, mode, share in (("foveal", "forward", 0.7), ("flex", "forward", 0.1), ("natten", "", "")):
            row = dict(zip(fields, ("dinat", "56x56", "k7", by, mode, share, "GPU", "2", "today"), strict=True))
            writer.writerow(row)
    assert [path.name for path in plots.draw(tmp_path)] == ["gpu-layers-forward.png"]
    assert (tmp_path / "gpu-layers-forward.png").read_bytes().startswith(b"\x89PNG")
    assert plots.main([str(tmp_path / "nowhere")]) == 2


def test_the_script_is_sound():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    """From another folder, in a dry run: the package is found, tables and pictures are written."""
    environment = {**os.environ, "DRY": "1", "PYTHON": sys.executable, "PARTS": "tests convs models"}
    environment.pop("OUT", None)
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out")], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"gpu.log", "gpu-convs.csv", "gpu-models.csv", "gpu-convs-forward.png"} <= names
    assert (tmp_path / "out" / "gpu-convs-forward.png").read_bytes().startswith(b"\x89PNG")
