"""`foveal bench instructions`: what the Triton kernels of a layer cost on paper, compiled for sm_90 without a GPU.

`issue_us` is a lower bound of the time: all warp instructions, at one per clock on each of an H200's schedulers.
`memory_us` is another: every tensor of the launch read or written once. Real kernels reach 50 to 80 % of the first.
"""

from __future__ import annotations

import math
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .cases import CompiledLayer, Layer
from .measure import Bench, Row

PROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.755e9  # an H200's multiprocessors, their schedulers, Hz
BANDWIDTH = 4.3e12  # bytes per second
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is launched with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]

    @property
    def named(self) -> dict[str, Any]:
        """All arguments by name, in the kernel's order, without the compiler's options."""
        given = {**dict(zip(self.kernel.arg_names, self.args, strict=False)), **self.options}
        return {name: given[name] for name in self.kernel.arg_names}

    @property
    def compiler_options(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name not in self.kernel.arg_names}

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.named.values() if isinstance(t, Tensor))


class _Recorder:
    """Replaces a kernel: appends its launches to a list."""

    def __init__(self, kernel: Any, found: list[Launch]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.found.append(Launch(self.kernel, grid, args, options))


def launches(module: ModuleType, call: Callable[[], object]) -> list[Launch]:
    """The launches of the kernels of ``module`` during ``call()``, on an H200; nothing runs."""
    from triton.runtime.jit import JITFunction

    from ..kernels import triton_common

    found: list[Launch] = []
    with ExitStack() as stack:
        for name, value in vars(module).copy().items():
            if isinstance(value, JITFunction) and value.module == module.__name__:
                stack.enter_context(mock.patch.object(module, name, _Recorder(value, found)))
        stack.enter_context(mock.patch.object(triton_common, "processors", lambda device: PROCESSORS))
        call()
    return found


@dataclass(frozen=True)
class Compiled:
    """Machine code of a launch."""

    sass: str
    registers: int
    spilled: int  # bytes of stack per thread
    shared: int  # bytes of shared memory per program

    @property
    def instructions(self) -> list[int]:
        """Instructions by the number of loops around them: outside all loops, in one loop, in a loop inside it, ..."""
        code: list[str] = []
        labels: dict[str, int] = {}
        for line in self.sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                code.append(instruction[1])
        loops = []
        for at, text in enumerate(code):
            branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
            if branch and labels.get(branch[1], at) < at:
                loops.append((labels[branch[1]], at))
        depths = [
            sum(first <= at <= last for first, last in loops) for at, text in enumerate(code) if text.strip() != "NOP"
        ]
        return [depths.count(depth) for depth in range(max(depths, default=0) + 1)]


def compile_launch(launch: Launch, capability: int = 90) -> Compiled:
    """Compile a launch as Triton would specialize it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants, attributes = {}, {}
    constexpr = {p.name for p in launch.kernel.params if p.is_constexpr}
    for index, (name, value) in enumerate(launch.named.items()):
        if name in constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=launch.compiler_options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()

        def read(tool: str, option: str) -> str:
            return subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout

        used, sass = read("cuobjdump", "--dump-resource-usage"), read("nvdisasm", "-c")
    registers, spilled = (int(re.findall(rf"\b{name}:(\d+)", used)[0]) for name in ("REG", "STACK"))
    return Compiled(sass, registers, spilled, built.metadata.shared)


# ------------------------------------------------------------------------------------------ the kernels of a layer


def _attention(layer: Layer, dtype: torch.dtype) -> list[Launch]:
    from ..kernels.neighborhood import triton as backend
    from ..kernels.neighborhood import triton_kernels

    batch, _, _, heads, depth = layer.shape
    q = torch.empty(batch, *layer.queries, heads, depth, dtype=dtype)
    k, v = torch.empty(layer.shape, dtype=dtype), torch.empty(*layer.shape[:4], layer.value_depth, dtype=dtype)
    sides = [2 * w.kernel_size - 1 for w in (layer.rows, layer.columns)]
    first = second = None
    if layer.bias == "table":
        first = torch.empty(heads, *sides)
    elif layer.bias == "factored":
        first, second = (torch.empty(side, depth) for side in sides)
    window = backend.window_list(layer.rows, layer.columns)

    def call() -> None:
        out, lse = backend.attention(q, k, v, first, second, window, 0.2)
        backend.attention_backward(out, q, k, v, first, second, out, lse, window, 0.2, first is not None)

    return launches(triton_kernels, call)


def _mix(layer: Layer, dtype: torch.dtype) -> list[Launch]:
    from ..kernels.aggregate import triton_kernels

    sides = [w.kernel_size for w in (layer.rows, layer.columns)]
    logits = torch.empty(*layer.shape[:4], math.prod(sides), dtype=dtype)
    v, sums = torch.empty(layer.shape, dtype=dtype), torch.empty(layer.shape[:4])
    table = torch.empty(layer.shape[3], *(2 * side - 1 for side in sides))
    window = [*sides, layer.rows.dilation, layer.columns.dilation], layer.rows.boundary
    softmax = {"sums": sums, "table": table, "kernel_bias": torch.empty(math.prod(sides))}

    def call() -> None:
        triton_kernels.apply(logits, v, v, *window, softmax)
        triton_kernels.dots(v, v, logits, *window, logits, v, softmax)
        triton_kernels.spread(logits, v, v, *window, softmax)

    return launches(triton_kernels, call)


def _trips(launch: Launch, layer: Layer) -> Sequence[float]:
    """Iterations of the loops of a kernel, the outermost first: their mean where tiles differ, else those of a tile far
    from the border."""
    given, name = launch.named, launch.kernel.__name__
    if name in ("_apply", "_dots", "_spread"):
        from ..kernels.aggregate.triton_kernels import spans

        trips = []
        for w, n, tile, block in (
            (layer.columns, layer.shape[2], given["TW"], given["EC"]),
            (layer.rows, layer.shape[1], given["TH"], given["ER"]),
        ):
            seen = spans(w, w.group_length(n), tile, name == "_spread")
            trips.append(statistics.mean(-(-span // block) for span in seen))
        return trips
    if name in ("forward", "queries_backward", "keys_backward"):
        blocks: float = given["DOWN"] * given["CHUNKS"] if given.get("ALL_CHUNKS", True) else given["DOWN"]
        if given.get("VARIES"):
            from ..kernels.neighborhood.triton import key_tiling

            a, b = (
                key_tiling(layer.rows, layer.shape[1], given["TH"]),
                key_tiling(layer.columns, layer.shape[2], given["TW"]),
            )
            blocks = a.blocks(given["QR"]) * b.blocks(given["QC"]) / (a.tiles * b.tiles)
        trips = [-(-layer.shape[0] // launch.grid[1]), *([] if given["UNROLL"] > 1 else [blocks])]
        return [-(-given["count"] // given["programs"]), *trips] if name == "queries_backward" else trips
    return []


def instruction_rows(case: CompiledLayer, bench: Bench) -> Iterator[Row]:
    """The launches of a layer: forward, then backward."""
    import triton

    layer = case.layer
    for launch in (_attention if layer.operation == "attention" else _mix)(layer, getattr(torch, case.dtype)):
        built = compile_launch(launch)
        counts = built.instructions
        trips = list(_trips(launch, layer))[: len(counts) - 1]
        total = sum(count * math.prod(trips[:depth]) for depth, count in enumerate(counts))
        warps = math.prod(launch.grid) * launch.options.get("num_warps", 4)
        yield {
            "kernel": launch.kernel.__name__,
            "map": layer.map,
            "rule": layer.rule,
            "dilation": layer.rows.dilation,
            "bias": layer.bias,
            "depth": layer.shape[4],
            "dtype": case.dtype,
            "issue_us": round(1e6 * warps * total / (PROCESSORS * SCHEDULERS * CLOCK), 1),
            "memory_us": round(1e6 * launch.bytes / BANDWIDTH, 1),
            "registers": built.registers,
            "spilled": built.spilled,
            "loop_instructions": counts[-1] if len(counts) > 1 else 0,
            "other_instructions": sum(counts[:-1]) if len(counts) > 1 else counts[0],
            "triton": triton.__version__,
        }
