"""The sections for a GPU as far as a CPU can run them: cases, counted work, dry runs, pictures, the script."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foveal.benchmarks import cases, instructions, measure, models, operations, peers, plots, run
from foveal.benchmarks.cases import Layer
from foveal.benchmarks.measure import Bench, read_csv
from foveal.kernels import triton_support
from foveal.kernels.window import Window

SCRIPT = Path(run.__file__).with_name("gpu.sh")
TOP = 4e12, 8e14  # bytes and FLOPs per second


@pytest.fixture
def bench(monkeypatch) -> Bench:
    """Every call takes two milliseconds, after having been made once."""

    def median_ms(self, calls, **_):
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 2.0)

    monkeypatch.setattr(Bench, "median_ms", median_ms)
    monkeypatch.setattr(Bench, "ceilings", TOP)
    return Bench()


def test_the_layers_of_dinat_tiny_are_those_of_the_paper(monkeypatch):
    layers = operations.layers_of(cases.LayersCase("dinat_tiny", 128, 224, 224))
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
    row = {"forward_ms": 1.0, "forward_backward_ms": ""}
    monkeypatch.setattr(Bench, "ceilings", TOP)
    Bench()._floor(row, first)
    assert row["forward_share_of_floor"] == pytest.approx(2 * 4 * tensor / 4e12 * 1e3, abs=1e-3)


def test_the_cases_of_the_cpu_are_layers_of_dinat_tiny():
    layers = operations.layers_of(cases.LayersCase("dinat_tiny", 8, 224, 224))
    assert [(layer.shape, layer.rows, layer.bias) for layer in cases.DINAT_TINY] == [
        (layer.shape, layer.rows, layer.bias) for layer in layers
    ]


def test_the_layers_of_other_models():
    strided = Layer("attention", (1, 8, 8, 2, 16), (4, 4), 24, Window(6, 4), Window(6, 4), "factored")
    assert strided.bytes(False) == 2 * (16 * 2 * (16 + 24) + 64 * 2 * (16 + 24))
    assert strided.pairs == 16 * 2 * 36
    mix = Layer("mix", (1, 8, 8, 2, 16), (8, 8), 16, Window(5), Window(5), "table")
    assert mix.bytes(False) == 2 * (64 * 2 * 25 + 2 * 64 * 2 * 16)
    assert mix.flops(False) == 2 * 64 * 2 * 25 * 16
    kinds = {case.model: operations.layers_of(case) for case in cases.TINY_LAYERS}
    assert {layer.operation for layer in kinds["test_foveal_overlock"]} == {"mix"}
    assert {layer.bias for layer in kinds["test_foveal_halonet"]} == {"factored"}
    assert any(layer.rows.dilation > 1 and peers.windowed(layer) for layer in kinds["test_foveal_maxvit"])  # a grid


@pytest.mark.parametrize("case", cases.TINY_LAYERS, ids=lambda case: case.model)
def test_every_implementation_has_the_same_outputs(case, bench):
    rows = list(operations.layer_rows(case, bench))
    noted = {(row["by"], row["note"]) for row in rows if row.get("note")}
    assert {by for by, _ in noted} <= {"natten, no bias"}  # which has no gradient on a CPU
    by = {row["by"] for row in rows}
    assert "foveal" in by
    expected = {"dinat": "sdpa, dense mask", "maxvit": "sdpa on windows", "overlock": "separate softmax, tiled"}
    for family, peer in expected.items():
        assert family not in case.model or peer in by
    assert all(row["forward_ms"] == 2.0 and row["forward_share_of_floor"] >= 0 for row in rows)
    assert all(row["forward_backward_ms"] == 2.0 for row in rows if not row.get("note"))
    assert list(operations.layer_rows(case, bench, compiled=True)) == []  # flex_attention: on a GPU alone


def test_wrong_outputs_are_not_timed(bench, monkeypatch):
    monkeypatch.setattr(peers, "windowed", lambda layer: lambda q, k, v, table=None: v + 1)
    rows = list(operations.layer_rows(cases.TINY_LAYERS[2], bench))
    wrong = [row for row in rows if row["by"] == "sdpa on windows"]
    assert wrong and all("foveal" in row["note"] and row["forward_ms"] == "" for row in wrong)


def test_forward_and_backward_read_one_layout():
    layer = Layer("attention", (1, 8, 8, 2, 16), (8, 8), 16, Window(3), Window(3), "none")
    bench = Bench()
    bench.cuda = True  # in whose models q, k and v are views of one projection
    tensors, grad = operations.inputs_of(layer, bench)
    seen = []

    def call(*given):
        seen.append([(t.stride(), t.data_ptr()) for t in given])
        return sum(given)

    for each in measure.modes(call, tensors, grad):
        each()
    assert seen == [[(t.stride(), t.data_ptr()) for t in tensors]] * 2
    assert not tensors[0].is_contiguous() and not any(t.requires_grad for t in tensors)


@pytest.mark.slow
def test_a_case_that_fails_is_counted_and_the_rest_measured(tmp_path, bench, monkeypatch, capsys):
    def rows(case, bench):
        yield {"case": "first", "by": "x", "forward_ms": 1.0}
        raise RuntimeError("no such luck")

    monkeypatch.setitem(run.SECTIONS, "halo", run.Section(rows, tiny=cases.TINY_HALO))
    arguments = ["halo", "models", "--device", "cpu", "--tiny", "--output", str(tmp_path)]
    assert run.main(arguments) == 1
    err = capsys.readouterr().err
    assert cases.TINY_HALO[0].id in err and "RuntimeError: no such luck" in err
    assert len(read_csv(tmp_path / "gpu-halo.csv")) == 1
    assert len(read_csv(tmp_path / "gpu-models.csv")) == 4 * len(cases.TINY_PAIRS)


def test_a_missing_extra_ends_the_run(bench, monkeypatch):
    def rows(case, bench):
        raise ImportError("no onnx", name="onnx")

    monkeypatch.setitem(run.SECTIONS, "halo", run.Section(rows, tiny=cases.TINY_HALO))
    with pytest.raises(ImportError, match="onnx"):
        run.main(["halo", "--tiny"])


def test_a_model_that_fails_is_an_error(tmp_path, bench, monkeypatch):
    monkeypatch.setattr(models.timm, "create_model", lambda *arguments, **options: torch.nn.Linear(2, 2))
    assert run.main(["models", "--tiny", "--output", str(tmp_path)]) == 1
    assert all(row["note"] and not row["forward_ms"] for row in read_csv(tmp_path / "gpu-models.csv"))


def test_a_peer_that_fails_is_none():
    assert not run._ours({"rule": "k7", "by": "flex", "note": "fails"})
    assert run._ours({"rule": "k7", "by": "foveal, triton", "note": "fails"})
    assert run._ours({"backend": "tiled", "note": "differs"}) and run._ours({"model": "m", "note": "fails"})


def test_flex_attention_is_never_timed_in_eager_mode(monkeypatch):
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_WARNINGS_SHOWN", set())
    q = torch.randn(1, 1, 16, 16)
    for _ in range(2):
        with measure.quiet(cuda=True), pytest.raises(UserWarning, match=r"torch\.compile"):
            flex_attention.flex_attention(q, q, q)


def test_geometric_means():
    key = {"case": "a", "heads": 1, "rule": "k7", "forward_backward_ms": ""}
    own = [
        {**key, "map": m, "by": "foveal", "forward_ms": ms, "forward_extra_mib": 10}
        for m, ms in (("1", 1.0), ("2", 2.0), ("3", 5.0))
    ]
    peer = [
        {**key, "map": m, "by": "flex", "forward_ms": ms, "forward_extra_mib": 40}
        for m, ms in (("1", 2.0), ("2", 16.0), ("3", ""))
    ]
    (mean,) = run.geometric_means(own + peer)
    assert re.match(r"forward: 4\.00 .*flex.*4\.00 .*\b2 layers", mean)


@pytest.mark.slow
def test_sections_within_their_seconds(tmp_path, bench, capsys):
    arguments = ["--device", "cpu", "--tiny", "--output", str(tmp_path)]
    assert run.main([*arguments, "halo"]) == 0
    assert run.main([*arguments, "models", "--only", "dinat"]) == 0
    tables = {path.stem: read_csv(path) for path in tmp_path.glob("*.csv")}
    assert set(tables) == {"gpu-halo", "gpu-models"}
    assert {row["by"] for row in tables["gpu-halo"]} == {"foveal", "timm"}
    assert [row["run"] for row in tables["gpu-models"]] == ["eager", "eager", "compiled", "compiled"]
    assert all(float(row["images_per_second"]) == 500 for row in tables["gpu-models"])
    assert tables["gpu-models"][0]["torch"] == torch.__version__ and tables["gpu-models"][0]["date"]
    assert run.main([*arguments, "layers", "--seconds", "0"]) == 0
    assert "layers: " in capsys.readouterr().out
    assert not (tmp_path / "gpu-layers.csv").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="refuses where there is no GPU")
def test_refuses_without_a_gpu(capsys):
    for arguments in (["gpu"], ["layers", "--device", "cuda"]):
        with pytest.raises(SystemExit):
            run.main(arguments)
        assert torch.__version__ in capsys.readouterr().err


def test_pictures_of_a_table(tmp_path):
    fields = ["case", "map", "rule", "by", "forward_share_of_floor", "forward_backward_share_of_floor", "gpu", "date"]
    with (tmp_path / "gpu-layers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for by, share in (("foveal", 0.7), ("flex", 0.1), ("natten", "")):
            row = dict(zip(fields, ("dinat", "56x56", "k7", by, share, share, "GPU", "today"), strict=True))
            writer.writerow(row)
    (picture,) = plots.pictures(tmp_path)
    assert [axis.get_title() for axis in picture.figure.axes] == [panel.title for panel in plots.SHARES]
    assert plots.save_picture(picture, tmp_path).name == "gpu-layers.png"
    assert (tmp_path / "gpu-layers.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------ instructions


@pytest.mark.skipif(triton_support.interpreting(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case == cases.COMPILED[1] else pytest.mark.slow, id=case.id)
        for case in cases.COMPILED
    ],
)
def test_kernels_have_no_more_instructions_than_before(case):
    """Within 1.1 of the committed figures, and not one more byte spilled."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    keys = ("kernel", "map", "rule", "bias", "depth", "dtype")
    committed = read_csv(run.plots.RESULTS / "instructions-sm90.csv")
    if committed[0]["triton"] != triton.__version__:
        pytest.skip(f"committed for Triton {committed[0]['triton']}; this is {triton.__version__}")
    known = {tuple(row[key] for key in keys): row for row in committed}
    for row in instructions.instruction_rows(case, Bench()):
        before = known[tuple(str(row[key]) for key in keys)]
        assert row["issue_us"] <= 1.1 * float(before["issue_us"]), row
        assert row["spilled"] <= int(before["spilled"]), row


