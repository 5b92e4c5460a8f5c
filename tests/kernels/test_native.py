"""The backend `native`: its library, its choice and its tilings; the sweeps are those of test_neighborhood.py."""

import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

from foveal.kernels import BackendError, RelativePositionBias, neighborhood_attention, recording
from foveal.kernels.neighborhood import native
from foveal.kernels.window import Window, window_list

from .test_neighborhood import inputs, needs_compiler, relative_error, with_gradients

pytestmark = needs_compiler


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((7, 9), {"kernel_size": (3, 4), "dilation": (1, 2)}),
        ((14, 7), {"kernel_size": (7, 7), "dilation": (2, 1)}),
        ((3, 40), {"kernel_size": (1, 17), "boundary": "zero"}),
        ((2, 3), {"kernel_size": (4, 6), "boundary": "mask", "query_stride": 2}),
        ((20, 1), {"kernel_size": (18, 1)}),
    ],
    ids=["rows", "windows", "long", "small", "column"],
)
@pytest.mark.parametrize(("depth", "value_depth"), [(1, 3), (3, 1), (24, 40), (40, 24), (64, 16), (130, 65)])
def test_depths(size, options, depth, value_depth):
    """Channels that fill no vector, and more than a block of packed queries."""
    step = options.get("query_stride", 1)
    leaves, rule = inputs((2, *size, 2, depth), value_depth, options["kernel_size"], "table", query_stride=(step, step))
    got = with_gradients(leaves, rule, "native", **options)
    exact = [t.detach().double().requires_grad_(True) for t in leaves]
    want = with_gradients(exact, RelativePositionBias(exact[3]), "reference", rounded=torch.float32, **options)
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.parametrize("bias", ["table", "factored"])
@pytest.mark.parametrize("dilation", [1, 7])
def test_any_number_of_threads(bias, dilation, threads):
    """The forward is the same for any number, the gradients in every run with one number."""
    if bias == "factored" and dilation > 1:
        pytest.skip("the decomposed bias is tiled by rows alone, as without a dilation")
    leaves, rule = inputs((1, 49, 49, 2, 16), None, (7, 7), bias)
    results = []
    for count in (1, 2, 2, 5):
        threads(count)
        results.append(with_gradients(leaves, rule, "native", kernel_size=7, dilation=dilation))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert max(relative_error(a, b) for a, b in zip(other, results[0], strict=True)) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))


def test_keys_that_no_query_sees_have_zero_gradients():
    leaves, _ = inputs((1, 9, 9, 1, 4), None, (1, 1), query_stride=(4, 4))
    _, dq, dk, dv = with_gradients(leaves, None, "native", kernel_size=1, query_stride=4)
    seen = torch.zeros(9, 9, dtype=torch.bool)
    seen[::4, ::4] = True
    assert (dv[0, seen] != 0).all() and not dv[0, ~seen].any() and not dk.any() and not dq.any()


# --------------------------------------------------------------------------------------------------- the choice


def test_the_automatic_choice_takes_it_only_when_asked(monkeypatch):
    q, calls = torch.randn(1, 6, 6, 1, 8), []
    with recording(lambda call: calls.append(call.backend)):
        neighborhood_attention(q, q, q, kernel_size=3)
        monkeypatch.setattr(native, "AUTOMATIC", True)
        neighborhood_attention(q, q, q, kernel_size=3)
        neighborhood_attention(q, q, q, kernel_size=3, dropout_p=0.1)
        neighborhood_attention(*[q.double()] * 3, kernel_size=3)
        torch.func.grad(lambda q: neighborhood_attention(q, q, q, kernel_size=3).sum())(q)
    assert calls == ["tiled", "native", "tiled", "tiled", "tiled"]
    exported = torch.export.export(Attention(), (q,))
    assert not [n for n in exported.graph.nodes if "foveal" in str(n.target)]


class Attention(torch.nn.Module):
    def forward(self, q):
        return neighborhood_attention(q, q, q, kernel_size=3)


