"""The Triton kernels of neighborhood attention: the sweep of ``triton_attention.py`` under the interpreter and on a GPU
where there is one, and what needs neither: plans, dispatch, the compiler down to machine code.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from foveal.benchmarks.instructions import compile_launch, launches
from foveal.kernels import (
    DecomposedRelativePositionBias,
    RelativePositionBias,
    dispatch,
    neighborhood_attention,
    recording,
    triton_support,
)
from foveal.kernels.neighborhood import api
from foveal.kernels.neighborhood import triton as backend
from foveal.kernels.problem import Problem, old_gpu, subclassed
from foveal.kernels.window import Window

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from foveal.kernels import triton_common
from foveal.kernels.neighborhood import triton_kernels

KERNELS = ["forward", "queries_backward", "keys_backward"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_compiler = pytest.mark.skipif(triton_support.interpreting(), reason="the interpreter compiles nothing")
both_sweeps = pytest.mark.parametrize(
    "which",
    [
        "not slow",
        pytest.param("slow and not long", marks=pytest.mark.slow),
        pytest.param("long", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
PYTEST = Path(sys.executable).with_name("pytest")  # not `python -m pytest`, which puts our folders on the path
SWEEP = Path(__file__).with_name("triton_attention.py")


# ------------------------------------------------------------------------------------------------------ the sweep


def sweep(environment, *options, before=()):
    """Run the sweep in a process of its own: Triton chooses between GPU and interpreter when a kernel is defined."""
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:xdist", *options, str(SWEEP)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    run = subprocess.run(
        [*before, PYTEST, *options], env=inherited | environment, cwd=SWEEP.parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@both_sweeps
def test_under_the_interpreter(which):
    sweep({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, "-m", which)


@needs_gpu
@both_sweeps
def test_on_a_gpu(which):
    sweep({}, "-m", which)


@needs_gpu
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
def test_no_access_out_of_bounds():
    memcheck = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "7")
    sweep({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "-k", "test_small or test_other_tiles", before=memcheck)


# ---------------------------------------------------------------------------------------------------------- plans


WINDOWS = [
    (Window(size, stride, dilation, boundary, apart, offset=offset), length)
    for size, stride, dilation, apart in [
        (7, 1, 1, 1),
        (7, 1, 3, 1),
        (4, 3, 2, 1),
        (7, 7, 1, 1),
        (14, 8, 1, 1),
        (14, 8, 1, 2),
        (13, 1, 1, 1),
        (14, 14, 1, 1),
        (5, 4, 1, 3),
        (33, 1, 1, 1),
    ]
    for boundary, offset in [("shift", 0), ("zero", 0), *([("zero", 1), ("zero", stride - 1)] if apart == 1 else [])]
    for length in (size * dilation, size * dilation + 5, 101)
]


@pytest.mark.parametrize("tile", [1, 4, 8, 32])
def test_tiles_hold_every_query_and_its_keys(tile):
    for window, length in WINDOWS:
        side = backend.launch_tiling(window, length, tile)
        assert 1 <= side.step <= tile
        for group in {window.group_length(length, g) for g in range(min(window.dilation, length))}:
            queries = window.queries(group)
            assert side.tiles * side.step >= window.ahead + queries
            for query in range(queries):
                first = (query + window.ahead) // side.step * side.step - window.ahead
                left = first * window.query_stride - side.before
                start = window.start(query, group)
                assert left <= start and start + window.kernel_size <= left + side.span


@pytest.mark.parametrize("tile", [4, 8])
def test_tiles_hold_every_key_and_its_queries(tile):
    for window, length in WINDOWS:
        side = backend.key_tiling(window, length, tile)
        assert 1 <= side.step <= tile and 0 <= side.lead < side.step
        for group in {window.group_length(length, g) for g in range(min(window.dilation, length))}:
            assert side.tiles * side.step >= side.lead + group
            for first in range(-side.lead, group, side.step):
                tile_keys = range(max(first, 0), min(first + side.step, group))
                seeing = [
                    q
                    for q in range(window.queries(group))
                    if any(0 <= key - window.start(q, group) < window.kernel_size for key in tile_keys)
                ]
                assert not seeing or seeing[-1] - seeing[0] < side.span


def test_tiles_of_keys_begin_where_windows_end():
    """Of HaloNet's blocks of 8 with a halo of 3, two see a tile of 8 keys; of MaxViT's windows, one."""
    assert backend.key_tiling(Window(14, 8, boundary="zero"), 32, 8) == backend.KeyTiling(8, 3, (8, 16, 16, 16, 8), 16)
    assert backend.key_tiling(Window(7, 7, boundary="mask"), 56, 8) == backend.KeyTiling(7, 0, (7,) * 8, 7)
    assert backend.key_tiling(Window(7), 56, 8) == backend.KeyTiling(8, 0, (11, *[14] * 5, 11), 14)


def call_of(size, kernel_size, bias, dtype, depth=32, batch=2, heads=2, stride=1, boundary="shift", offset=0):
    window = Window(kernel_size, stride, 1, boundary, offset=offset)
    return backend.LaunchShape(batch, heads, *size, depth, depth, window, window, bias, dtype)


def test_a_tile_fits_its_map():
    """Whole windows of MaxViT and HaloNet are one tile; NAT's tiles leave no column of keys to a second block."""
    assert backend.candidates("forward", call_of((56, 56), 7, 1, torch.bfloat16))[0][:4] == (8, 8, 8, 16)
    halo = call_of((64, 64), 14, 2, torch.bfloat16, stride=8, boundary="zero")
    assert backend.candidates("forward", halo)[0][:2] == (8, 8)
    window = call_of((56, 56), 7, 1, torch.bfloat16, stride=7)
    th, tw, _, _ = backend.candidates("forward", window)[0][:4]
    assert all(backend.launch_tiling(window.rows, 56, t).step == 7 for t in (th, tw))
    shifted = call_of((56, 56), 7, 1, torch.bfloat16, stride=7, boundary="mask", offset=3)
    assert backend.candidates("forward", shifted)[0] == backend.candidates("forward", window)[0]
    assert backend.launch_tiling(shifted.rows, 56, th) == backend.LaunchTiling(7, 9, 0, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_there_are_tiles_for_every_call(dtype):
    for bias, depth, kernel_size, kernel in itertools.product((0, 1, 2), (8, 64, 128, 256), (1, 3, 8, 24, 32), KERNELS):
        for choice in backend.candidates(kernel, call_of((40, 33), kernel_size, bias, dtype, depth)):
            th, tw, rows, columns = choice[:4]
            assert th * tw >= 16 and rows * columns >= 16
            # the least that a product of the kernels may sum over
            assert bias != 1 or kernel != "queries_backward" or th * rows >= 16


# ------------------------------------------------------------------------------------------------------- dispatch


def problem(size=(56, 56), kernel_size=7, bias=RelativePositionBias, **changes):
    window = Window(kernel_size, changes.pop("stride", 1), changes.pop("dilation", 1))
    base = Problem(
        shape=(2, *size, 2, 32), value_depth=32, rows=window, columns=window, dtype=torch.bfloat16, device="cuda",
        needs_grad=True, tracing=False, bias=bias,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def chosen(call):
    return dispatch.choose("neighborhood_attention", api.BACKENDS, call, None)


@pytest.mark.skipif(not triton_support.AUTOMATIC, reason="the Triton kernels are switched off")
def test_the_choice_on_cuda():
    assert chosen(problem()) == "triton"
    assert chosen(problem(bias=None)) == "triton"
    assert chosen(problem(dropout_p=0.1)) == "tiled"
    assert chosen(problem(dtype=torch.float64)) == "tiled"
    assert chosen(problem(shape=(2, 56, 56, 2, 512))) == "tiled"
    # plain windows and grids are dense attention; those of HaloNet are not, nor blocks that do not fill the map
    assert chosen(problem(stride=7)) == "tiled"
    assert chosen(problem(dilation=8)) == "tiled"
    assert chosen(problem(size=(57, 56), stride=7)) == "triton"
    assert chosen(problem(bias=DecomposedRelativePositionBias, stride=7)) == "triton"
    assert chosen(problem(device="cpu")) == "tiled"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dropout_p": 0.5}, "dropout.*0.5"),
        ({"dtype": torch.float64}, "float64"),
        ({"value_depth": 300}, "256.*300"),
        ({"kernel_size": 40}, r"kernel_size.*32.*\(40, 40\)"),
        ({"device": "xpu"}, "xpu"),
        ({"subclass": True}, "subclass"),
        ({"old_gpu": "7.5"}, r"compute capability 8\.0.*7\.5"),
    ],
)
def test_unsupported_calls(changes, reason):
    with pytest.raises(dispatch.BackendError, match=reason):
        dispatch.choose("neighborhood_attention", api.BACKENDS, problem(**changes), "triton")


