"""`foveal bench kernels|aggregate|halo|models|zoo`: ours and peers, the same inputs, one process, one table, one CSV.

Nothing is timed before its answer, and its gradients, have been compared with the other's, except for a peer that is a
different model. Timings are medians of interleaved rounds; memory is the rise of the process's resident set above what
it held before the call.
"""

from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import datetime
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timm.layers.halo_attn import HaloAttn
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .._version import __version__
from ..backbones import list_models
from ..backbones.attention import HaloAttention2d
from ..kernels import Call, RelativePositionBias, neighborhood_aggregate, neighborhood_attention, recording
from ..kernels.aggregate.softmax import expand_table
from ..kernels.neighborhood.natten import installed_version
from .cases import (
    DINAT_TINY,
    HALO,
    MODELS,
    OVERLOCK_XT,
    ZOO_PEERS,
    AggregateCase,
    AttentionCase,
    HaloCase,
    ModelCase,
    SpeedCase,
)

TOLERANCE = 1e-5  # float32, relative to the largest value
MODEL_TOLERANCE = 1e-4  # the same, of a whole model


def environment() -> dict[str, str]:
    """What a figure depends on: machine, threads, versions, date."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "foveal": __version__,
        "torch": torch.__version__,
        "natten": installed_version() or "not installed",
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }


def median_ms(
    calls: dict[str, Callable[[], object]], rounds: int, slow: float = 1.0, settle: float = 0.0
) -> dict[str, float]:
    """Median milliseconds of each call, in interleaved rounds; one that takes over ``slow`` seconds gets three only.

    ``settle``: seconds of rest and one call untimed before each that is timed, where the calls are of several runtimes:
    the threads of one keep spinning for a while after its answer, and would take the cores from the next.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # warm-up
    for i in range(rounds):
        for name, call in calls.items():
            if i >= 3 and times[name][0] > slow:
                continue
            if settle:
                time.sleep(settle)
                call()
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def extra_memory_mib(call: Callable[[], object]) -> float:
    """Peak resident memory during the call above what was resident before it, MiB (Linux)."""
    if sys.platform != "linux":
        return float("nan")

    def status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise RuntimeError(f"/proc/self/status has no {field}")

    ctypes.CDLL("libc.so.6").malloc_trim(0)  # hand back what earlier calls left in the heap
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    result = call()
    peak = status("VmHWM")
    del result
    return max(peak - before, 0) / 1024


def activation_mib(call: Callable[[], tuple[Tensor, ...] | Tensor]) -> float:
    """Peak of what PyTorch allocates on the CPU during the call, above what the call returns, MiB."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes of start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    now = peak = 0
    events = (e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    returned = (result,) if isinstance(result, Tensor) else result
    return (peak - sum(t.nbytes for t in returned)) / 2**20


# ----------------------------------------------------------------------------------------------- comparisons

Calls = dict[str, Callable[[], object]]


def _agrees(got, want, limit: float) -> bool:
    """Whether every tensor is within ``limit`` of the largest value of its counterpart; NaN is not."""
    pairs = zip((got,) if isinstance(got, Tensor) else got, (want,) if isinstance(want, Tensor) else want, strict=True)
    return all(float((a - b).abs().max() / b.abs().max()) <= limit for a, b in pairs)


def check(name: str, forward: Calls, both: Calls, judge: str, limit: float = TOLERANCE) -> None:
    """Compare what all calls return with what ``judge`` returns.

    Raises:
        RuntimeError: one of them differs by more than ``limit`` of the largest value.
    """
    for what, calls in (("forward", forward), ("forward and backward", both)):
        want = calls[judge]()
        wrong = [other for other, call in calls.items() if other != judge and not _agrees(call(), want, limit)]
        if wrong:
            raise RuntimeError(f"{name}, {what}: {', '.join(wrong)} differs from {judge}; not timed")


def measure(
    labels: dict[str, object],
    forward: Calls,
    both: Calls,
    rounds: int,
    column: str,
    memory: Callable[[Callable[[], Any]], float] | None = extra_memory_mib,
) -> dict[str, dict[str, object]]:
    """One row for each call: the labels, its name under ``column``, milliseconds and, if measured, MiB."""
    times, times_both = median_ms(forward, rounds), median_ms(both, rounds)
    rows = {}
    for name in forward:
        row = {**labels, column: name, "forward_ms": round(times[name], 2), "forward_backward_ms": ""}
        if name in both:
            row["forward_backward_ms"] = round(times_both[name], 2)
        if memory:
            row["forward_extra_mib"] = round(memory(forward[name]), 2)
            row["forward_backward_extra_mib"] = round(memory(both[name]), 2) if name in both else ""
        rows[name] = row
    return rows


def beside_peer(rows: dict[str, dict[str, object]], peer: str) -> list[dict[str, object]]:
    """The rows with each figure as a share of the peer's."""
    for row in rows.values():
        figures = [key for key in row if key.endswith(("_ms", "_mib"))]
        for key in figures:
            below = rows[peer][key]
            row[f"{key.rpartition('_')[0]}_over_peer"] = round(row[key] / below, 3) if below else ""
    return list(rows.values())


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _modes(
    call: Callable[[list[Tensor]], Tensor], tensors: list[Tensor], grad: Tensor, parameters: Sequence[Tensor] = ()
) -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]:
    """``call`` on the tensors: forward alone, and with the gradients of all of them and of the parameters."""
    leaves = [t.detach().clone().requires_grad_(True) for t in tensors]

    def forward() -> Tensor:
        with torch.no_grad():
            return call(tensors)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(leaves), [*leaves, *parameters], grad)

    return forward, both


