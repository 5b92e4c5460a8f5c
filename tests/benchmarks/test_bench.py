"""The harness of foveal bench: comparison before timing, tables, arguments; and the sections on a CPU."""

import csv
import functools
import itertools
import re
import sys
from contextlib import nullcontext

import pytest
import timm
import torch

from foveal.backbones.profile import profile
from foveal.benchmarks import cases, data, measure, models, operations, peers, run, served
from foveal.benchmarks.measure import Bench, difference
from foveal.kernels import Call, neighborhood_aggregate, recording


def read(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------- measuring


def compare(calls, **options) -> dict[str, dict]:
    rows = Bench(rounds=1).compare({"case": "c"}, "by", calls, **options)
    return {row["by"]: row for row in rows}


def test_the_difference_is_relative_to_the_largest_value():
    one, two = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0])
    assert difference(two, one) == 0.25
    assert difference((one, two), (one, one)) == 0.25
    assert difference((one, torch.tensor([float("nan"), 4.0])), (one, one)) != difference(one, one)
    assert not difference(torch.full((2,), torch.nan), one) <= 1


@pytest.mark.parametrize("other", [torch.tensor([1.0, 1.0, 1.1]), torch.full((3,), torch.nan)], ids=["wrong", "nan"])
def test_wrong_outputs_are_not_timed(other):
    calls = []

    def wrong():
        calls.append(1)
        return other

    def right():
        return torch.ones(3)

    rows = compare({"a": (right, right), "b": (wrong, right), "c": (right, wrong)}, reference="a", memory=False)
    assert rows["a"]["forward_ms"] != "" and rows["a"]["note"] == ""
    assert (rows["b"]["forward_ms"], rows["b"]["forward_backward_ms"]) == ("", "")
    assert re.match(r"forward .* a ", rows["b"]["note"])
    assert rows["c"]["forward_ms"] != "" and rows["c"]["forward_backward_ms"] == ""
    assert rows["c"]["note"].startswith("forward_backward ")
    assert len(calls) == 2  # once to be compared, in each


def test_one_that_fails_leaves_the_others():
    def fails():
        raise ZeroDivisionError("by 17")

    rows = compare({"a": (torch.ones, None), "b": (fails, None)} | {"a": (lambda: torch.ones(2), None)}, reference="a")
    assert rows["b"]["note"] == "forward: ZeroDivisionError: by 17"
    assert rows["a"]["forward_ms"] != "" and rows["a"]["forward_backward_ms"] == ""
    with pytest.raises(ZeroDivisionError, match="17"):
        compare({"a": (fails, None)}, reference="a")


def test_figures_beside_the_peer(monkeypatch):
    monkeypatch.setattr(Bench, "median_ms", lambda self, calls, **_: dict(zip(calls, (3.0, 2.0), strict=False)))
    monkeypatch.setattr(Bench, "peak_mib", lambda self, call: 8.0)
    ones = (lambda: torch.ones(1), None)
    rows = compare({"ours": ones, "peer": ones}, reference="peer", peer="peer")
    assert rows["ours"]["forward_over_peer"] == 1.5 and rows["ours"]["forward_extra_over_peer"] == 1.0
    assert rows["peer"]["forward_over_peer"] == 1.0 and rows["ours"]["forward_backward_over_peer"] == ""


def test_memory_is_what_is_allocated_beyond_the_result():
    def call():
        kept = torch.ones(2**20)  # 4 MiB
        return (kept + torch.ones(2**18)[:1]).sum()  # a second, of 4 MiB, and 1 MiB

    assert Bench().peak_mib(call) == pytest.approx(9, abs=0.01)
    assert Bench().peak_mib(lambda: torch.ones(2**20)) == pytest.approx(0, abs=0.01)


def test_rounds_are_interleaved_and_slow_calls_get_fewer(monkeypatch):
    order, clock = [], [0.0]

    def call(name, seconds):
        order.append(name)
        clock[0] += seconds

    calls = {"a": lambda: call("a", 2.0), "b": lambda: call("b", 1.0)}
    times = Bench(rounds=10).median_ms(calls, timer=lambda: clock[0])
    assert times == {"a": 2000.0, "b": 1000.0}
    assert order[:6] == ["a", "b", "a", "b", "b", "a"]  # a warm-up; neither always comes second
    assert (order.count("a"), order.count("b")) == (1 + 3, 1 + 6)


# ------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize(("size", "kernel_size"), [((7, 9), 5), ((5, 5), 5), ((6, 11), (3, 5))])
def test_unfolding_is_the_shifted_window(size, kernel_size):
    area = kernel_size**2 if isinstance(kernel_size, int) else kernel_size[0] * kernel_size[1]
    weights, v = torch.randn(2, *size, 3, area), torch.randn(2, *size, 3, 4)
    want = neighborhood_aggregate(weights, v, kernel_size=kernel_size, backend="reference")
    torch.testing.assert_close(peers.unfold_aggregate(weights, v, kernel_size=kernel_size), want)


