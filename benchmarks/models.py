"""Whole models against their peers, one image through every model of the zoo, a model of each family by torch.compile,
and models against a matrix product: `foveal bench models|zoo|compiled|roofline`."""

from __future__ import annotations

import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from ..backbones import list_models
from ..backbones.profile import of_model
from ..backbones.replace import replace_attention
from ..figures import Figures, figures
from .cases import ZOO_PEERS, ModelCase
from .measure import Bench, Modes, Row, beside_peer, difference, resident_mib
from .peers import by_unfolding

TOLERANCE = 1e-4  # float32, relative to the largest value
PRODUCT = 4096, 384, 1536  # rows, inner and columns: the first layer of an MLP on 14x14 maps


def _modes(net: Any, x: Tensor, bench: Bench, compiled: bool, context: Callable[[], AbstractContextManager]) -> Modes:
    """Inference, and a training step without the optimizer.

    On a GPU in channels_last, with weights in bfloat16 or, for training, autocast; on a CPU always in evaluation mode,
    so that outputs can be compared.
    """
    deployed = net.eval()
    if bench.cuda:
        net, x = net.to(memory_format=torch.channels_last), x.float().contiguous(memory_format=torch.channels_last)
        deployed = copy.deepcopy(net).eval().to(bench.dtype)
        net.train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    images = x.to(bench.dtype)
    if compiled:
        net, deployed = (torch.compile(each, backend="inductor" if bench.cuda else "eager") for each in (net, deployed))

    def forward() -> Tensor:
        with torch.inference_mode(), context():
            return deployed(images)

    def both() -> Tensor:
        with context(), torch.autocast(bench.device, torch.bfloat16, enabled=bench.cuda):
            loss = net(x).float().square().mean()
        torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach()

    return forward, both


def _network(case: ModelCase, name: str, bench: Bench, compiled: bool = False) -> Modes:
    """The calls of a model of a case, by its name there."""
    own = name == case.own_name
    net = _created(case.model if own else case.peer)
    if case.same:  # for both, as what a process has freed counts in its resident set
        net.load_state_dict(_created(case.peer).state_dict())
    if own and case.way == "replace":
        replace_attention(net)
    context = nullcontext if own or case.way != "unfold" else by_unfolding
    x = bench.normal(case.batch, 3, case.size, case.size)
    return _modes(net.to(bench.device), x, bench, compiled, context)


def _created(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name)


def _call(case: ModelCase, name: str, mode: int) -> Callable[[], Any]:
    """Forward, or forward and backward, on a CPU; for `resident_mib`."""
    call = _network(case, name, Bench())[mode]
    assert call is not None
    return call


def model_rows(case: ModelCase, bench: Bench, compiled: bool = False) -> Iterator[Row]:
    """A model and its peer: milliseconds, images per second of inference, and the memory that PyTorch allocates; on a
    CPU for two forms of one model, with what a process of its own grows by."""
    torch.compiler.reset()
    names = [case.own_name, *filter(None, [case.peer_name])]
    calls = {name: _network(case, name, bench, compiled) for name in names}
    labels = {"input": f"{case.batch}x3x{case.size}x{case.size}", "run": "compiled" if compiled else "eager"}
    rows = list(
        bench.compare(
            labels,
            "model",
            calls,
            reference=case.peer_name if case.same else None,
            tolerance=TOLERANCE,
            memory=bench.cuda or case.same,
            queued=False,
        )
    )
    if case.same and not bench.cuda and sys.platform == "linux":
        for row, (mode, key) in itertools.product(rows, enumerate(("forward", "forward_backward"))):
            row[f"{key}_resident_mib"] = round(resident_mib(_call, case, row["model"], mode), 1)
    if case.peer:
        beside_peer(rows, rows[-1])
    for row in rows:
        yield {**row, "images_per_second": round(1e3 * case.batch / row["forward_ms"], 1) if row["forward_ms"] else ""}


def zoo_cases() -> tuple[ModelCase, ...]:
    """All our models at their default input size, and well-known ones of timm, batch 1."""
    names = [name for name in list_models() if not name.startswith("test_")] + list(ZOO_PEERS)
    return tuple(ModelCase(name, "", 1, get_pretrained_cfg(name).input_size[1]) for name in names)


def zoo_rows(case: ModelCase, bench: Bench) -> Iterator[Row]:
    """One image through a model as created, and reparameterized if it supports that."""
    x = bench.normal(case.batch, 3, case.size, case.size)
    nets: dict[str, Any] = {"forward": timm.create_model(case.model).eval()}
    if hasattr(nets["forward"], "reparameterize"):
        nets["deployed"] = copy.deepcopy(nets["forward"]).reparameterize()
    with torch.inference_mode():
        times = bench.median_ms({name: partial(net, x) for name, net in nets.items()})
    row = {"model": case.model, "input": f"{case.batch}x3x{case.size}x{case.size}"}
    yield row | {f"{name}_ms": round(times[name], 1) if name in times else "" for name in ("forward", "deployed")}


