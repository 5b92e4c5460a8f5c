"""Neighborhood attention in C++ for CPUs, compiled at the first call with the compiler that `torch.compile` uses.

Opt-in: with ``FOVEAL_NATIVE=1`` the automatic choice takes it wherever it runs. ``native.cpp`` is a plain shared
library over pointers and strides, independent of PyTorch's version, called through ctypes without the GIL. Two
``torch.library`` operations with fakes, so compilers see one node. Sums are float32 for every dtype. The order of
summation depends only on the number of threads, so results are bitwise reproducible for one number.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from foveal.files import atomic

from .. import flops
from ..bias import Bias
from ..dispatch import BackendError
from ..problem import Problem
from ..tracing import transformed
from ..window import Window, pairs_of, window_list, windows_of
from .triton import _gradients

ENVIRONMENT = "FOVEAL_NATIVE"
LARGEST_BIASED = 64  # keys along an axis; each thread expands the bias of a tile
FLAGS = (
    *("-O3", "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native", "-std=c++17"),
    *("-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"),
)

_lock = threading.Lock()
_loaded: list[ctypes.CDLL] = []


def _opted_in() -> bool:
    value = os.environ.get(ENVIRONMENT) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT} must be 0 or 1, got {value!r}")
    return value == "1"


AUTOMATIC = _opted_in()  # whether the automatic choice takes this backend; by name it always runs


def unsupported_reason(problem: Problem) -> str | None:
    if problem.device != "cpu" or sys.platform == "win32":
        return f"native runs on the cpu of Linux and macOS (got {problem.device} on {sys.platform})"
    if problem.subclass:
        return "native needs storage, which a subclass of Tensor may not have"
    if problem.dtype == torch.float64:
        return "native takes float16, bfloat16 and float32 (got torch.float64)"
    if problem.dropout_p > 0:
        return f"native has no attention dropout (got {problem.dropout_p})"
    if problem.bias is not None and max(problem.kernel_size) > LARGEST_BIASED:
        return f"native takes a bias up to a kernel_size of {LARGEST_BIASED} (got {problem.kernel_size})"
    if problem.tracing and (torch.compiler.is_exporting() or not torch.compiler.is_compiling()):
        return "exporters and torch.jit.trace need standard operators"
    if not problem.tracing and transformed():
        return "the transforms of torch.func and forward mode need standard operators"
    return None


# ------------------------------------------------------------------------------------------------ the library


def _cpu() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in lines if not line.startswith(("cpu MHz", "processor", "bogomips", "BogoMIPS")))


def cache_folder() -> Path:
    """Where compiled libraries are kept: beside PyTorch's extensions."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions").expanduser() / "foveal"


def build() -> Path:
    """Compile ``native.cpp``, unless it has been for this compiler and CPU.

    Raises:
        BackendError: there is no C++ compiler (``CXX``), or it fails; with its output.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler  # costs a second to import
    from torch._inductor.exc import InvalidCxxCompiler

    source = Path(__file__).with_name("native.cpp")
    searched = " or ".join(filter(None, config.cpp.cxx))
    try:
        command = [*shlex.split(get_cpp_compiler()), *FLAGS]
        version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    except (InvalidCxxCompiler, OSError, subprocess.CalledProcessError) as error:
        raise BackendError(f"backend 'native' needs a C++ compiler: {searched} does not run (set CXX)") from error
    key = hashlib.sha256("\0".join([source.read_text(encoding="utf-8"), *command, version, _cpu()]).encode())
    target = cache_folder() / f"native-{key.hexdigest()[:24]}.so"
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BackendError(
                f"backend 'native' has no folder for its library, set TORCH_EXTENSIONS_DIR: {error}"
            ) from error
        with atomic(target) as new:
            done = subprocess.run([*command, str(source), "-o", str(new)], capture_output=True, text=True)
            if done.returncode:
                raise BackendError(
                    f"backend 'native': {shlex.join(command)} failed with status {done.returncode}:\n{done.stderr}"
                )
    return target


def library() -> ctypes.CDLL:
    """The compiled library, loaded once per process."""
    with _lock:
        if not _loaded:
            path = build()
            try:
                _loaded.append(ctypes.CDLL(str(path)))
            except OSError as error:  # a damaged file, or a folder from which nothing may be run
                raise BackendError(f"backend 'native' cannot load {path}: {error}") from error
        return _loaded[0]


class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("image", "row", "column", "head")]


class Call(ctypes.Structure):
    """The struct of this name in ``native.cpp``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "depth", "value_depth")),
        *((name, ctypes.c_int64) for name in ("height", "width", "rows", "columns")),
        *((name, ctypes.c_int64 * 2) for name in ("dilation", "kernel")),
        *((name, ctypes.c_int64) for name in ("bias", "masked", "half", "threads", "first_by_head", "second_by_head")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "grad")),
        *((f"at_{name}", _Strides) for name in ("q", "k", "v", "grad", "out", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("first", "second")),
        *((name, ctypes.c_void_p) for name in ("row_start", "row_base", "column_start", "column_base")),
        *((name, ctypes.c_void_p) for name in ("out", "dq", "dk", "dv", "dfirst", "dsecond")),
    ]


