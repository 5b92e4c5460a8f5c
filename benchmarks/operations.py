"""The operations beside their peers: `foveal bench kernels|aggregate|windows|halo` on a CPU, `layers|windows|halo` on a
GPU."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from ..backbones.attention import HaloAttention2d
from ..kernels import (
    Call,
    DecomposedRelativePositionBias,
    RelativePositionBias,
    neighborhood_aggregate,
    neighborhood_attention,
    neighborhood_mix,
    recording,
)
from . import peers
from .cases import Layer, LayersCase, WindowCase
from .measure import TOLERANCE, Bench, Modes, Row, beside_peer, modes, reason
from .peers import Function

EAGER_SIZE = 64  # sides of windows above which eager attention takes too much memory


def layers_of(case: LayersCase) -> list[Layer]:
    """The distinct neighborhood operations of a model, in order."""
    found: dict[Layer, int] = {}

    def count(call: Call) -> Tensor:
        attend, problem = call.operation == "neighborhood_attention", call.problem
        kinds = {None: "none", RelativePositionBias: "table", DecomposedRelativePositionBias: "factored"}
        bias = kinds[problem.bias] if attend else "table"
        sizes = problem.shape, problem.query_size, problem.value_depth
        layer = Layer("attention" if attend else "mix", *sizes, problem.rows, problem.columns, bias)
        found[layer] = found.get(layer, 0) + 1
        v = call.tensors[2 if attend else 1]
        return v.new_empty(v.shape[0], *problem.query_size, *v.shape[3:])

    with torch.device("meta"):
        net = timm.create_model(case.model, num_classes=0).eval()
    with torch.no_grad(), recording(count):
        net(torch.empty(case.batch, 3, case.rows, case.columns, device="meta"))
    return [dataclasses.replace(layer, count=count) for layer, count in found.items()]


def inputs_of(layer: Layer, bench: Bench) -> tuple[list[Tensor], Tensor]:
    """Random inputs of a call, biases last, and a gradient of its output."""
    batch, height, width, heads, depth = layer.shape
    area = [w.kernel_size for w in (layer.rows, layer.columns)]
    grad = bench.normal(batch, *layer.queries, heads, layer.value_depth, seed=1)
    if layer.operation == "aggregate":
        weights = bench.normal(batch, height, width, heads, math.prod(area)).softmax(-1)
        return [weights, bench.normal(*layer.shape, seed=2)], grad
    table = [bench.normal(heads, *(2 * k - 1 for k in area), seed=3)]
    if layer.operation == "mix":
        # in the memory layout of q @ k^T per head
        logits = bench.normal(batch, heads, height, width, math.prod(area)).permute(0, 2, 3, 1, 4)
        return [logits, bench.normal(*layer.shape, seed=2), *table, bench.normal(math.prod(area), seed=4)], grad
    q = bench.normal(batch, *layer.queries, heads, depth)
    k, v = bench.normal(*layer.shape, seed=2), bench.normal(*layer.shape[:4], layer.value_depth, seed=4)
    if bench.cuda and q.shape == k.shape == v.shape:  # views of one projection, as in the models
        q, k, v = torch.stack((q, k, v), 3).unbind(3)
    factored = [bench.normal(2 * k - 1, depth, seed=3) * depth**-0.5 for k in area]
    return [q, k, v, *{"none": [], "table": table, "factored": factored}[layer.bias]], grad


def ours(layer: Layer, backend: str | None = None) -> Function:
    """The operation as a function of its tensors."""
    options = {**layer.options, "backend": backend}
    if layer.operation == "aggregate":
        return partial(neighborhood_aggregate, **options)
    if layer.operation == "mix":
        return lambda logits, v, table, kernel_bias: neighborhood_mix(
            logits, v, bias=RelativePositionBias(table), kernel_bias=kernel_bias, **options
        )
    bias = {
        "none": lambda: None,
        "table": RelativePositionBias,
        "factored": partial(DecomposedRelativePositionBias, counted=layer.rows.counted),
    }[layer.bias]
    return lambda q, k, v, *tensors: neighborhood_attention(q, k, v, bias=bias(*tensors), **options)


def kernel_rows(layer: Layer, bench: Bench) -> Iterator[Row]:
    """Neighborhood attention: ours in PyTorch and in C++, a plain gather, and NATTEN if it supports the call."""
    for bias in ("none", "table"):
        layer = dataclasses.replace(layer, bias=bias)
        tensors, grad = inputs_of(layer, bench)
        names = {"tiled": "tiled", "native": "native", "gather": "reference"}
        calls = {name: modes(ours(layer, backend), tensors, grad) for name, backend in names.items()}
        if bias == "none" and (peer := peers.natten(layer)) is not None:
            calls["natten"] = (modes(peer, tensors, grad)[0], None)  # it has no gradient on a CPU
        labels = {"layer": layer.name, "map": layer.id, "heads": layer.shape[3], "bias": bias}
        yield from bench.compare(labels, "backend", calls, reference="gather", peer="gather")


def aggregate_rows(layer: Layer, bench: Bench) -> Iterator[Row]:
    """Neighborhood aggregation: ours and by unfolding."""
    tensors, grad = inputs_of(layer, bench)
    unfold = partial(peers.unfold_aggregate, kernel_size=layer.options["kernel_size"])
    calls = {"tiled": modes(ours(layer), tensors, grad), "unfold": modes(unfold, tensors, grad)}
    labels = {"layer": layer.name, "batch": layer.shape[0], "map": layer.id, "heads": layer.shape[3]}
    yield from bench.compare(labels, "backend", calls, reference="unfold", peer="unfold")


def window_rows(case: WindowCase, bench: Bench) -> Iterator[Row]:
    """Attention in windows with a bias: ours, scaled_dot_product_attention with a dense bias, matrix products, and, on
    a map in one window, the bias as more channels."""
    layer = case.layer
    tensors, grad = inputs_of(layer, bench)
    batch, *_, heads, depth = layer.shape
    functions: dict[str, Function | None] = {"foveal": ours(layer)}
    if layer.bias == "table":
        functions |= {"sdpa": peers.windowed(layer), "eager": peers.windowed(layer, peers.eager)}
    else:
        functions |= {"sdpa": peers.factored(layer, False), "sdpa, in channels": peers.factored(layer, True)}
    if layer.rows.kernel_size > EAGER_SIZE:
        del functions["eager"]
    calls = {name: modes(function, tensors, grad) for name, function in functions.items() if function is not None}
    if not case.backward:
        calls = {name: (forward, None) for name, (forward, _) in calls.items()}
    labels = {"case": case.table, "batch": batch, "map": layer.map, "heads": heads, "depth": depth, "rule": layer.rule}
    yield from bench.compare(labels | {"bias": layer.bias}, "by", calls, reference="sdpa", peer="sdpa")


# ---------------------------------------------------------------------------------------- the layers of a model


def _candidates(layer: Layer, device: str, compiled: bool) -> Iterator[tuple[str, bool, Callable[[], Function | None]]]:
    """(name, whether it has the bias, constructor) of all implementations of a layer except our default."""
    if compiled:
        yield "flex", True, lambda: peers.flex(layer, device)
        return
    if device == "cuda" and peers.windowed(layer) is not None:  # the automatic choice uses PyTorch's kernels
        yield "foveal, triton", True, lambda: ours(layer, "triton")
    if layer.operation == "mix":
        yield "separate softmax, tiled", True, lambda: ours(layer, "tiled")
    yield "sdpa on windows", True, lambda: peers.windowed(layer)
    yield "sdpa, dense mask", True, lambda: peers.dense(layer, device)
    yield "natten, no bias", False, lambda: peers.natten(layer)


def layer_rows(case: LayersCase, bench: Bench, compiled: bool = False) -> Iterator[Row]:
    """All distinct layers of a model: ours, with and without bias, and all peers; ``compiled``: flex_attention."""
    for layer in layers_of(case):
        if bench.spent:
            return
        tensors, grad = inputs_of(layer, bench)
        labels = {
            "case": case.id,
            "operation": layer.operation,
            "map": layer.map,
            "heads": layer.shape[3],
            "depth": layer.shape[4],
            "rule": layer.rule,
            "bias": layer.bias,
            "boundary": layer.rows.boundary,
            "count": layer.count,
        }
        plain = dataclasses.replace(layer, bias="none")
        calls = {True: {"foveal": modes(ours(layer), tensors, grad)}, False: {}}
        if layer.operation == "attention" and layer.bias != "none" and not compiled:
            calls[False]["foveal, no bias"] = modes(ours(plain), tensors[:3], grad)
        for name, with_bias, make in _candidates(layer, bench.device, compiled):
            try:
                function = make()
            except Exception as error:  # noqa: BLE001 - of any library: it belongs in the table, and others follow
                yield {**labels, "by": name, "note": reason(error)}
                continue
            if function is not None:
                same = with_bias or layer.bias == "none"
                calls[same][name] = modes(function, tensors if same else tensors[:3], grad)
        for with_bias, group in calls.items():
            if not group or (compiled and len(group) == 1):
                continue
            reference = "foveal" if with_bias else "foveal, no bias"
            note = {} if with_bias else {"bias": "none"}
            for row in bench.compare({**labels, **note}, "by", group, reference=reference, work=layer):
                if not (compiled and row["by"] == "foveal"):  # already in the table
                    yield row


# ---------------------------------------------------------------------------------------------- halo attention


def halo_layers(case: LayersCase) -> dict[str, tuple[HaloAttn, tuple[int, ...]]]:
    """timm's distinct halo attention modules and the shapes of their inputs."""
    with torch.device("meta"):
        net = timm.create_model(case.model).eval()
    found: dict[str, tuple[HaloAttn, tuple[int, ...]]] = {}

    def note(module: HaloAttn, inputs: tuple[Tensor], output: Tensor) -> None:
        rows, columns = inputs[0].shape[2:]
        stride = inputs[0].shape[2] // output.shape[2]
        label = f"{rows}x{columns} b{module.block_size} h{module.halo_size} s{stride}, {module.dim_out_v} channels"
        found.setdefault(label, (module, tuple(inputs[0].shape)))

    handles = [m.register_forward_hook(note) for m in net.modules() if isinstance(m, HaloAttn)]
    net(torch.empty(case.batch, 3, case.rows, case.columns, device="meta"))
    for handle in handles:
        handle.remove()
    return found