def test_instructions_are_counted_by_loop():
    """Two loops, one in the other; padding and the branch to itself behind the end do not count."""
    code = ["MOV R1, R2", "MOV R2, R3", "MOV R3, R4", "@P0 BRA `(.L_x_1)", "@P0 BRA `(.L_x_0)", "EXIT"]
    lines = [
        f"        /*{at:04x}*/                   {text} ;" for at, text in enumerate([*code, "BRA `(.L_x_2)", "NOP"])
    ]
    lines[6:6] = [".L_x_2:"]
    lines[2:2] = [".L_x_1:"]
    lines[1:1] = [".L_x_0:"]
    assert instructions.Compiled("\n".join(lines), 0, 0, 0).instructions == [3, 2, 2]


# -------------------------------------------------------------------------------------------------- the script


def test_the_script_is_sound():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    """From another folder, in a dry run: the package is found, tables and pictures are written."""
    environment = {**os.environ, "DRY": "1", "PYTHON": sys.executable, "PARTS": "tests halo models"}
    environment.pop("OUT", None)
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out")], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"gpu.log", "gpu-halo.csv", "gpu-models.csv", "gpu-halo.png"} <= names
    assert (tmp_path / "out" / "gpu-halo.png").read_bytes().startswith(b"\x89PNG")
