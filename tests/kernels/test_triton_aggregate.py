"""The Triton kernels of aggregation where there is no GPU: interpreted, and compiled for one."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foveal.benchmarks.instructions import compile_launch, launches
from foveal.kernels import triton_support

pytest.importorskip("triton", reason="Triton is not installed")

from foveal.kernels.aggregate import triton_kernels
from foveal.kernels.window import Window

SWEEP = Path(__file__).with_name("triton_aggregate.py")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
both_sweeps = pytest.mark.parametrize(
    "which",
    [
        "not slow",
        pytest.param("slow and not long", marks=pytest.mark.slow),
        pytest.param("long", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)


def sweep(folder, which, environment):
    """Run the sweep in a process of its own, in a folder that holds none of ours: -m puts it on the path."""
    options = ["-q", "-W", "ignore", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", which]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    command = [sys.executable, "-m", "pytest", *options, str(SWEEP)]
    done = subprocess.run(command, env=inherited | environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@both_sweeps
def test_under_the_interpreter(which, tmp_path):
    sweep(tmp_path, which, {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


@needs_gpu
@both_sweeps
def test_on_a_gpu(which, tmp_path):
    sweep(tmp_path, which, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})


def calls(depth, kernel_size, dtype):
    """A call of each kernel, with all it can be asked for."""
    window, shape = [kernel_size, kernel_size, 1, 1], (1, 16, 16, 2, depth)
    v, out = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    weights = torch.empty(*shape[:4], kernel_size**2, dtype=dtype)
    softmax = {
        "sums": torch.empty(shape[:4]),
        "table": torch.empty(2, 2 * kernel_size - 1, 2 * kernel_size - 1),
        "kernel_bias": torch.empty(kernel_size**2),
    }
    for given in ({}, {"softmax": softmax}):
        more = {"logits": weights, "output": out, **given} if given else {}
        yield lambda g=given: triton_kernels.apply(weights, v, out, window, "shift", **g)
        yield lambda m=more: triton_kernels.dots(v, v, weights, window, "shift", **m)
        yield lambda g=given: triton_kernels.spread(weights, v, out, window, "shift", **g)
    yield lambda: triton_kernels.fold_table(weights[0].float(), softmax["table"], window, "shift")


@pytest.mark.slow
@pytest.mark.skipif(triton_support.interpreting(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("depth", "kernel_size"), [(16, 13), (32, 5), (64, 7), (256, 3)])
def test_nothing_spills(depth, kernel_size, dtype):
    """The default tiles of every kernel, down to machine code for compute capability 9.0."""
    for call in calls(depth, kernel_size, dtype):
        (launch,) = launches(triton_kernels, call)
        built = compile_launch(launch)
        # 227 KiB: the shared memory that a program may have
        assert built.spilled == 0 and built.registers <= 255 and built.shared <= 227 * 1024, launch.kernel


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 4, 5])
def test_spans_are_those_of_the_windows(kernel_size, keys):
    """Keys between the first and the last that a tile of queries sees, or queries that see a tile of keys."""
    for boundary, length, tile in (("shift", 5, 2), ("zero", 9, 4), ("mask", 3, 8)):
        window = Window(kernel_size, boundary=boundary)
        seen = [range(window.start(q, length), window.start(q, length) + kernel_size) for q in range(length)]
        found = []
        for first in range(0, length, tile):
            inside = range(first, min(first + tile, length))
            if keys:
                found.append(sum(any(key in seen[q] for key in inside) for q in range(length)))
            else:
                found.append(seen[inside[-1]][-1] + 1 - seen[first][0])
        assert triton_kernels.spans(window, length, tile, keys) == found


def test_a_tile_fits_its_map():
    def shape(size, kernel_size, block=64, keys=False):
        return triton_kernels.tile_shape((Window(kernel_size),) * 2, size, 16, block, keys)

    assert shape((14, 14), 13).tile == (1, 16)  # all see 14 columns
    assert shape((7, 7), 7) == triton_kernels.TileShape((2, 8), (8, 8), (4, 1))
    assert shape((3, 100), 3).tile == (4, 4)
    assert shape((1, 100), 3).tile == (1, 16)
    for keys in (False, True):
        assert math.prod(shape((56, 3), 3, 16, keys).block) == 16
