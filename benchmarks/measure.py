"""Measurements of `foveal bench`: interleaved timing, peak memory and comparison of outputs, on a CPU or a CUDA GPU.

An implementation is timed only if its outputs, and on a CPU its gradients, match the reference. Times are medians of
interleaved rounds: wall clock on a CPU, CUDA events with a flushed L2 cache on a GPU. Memory is the peak of PyTorch's
allocations during a call, without what is allocated before it and what it returns.
"""

from __future__ import annotations

import csv
import datetime
import functools
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .._version import __version__
from ..files import atomic
from .cases import Layer

Row = dict[str, Any]
Call = Callable[[], Any]
Modes = tuple[Call, Call | None]  # forward; forward and backward, if there is one

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of outputs, relative to the largest value
UNCOMPILED_FLEX = ".*flex_attention called without torch.compile"


class Bench:
    """Measures calls on one device.

    Args:
        rounds: maximum rounds of timing; a call stops after 5 seconds (on a GPU 40 ms) in total and at least 3 (5)
            rounds.
        seconds: until `spent`.
        exports: a folder that keeps exported models, and may have some.
    """

    def __init__(
        self, device: str = "cpu", rounds: int = 15, seconds: float = math.inf, exports: Path | None = None
    ) -> None:
        self.device, self.rounds, self.exports = device, rounds, exports
        self.cuda = device == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self._fewest, self._enough = (5, 0.04) if self.cuda else (3, 5.0)
        self._deadline = time.monotonic() + seconds
        self._l2 = torch.empty(2**26 if self.cuda else 0, dtype=torch.int32, device=device)

    @property
    def spent(self) -> bool:
        return time.monotonic() > self._deadline

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)

    def median_ms(
        self,
        calls: Mapping[str, Call],
        *,
        queued: bool = True,
        settle: float = 0.0,
        timer: Callable[[], float] = time.perf_counter,
        of: Callable[[Sequence[float]], float] = statistics.median,
    ) -> dict[str, float]:
        """Median milliseconds of each call.

        Args:
            queued: on a GPU, exclude the host's launch time.
            settle: seconds of sleep and an untimed call before each timed one, for calls of several runtimes: the
                threads of one keep spinning for a while and would slow down the next.
            timer: on a CPU.
            of: instead of the median.
        """
        for call in calls.values():
            for _ in range(3 if self.cuda else 1):
                call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(self.rounds):
            for name in sorted(calls, reverse=bool(number % 2)):  # alternate the order
                if len(times[name]) >= self._fewest and sum(times[name]) > self._enough:
                    continue
                if settle:
                    time.sleep(settle)
                    calls[name]()
                times[name].append(self._once(calls[name], queued, timer))
        return {name: 1e3 * of(taken) for name, taken in times.items()}

    def _once(self, call: Call, queued: bool, timer: Callable[[], float]) -> float:
        """Seconds of a call."""
        if not self.cuda:
            begin = timer()
            call()
            return timer() - begin
        self._l2.zero_()
        if queued:  # cycles, about 2 ms in which the host launches the call
            torch.cuda._sleep(4_000_000)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_mib(self, call: Call) -> float:
        """Peak of PyTorch's allocations during the call, without its outputs, in MiB."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = call()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages at start and stop
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
                result = call()
            now = peak = 0
            results: Any = recorded.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
            events = (e for e in results.events() if e.name() == "[memory]")
            for event in sorted(events, key=lambda e: e.start_ns()):
                now += event.nbytes()
                peak = max(peak, now)
        return (peak - sum(t.nbytes for t in _tensors(result))) / 2**20

    @functools.cached_property
    def ceilings(self) -> tuple[float, float]:
        """Peak bytes per second of a copy (read and written) and FLOPs per second of a matrix product. On a CPU small
        ones, for dry runs."""
        count, side = (2**30, 8192) if self.cuda else (2**12, 64)
        source = self.normal(count)
        target = torch.empty_like(source)
        copied = self.median_ms({"copy": lambda: target.copy_(source)})["copy"]
        a, b = self.normal(side, side), self.normal(side, side, seed=1)
        product = self.median_ms({"product": lambda: a @ b})["product"]
        return 2e3 * source.nbytes / copied, 2e3 * side**3 / product

    def compare(
        self,
        labels: Row,
        column: str,
        calls: Mapping[str, Modes],
        *,
        reference: str | None,
        peer: str | None = None,
        tolerance: float | None = None,
        memory: bool = True,
        work: Layer | None = None,
        **timing: Any,
    ) -> Iterator[Row]:
        """A row for each of ``calls``, its name in ``column``: milliseconds, MiB, ratios to ``peer``.

        A call that fails, or whose outputs differ from ``reference``, is not timed; its row has a ``note``. The
        reference itself raises.

        Args:
            tolerance: of outputs and, on a CPU, gradients, relative to the largest value; None: by dtype.
            work: for its bytes and FLOPs: add the lower bound of the time, by `ceilings`, as a fraction.
            timing: arguments of `median_ms`.
        """
        tolerance = TOLERANCE[self.dtype] if tolerance is None else tolerance
        modes: dict[str, dict[str, Call]] = {"forward": {}, "forward_backward": {}}
        for name, runs in calls.items():
            for mode, run in zip(modes, runs, strict=True):
                if run is not None:
                    modes[mode][name] = run
        notes = self._drop_wrong(modes, reference, tolerance)
        figures = {f"{mode}_ms": self.median_ms(runs, **timing) for mode, runs in modes.items()}
        if memory:
            for mode, runs in modes.items():
                figures[f"{mode}_extra_mib"] = {name: self.peak_mib(run) for name, run in runs.items()}
        rows = {name: {**labels, column: name} for name in calls}
        for name, row in rows.items():
            for key, found in figures.items():
                row[key] = round(found[name], 4 if self.cuda else 2) if name in found else ""
            if work is not None:
                self._floor(row, work)
            if notes:
                row["note"] = notes.get(name, "")
        if peer is not None:
            beside_peer(list(rows.values()), rows[peer])
        yield from rows.values()

    def _drop_wrong(self, modes: dict[str, dict[str, Call]], reference: str | None, tolerance: float) -> dict[str, str]:
        """Remove failing and wrong calls from ``modes``; returns the reasons, by name."""
        notes: dict[str, str] = {}
        for mode, runs in modes.items():
            want = None
            # some peers accumulate gradients in bfloat16: compare only outputs on a GPU
            if reference in runs and (mode == "forward" or not self.cuda):
                want = runs[reference]()
            for name, run in [*runs.items()]:
                try:
                    if name not in notes and name != reference:
                        out = run()
                        apart = 0.0 if want is None else difference(out, want)
                        if not apart <= tolerance:  # NaN differs
                            notes[name] = f"{mode} differs from {reference} by {apart:.1e}: not timed"
                except Exception as error:  # noqa: BLE001 - of any library: it belongs in the table, and others follow
                    notes[name] = f"{mode}: {reason(error)}"
                if name in notes:
                    del runs[name]
        return notes

    def _floor(self, row: Row, work: Layer) -> None:
        bandwidth, rate = self.ceilings
        for mode in ("forward", "forward_backward"):
            if taken := row[f"{mode}_ms"]:
                moved, flops = work.bytes(mode != "forward"), work.flops(mode != "forward")
                row[f"{mode}_mbytes"], row[f"{mode}_gflop"] = round(moved / 1e6, 2), round(flops / 1e9, 2)
                row[f"{mode}_share_of_floor"] = round(1e3 * max(moved / bandwidth, flops / rate) / taken, 3)


def resident_mib(make: Callable[..., Call], *arguments: Any) -> float:
    """By how many MiB the resident set of a new process grows at most while it runs the call ``make(*arguments)``, a
    function of this package, for the first time. On Linux only."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_growth, make, arguments).result()