@lru_cache(maxsize=1024)
def _axis(window: Window, length: int) -> np.ndarray:
    """[2, queries]: the first key of each query's window in its dilation group, and the table's row of key 0."""
    query = torch.arange(window.queries(length), device="cpu")
    group, index = query % window.dilation, query // window.dilation
    in_group = (length - group + window.dilation - 1) // window.dilation
    return torch.stack([window.starts(index, in_group), window.table_row(torch.zeros_like(index), index)]).int().numpy()


def _call(tensors: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, window: list[int], scale: float) -> Call:
    """The arguments of the library: sizes, and addresses and strides of all ``tensors``, by name."""
    windows = windows_of(tuple(window))
    batch, height, width, heads, depth = k.shape
    call = Call(
        batch, heads, depth, v.shape[4], height, width, *q.shape[1:3],
        *(tuple(getattr(w, name) for w in windows) for name in ("dilation", "kernel_size")),
        bias=("first" in tensors) + ("second" in tensors), masked=windows[0].boundary == "mask",
        half=q.dtype == torch.bfloat16, threads=torch.get_num_threads(), scale=scale,
    )  # fmt: skip
    for name, t in {"q": q, "k": k, "v": v, **tensors}.items():
        setattr(call, name, t.data_ptr())
        if t.ndim == 5:
            setattr(call, f"at_{name}", _Strides(*t.stride()[:4]))
    for name in ("first", "second"):
        t = tensors.get(name)
        setattr(call, f"{name}_by_head", t.stride(0) if t is not None and t.ndim == 3 else 0)
    axes = [_axis(w, length) for w, length in zip(windows, (height, width), strict=True)]
    call.held = tensors, axes
    for name, (start, base) in zip(("row", "column"), axes, strict=True):
        setattr(call, f"{name}_start", start.ctypes.data)
        setattr(call, f"{name}_base", base.ctypes.data)
    return call


# ------------------------------------------------------------------------------------------------- operations


def _plain(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Inputs as the library takes them: float32 or bfloat16, with contiguous channels."""
    plain = (t.float() if t.dtype == torch.float16 else t for t in tensors)
    return tuple(t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in plain)


@torch.library.custom_op("foveal::native_attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, second: Tensor | None, window: list[int], scale: float
) -> Tensor:
    """``first`` alone is a bias table; ``first`` and ``second`` are row and column embeddings."""
    dtype, (q, k, v) = v.dtype, _plain(q, k, v)
    out = v.new_empty(*q.shape[:4], v.shape[4])
    if q.numel():
        bias = {name: t.float().contiguous() for name, t in (("first", first), ("second", second)) if t is not None}
        library().foveal_attention(ctypes.byref(_call({**bias, "out": out}, q, k, v, window, scale)), 0)
    return out.to(dtype)


@attention.register_fake
def _(q, k, v, first, second, window, scale):
    return v.new_empty(*q.shape[:4], v.shape[4])


@torch.library.custom_op("foveal::native_attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    window: list[int],
    scale: float,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dfirst, dsecond); the last two are empty without a bias or if ``wanted`` is false."""
    dtype, (grad, q, k, v) = q.dtype, _plain(grad, q, k, v)
    # zeros: a query stride may leave keys unseen
    dq, dk, dv = torch.empty_like(q, memory_format=torch.contiguous_format), k.new_zeros(k.shape), v.new_zeros(v.shape)
    bias = {name: t.float().contiguous() for name, t in (("first", first), ("second", second)) if t is not None}
    sums = {f"d{name}": t.new_zeros(t.shape) for name, t in bias.items() if wanted}
    if q.numel():
        tensors = {**bias, **sums, "grad": grad, "dq": dq, "dk": dk, "dv": dv}
        library().foveal_attention(ctypes.byref(_call(tensors, q, k, v, window, scale)), 1)
    biases = (
        q.new_empty(0, dtype=dtype) if t is None or not wanted else sums[name].to(t.dtype)
        for name, t in (("dfirst", first), ("dsecond", second))
    )
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), *biases


@attention_backward.register_fake
def _(grad, q, k, v, first, second, window, scale, wanted):
    return _gradients(q, k, v, first, second, wanted)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    wanted = any(ctx.needs_input_grad[3:5])
    dq, dk, dv, *biases = attention_backward(grad, *ctx.saved_tensors, ctx.window, ctx.scale, wanted)
    biases = (g if needed else None for g, needed in zip(biases, ctx.needs_input_grad[3:5], strict=True))
    return dq, dk, dv, *biases, None, None


attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.foveal.native_attention)
def _(q, k, v, first, second, window, *_, **__) -> int:
    return flops.attention(pairs_of(q, window), q[4], v[4])


@register_flop_formula(torch.ops.foveal.native_attention_backward)
def _(grad, q, k, v, first, second, window, *_, **__) -> int:
    return flops.attention(pairs_of(q, window), q[4], v[4], backward=True)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, problem: Problem) -> Tensor:
    """[B, h, w, N, D] x [B, H, W, N, D] x [B, H, W, N, V] -> [B, h, w, N, V]."""
    first, second = (*(() if bias is None else bias.tensors), None, None)[:2]
    return attention(q, k, v, first, second, window_list(*problem.windows), problem.scale)
