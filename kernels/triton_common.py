"""Shared code of the Triton kernels: the window rule on the device, and the choice of tiles. Imports Triton, so import
it only where a kernel is launched.

The window rule is that of ``kernels/window.py``, with the same names; tests compare the two. K, STRIDE, APART (the
query stride), SHIFT (boundary "shift") and AHEAD (the positions that the first stride group lacks) are compile-time
constants; lengths and dilations are not, since a model has few windows and many map sizes.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton
import triton.language as tl

from foveal.files import write_json  # absolute, as in dispatch.py

ENVIRONMENT = "FOVEAL_AUTOTUNE"

# ------------------------------------------------------------------------------------------------ on the device


@triton.jit
def group_length(length, group, dilation):
    """Positions congruent to ``group`` on an axis of ``length``."""
    return (length - group + dilation - 1) // dilation


@triton.jit
def query_count(length, APART: tl.constexpr):
    """Queries on ``length`` positions."""
    return (length + APART - 1) // APART


@triton.jit
def window_start(
    query, length, K: tl.constexpr, STRIDE: tl.constexpr, APART: tl.constexpr, SHIFT: tl.constexpr,
    AHEAD: tl.constexpr = 0,
):  # fmt: skip
    """First key of a query (scalar or tensor, from -AHEAD on) in a group of ``length`` positions."""
    lead = (query * APART + AHEAD) // STRIDE * STRIDE + (STRIDE // 2 - AHEAD)
    if SHIFT:
        lead = tl.minimum(tl.maximum(lead, K // 2), length - K + K // 2)
    return lead - K // 2


@triton.jit
def first_query(
    key, length, K: tl.constexpr, STRIDE: tl.constexpr, APART: tl.constexpr, SHIFT: tl.constexpr,
    AHEAD: tl.constexpr = 0,
):  # fmt: skip
    """The first query whose window ends at or after ``key``, a key of the map."""
    # start + K > key, solved for the query; K + STRIDE is added first, since the division rounds towards zero
    group = (key - (K - 1 - K // 2) - STRIDE // 2 + AHEAD + STRIDE - 1 + STRIDE * K) // STRIDE - K
    query = (tl.maximum(group, 0) * STRIDE + APART - 1) // APART
    if AHEAD:  # without a query stride
        query = tl.maximum(query - AHEAD, 0)
    if SHIFT:
        query = tl.where(key < K, 0, query)
    return query


@triton.jit
def last_query(
    key, length, K: tl.constexpr, STRIDE: tl.constexpr, APART: tl.constexpr, SHIFT: tl.constexpr,
    AHEAD: tl.constexpr = 0,
):  # fmt: skip
    """The last query whose window begins at or before ``key``, a key of the map."""
    group = (key + K // 2 - STRIDE // 2 + AHEAD + STRIDE) // STRIDE - 1
    query = (group * STRIDE + STRIDE - 1) // APART - AHEAD
    last = query_count(length, APART) - 1
    if SHIFT:
        query = tl.where(key >= length - K, last, query)
    return tl.minimum(query, last)


@triton.jit
def table_index(query, STRIDE: tl.constexpr, APART: tl.constexpr, COUNTED: tl.constexpr):
    """The index of a query in the row of a bias table: row = key - index + K - 1."""
    if COUNTED:
        together: tl.constexpr = STRIDE // APART
        query += query // together * (STRIDE - together)
    else:
        query *= APART
    return query


# ------------------------------------------------------------------------------------------------- on the host


def power_of_2(x: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``x`` and ``least``."""
    return max(least, 1 << (x - 1).bit_length())


def input_precision(dtype: torch.dtype) -> str:
    """Precision of float32 products: tf32 only if PyTorch's own matmul may use it."""
    if dtype != torch.float32:
        return "tf32"  # ignored for float16 and bfloat16 operands
    # PyTorch 2.9 has a new setting; once it is used, the old one raises
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    allowed = torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def wide(*tensors: torch.Tensor) -> bool:
    """Whether offsets inside one image need 64 bits (offsets of images always have them)."""
    return any(
        sum((n - 1) * abs(s) for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2**31 for t in tensors
    )


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 in the interpreter, which runs programs sequentially."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def autotuning() -> bool:
    """Whether ``FOVEAL_AUTOTUNE=1`` is set. Without it every call uses the default tiles."""
    value = os.environ.get(ENVIRONMENT, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT} must be 0 or 1, got {value!r}")
    return value == "1"


Choice = tuple[int, ...]
Result = TypeVar("Result")
_lock = threading.Lock()
_measured: dict[str, Choice] = {}  # by device, Triton version and shape class, as JSON
_read: set[Path] = set()


def cache_path() -> Path:
    """The file of autotuning results, in Triton's cache folder."""
    folder = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    return Path(folder) / "foveal_autotune.json"


def choose(name: str, shape_class: tuple, candidates: Sequence[Choice], run: Callable[[Choice], object]) -> Choice:
    """The fastest of ``candidates`` for ``run``, measured once per kernel ``name``, shape class and device type, and
    stored on disk. The first candidate if autotuning is off, in the interpreter, and, if nothing is stored yet, during
    the capture of a CUDA graph. ``run`` must be repeatable. Candidates that do not fit the device are skipped.
    """
    if len(candidates) == 1 or not torch.cuda.is_available() or not autotuning():
        return candidates[0]
    key = json.dumps([name, torch.cuda.get_device_name(), triton.__version__, *map(str, shape_class)])
    path = cache_path()
    with _lock:
        if path not in _read:
            _measured.update(_load(path))
            _read.add(path)
        if _measured.get(key) in candidates:
            return _measured[key]
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        times = {}
        for candidate in candidates:
            try:
                times[candidate] = triton.testing.do_bench(lambda c=candidate: run(c), return_mode="median")
            except triton.runtime.errors.OutOfResources:
                continue
        if not times:
            return candidates[0]  # its error names the missing resource
        _measured[key] = min(times, key=times.__getitem__)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**_load(path), key: _measured[key]})
        return _measured[key]


def launch(name: str, shape_class: tuple, candidates: Sequence[Choice], run: Callable[[Choice], Result]) -> Result:
    """Run the choice of :func:`choose` or, if that does not fit the device, the first of ``candidates`` that does."""
    first = choose(name, shape_class, candidates, run)
    *others, last = dict.fromkeys((first, *candidates))
    for candidate in others:
        try:
            return run(candidate)
        except triton.runtime.errors.OutOfResources:  # raised before any launch
            continue
    return run(last)


def _load(path: Path) -> dict[str, Choice]:
    try:
        return {key: tuple(value) for key, value in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
