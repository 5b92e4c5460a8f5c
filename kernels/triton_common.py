"""What the Triton kernels share: the window rule on the device, and the choice of a tile. Imports Triton, so it is
imported where a kernel is launched and not before.

The window rule is that of ``kernels/window.py``, whose names it keeps; the tests compare the two. The parameters K,
STRIDE, APART (the query stride) and SHIFT (boundary "shift") are compile-time constants, lengths and dilations are not:
a model has few windows and many maps.
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
def window_start(query, length, K: tl.constexpr, STRIDE: tl.constexpr, APART: tl.constexpr, SHIFT: tl.constexpr):
    """First key of a query, a scalar or a tensor of them, in a group of ``length`` positions."""
    lead = query * APART // STRIDE * STRIDE + STRIDE // 2
    if SHIFT:
        lead = tl.minimum(tl.maximum(lead, K // 2), length - K + K // 2)
    return lead - K // 2


@triton.jit
def first_query(key, length, K: tl.constexpr, STRIDE: tl.constexpr, APART: tl.constexpr, SHIFT: tl.constexpr):
    """The first query whose window reaches ``key``, a key of the map, or one behind it."""
    # start + K > key, solved for the query; K + STRIDE is added first, since the division rounds towards zero
    group = (key - (K - 1 - K // 2) - STRIDE // 2 + STRIDE - 1 + STRIDE * K) // STRIDE - K
    query = (tl.maximum(group, 0) * STRIDE + APART - 1) // APART
    if SHIFT:
        query = tl.where(key < K, 0, query)
    return query


@triton.jit
def last_query(key, length, K: tl.constexpr, STRIDE: tl.constexpr, APART: tl.constexpr, SHIFT: tl.constexpr):
    """The last query whose window begins at ``key``, a key of the map, or before it."""
    group = (key + K // 2 - STRIDE // 2 + STRIDE) // STRIDE - 1
    query = (group * STRIDE + STRIDE - 1) // APART
    last = query_count(length, APART) - 1
    if SHIFT:
        query = tl.where(key >= length - K, last, query)
    return tl.minimum(query, last)


@triton.jit
def table_index(query, STRIDE: tl.constexpr, APART: tl.constexpr, COUNTED: tl.constexpr):
    """The index of a query from which a bias table is read: row = key - index + K - 1."""
    if COUNTED:
        together: tl.constexpr = STRIDE // APART
        query += query // together * (STRIDE - together)
    else:
        query *= APART
    return query


# ------------------------------------------------------------------------------------------------- on the host


def power_of_2(x: int, least: int = 1) -> int:
    """The first power of two from ``x`` on, and at least ``least``."""
    return max(least, 1 << (x - 1).bit_length())


def input_precision(dtype: torch.dtype) -> str:
    """Of a product of float32 tiles: tf32 only where PyTorch's own products may use it."""
    if dtype != torch.float32:
        return "tf32"  # of no effect on float16 and bfloat16 operands
    # PyTorch 2.9 has a new setting; once it was used the old ones raise
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    allowed = torch.backends.cuda.matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if allowed else "ieee"


def wide(*tensors: torch.Tensor) -> bool:
    """Whether offsets inside one image need 64 bits (a kernel's offset of the image itself always has them)."""
    return any(
        sum((n - 1) * abs(s) for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2**31 for t in tensors
    )


def autotuning() -> bool:
    """Whether ``FOVEAL_AUTOTUNE=1`` asks for measured tiles. Without it every call takes its fixed default."""
    value = os.environ.get(ENVIRONMENT, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT} must be 0 or 1, got {value!r}")
    return value == "1"


Choice = tuple[int, ...]
Result = TypeVar("Result")
_lock = threading.Lock()
_measured: dict[str, Choice] = {}  # by the text of a shape class
_read: set[Path] = set()


def cache_path() -> Path:
    """The file of measured choices, in Triton's own cache folder."""
    folder = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    return Path(folder) / "foveal_autotune.json"


def choose(name: str, shape_class: tuple, candidates: Sequence[Choice], run: Callable[[Choice], object]) -> Choice:
    """The fastest of ``candidates`` for ``run``, measured once for each kernel ``name``, class of shapes and kind of
    device, and kept on disk; the first of them while autotuning is off and in the interpreter, and, where nothing is
    kept yet, while a CUDA graph is captured. ``run`` must be repeatable. A candidate that does not fit the device is
    skipped.
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
            return candidates[0]  # whose error names what it lacks
        _measured[key] = min(times, key=times.__getitem__)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**_load(path), key: _measured[key]})
        return _measured[key]


def launch(name: str, shape_class: tuple, candidates: Sequence[Choice], run: Callable[[Choice], Result]) -> Result:
    """What ``run`` returns for the choice of :func:`choose`, or where that does not fit the device, for the first of
    ``candidates`` that does."""
    first = choose(name, shape_class, candidates, run)
    *others, last = dict.fromkeys((first, *candidates))
    for candidate in others:
        try:
            return run(candidate)
        except triton.runtime.errors.OutOfResources:  # raised before anything is launched, also into a CUDA graph
            continue
    return run(last)


def _load(path: Path) -> dict[str, Choice]:
    try:
        return {key: tuple(value) for key, value in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