def test_the_environment_asks_for_it(monkeypatch):
    for value, wanted in (("1", True), ("0", False)):
        monkeypatch.setenv("FOVEAL_NATIVE", value)
        assert native._opted_in() is wanted
    monkeypatch.setenv("FOVEAL_NATIVE", "yes")
    with pytest.raises(ValueError, match=r"FOVEAL_NATIVE.*'yes'"):
        native._opted_in()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda q: {"dropout_p": 0.1}, r"dropout.*0\.1"),
        (lambda q: {"q": q.double()}, "float64"),
        (lambda q: {"q": q.to("meta")}, "meta"),
        (lambda q: {"bias": RelativePositionBias(torch.zeros(1, 129, 5)), "kernel_size": (65, 3)}, r"64.*\(65, 3\)"),
    ],
    ids=["dropout", "float64", "meta", "large-table"],
)
def test_it_names_what_it_lacks(make, reason):
    options = {"kernel_size": 3, "boundary": "mask", **make(torch.randn(1, 6, 6, 1, 8))}
    q = options.pop("q", torch.randn(1, 6, 6, 1, 8))
    with pytest.raises(BackendError, match=reason):
        neighborhood_attention(q, q, q, backend="native", **options)


def test_a_table_of_the_lowest_value_is_finite():
    q = torch.randn(1, 6, 6, 1, 8)
    lowest = RelativePositionBias(torch.full((1, 5, 5), torch.finfo(torch.float32).min))
    got, want = (
        neighborhood_attention(q, q, q, kernel_size=3, bias=lowest, backend=name) for name in ("native", "tiled")
    )
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------ the operators


@pytest.mark.parametrize("bias", [None, "table", "factored"])
def test_operators_are_proper(bias):
    leaves, _ = inputs((1, 6, 7, 2, 4), None, (3, 3), bias)
    tensors = (*leaves, None, None)[:5]
    torch.library.opcheck(native.attention, (*tensors, window_list(Window(3), Window(3)), 0.5))


def test_compilers_see_one_node(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(native, "AUTOMATIC", True)
    leaves, rule = inputs((1, 8, 9, 2, 8), None, (3, 3), "table")
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def call(q, k, v, table):
        return neighborhood_attention(q, k, v, kernel_size=3, dilation=2, bias=RelativePositionBias(table))

    got = torch.compile(call, fullgraph=True, backend=keep)(*leaves)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [name for name in called if "native_attention" in name] == called[-1:], called
    want = with_gradients(leaves, rule, "reference", kernel_size=3, dilation=2)
    torch.testing.assert_close(got, want[0])


# ------------------------------------------------------------------------------------------------- the library


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_it_shares_the_threads_of_pytorch():
    """In a process of its own: other packages bring an OpenMP of another name."""
    code = (
        "from pathlib import Path\n"
        "from foveal.kernels.neighborhood import native\n"
        "native.library()\n"
        "lines = Path('/proc/self/maps').read_text().splitlines()\n"
        "print(*{line.split()[-1] for line in lines if 'libgomp' in line}, sep='\\n')\n"
    )
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) == 1, run.stdout


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Replaces the compiler by a shell script; returns the folder of the cache."""
    from torch._inductor import config, cpp_builder

    def set_to(body):
        cpp_builder.cpp_compiler_search.cache_clear()
        script = tmp_path / "c++"
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        stack.enter_context(config.patch({"cpp.cxx": (str(script),)}))
        return tmp_path / "cache" / "foveal"

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    with ExitStack() as stack:
        yield set_to
    cpp_builder.cpp_compiler_search.cache_clear()


VERSION = 'case "$*" in --version) echo a compiler; exit;; esac\n'


def test_it_is_compiled_once(compiler):
    folder = compiler(VERSION + 'for last; do :; done; echo "$*" > "$last"')
    first = native.build()
    assert first.parent == folder and "-fopenmp" in first.read_text()
    changed = first.read_text() + "kept"
    first.write_text(changed)
    assert native.build() == first and first.read_text() == changed
    assert [*folder.iterdir()] == [first]  # no temporary file is left
    compiler(VERSION.replace("a compiler", "another") + 'for last; do :; done; echo "$*" > "$last"')
    assert native.build() != first


def test_errors_of_the_compiler_are_shown(compiler, monkeypatch):
    folder = compiler(VERSION + "echo unknown flag >&2; exit 3")
    monkeypatch.setattr(native, "_loaded", [])
    q = torch.randn(1, 6, 6, 1, 8)
    with pytest.raises(BackendError, match=r"(?s)status 3.*unknown flag"):
        neighborhood_attention(q, q, q, kernel_size=3, backend="native")
    assert not [*folder.iterdir()]
    compiler("exit 1")
    with pytest.raises(BackendError, match=r"c\+\+.*CXX"):
        native.build()


def test_a_folder_that_cannot_be(compiler, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "inside"))
    with pytest.raises(BackendError, match=r"TORCH_EXTENSIONS_DIR.*inside"):
        native.build()
