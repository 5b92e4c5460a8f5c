"""`foveal bench kernels|models`: ours and the peers on the same inputs, in one process, as one table and one CSV.

A backend is only timed after its answer has been compared with the reference. Timings are medians of interleaved
rounds; memory is the rise of the process's resident set above what it held before the call.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .._version import __version__
from ..kernels import TableBias, neighborhood_attention
from ..kernels.neighborhood.natten import installed_version
from .cases import DINAT_TINY, MODELS, AttentionCase

TOLERANCE = 1e-5  # float32, relative to the largest value


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


def median_ms(calls: dict[str, Callable[[], object]], rounds: int, slow: float = 1.0) -> dict[str, float]:
    """Median milliseconds of each call, in interleaved rounds; one that takes over ``slow`` seconds gets three only."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # warm-up
    for i in range(rounds):
        for name, call in calls.items():
            if i >= 3 and times[name][0] > slow:
                continue
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


# --------------------------------------------------------------------------------------------------- kernels


def _attention_calls(case: AttentionCase, with_bias: bool) -> tuple[dict[str, Callable], dict[str, Callable]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (case.batch, case.size, case.size, case.heads, case.depth)
    q, k, v, grad = (normal(*shape) for _ in range(4))
    table = normal(case.heads, *(2 * (2 * case.kernel_size - 1,)))
    options = {"kernel_size": case.kernel_size, "dilation": case.dilation}
    leaves = [t.clone().requires_grad_(True) for t in (q, k, v, table)]

    def forward(backend: str) -> Tensor:
        with torch.no_grad():
            bias = TableBias(table) if with_bias else None
            return neighborhood_attention(q, k, v, bias=bias, backend=backend, **options)

    def both(backend: str) -> tuple[Tensor, ...]:
        q, k, v, table = leaves
        bias = TableBias(table) if with_bias else None
        out = neighborhood_attention(q, k, v, bias=bias, backend=backend, **options)
        return torch.autograd.grad(out, leaves if with_bias else leaves[:3], grad)

    names = {"tiled": "tiled", "gather": "reference"}
    fwd = {name: lambda b=b: forward(b) for name, b in names.items()}
    if not with_bias and installed_version() is not None:
        fwd["natten"] = lambda: forward("natten")
    return fwd, {name: lambda b=b: both(b) for name, b in names.items()}


def _agrees(got, want, limit: float) -> bool:
    """Whether every tensor is within ``limit`` of the largest value of its counterpart; NaN is not."""
    pairs = zip((got,) if isinstance(got, Tensor) else got, (want,) if isinstance(want, Tensor) else want, strict=True)
    return all(float((a - b).abs().max() / b.abs().max()) <= limit for a, b in pairs)


def kernel_rows(cases: tuple[AttentionCase, ...], rounds: int, console: Console) -> list[dict[str, object]]:
    rows = []
    for case in cases:
        for with_bias in (False, True):
            fwd, both = _attention_calls(case, with_bias)
            wrong = [n for n in fwd if not _agrees(fwd[n](), fwd["gather"](), TOLERANCE)]
            wrong += [n for n in both if not _agrees(both[n](), both["gather"](), TOLERANCE)]
            if wrong:
                raise RuntimeError(
                    f"{case.id}, bias {with_bias}: {', '.join(wrong)} differs from the reference; not timed"
                )
            forward, forward_backward = median_ms(fwd, rounds), median_ms(both, rounds)
            for name in fwd:
                rows.append(
                    {
                        "layer": case.layer,
                        "map": case.id,
                        "heads": case.heads,
                        "bias": "table" if with_bias else "none",
                        "backend": name,
                        "forward_ms": round(forward[name], 2),
                        "forward_backward_ms": round(forward_backward[name], 2) if name in both else "",
                        "forward_extra_mib": round(extra_memory_mib(fwd[name]), 1),
                        "forward_backward_extra_mib": round(extra_memory_mib(both[name]), 1) if name in both else "",
                        "times_natten": round(forward["natten"] / forward[name], 1) if "natten" in forward else "",
                        "times_gather": round(forward["gather"] / forward[name], 1),
                    }
                )
            console.print(f"[dim]{case.id} bias={'table' if with_bias else 'none'} done[/dim]")
    return rows


# ---------------------------------------------------------------------------------------------------- models


def model_rows(models, rounds: int, console: Console) -> list[dict[str, object]]:
    import timm

    from .. import backbones  # noqa: F401  registers ours

    rows = []
    for ours, peer, batch, size in models:
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        nets = {name: timm.create_model(name).eval() for name in (ours, peer)}

        def inference(net, x=x) -> Tensor:
            with torch.inference_mode():
                return net(x)

        def training(net, x=x) -> None:
            net.zero_grad(set_to_none=True)
            net(x).square().mean().backward()

        forward = median_ms({name: lambda net=net: inference(net) for name, net in nets.items()}, rounds)
        both = median_ms({name: lambda net=net: training(net) for name, net in nets.items()}, max(3, rounds // 3))
        for name in nets:
            rows.append(
                {
                    "model": name,
                    "input": f"{batch}x3x{size}x{size}",
                    "forward_ms": round(forward[name], 1),
                    "forward_backward_ms": round(both[name], 1),
                    "forward_over_peer": round(forward[name] / forward[peer], 3),
                    "forward_backward_over_peer": round(both[name] / both[peer], 3),
                }
            )
        console.print(f"[dim]{ours} beside {peer} done[/dim]")
    return rows


# ----------------------------------------------------------------------------------------------------- shell


def print_table(title: str, rows: list[dict[str, object]], console: Console) -> None:
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(
            key.replace("_", " "), justify="left" if key in ("layer", "map", "backend", "model") else "right"
        )
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Rows with the environment in every line, written under a temporary name and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    extra = environment()
    try:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *extra], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **extra} for row in rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="foveal bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("kernels", "models"))
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; the median is printed (default 15)")
    parser.add_argument("--only", help="cases whose name holds this text, such as 56x56")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    warnings.filterwarnings("ignore", module="torch.nn.attention.flex_attention")  # NATTEN's CPU path, on every call
    if options.what == "kernels":
        chosen = tuple(case for case in DINAT_TINY if not options.only or options.only in case.id)
        rows = kernel_rows(chosen, options.rounds, console) if chosen else []
    else:
        chosen = tuple(model for model in MODELS if not options.only or options.only in model[0])
        rows = model_rows(chosen, options.rounds, console) if chosen else []
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