def test_halo_layers_are_those_of_the_model():
    layers = operations.halo_layers(cases.LayersCase("halonet26t", 2, 256, 256))
    assert [shape for _, shape in layers.values()] == [(2, 256, 16, 16), (2, 512, 16, 16), (2, 512, 8, 8)]
    assert list(layers)[1] == "16x16 b8 h2 s2, 512 channels"


# ------------------------------------------------------------------------------------------------------ tables


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
    assert str(path) in capsys.readouterr().out
    table = read(path)
    assert rows <= {row[text] for row in table}
    assert all(float(row["forward_ms"]) > 0 and row["torch"] == torch.__version__ for row in table)
    assert all(row["date"] and "commit" in row for row in table)
    (shipped,) = run.plots.RESULTS.glob(f"{section}-cpu-*.csv")
    assert {key for key in read(shipped)[0] if not key.startswith("times_")} <= set(table[0])


def test_halo_attention_layer_by_layer_and_in_sum(tmp_path):
    path = tmp_path / "table.csv"
    assert run.main(["halo", "--tiny", "--csv", str(path)]) == 0
    table = read(path)
    assert [(row["part"], row["by"]) for row in table[:4]] == [
        ("attention", "foveal"), ("attention", "timm"), ("module", "foveal"), ("module", "timm")
    ]  # fmt: skip
    assert len(table) == 3 * 4 + 4
    layers = [row for row in table[:-4] if (row["part"], row["by"]) == ("module", "timm")]
    total = table[-1]
    assert total["layer"].startswith("all") and (total["part"], total["by"]) == ("module", "timm")
    assert float(total["forward_ms"]) == pytest.approx(sum(float(row["forward_ms"]) for row in layers), abs=0.01)
    assert float(total["forward_extra_mib"]) == max(float(row["forward_extra_mib"]) for row in layers)


@pytest.mark.parametrize("name", ["test_foveal_dinat", "test_foveal_overlock"])
def test_shares_of_the_matrix_product(name, monkeypatch):
    """Of FLOPs counted beside the harness; OverLoCK trains with more branches than it infers with."""
    measured = {}

    def median_ms(self, calls, of, timer):
        assert timer() > 0 and of is min and next(iter(calls)) == "product" and len(calls) == 5
        measured.update({call: call_() for call, call_ in calls.items()})
        return {call: 2.0 if call == "product" else 0.01 for call in calls}

    monkeypatch.setattr(Bench, "median_ms", median_ms)
    rows = list(models.roofline_rows(cases.ModelCase(name, "test_foveal_nat", 2, 64), Bench()))
    assert [(row["model"], row["dtype"]) for row in rows[1:3]] == [("test_foveal_nat", "float32"), (name, "bfloat16")]
    assert measured["product"].shape == (4096, 1536)
    assert measured[f"{name} forward"].dtype is torch.bfloat16 and measured[f"{name} forward"].shape == (2, 1000)
    product = 4096 * 384 * 1536
    macs = 2 * profile(name, 64).macs
    assert [row["forward_share"] for row in rows[::2]] == [round(200 * macs / product, 3)] * 2
    assert (rows[0]["gflop"], rows[0]["forward_over_peer"]) == (round(2e-9 * macs, 3), 1.0)
    branches = rows[0]["forward_backward_share"] / rows[0]["forward_share"] / 3
    assert branches > 1.05 if name == "test_foveal_overlock" else branches == pytest.approx(1, rel=0.01)


