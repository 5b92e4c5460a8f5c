"""`foveal bench gpu`: our kernels and models beside their peers on one GPU, in one process, on the same inputs.

Times are medians between CUDA events, warm, with the L2 cache overwritten before each; those of whole models have the
host's time to launch them in them, the others do not. Memory is the peak of what PyTorch allocates above what it held.
Bytes and operations are counted, not measured: each input read once, each output written once, two operations for a
multiplication and addition. The floor of a call is the larger of the two times that these take at the copy bandwidth
and the rate of matrix products measured in the same run. Nothing is timed before its answer has been compared with
another's.

Each part stays within its seconds: what does not fit is left out and said to be. Tables are rewritten after every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.attention import HaloAttention2d
from ..kernels import (
    Call,
    DecomposedRelativePositionBias,
    RelativePositionBias,
    neighborhood_attention,
    neighborhood_mix,
    recording,
)
from ..kernels.aggregate.softmax import expand_table
from ..kernels.window import Window
from .cases import (
    GPU_CONVS,
    GPU_HALO,
    GPU_LAYERS,
    GPU_MODELS,
    TINY_CONVS,
    TINY_HALO,
    TINY_LAYERS,
    TINY_MODELS,
    ConvCase,
    HaloCase,
    LayersCase,
    SpeedCase,
)
from .run import environment, halo_layers, write_csv

Row = dict[str, object]
TOLERANCE = 3e-2  # of answers in bfloat16, relative to their norm
NOT_COMPILED = ".*flex_attention called without torch.compile"  # of a warning: it would be timed in eager mode
DENSE_MASK_POSITIONS = 1024  # of a map that scaled_dot_product_attention gets with a mask of all pairs

# ------------------------------------------------------------------------------------------------------ the cases


@dataclass(frozen=True)
class Layer:
    """A call of a neighborhood operation, and how often its model makes it."""

    operation: str  # "attention" or "mix"
    shape: tuple[int, ...]  # B, H, W, N, D of the keys; of the values of a mix
    queries: tuple[int, int]
    value_depth: int
    rows: Window
    columns: Window
    bias: str  # "table", "factored" or "none"
    count: int = 1

    @property
    def map(self) -> str:
        return f"{self.shape[1]}x{self.shape[2]}"

    @property
    def rule(self) -> str:
        pairs = {
            "k": (self.rows.kernel_size, self.columns.kernel_size),
            "s": (self.rows.stride, self.columns.stride),
            "d": (self.rows.dilation, self.columns.dilation),
            "q": (self.rows.query_stride, self.columns.query_stride),
        }
        words = [
            f"{name}{a}" if a == b else f"{name}{a}x{b}"
            for name, (a, b) in pairs.items()
            if name == "k" or (a, b) != (1, 1)
        ]
        return " ".join(words)

    @property
    def pairs(self) -> int:
        """Queries times keys of their windows, of all images and heads."""
        batch, _, _, heads, _ = self.shape
        return batch * heads * math.prod(self.queries) * self.rows.kernel_size * self.columns.kernel_size

    @property
    def options(self) -> dict[str, object]:
        both = (self.rows, self.columns)
        found: dict[str, object] = {
            "kernel_size": tuple(w.kernel_size for w in both),
            "dilation": tuple(w.dilation for w in both),
            "boundary": self.rows.boundary,
        }
        if self.operation == "attention":
            found |= {"stride": tuple(w.stride for w in both), "query_stride": tuple(w.query_stride for w in both)}
        return found

    def flops(self, backward: bool) -> int:
        """Operations of a forward, or of a forward and a backward, that makes the weights again."""
        depth, value = self.shape[4], self.value_depth
        if self.operation == "mix":
            return 2 * self.pairs * value * (3 if backward else 1)
        forward = 2 * self.pairs * (depth + value)
        return forward + 2 * self.pairs * (3 * depth + 2 * value) if backward else forward

    def bytes(self, backward: bool, item: int = 2) -> int:
        """The fewest bytes to move: each tensor once forward, and once backward each that is read or made there."""
        batch, height, width, heads, depth = self.shape
        keys = batch * height * width * heads
        queries = batch * math.prod(self.queries) * heads
        if self.operation == "mix":
            logits = self.pairs
            forward = logits + 2 * keys * depth
            return item * (forward + 2 * logits + 3 * keys * depth if backward else forward)
        forward = queries * (depth + self.value_depth) + keys * (depth + self.value_depth)
        # backward q, k, v, o and its gradient are read, the gradients of q, k and v written: twice the forward's
        return item * (3 * forward if backward else forward)


def layers_of(case: LayersCase) -> list[Layer]:
    """What the neighborhood operations of a model are called with, the distinct calls in their order."""
    found: dict[Layer, int] = {}

    def count(call: Call) -> Tensor:
        attend, problem = call.operation == "neighborhood_attention", call.problem
        kinds = {None: "none", RelativePositionBias: "table", DecomposedRelativePositionBias: "factored"}
        kind = kinds[problem.bias] if attend else "table"
        operation = "attention" if attend else "mix"
        sizes = problem.shape, problem.query_size, problem.value_depth
        layer = Layer(operation, *sizes, problem.rows, problem.columns, kind)
        found[layer] = found.get(layer, 0) + 1
        return call.empty_output()

    with torch.device("meta"):
        net = timm.create_model(case.model, num_classes=0).eval()
    with torch.no_grad(), recording(count):
        net(torch.empty(case.batch, 3, case.rows, case.columns, device="meta"))
    return [dataclasses.replace(layer, count=count) for layer, count in found.items()]


# -------------------------------------------------------------------------------------------------------- measuring


class Clock:
    """Times and measures calls on a device; on a CPU, for tests and dry runs, by the wall clock."""

    def __init__(self, device: str, milliseconds: float = 40.0) -> None:
        self.device, self.milliseconds = device, milliseconds
        self.cuda = device == "cuda"
        self.compiler = "inductor" if self.cuda else "eager"
        self.flush = torch.empty(256 * 2**20 // 4 if self.cuda else 1, dtype=torch.int32, device=device)

    def once(self, call: Callable[[], object], queued: bool) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        self.flush.zero_()
        if queued:  # cycles, some two milliseconds in which the host launches what follows
            torch.cuda._sleep(4_000_000)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def median_ms(self, call: Callable[[], object], queued: bool = True) -> float:
        """``queued``: without the host's time to launch the call."""
        for _ in range(3):
            guess = self.once(call, queued)
        rounds = min(max(int(self.milliseconds / max(guess, 1e-3)), 5), 100) if self.cuda else 1
        return statistics.median(self.once(call, queued) for _ in range(rounds))

    def peak_mib(self, call: Callable[[], object]) -> float | str:
        """Above what is held before the call; what it returns counts."""
        if not self.cuda:
            return ""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return round(peak / 2**20, 1)


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do: bytes per second copied (read and written), operations per second."""

    bandwidth: float
    rate: float

    def floor_ms(self, moved: int, flops: int) -> float:
        return 1e3 * max(moved / self.bandwidth, flops / self.rate)


def ceilings(clock: Clock, dtype: torch.dtype, tiny: bool) -> Ceilings:
    """A large copy and a large matrix product, on random numbers."""
    count, side = (2**12, 64) if tiny else (2**30, 8192)
    source = torch.randn(count, device=clock.device).to(dtype)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / (clock.median_ms(partial(target.copy_, source)) / 1e3)
    del source, target
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    return Ceilings(bandwidth, 2 * side**3 / (clock.median_ms(lambda: a @ b) / 1e3))


# ------------------------------------------------------------------------------------------- ours and the peers

Modes = tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]] | None]


def _modes(call: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor) -> Modes:
    """``call`` forward alone, and with the gradients of all tensors, which both lie as they are given."""
    leaves = [t.detach().requires_grad_(True) for t in tensors]

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*tensors)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*leaves), leaves, grad)

    return forward, both


def inputs_of(layer: Layer, device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Random tensors of a call, biases last, and a gradient of its output."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    batch, height, width, heads, depth = layer.shape
    area = [w.kernel_size for w in (layer.rows, layer.columns)]
    grad = normal(batch, *layer.queries, heads, layer.value_depth)
    if layer.operation == "mix":
        # as a product of each head's queries and keys leaves them
        logits = normal(batch, heads, height, width, math.prod(area)).permute(0, 2, 3, 1, 4)
        return [logits, normal(*layer.shape), normal(heads, *(2 * k - 1 for k in area)), normal(math.prod(area))], grad
    same = layer.queries == (height, width) and depth == layer.value_depth
    if same:  # views of one projection, as the models have them
        q, k, v = normal(batch, height, width, 3, heads, depth).unbind(3)
    else:
        q, k = normal(batch, *layer.queries, heads, depth), normal(*layer.shape)
        v = normal(batch, height, width, heads, layer.value_depth)
    biases = {
        "none": list,
        "table": lambda: [normal(heads, *(2 * k - 1 for k in area))],
        "factored": lambda: [normal(2 * k - 1, depth) * depth**-0.5 for k in area],
    }[layer.bias]()
    return [q, k, v, *biases], grad


def ours(layer: Layer, backend: str | None) -> Callable[..., Tensor]:
    """The operation with its bias, by a backend."""
    if layer.operation == "mix":

        def mix(logits: Tensor, v: Tensor, table: Tensor, kernel_bias: Tensor) -> Tensor:
            bias = RelativePositionBias(table)
            return neighborhood_mix(logits, v, bias=bias, kernel_bias=kernel_bias, backend=backend, **layer.options)

        return mix

    def attend(q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> Tensor:
        bias = None
        if biases:
            if layer.bias == "table":
                bias = RelativePositionBias(*biases)
            else:
                bias = DecomposedRelativePositionBias(*biases, counted=layer.rows.counted)
        return neighborhood_attention(q, k, v, bias=bias, backend=backend, **layer.options)

    return attend


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_plain(layer: Layer) -> bool:
    """A query at every key, one window rule that NATTEN and masks of all pairs know."""
    return layer.operation == "attention" and layer.queries == layer.shape[1:3] and layer.bias != "factored"


def natten(layer: Layer) -> Callable[..., Tensor] | None:
    """NATTEN's fused kernels, without a bias, where it has them."""
    if not _is_plain(layer) or layer.rows.boundary != "shift" or _package("natten") is None:
        return None
    from natten import na2d

    pairs = {name: layer.options[name] for name in ("kernel_size", "stride", "dilation")}
    return lambda q, k, v: na2d(q, k, v, **pairs)