# -------------------------------------------------------------------------------------------------- sections


def kernel_rows(case: AttentionCase, rounds: int) -> list[dict[str, object]]:
    """Neighborhood attention: ours, the gather that any user could write, and NATTEN where it can."""
    shape = (case.batch, case.size, case.size, case.heads, case.depth)
    q, k, v, grad = (_normal(*shape, seed=i) for i in range(4))
    table = _normal(case.heads, *(2 * (2 * case.kernel_size - 1,)), seed=4)
    rows = []
    for with_bias in (False, True):

        def call(tensors: list[Tensor], backend: str, with_bias: bool = with_bias) -> Tensor:
            bias = RelativePositionBias(tensors[3]) if with_bias else None
            options = {"kernel_size": case.kernel_size, "dilation": case.dilation}
            return neighborhood_attention(*tensors[:3], bias=bias, backend=backend, **options)

        tensors = [q, k, v, table] if with_bias else [q, k, v]
        forward, both = {}, {}
        for name, backend in (("tiled", "tiled"), ("gather", "reference"), ("natten", "natten")):
            if name == "natten" and (with_bias or installed_version() is None):
                continue
            forward[name], both[name] = _modes(partial(call, backend=backend), tensors, grad)
        both.pop("natten", None)  # it has no gradient on a CPU
        check(f"{case.id}, bias {with_bias}", forward, both, "gather")
        labels = {"layer": case.layer, "map": case.id, "heads": case.heads, "bias": "table" if with_bias else "none"}
        found = measure(labels, forward, both, rounds, "backend")
        for row in found.values():
            for peer in ("natten", "gather"):
                known = peer in found
                row[f"times_{peer}"] = round(found[peer]["forward_ms"] / row["forward_ms"], 1) if known else ""
        rows += found.values()
    return rows