def test_transnext_by_unfolding():
    """Of the same outputs and gradients; on a map whose sides differ, and without our kernels."""
    torch.manual_seed(0)
    model = timm.create_model("test_foveal_transnext").double().eval()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    found = []
    for context in (nullcontext, peers.by_unfolding):
        calls: list[Call] = []
        with context(), recording(calls.append):
            out = model(x)
        found.append((bool(calls), out.detach(), torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    (kernels, out, grads), (others, unfolded, unfolded_grads) = found
    assert kernels and not others
    assert difference(unfolded, out) < 1e-7
    scale = max(grad.abs().max() for grad in grads)
    assert max((a - b).abs().max() for a, b in zip(grads, unfolded_grads, strict=True)) < 1e-7 * scale


def test_a_replaced_model_beside_its_own(monkeypatch):
    case = cases.ModelCase("test_maxvit", "test_maxvit", 1, 160, same=True, way="replace")
    monkeypatch.setattr(models, "resident_mib", lambda *arguments: float(len(arguments)))
    own, peer = models.model_rows(case, Bench(rounds=1))
    assert own["model"] != peer["model"] == "test_maxvit"
    assert own["forward_ms"] > 0 and own["forward_over_peer"] > 0 and not own.get("note")
    assert own["forward_backward_resident_over_peer"] == 1.0


@pytest.mark.slow  # another process
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_growth_of_a_process():
    assert 60 < measure.resident_mib(functools.partial, bytearray, 64 * 2**20) < 80


def test_windows_beside_pytorch():
    for case in cases.TINY_WINDOWS:
        rows = {row["by"]: row for row in operations.window_rows(case, Bench(rounds=1))}
        assert len(rows) == 3 and not any(row.get("note") for row in rows.values())
        assert all(row["forward_backward_ms"] > 0 for row in rows.values())


def test_an_earlier_table(tmp_path, capsys, monkeypatch):
    earlier = [{"map": "7x7", "by": "foveal", "forward_ms": "2.0", "date": "then"}]
    same = {"map": "7x7", "by": "foveal", "forward_ms": 2.2, "forward_extra_mib": 3.0}
    mean, slower = run.against_earlier([same], earlier)
    assert re.search(r"1\.100 .*\b1 ", mean)
    assert re.search(r"1\.10 .*7x7, foveal, forward_ms", slower)
    (mean,) = run.against_earlier([same | {"forward_ms": 1.8}], earlier)
    assert "0.900 " in mean
    assert len(run.against_earlier([same | {"map": "8x8"}], earlier)) == 1
    path = tmp_path / "earlier.csv"
    measure.write_csv(path, [{"model": "care_s0", "input": "1x3x224x224", "forward_ms": 1e-6}], {})
    assert run.main(["zoo", "--only", "care_s0", "--rounds", "1", "--compare", str(path)]) == 0
    assert "care_s0" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["halo", "--only", "nothing"], "nothing"),
        (["layers"], "layers"),
        (["halo", "--rounds", "0"], "0"),
        (["halo", "models", "--csv", "x.csv"], "halo, models"),
        (["nowhere"], "nowhere"),
    ],
)
def test_arguments_that_cannot_be(arguments, value, capsys):
    with pytest.raises(SystemExit) as raised:
        run.main(arguments)
    assert raised.value.code == 2
    assert value in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- data and exports


def test_both_loaders_read_the_same():
    rows = list(data.data_rows(*data.TINY, Bench(rounds=1)))
    assert [row["loader"] for row in rows] == ["timm", "foveal"]
    assert rows[0]["times_timm"] == 1 and all(row["images_per_core_second"] > 0 for row in rows)
    ones = [(torch.ones(2, 3), torch.arange(2))]
    case = data.DataCase(1, 1, training=False)
    with pytest.raises(RuntimeError, match="foveal"):
        data._check(case, {"timm": lambda: ones, "foveal": lambda: [(2 * ones[0][0], ones[0][1])]})


@pytest.mark.slow  # compiles
def test_served_models_are_timed_beside_eager(tmp_path, monkeypatch):
    path, exports = tmp_path / "table.csv", tmp_path / "exports"
    arguments = ["served", "--tiny", "--csv", str(path), "--exports", str(exports)]
    assert run.main(arguments) == 0
    table = read(path)
    ((name,), peer) = served.TINY[0].models, served.TINY[0].peer
    kinds = [("eager", "float32"), ("AOTInductor", "float32"), ("onnxruntime", "float32"), ("onnxruntime", "int8")]
    kinds += [("openvino", dtype) for dtype in served.LIMITS]
    assert {(row["model"], row["by"], row["dtype"]) for row in table} == {
        (model, *kind) for model, kind in itertools.product((name, peer), kinds)
    }
    assert all(float(row["forward_ms"]) > 0 and float(row["forward_over_peer"]) > 0 for row in table)
    (shipped,) = run.plots.RESULTS.glob("served-cpu-*.csv")
    assert set(read(shipped)[0]) <= set(table[0])
    made = sorted(exports.rglob("*.*"))
    assert len(made) > 8 and run.main(arguments) == 0
    assert sorted(exports.rglob("*.*")) == made and all(a.stat().st_mtime < path.stat().st_mtime for a in made)


def test_a_wrong_output_and_a_missing_runtime_leave_a_gap(monkeypatch):
    def missing():
        raise ImportError("openvino")

    def forms(model, folder, images):
        wrong = lambda x: 1.01 * model(x)  # noqa: E731
        return {("eager", "float32"): lambda: model, ("a", "float32"): lambda: wrong, ("b", "int8"): missing}

    monkeypatch.setattr(served, "forms", forms)
    monkeypatch.setattr(served, "SETTLE", 0)
    threads = torch.get_num_threads()
    case = served.ServedCase(("test_foveal_care",), "test_convnext", threads=1)
    rows = {row["by"]: row for row in served.served_rows(case, Bench(rounds=1)) if row["model"] in case.models}
    assert rows["a"]["forward_ms"] == rows["b"]["forward_ms"] == rows["b"]["forward_over_peer"] == ""
    assert "1.0e-02" in rows["a"]["note"] and "openvino" in rows["b"]["note"]
    assert rows["eager"]["forward_ms"] > 0 and rows["eager"]["forward_over_peer"] > 0
    assert rows["eager"]["runtime_threads"] == 1 and torch.get_num_threads() == threads