class Plain(torch.Tensor):
    """A subclass, as DTensor is."""


@pytest.mark.parametrize("which", range(4))
def test_backends_see_subclasses(which):
    calls = []
    tensors = [torch.randn(1, 5, 5, 1, 4) for _ in range(3)] + [torch.nn.Parameter(torch.randn(1, 5, 5))]
    for plain in (True, False):
        *qkv, table = (t.as_subclass(Plain) if i == which and not plain else t for i, t in enumerate(tensors))
        with recording(calls.append):
            neighborhood_attention(*qkv, kernel_size=3, bias=RelativePositionBias(table))
    problems = [call.problem for call in calls]
    assert [p.subclass for p in problems] == [False, True]
    reasons = [backend.unsupported_reason(dataclasses.replace(p, device="cuda")) for p in problems]
    assert reasons[0] is None and "subclass" in reasons[1]
    with FakeTensorMode() as mode:
        assert not subclassed(mode.from_tensor(tensors[0]), None)


def test_the_age_of_a_gpu_is_a_constant_of_a_compiled_graph(monkeypatch):
    capability = {0: (7, 5), 1: (8, 0)}
    cuda = types.SimpleNamespace(
        is_available=lambda: True, get_device_capability=lambda device: capability[device.index]
    )
    there = types.SimpleNamespace(cuda=cuda, version=types.SimpleNamespace(hip=None))
    monkeypatch.setattr(sys.modules[Problem.__module__], "torch", there)

    def call(x, device):
        return x + 1 if old_gpu(device) == "7.5" else x - 1

    compiled, x = torch.compile(call, fullgraph=True, backend="eager"), torch.zeros(2)
    for device, want in ((torch.device("cuda", 0), 1), (torch.device("cuda", 1), -1)):
        torch._dynamo.reset()
        assert call(x, device).tolist() == compiled(x, device).tolist() == [want] * 2
    assert old_gpu(torch.device("cpu")) == ""