def _growth(make: Callable[..., Call], arguments: Sequence[Any]) -> float:
    call = make(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak (VmHWM) so far is forgotten
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """KiB."""
    return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0])


def reason(error: Exception) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def beside_peer(rows: Sequence[Row], peer: Row) -> None:
    """Add ratios of all figures to the peer's."""
    for row in rows:
        for key in [key for key in row if key.endswith(("_ms", "_mib"))]:
            known = row[key] != "" and peer[key]
            row[f"{key.rpartition('_')[0]}_over_peer"] = round(row[key] / peer[key], 3) if known else ""


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def difference(got: Any, want: Any) -> float:
    """Largest error of any tensor relative to the largest value of its counterpart; NaN if there is one."""
    pairs = zip(_tensors(got), _tensors(want), strict=True)
    apart = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in pairs]
    return float(torch.stack(apart).max())


def modes(
    call: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor, parameters: Sequence[Tensor] = ()
) -> Modes:
    """``call`` on the tensors: forward, and forward + backward with gradients of tensors and parameters."""
    leaves = [t.detach().requires_grad_(True) for t in tensors]  # in the memory layout of the tensors

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*tensors)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*leaves), [*leaves, *parameters], grad)

    return forward, both


@contextmanager
def quiet(cuda: bool) -> Iterator[None]:
    """Silence warnings; on a GPU flex_attention that is not compiled is an error: it would be timed in eager mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if cuda:
            warnings.filterwarnings("error", UNCOMPILED_FLEX)
        yield


# ---------------------------------------------------------------------------------------------------- tables


def installed(package: str) -> str:
    """Version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment(bench: Bench) -> dict[str, str]:
    """Date, commit, versions and machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "foveal": __version__,
        "commit": _commit(Path(__file__).resolve().parents[1]),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "natten": installed("natten"),
        "python": platform.python_version(),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
    if chosen := os.environ.get("FOVEAL_NATIVE"):
        found["native"] = chosen
    if bench.cuda:
        bandwidth, rate = bench.ceilings
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "triton": installed("triton"),
            "copy_tb_s": f"{bandwidth / 1e12:.4f}",
            "matmul_tflop_s": f"{rate / 1e12:.2f}",
        }
    return found


def _commit(checkout: Path) -> str:
    """The commit of a checkout, with "-dirty" if files are modified; empty for an installed package."""
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Row], extra: Mapping[str, str]) -> None:
    """Write the rows, each with the columns of ``extra``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns([{**row, **extra} for row in rows]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **extra} for row in rows)


def columns(rows: Sequence[Row]) -> list[str]:
    """The keys of all rows, in order."""
    return list(dict.fromkeys(key for row in rows for key in row))