def compiled_cases() -> tuple[ModelCase, ...]:
    """The smallest model of each family, one image and eight."""
    least: dict[str, Figures] = {}
    for model in sorted(figures().values(), key=lambda model: model.macs):
        if not model.name.startswith("test_"):
            least.setdefault(model.family, model)
    return tuple(ModelCase(model.name, "", batch, model.input_size[1]) for model in least.values() for batch in (1, 8))


@torch.no_grad()
def compiled_rows(case: ModelCase, bench: Bench) -> Iterator[Row]:
    """A model by torch.compile over eager mode, inference in its deployed form: the shortest times. It is timed only if
    the outputs are equal."""
    torch.compiler.reset()
    net: Any = _created(case.model).eval()
    net = net.reparameterize() if hasattr(net, "reparameterize") else net
    x = bench.normal(case.batch, 3, case.size, case.size)
    compiled = torch.compile(net, fullgraph=True)
    apart = difference(compiled(x), net(x))
    if not apart <= TOLERANCE:  # NaN differs
        raise ArithmeticError(f"{case.id} compiled differs from eager mode by {apart:.1e}")
    times = bench.median_ms({"eager": partial(net, x), "compiled": partial(compiled, x)}, of=min)
    row: Row = {"model": case.model, "input": f"{case.batch}x3x{case.size}x{case.size}"}
    row |= {f"{name}_ms": round(taken, 2) for name, taken in times.items()}
    yield row | {"compiled_over_eager": round(times["compiled"] / times["eager"], 3)}


def roofline_rows(case: ModelCase, bench: Bench) -> Iterator[Row]:
    """GFLOP/s of a model and its peer over those of a matrix product, interleaved, from the shortest times.

    Times are CPU time over the number of threads: with one thread, of a machine that need not be idle.
    ``forward``: folded where the model can be, with weights of the dtype. ``forward_backward``: a training step without
    the optimizer, in training mode, for bfloat16 with autocast; it counts three times the FLOPs of the forward pass.
    """
    x = bench.normal(case.batch, 3, case.size, case.size).float()
    names = [case.model, *filter(None, [case.peer])]
    gflop = {name: dict(zip(("forward", "forward_backward"), _gflop(name, case), strict=True)) for name in names}
    for dtype in (torch.float32, torch.bfloat16):
        rows, inner, columns = PRODUCT
        a, b = (torch.randn(*shape).to(dtype) for shape in ((rows, inner), (inner, columns)))
        calls = {"product": partial(torch.mm, a, b)}
        for name in names:
            calls[f"{name} forward"], calls[f"{name} forward_backward"] = _steps(name, x, dtype)
        times = bench.median_ms(calls, of=min, timer=_cpu_time)
        rate = 2e-9 * rows * inner * columns / times["product"]  # GFLOP per millisecond
        found = []
        for name in names:
            row: Row = {"model": name, "input": f"{case.batch}x3x{case.size}x{case.size}", "dtype": str(dtype)[6:]}
            for mode, count in gflop[name].items():
                taken = times[f"{name} {mode}"]
                row |= {f"{mode}_ms": round(taken, 2), f"{mode}_share": round(count / taken / rate, 3)}
            found.append(row | {"gflop": round(gflop[name]["forward"], 3), "product_gflop_s": round(1e3 * rate, 1)})
        if case.peer:
            beside_peer(found, found[-1])
        yield from found


def _cpu_time() -> float:
    return time.process_time() / torch.get_num_threads()


def _gflop(name: str, case: ModelCase) -> tuple[float, float]:
    """GFLOP of a batch: of inference, and of a training step, whose layers may be more."""
    with torch.device("meta"):
        net = timm.create_model(name)
    image = (3, case.size, case.size)
    forward, training = (2e-9 * case.batch * of_model(net.train(mode), image).macs for mode in (False, True))
    return forward, 3 * training


def _steps(name: str, x: Tensor, dtype: torch.dtype) -> Modes:
    """Inference, and a training step without the optimizer, on a CPU."""
    torch.manual_seed(0)
    net: Any = timm.create_model(name)
    deployed = copy.deepcopy(net).eval()
    if hasattr(deployed, "reparameterize"):
        deployed = deployed.reparameterize()
    deployed, images, parameters = deployed.to(dtype), x.to(dtype), list(net.parameters())

    def forward() -> Tensor:
        with torch.inference_mode():
            return deployed(images)

    def both() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = net(x).float().square().mean()
        torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach()

    return forward, both
