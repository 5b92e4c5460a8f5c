"""foveal bench: the peers answer alike, wrong answers are not timed, tables come out as CSV."""

import csv

import pytest
import torch

from foveal.benchmarks import export, run
from foveal.cli import _exported
from foveal.kernels import neighborhood_aggregate


@pytest.mark.parametrize(("size", "kernel_size"), [((7, 9), 5), ((5, 5), 5), ((6, 11), (3, 5))])
def test_unfolding_is_the_shifted_window(size, kernel_size):
    area = kernel_size**2 if isinstance(kernel_size, int) else kernel_size[0] * kernel_size[1]
    weights, v = torch.randn(2, *size, 3, area), torch.randn(2, *size, 3, 4)
    want = neighborhood_aggregate(weights, v, kernel_size=kernel_size, backend="reference")
    torch.testing.assert_close(run.unfold_aggregate(weights, v, kernel_size=kernel_size), want)


@pytest.mark.parametrize(
    ("section", "only", "rows", "text"),
    [
        ("kernels", "7x7 d1", {"tiled", "gather"}, "backend"),
        ("aggregate", "7x7 k5", {"tiled", "unfold"}, "backend"),
        ("zoo", "care_s0", {"care_s0"}, "model"),
    ],
)
def test_a_section_becomes_a_table(section, only, rows, text, tmp_path, capsys):
    path = tmp_path / "table.csv"
    assert run.main([section, "--only", only, "--rounds", "1", "--csv", str(path)]) == 0
    assert f"wrote {path}" in capsys.readouterr().out.replace("\n", "")
    with path.open() as file:
        table = list(csv.DictReader(file))
    assert rows <= {row[text] for row in table}
    assert all(float(row["forward_ms"]) > 0 and row["torch"] == torch.__version__ for row in table)


def test_no_case_is_an_error(capsys):
    assert run.main(["halo", "--only", "nothing"]) == 2
    assert "no case of 'foveal bench halo' holds 'nothing'" in capsys.readouterr().out


def test_wrong_answers_are_not_timed():
    right, wrong = (lambda: torch.ones(3)), (lambda: torch.tensor([1.0, 1.0, 1.1]))
    run.check("case", {"a": right, "b": right}, {"a": right}, "a")
    for other in (wrong, lambda: torch.full((3,), torch.nan)):
        with pytest.raises(RuntimeError, match="case, forward: b differs from a; not timed"):
            run.check("case", {"a": right, "b": other}, {}, "a")


def test_halo_layers_are_those_of_the_model():
    layers = run.halo_layers(run.HaloCase("halonet26t", 256, 2))
    assert [shape for _, shape in layers.values()] == [(2, 256, 16, 16), (2, 512, 16, 16), (2, 512, 8, 8)]
    assert list(layers)[1] == "16x16 b8 h2 s2, 512 channels"


@pytest.mark.slow  # compiles
def test_exported_models_are_timed_beside_eager(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(export, "CASES", (export.ExportCase("test_foveal_care", (1, 2)),))
    path = tmp_path / "table.csv"
    assert run.main(["export", "--rounds", "1", "--csv", str(path)], {"export": export.section(_exported)}) == 0
    with path.open() as file:
        table = list(csv.DictReader(file))
    runtimes = ["eager", "torch.compile", "onnxruntime", "openvino"]
    assert [row["by"] for row in table] == 2 * runtimes
    assert [row["input"].partition("x")[0] for row in table] == ["1"] * 4 + ["2"] * 4
    assert all(float(row["ms"]) > 0 and row["onnxruntime"] for row in table)


def test_a_wrong_answer_of_an_export_is_not_timed():
    def wrong(model, folder):
        return model, {"wrong": lambda x: (1.01 * model(x),)}

    case = export.ExportCase("test_foveal_care", (1,))
    with pytest.raises(
        RuntimeError, match=r"test_foveal_care, batch 1: wrong differs from eager by 1\.0e-02; not timed"
    ):
        export.export_rows(case, 1, wrong, compiled=False)