def _seen(layer: Layer, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each axis, ``[queries, positions]``: whether a position is a key of a query, and the row of the table."""
    found = []
    for window, length in zip((layer.rows, layer.columns), layer.shape[1:3], strict=True):
        position, inside, row = window.keys(length, device)
        seen = torch.zeros(len(position), length + 1, dtype=torch.bool, device=device)
        rows = torch.zeros(len(position), length + 1, dtype=torch.long, device=device)
        at = torch.where(inside, position, length)  # those outside share a column that is cut off
        seen.scatter_(1, at, True)
        rows.scatter_(1, at, row)
        found += [seen[:, :length], rows[:, :length]]
    return tuple(found)


def flex(layer: Layer, device: str) -> Callable[..., Tensor] | None:
    """PyTorch's flex_attention, compiled, with a block mask and the table added by its score_mod."""
    if not _is_plain(layer) or layer.rows.boundary == "zero" or device != "cuda":
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # after some variants Dynamo compiles no more of them
    _, height, width, _, depth = layer.shape
    seen_rows, row_of, seen_columns, column_of = _seen(layer, device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen_rows[q // width, k // width] & seen_columns[q % width, k % width]

    mask = create_block_mask(mask_mod, None, None, height * width, height * width, device=device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + table[h, row_of[i // width, j // width], column_of[i % width, j % width]]

        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        out = compiled(q, k, v, score_mod=None if table is None else score_mod, block_mask=mask, scale=depth**-0.5)
        return out.transpose(1, 2).unflatten(1, (height, width))

    return call


def dense(layer: Layer, device: str) -> Callable[..., Tensor] | None:
    """scaled_dot_product_attention over the whole map with a mask that holds the table and hides what is not seen."""
    _, height, width, _, _ = layer.shape
    if not _is_plain(layer) or layer.rows.boundary == "zero" or height * width > DENSE_MASK_POSITIONS:
        return None
    seen_rows, row_of, seen_columns, column_of = _seen(layer, device)
    hidden = ~(seen_rows[:, None, :, None] & seen_columns[None, :, None, :]).flatten(2).flatten(0, 1)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        if table is None:
            mask = torch.zeros(hidden.shape, dtype=q.dtype, device=device)
        else:
            mask = table[:, row_of[:, None, :, None], column_of[None, :, None, :]].flatten(3).flatten(1, 2)
        mask = mask.masked_fill(hidden, float("-inf"))
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).unflatten(1, (height, width))

    return call


def windowed(layer: Layer) -> Callable[..., Tensor] | None:
    """scaled_dot_product_attention on the windows of a map that they tile, as one would cut them for it."""
    both, size = (layer.rows, layer.columns), layer.shape[1:3]
    tiled = all(
        w.kernel_size == w.stride and length % (w.kernel_size * w.dilation) == 0
        for w, length in zip(both, size, strict=True)
    )
    grid = all(w.kernel_size * w.dilation == length for w, length in zip(both, size, strict=True))
    block = all(w.dilation == 1 for w in both)
    if not _is_plain(layer) or not tiled or not (grid or block):
        return None
    p, p2 = (w.kernel_size for w in both)
    parts = tuple(length // w.kernel_size for length, w in zip(size, both, strict=True))

    def cut(t: Tensor) -> Tensor:  # B H W N D -> B*parts N P*P D
        if block:
            t = t.unflatten(2, (parts[1], p2)).unflatten(1, (parts[0], p)).permute(0, 1, 3, 5, 2, 4, 6)
        else:
            t = t.unflatten(2, (p2, parts[1])).unflatten(1, (p, parts[0])).permute(0, 2, 4, 5, 1, 3, 6)
        return t.flatten(4, 5).flatten(0, 2)

    def joined(t: Tensor, batch: int) -> Tensor:
        t = t.unflatten(0, (batch, *parts)).unflatten(4, (p, p2))  # B R Q N P P D
        t = t.permute(0, 1, 4, 2, 5, 3, 6) if block else t.permute(0, 4, 1, 5, 2, 3, 6)
        return t.flatten(3, 4).flatten(1, 2)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        mask = None
        if table is not None:
            mask = expand_table(table, Window(p), Window(p2), (p, p2)).flatten(1, 2)
        return joined(F.scaled_dot_product_attention(*map(cut, (q, k, v)), attn_mask=mask), q.shape[0])

    return call


def separate(layer: Layer) -> Callable[..., Tensor] | None:
    """A mix in two steps of PyTorch and the aggregation of ours: what fusing the softmax is worth."""
    if layer.operation != "mix":
        return None
    return ours(layer, "tiled")


def peers_of(layer: Layer, device: str) -> Iterator[tuple[str, bool, Callable[[], Callable[..., Tensor] | None]]]:
    """(name, whether it has the bias, how to make it), the cheapest to make first."""
    yield "foveal", True, lambda: ours(layer, None)
    if device == "cuda" and windowed(layer) is not None:  # which the automatic choice leaves to PyTorch's kernels
        yield "foveal, triton", True, lambda: ours(layer, "triton")
    if layer.operation == "attention" and layer.bias != "none":
        yield "foveal, no bias", False, lambda: ours(dataclasses.replace(layer, bias="none"), None)
    yield "natten, no bias", False, lambda: natten(layer)
    yield "sdpa on windows", True, lambda: windowed(layer)
    yield "sdpa, dense mask", True, lambda: dense(layer, device)
    yield "separate softmax, tiled", True, lambda: separate(layer)
    yield "flex", True, lambda: flex(layer, device)


# ------------------------------------------------------------------------------------------------------------- parts


class Budget:
    """Seconds that a part may take."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def spent(self) -> bool:
        return time.monotonic() > self.end


def _differs(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach().float(), b.detach().float()
    return not float((a - b).norm()) <= TOLERANCE * float(b.norm())  # NaN differs


def layer_rows(
    case: LayersCase, clock: Clock, top: Ceilings, dtype: torch.dtype, budget: Budget, slow: bool
) -> Iterator[Row]:
    """A row for each layer, implementation and mode; ``slow``: of those alone that take long to make."""
    for layer in layers_of(case):
        if budget.spent:
            return
        tensors, grad = inputs_of(layer, clock.device, dtype)
        answers: dict[bool, Tensor] = {}
        if slow:
            with torch.no_grad():
                answers[True] = ours(layer, None)(*tensors)
        for name, with_bias, make in peers_of(layer, clock.device):
            if (name == "flex") != slow:
                continue
            if budget.spent:
                return
            labels = {
                "case": case.id, "operation": layer.operation, "map": layer.map, "heads": layer.shape[3],
                "depth": layer.shape[4], "rule": layer.rule, "bias": layer.bias if with_bias else "none",
                "boundary": layer.rows.boundary, "count": layer.count, "by": name,
            }  # fmt: skip
            empty = dict.fromkeys(("mode", "ms", "peak_mib", *COUNTED), "")
            try:
                call = make()
                if call is None:
                    continue
                forward, both = _modes(call, tensors if with_bias else tensors[:3], grad)
                answer = forward()
                if _differs(answer, answers.setdefault(with_bias, answer)):
                    yield {**labels, **empty, "note": "another answer than foveal's: not timed"}
                    continue
                del answer
                yield from _timed(labels, layer, {"forward": forward, "forward+backward": both}, clock, top)
            except Exception as error:  # noqa: BLE001 - of any library: it belongs in the table, and others follow
                yield {**labels, **empty, "note": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


COUNTED = ("mbytes", "gflop", "floor_ms", "share_of_floor")


def _timed(
    labels: Row, of: Layer | ConvCase, runs: dict[str, Callable[[], object]], clock: Clock, top: Ceilings
) -> Iterator[Row]:
    for mode, run in runs.items():
        moved, flops = (count(mode != "forward") for count in (of.bytes, of.flops))
        floor, taken = top.floor_ms(moved, flops), clock.median_ms(run)
        yield {
                **labels, "mode": mode, "ms": round(taken, 4), "peak_mib": clock.peak_mib(run),
                "mbytes": round(moved / 1e6, 2), "gflop": round(flops / 1e9, 2), "floor_ms": round(floor, 4),
                "share_of_floor": round(floor / taken, 3), "note": "",
            }  # fmt: skip


def conv_rows(case: ConvCase, clock: Clock, top: Ceilings, dtype: torch.dtype) -> Iterator[Row]:
    """cuDNN's depthwise convolution, in both memory formats."""
    shape = (case.batch, case.channels, case.size, case.size)
    for layout, name in ((torch.channels_last, "channels_last"), (torch.contiguous_format, "contiguous")):
        x = torch.randn(shape, device=clock.device).to(dtype).contiguous(memory_format=layout)
        weight = torch.randn(case.channels, 1, case.kernel_size, case.kernel_size, device=clock.device).to(dtype)
        call = partial(F.conv2d, padding=case.kernel_size // 2, groups=case.channels)
        forward, both = _modes(call, [x, weight], torch.randn_like(x))
        labels = {"case": case.id, "by": f"cudnn, {name}"}
        yield from _timed(labels, case, {"forward": forward, "forward+backward": both}, clock, top)


def halo_rows(case: HaloCase, clock: Clock, top: Ceilings, dtype: torch.dtype) -> Iterator[Row]:
    """Halo attention with its projections, timm's module and ours on the same parameters."""
    for label, (module, shape) in halo_layers(case).items():
        module = module.to_empty(device=clock.device).train()
        module._forward_hooks.clear()
        generator = torch.Generator(clock.device).manual_seed(0)
        with torch.no_grad():
            for p in module.parameters():
                p.normal_(std=p.shape[1] ** -0.5, generator=generator)
        module = module.to(dtype)
        x = torch.randn(shape, generator=generator, device=clock.device).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        parameters, answers = list(module.parameters()), []
        for name, net in (("foveal", HaloAttention2d.from_timm(module)), ("timm", module)):
            with torch.no_grad():
                answers.append(net(x))
            grad, leaf = torch.ones_like(answers[-1]), x.clone().requires_grad_(True)

            def forward(net: nn.Module = net, x: Tensor = x) -> Tensor:
                with torch.no_grad():
                    return net(x)

            def both(net: nn.Module = net, leaf: Tensor = leaf, grad: Tensor = grad) -> tuple[Tensor, ...]:
                return torch.autograd.grad(net(leaf), [leaf, *parameters], grad)  # noqa: B023

            labels = {"case": case.id, "layer": label, "by": name}
            if _differs(answers[-1], answers[0]):
                raise RuntimeError(f"{case.id}, {label}: timm's answer differs from ours; not timed")
            for mode, run in (("forward", forward), ("forward+backward", both)):
                yield {**labels, "mode": mode, "ms": round(clock.median_ms(run), 4), "peak_mib": clock.peak_mib(run)}


def model_rows(case: SpeedCase, clock: Clock, dtype: torch.dtype, compiled: bool) -> Iterator[Row]:
    """Images per second, inference with weights in ``dtype``, training with autocast and a step of SGD."""
    labels = {"model": case.model, "peer": case.peer, "input": f"{case.batch}x3x{case.size}x{case.size}"}
    labels["run"] = "compiled" if compiled else "eager"
    x = torch.randn(case.batch, 3, case.size, case.size, device=clock.device)
    x = x.contiguous(memory_format=torch.channels_last)
    for mode in ("inference", "training"):
        torch.manual_seed(0)
        net: nn.Module = timm.create_model(case.model, num_classes=1000).to(clock.device)
        net = net.to(memory_format=torch.channels_last)
        try:
            if mode == "inference":
                net, given = net.eval().to(dtype), x.to(dtype)
                fast = torch.compile(net, backend=clock.compiler) if compiled else net

                def step(fast=fast, given=given) -> Tensor:
                    with torch.inference_mode():
                        return fast(given)

            else:
                net.train()
                fast = torch.compile(net, backend=clock.compiler) if compiled else net
                optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
                target = torch.randint(1000, (case.batch,), device=clock.device)

                def step(fast=fast, optimizer=optimizer, target=target) -> Tensor:
                    with torch.autocast(clock.device, dtype):
                        loss = F.cross_entropy(fast(x).float(), target)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    return loss

            taken = clock.median_ms(step, queued=False)
            memory, note = clock.peak_mib(step), ""
        except Exception as error:  # noqa: BLE001 - such as a compiler's: it belongs in the table, and others follow
            taken, memory, note = math.nan, "", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        rate = "" if math.isnan(taken) else round(1e3 * case.batch / taken, 1)
        ms = "" if math.isnan(taken) else round(taken, 2)
        yield {**labels, "mode": mode, "images_per_second": rate, "ms": ms, "peak_mib": memory, "note": note}
        del net
        torch.compiler.reset()


# ---------------------------------------------------------------------------------------------------- what they say


def geometric_means(rows: Sequence[Row]) -> list[str]:
    """How many times faster ours is than each peer, over the layers that both ran; of memory, how many times less."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    key = ("case", "map", "heads", "rule", "mode")
    own = {tuple(str(row[k]) for k in key): row for row in rows if row["by"] == "foveal" and row["ms"] != ""}
    for row in rows:
        mine = own.get(tuple(str(row[k]) for k in key))
        if mine is None or row is mine or row["ms"] == "":
            continue
        memory = math.nan
        if row["peak_mib"] != "" and mine["peak_mib"] != "":
            memory = max(float(row["peak_mib"]), 0.1) / max(float(mine["peak_mib"]), 0.1)
        times = float(row["ms"]) / float(mine["ms"])
        found.setdefault((str(row["by"]), str(row["mode"])), []).append((times, memory))
    lines = []
    for (peer, mode), pairs in sorted(found.items()):
        speed, memory = (statistics.geometric_mean(x) for x in zip(*pairs, strict=True))
        lines.append(f"{mode}: {speed:.2f} times as fast as {peer}, 1/{memory:.2f} of its memory, {len(pairs)} layers")
    return lines


def model_ratios(rows: Sequence[Row]) -> list[str]:
    """Images per second of ours over its peer's in the same run."""
    rates = {(row["model"], row["run"], row["mode"]): row["images_per_second"] for row in rows}
    lines = []
    for row in rows:
        other = rates.get((row["peer"], row["run"], row["mode"]), "")
        if row["images_per_second"] != "" and other != "":
            ratio = float(row["images_per_second"]) / float(other)
            lines.append(f"{row['model']}, {row['run']} {row['mode']}: {ratio:.2f} times {row['peer']}")
    return lines


def gpu_environment() -> dict[str, str]:
    """What a figure depends on."""
    found = {**environment(), "timm": timm.__version__, "triton": _package("triton") or "not installed"}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": f"{major}.{minor}",
            "cuda": str(torch.version.cuda),
        }
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", NOT_COMPILED)
        yield


def measure(options: argparse.Namespace) -> int:
    device, dtype = options.device, torch.bfloat16
    clock = Clock(device, options.milliseconds)
    torch.backends.cudnn.benchmark = True
    told = gpu_environment()
    print("  ".join(f"{key} {value}" for key, value in told.items()), flush=True)
    top = ceilings(clock, dtype, options.tiny)
    print(f"copy {top.bandwidth / 1e12:.3f} TB/s, matrix product {top.rate / 1e12:.1f} TFLOP/s, {dtype}", flush=True)
    measured = {"copy_tb_s": f"{top.bandwidth / 1e12:.4f}", "matmul_tflop_s": f"{top.rate / 1e12:.2f}"}

    def collect(part: str, rows: Iterator[Row], table: list[Row]) -> list[Row]:
        for row in rows:
            table.append(row)
            write_csv(options.output / f"gpu-{part}.csv", table, {**told, **measured})
            shown = [str(row[k]) for k in row if k in SHOWN and row[k] != ""]
            print(f"{part}: {', '.join(shown)}", flush=True)
        return table

    failed = 0
    for part in options.parts:
        budget, table = Budget(options.seconds * SHARES[part] / sum(SHARES[p] for p in options.parts)), []
        cases = [case for case in (TINY if options.tiny else FULL)[part] if options.only in case.id]
        # what takes long to compile comes last
        for late, case in itertools.product((False, True) if part in ("layers", "models") else (False,), cases):
            if budget.spent:
                print(f"{part}: the seconds are up; what is not in the table was not measured", flush=True)
                break
            if part == "layers":
                rows = layer_rows(case, clock, top, dtype, budget, late)
            elif part == "models":
                rows = model_rows(case, clock, dtype, late)
            else:
                rows = (conv_rows if part == "convs" else halo_rows)(case, clock, top, dtype)
            try:
                collect(part, rows, table)
            except Exception as error:  # noqa: BLE001 - what else is measured must not be lost to it
                failed += 1
                print(f"{part}: {case.id} fails: {type(error).__name__}: {error}", flush=True)
        for line in {"layers": geometric_means, "models": model_ratios}.get(part, lambda _: [])(table):
            print(line, flush=True)
        failed += sum(bool(row.get("note")) and str(row.get("by", "foveal")).startswith("foveal") for row in table)
    return 1 if failed else 0


SHOWN = (
    "case",
    "layer",
    "model",
    "run",
    "map",
    "rule",
    "by",
    "mode",
    "ms",
    "share_of_floor",
    "images_per_second",
    "note",
)
FULL = {"layers": GPU_LAYERS, "convs": GPU_CONVS, "halo": GPU_HALO, "models": GPU_MODELS}
TINY = {"layers": TINY_LAYERS, "convs": TINY_CONVS, "halo": TINY_HALO, "models": TINY_MODELS}
SHARES = {"layers": 10, "convs": 1, "halo": 1, "models": 10}  # of the seconds
PARTS = tuple(SHARES)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="foveal bench gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", default="", help="cases whose name holds this text, such as dinat_tiny")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the tables")
    parser.add_argument("--seconds", type=float, default=360.0, help="for all parts together")
    parser.add_argument("--milliseconds", type=float, default=40.0, help="of timed calls for each figure")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, with --tiny")
    parser.add_argument("--tiny", action="store_true", help="very small cases, whose figures mean nothing")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is for dry runs: give --tiny as well; `foveal bench kernels` measures a CPU")
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"foveal bench gpu needs a CUDA GPU; torch {torch.__version__} (built for CUDA {torch.version.cuda}) sees "
            f"{torch.cuda.device_count()} of them",
            file=sys.stderr,
        )
        return 2
    with _quiet():
        return measure(options)


if __name__ == "__main__":
    sys.exit(main())