class Given(nn.Module):
    """Replaces a projection: its output is set from outside."""

    output: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.output


def _halo_calls(module: HaloAttn, x: Tensor, part: str) -> dict[str, Modes]:
    """Ours and timm's with the same parameters, as the whole module or as the attention of given q, k and v."""
    nets = {"foveal": HaloAttention2d.from_timm(module), "timm": copy.copy(module)}
    tensors = [x]
    with torch.no_grad():
        grad = torch.randn_like(module(x))
    if part == "attention":
        with torch.no_grad():  # in channels_last, as a convolution returns them
            tensors = [conv(x.contiguous(memory_format=torch.channels_last)) for conv in (module.q, module.kv)]
        for net in nets.values():
            net._modules = {**net._modules, "q": Given(), "kv": Given()}
    parameters = [p for name, p in module.named_parameters() if part == "module" or "rel" in name]

    def call(*given: Tensor, net: Any) -> Tensor:
        if len(given) == 2:
            net.q.output, net.kv.output = given
        return net(given[0] if len(given) == 1 else x)

    return {name: modes(partial(call, net=net), tensors, grad, parameters) for name, net in nets.items()}


def halo_rows(case: LayersCase, bench: Bench) -> Iterator[Row]:
    """Halo attention, timm's and ours with the same parameters: the attention alone (q, k, v given), the module with
    its projections, and for both the total over the distinct layers."""
    rows: list[Row] = []
    for label, (module, shape) in halo_layers(case).items():
        module = module.to_empty(device=bench.device).to(bench.dtype).train()
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(bench.normal(*p.shape) * p.shape[1] ** -0.5)
        x = bench.normal(*shape, seed=1)
        if bench.cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        for part in ("attention", "module"):
            labels = {"model": case.model, "input": case.rows, "batch": case.batch, "layer": label, "part": part}
            calls = _halo_calls(module, x, part)
            limit = (1 if bench.cuda else 10) * TOLERANCE[bench.dtype]
            found = list(bench.compare(labels, "by", calls, reference="timm", peer="timm", tolerance=limit))
            rows += found
            yield from found
    if any(row.get("note") for row in rows):
        return
    for part in ("attention", "module"):
        together = [
            _all_layers([row for row in rows if (row["part"], row["by"]) == (part, by)]) for by in ("foveal", "timm")
        ]
        beside_peer(together, together[1])
        yield from together


def _all_layers(rows: list[Row]) -> Row:
    total = {**rows[0], "layer": "all, times summed, memory the largest"}
    for key in total:
        if key.endswith(("_ms", "_mib")):
            total[key] = round((sum if key.endswith("_ms") else max)(each[key] for each in rows), 2)
    return total