def unfold_aggregate(weights: Tensor, v: Tensor, *, kernel_size: int | tuple[int, int]) -> Tensor:
    """Neighborhood aggregation as it is done without a kernel for it, boundary "shift", odd kernels, on
    [B, H, W, heads, D]: all windows inside the map unfolded, and the outer ones repeated for the border."""
    rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    batch, height, width, heads, depth = v.shape
    windows = F.unfold(v.permute(0, 3, 4, 1, 2).flatten(1, 2), (rows, columns))
    windows = windows.unflatten(-1, (height - rows + 1, width - columns + 1))
    windows = F.pad(windows, (columns // 2, columns // 2, rows // 2, rows // 2), mode="replicate")
    windows = windows.reshape(batch, heads, depth, rows * columns, height, width)
    return torch.einsum("bhwnk,bndkhw->bhwnd", weights, windows)


def unfold_mix(call: Call) -> Tensor:
    """`unfold_aggregate` in place of a `neighborhood_mix`."""
    logits, v, table, kernel_bias = call.tensors
    bias = expand_table(table, call.problem.rows, call.problem.columns, v.shape[1:3]) + kernel_bias
    weights = (logits.permute(0, 3, 1, 2, 4) + bias).softmax(-1).permute(0, 2, 3, 1, 4)
    return unfold_aggregate(weights, v, kernel_size=call.problem.kernel_size)


def aggregate_rows(case: AggregateCase, rounds: int) -> list[dict[str, object]]:
    """Neighborhood aggregation: ours and the unfolded windows."""
    lead = (case.batch, case.rows, case.columns, case.heads)
    weights = _normal(*lead, case.kernel_size**2).softmax(-1)
    v, grad = (_normal(*lead, case.depth, seed=seed) for seed in (1, 2))
    forward, both = {}, {}
    for name, function in (("tiled", neighborhood_aggregate), ("unfold", unfold_aggregate)):

        def call(tensors: list[Tensor], function=function) -> Tensor:
            return function(*tensors, kernel_size=case.kernel_size)

        forward[name], both[name] = _modes(call, [weights, v], grad)
    check(case.id, forward, both, "unfold")
    labels = {"layer": case.layer, "batch": case.batch, "map": case.id, "heads": case.heads}
    return beside_peer(measure(labels, forward, both, rounds, "backend"), "unfold")


def halo_layers(case: HaloCase) -> dict[str, tuple[HaloAttn, tuple[int, ...]]]:
    """timm's halo attention modules and the shapes that they are given, each kind once."""
    with torch.device("meta"):
        net = timm.create_model(case.model).eval()
    found: dict[str, tuple[HaloAttn, tuple[int, ...]]] = {}

    def note(module: HaloAttn, inputs: tuple[Tensor], output: Tensor) -> None:
        rows, columns = inputs[0].shape[2:]
        stride = inputs[0].shape[2] // output.shape[2]
        label = f"{rows}x{columns} b{module.block_size} h{module.halo_size} s{stride}, {module.dim_out_v} channels"
        found.setdefault(label, (module, tuple(inputs[0].shape)))

    for module in net.modules():
        if isinstance(module, HaloAttn):
            module.register_forward_hook(note)
    net(torch.empty(case.batch, 3, case.size, case.size, device="meta"))
    return found


class Given(nn.Module):
    """Answers with a tensor that was put there, whatever it is asked."""

    answer: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.answer


def halo_rows(case: HaloCase, rounds: int) -> list[dict[str, object]]:
    """Halo attention, timm's and ours on the same parameters: the attention alone (queries, keys and values given), the
    module with its projections, and of either all layers together, each kind once."""
    rows: list[dict[str, object]] = []
    for label, (module, shape) in halo_layers(case).items():
        module = module.to_empty(device="cpu").train()
        module._forward_hooks.clear()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in module.parameters():
                p.normal_(std=p.shape[1] ** -0.5, generator=generator)
        x = _normal(*shape, seed=1)
        with torch.no_grad():
            # as a convolution in the channels_last memory format answers
            projected = [conv(x.contiguous(memory_format=torch.channels_last)) for conv in (module.q, module.kv)]
            grad = torch.randn_like(module(x))
        for part in ("attention", "module"):
            nets = {"foveal": HaloAttention2d.from_timm(module), "timm": copy.copy(module)}
            tensors = [x]
            if part == "attention":
                tensors = projected
                for net in nets.values():
                    net._modules = {**net._modules, "q": Given(), "kv": Given()}
            parameters = [p for name, p in module.named_parameters() if part == "module" or "rel" in name]
            forward, both = {}, {}
            for name, net in nets.items():

                def call(tensors: list[Tensor], net=net, x=x) -> Tensor:
                    if len(tensors) == 2:
                        net.q.answer, net.kv.answer = tensors
                    return net(tensors[0] if len(tensors) == 1 else x)

                forward[name], both[name] = _modes(call, tensors, grad, parameters)
            check(f"{case.id}, {label}, {part}", forward, both, "timm", 10 * TOLERANCE)
            labels = {"model": case.model, "input": case.size, "batch": case.batch, "layer": label, "part": part}
            found = measure(labels, forward, both, rounds, "by", activation_mib)
            rows += beside_peer(found, "timm")
    for part in ("attention", "module"):
        together = {}
        for name in ("foveal", "timm"):
            of = [row for row in rows if (row["part"], row["by"]) == (part, name)]
            row = {**of[0], "layer": "all, times summed, memory the largest"}
            for key in row:
                if key.endswith(("_ms", "_mib")):
                    row[key] = round((sum if key.endswith("_ms") else max)(each[key] for each in of), 2)
            together[name] = row
        rows += beside_peer(together, "timm")
    return rows


def model_rows(case: ModelCase, rounds: int) -> list[dict[str, object]]:
    """Whole models, inference and a training step without the optimiser."""
    x = _normal(case.batch, 3, case.size, case.size)
    nets = {case.ours: timm.create_model(case.ours).eval(), case.peer_name: timm.create_model(case.peer).eval()}
    ours, peer = nets.values()
    if case.same:
        ours.load_state_dict(peer.state_dict())
    forward, both = {}, {}
    for name, net in nets.items():
        mixing = partial(recording, unfold_mix) if case.unfold and net is peer else nullcontext

        def inference(net=net, mixing=mixing) -> Tensor:
            with torch.inference_mode(), mixing():
                return net(x)

        def training(net=net, mixing=mixing) -> Tensor:
            net.zero_grad(set_to_none=True)
            with mixing():
                loss = net(x).square().mean()
            loss.backward()
            return loss.detach()

        forward[name], both[name] = inference, training
    if case.same:
        check(case.id, forward, both, case.peer_name, MODEL_TOLERANCE)
    labels = {"input": f"{case.batch}x3x{case.size}x{case.size}"}
    rows = measure(labels, forward, both, rounds, "model", memory=None)
    return beside_peer(rows, case.peer_name)


def zoo_rows(case: SpeedCase, rounds: int) -> list[dict[str, object]]:
    """One image through a model as it is created, and as it is deployed where that folds branches or norms."""
    x = _normal(case.batch, 3, case.size, case.size)
    nets = {"forward": timm.create_model(case.model).eval()}
    if hasattr(nets["forward"], "reparameterize"):
        nets["deployed"] = copy.deepcopy(nets["forward"]).reparameterize()
    with torch.inference_mode():
        times = median_ms({name: partial(net, x) for name, net in nets.items()}, rounds)
    row = {"model": case.model, "input": f"{case.batch}x3x{case.size}x{case.size}"}
    return [row | {f"{name}_ms": round(times[name], 1) if name in times else "" for name in ("forward", "deployed")}]


def zoo_cases() -> Iterator[SpeedCase]:
    """Every model of ours, at the input size that it is made for, and timm's that people know, batch 1."""
    for name in [name for name in list_models() if not name.startswith("test_")] + list(ZOO_PEERS):
        yield SpeedCase(name, get_pretrained_cfg(name).input_size[1], batch=1)


@dataclass(frozen=True)
class Section:
    """What `foveal bench NAME` measures: each case gives some rows."""

    cases: tuple[Any, ...]
    rows: Callable[[Any, int], list[dict[str, object]]]


SECTIONS = {
    "kernels": Section(DINAT_TINY, kernel_rows),
    "aggregate": Section(OVERLOCK_XT, aggregate_rows),
    "halo": Section(HALO, halo_rows),
    "models": Section(MODELS, model_rows),
    "zoo": Section(tuple(zoo_cases()), zoo_rows),
}


# ----------------------------------------------------------------------------------------------------- shell


TEXT = ("layer", "map", "backend", "model", "part", "by", "case", "loop")


def print_table(title: str, rows: list[dict[str, object]], console: Console) -> None:
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="left" if key in TEXT else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


def write_csv(path: Path, rows: list[dict[str, object]], extra: dict[str, str] | None = None) -> None:
    """Rows with the environment, or what else they depend on, in every line; under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    extra = environment() if extra is None else extra
    try:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *extra], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **extra} for row in rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str], more: Mapping[str, Section] | None = None) -> int:
    """Runs ``foveal bench``; ``more``: sections of parts that this package does not import."""
    sections = SECTIONS | dict(more or {})
    parser = argparse.ArgumentParser(
        prog="foveal bench",
        description=__doc__.split("\n\n")[0],
        epilog="Others have a --help of their own: foveal bench data, gpu, scaling, plots.",
    )
    parser.add_argument("what", choices=tuple(sections))
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; the median is printed (default 15)")
    parser.add_argument("--only", help="cases whose name holds this text, such as 56x56")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    warnings.filterwarnings("ignore", module="torch.nn.attention.flex_attention")  # NATTEN's CPU path, on every call
    section, rows = sections[options.what], []
    for case in section.cases:
        if not options.only or options.only in case.id:
            rows += section.rows(case, options.rounds)
            console.print(f"[dim]{case.id} done[/dim]")
    if not rows:
        console.print(f"no case of 'foveal bench {options.what}' holds {options.only!r}")
        return 2
    console.print("  ".join(f"{key} {value}" for key, value in environment().items()))
    print_table(f"foveal bench {options.what}", rows, console)
    if options.csv:
        write_csv(options.csv, rows)
        console.print(f"wrote {options.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