# ------------------------------------------------------------------------------------------------- how it launches


@pytest.mark.parametrize("kernel_size", [7, 32])
def test_the_workspace_of_a_table_stays_within_its_limit(kernel_size, monkeypatch):
    """Where the keys of a tile are several columns of blocks, there is a share for each of them."""
    call, choice = call_of((56, 56), kernel_size, 1, torch.bfloat16), (4, 8, 4, 8, 4, 2)
    q = torch.empty(2, 56, 56, 2, 32, device="meta", dtype=torch.bfloat16)
    lse = torch.empty(2, 56, 56, 2, device="meta")
    table = torch.empty(2, 2 * kernel_size - 1, 2 * kernel_size - 1, device="meta")

    def shares():
        found = launches(
            triton_kernels,
            lambda: backend.launch_queries_backward(
                q, q, q, table, None, q, q, lse, lse, q, call, 0.2, True, choice, False
            ),
        )
        return [work for launch in found if (work := launch.named.get("work")) is not None]

    wanted = shares()
    assert len(wanted) > 1 and len({t.shape for t in wanted}) == 1
    monkeypatch.setattr(backend, "WORKSPACE_BYTES", sum(t.nbytes for t in wanted) // 2)
    assert sum(t.nbytes for t in shares()) == backend.WORKSPACE_BYTES


@pytest.fixture
def new_setting():
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has no fp32_precision (2.9 on)")
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


def test_products_are_as_exact_as_the_new_setting_says(new_setting):
    for value, want in (("tf32", "tf32"), ("ieee", "ieee")):
        new_setting.fp32_precision = value
        assert triton_common.input_precision(torch.float32) == want


def test_products_are_as_exact_as_the_old_setting_says():
    before = torch.get_float32_matmul_precision()
    try:
        for value, want in (("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(value)
            assert triton_common.input_precision(torch.float32) == want
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_tile_that_does_not_fit_gives_way_to_the_next():
    tried = []

    def run(choice):
        tried.append(choice)
        if choice[0] > 16:
            raise triton.runtime.errors.OutOfResources(2**18, 2**17, "shared memory")
        return "done"

    assert triton_common.launch("kernel", ("x",), ((64, 4), (32, 4), (16, 4)), run) == "done"
    assert tried == [(64, 4), (32, 4), (16, 4)]
    with pytest.raises(triton.runtime.errors.OutOfResources):
        triton_common.launch("kernel", ("x",), ((64, 4), (32, 4)), run)


def test_a_deep_call_with_a_factored_bias_has_a_smaller_tile():
    for dtype, depth, kernel in itertools.product((torch.float16, torch.float32), (128, 256), KERNELS):
        choices = backend.candidates(kernel, call_of((40, 33), 14, 2, dtype, depth))
        sizes = [math.prod(choice[:4]) for choice in choices]
        # nothing is smaller than 16 keys by 16 queries
        assert sizes[0] > min(sizes) or sizes[0] == 256


# ----------------------------------------------------------------------------------------------------- autotuning


def test_a_choice_is_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(triton_common, "_measured", {})
    monkeypatch.setattr(triton_common, "_read", set())
    times, measured = {(1, 4): 3.0, (2, 4): 1.0, (4, 8): 2.0}, []

    def bench(run, return_mode):
        run()
        return times[measured[-1]]

    monkeypatch.setattr(triton.testing, "do_bench", bench)

    def choose(shape_class=("float16", 7)):
        return triton_common.choose("kernel", shape_class, tuple(times), measured.append)

    assert choose() == (1, 4) and not measured  # off: the first
    monkeypatch.setenv(triton_common.ENVIRONMENT, "1")
    assert choose() == (2, 4) and measured == [*times]
    assert choose() == (2, 4) and len(measured) == 3
    triton_common._measured.clear()
    triton_common._read.clear()
    assert choose() == (2, 4) and len(measured) == 3  # from the disk
    (path,) = (tmp_path / "cache").iterdir()
    assert list(json.loads(path.read_text()).values()) == [[2, 4]]
    assert choose(("float16", 9)) == (2, 4) and len(measured) == 6
    monkeypatch.setenv(triton_common.ENVIRONMENT, "yes")
    with pytest.raises(ValueError, match=r"FOVEAL_AUTOTUNE.*'yes'"):
        choose()


# ------------------------------------------------------------------------------------------------ to machine code


SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that a program may have


def compiled(kernel, bias, depth, dtype, capability=90, which=0, **options):
    """Resources of a kernel's launches for a layer's shape, with the ``which``-th of its tiles."""
    halo = bias == 2
    options = {"stride": 8, "boundary": "zero"} if halo else options
    call = call_of((56, 56), 14 if halo else 7, bias, dtype, depth, 8, **options)
    q = torch.empty(8, 56, 56, 2, depth, dtype=dtype, device="meta")
    lse = torch.empty(8, 56, 56, 2, device="meta")
    sides = [2 * w.kernel_size - 1 for w in call.windows]
    first = torch.empty(2, *sides, device="meta") if bias == 1 else torch.empty(sides[0], depth, device="meta")
    first, second = (first if bias else None), (torch.empty_like(first) if halo else None)
    choice = backend.candidates(kernel, call)[which]
    launch = {
        "forward": lambda: backend.launch_forward(q, q, q, first, second, q, lse, call, 0.2, choice, False),
        "queries_backward": lambda: backend.launch_queries_backward(
            q, q, q, first, second, q, q, lse, lse, q, call, 0.2, bias > 0, choice, False
        ),
        "keys_backward": lambda: backend.launch_keys_backward(
            q, q, q, first, second, q, lse, lse, q, q, call, 0.2, choice, False
        ),
    }[kernel]
    for found in launches(triton_kernels, launch):
        built = compile_launch(found, capability)
        assert built.shared <= SHARED_BYTES[capability], (found.kernel.__name__, built.shared)
        assert built.registers <= 255
        yield found.kernel.__name__, built.spilled


@needs_compiler
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"stride": 7, "boundary": "mask", "offset": 3}, marks=pytest.mark.slow)],
    ids=["plain", "shifted"],
)
def test_it_compiles_for_hopper(kernel, options):
    assert all(stack == 0 for _, stack in compiled(kernel, 1, 32, torch.bfloat16, **options))


# Bytes a thread that the queries' gradient with a factored bias may keep out of its registers, by depth: smaller tiles
# need as many. What that costs has not been measured.
STACK = {64: 128, 128: 768}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [0, 1, 2], ids=["none", "table", "factored"])
@pytest.mark.parametrize(
    ("dtype", "depth", "capability"),
    [
        pytest.param(torch.bfloat16, 64, 90, id="bfloat16-64"),
        pytest.param(torch.float16, 128, 90, marks=pytest.mark.long, id="float16-128"),
        pytest.param(torch.float32, 32, 90, marks=pytest.mark.long, id="float32-32"),
        pytest.param(torch.float16, 32, 80, marks=pytest.mark.long, id="float16-32-ampere"),
    ],
)
def test_it_compiles(kernel, bias, dtype, depth, capability):
    for name, stack in compiled(kernel, bias, depth, dtype, capability):
        # the tiles are chosen for sm_90; elsewhere they compile and fit
        spills = bias == 2 and name == "queries_backward"
        assert capability != 90 or stack <= (STACK.get(depth, 16) if spills else 16), (name, stack)
