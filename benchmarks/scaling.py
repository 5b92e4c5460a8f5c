"""`foveal bench scaling`: step time and communication at many GPUs, derived from measured single-GPU figures.

They are the training rows of the tables that `foveal bench gpu` writes (``gpu-models*.csv``), or given by hand.

For a step of P parameters on G GPUs of B images each (docs/scaling.md has the reasoning):

    compute   = B / measured images per second of one GPU
    bytes     = 2 (G - 1) / G * 4 P           DDP: a ring all-reduce of float32 gradients, sent by each GPU
                3 (G - 1) / G * 4 P           FSDP: two all-gathers of parameters, one reduce-scatter of gradients
    messages  = bytes / bandwidth of the slowest link of the ring + latency * hops
    step      = compute + max(0, messages - overlap * 2/3 compute)     DDP overlaps with the backward pass alone
                compute + max(0, messages - overlap * compute)         FSDP with both passes
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from rich.console import Console

from ..backbones import list_models
from .run import print_table, write_csv

RESULTS = Path(__file__).parent / "results"
# The large models of each family, and the batch of one GPU in their recipes.
LARGE = {
    "dinat_large": 64,
    "dinat_s_large": 64,
    "halo_h7": 32,
    "maxvit_large_224": 64,
    "maxvit_xlarge_224": 64,
    "overlock_b": 128,
    "ascan_large": 128,
}
GPUS = (8, 64, 512)
FLOAT32 = 4  # bytes; parameters, gradients and both of FSDP's gathers stay in it under autocast
BACKWARD = 2 / 3  # share of a step's compute: twice the operations of the forward pass


@dataclass(frozen=True)
class Machine:
    """What the links of a cluster do. Bytes per second and seconds are of one GPU, one direction."""

    node: int = 8  # GPUs that are joined by the fast links
    inside: float = 300e9  # NVLink of an H100 or H200: 450e9 nominal, two thirds of it reached
    between: float = 40e9  # 400 Gb/s of network for each GPU: 50e9 nominal, four fifths of it reached
    latency: float = 10e-6  # of one hop


@dataclass(frozen=True)
class Step:
    """Bytes that each GPU sends in a step; seconds; efficiency: share of G times a single GPU's images per second."""

    bytes: float
    messages: float
    seconds: float | None
    efficiency: float | None


@dataclass(frozen=True)
class Measured:
    """Training on one GPU: images per second, at a batch, ``run`` eager or compiled."""

    images_per_second: float
    batch: int
    run: str
    gpu: str
    date: str


def measured(folder: Path) -> dict[str, Measured]:
    """What `foveal bench gpu` has measured of our models' training, by name; the faster of two figures."""
    found: dict[str, Measured] = {}
    for path in sorted(folder.glob("gpu-models*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                # without a GPU it was a dry run; without images per second it failed
                if row["mode"] != "training" or not row.get("gpu") or not row["images_per_second"]:
                    continue
                speed, batch = float(row["images_per_second"]), int(row["input"].split("x")[0])
                known = found.get(row["model"])
                if row["model"] in list_models() and (known is None or speed > known.images_per_second):
                    found[row["model"]] = Measured(speed, batch, row["run"], row["gpu"], row["date"])
    return found


def derive(
    parameters: int,
    gpus: int,
    batch: int,
    images_per_second: float | None,
    *,
    fsdp: bool = False,
    machine: Machine | None = None,
    overlap: float = 0.8,
) -> Step:
    """A step of ``batch`` images on each of ``gpus`` GPUs.

    Args:
        images_per_second: of training on one GPU, measured; None: only what is sent is derived.
        overlap: share of the communication's window in which it really runs beside the computation.
    """
    machine = machine or Machine()
    sent = (3 if fsdp else 2) * (gpus - 1) / gpus * FLOAT32 * parameters
    bandwidth = machine.inside if gpus <= machine.node else machine.between
    messages = sent / bandwidth + machine.latency * 2 * (gpus - 1)
    if images_per_second is None:
        return Step(sent, messages, None, None)
    compute = batch / images_per_second
    window = compute if fsdp else BACKWARD * compute
    seconds = compute + max(0.0, messages - overlap * window)
    return Step(sent, messages, seconds, compute / seconds)


@functools.cache
def parameters_of(name: str) -> int:
    """Trained parameters of a model of 1,000 classes, without its memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, num_classes=1000).parameters())


def rows(
    names: list[str], figures: dict[str, Measured], speed: float | None, batch: int | None, overlap: float
) -> list[dict[str, object]]:
    """What is printed: for each model, way and number of GPUs. ``speed`` and ``batch`` replace what was measured."""
    table = []
    for name in names:
        parameters = parameters_of(name)
        own = figures.get(name)
        images = batch or (own.batch if own and speed is None else LARGE.get(name, 64))
        rate = speed or (own.images_per_second if own else None)
        for gpus in GPUS:
            for fsdp in (False, True):
                step = derive(parameters, gpus, images, rate, fsdp=fsdp, overlap=overlap)
                table.append(
                    {
                        "model": name,
                        "parameters_m": f"{parameters / 1e6:.1f}",
                        "by": "fsdp" if fsdp else "ddp",
                        "gpus": gpus,
                        "batch": images,
                        "sent_mb": f"{step.bytes / 1e6:,.0f}",
                        "messages_ms": f"{1e3 * step.messages:.2f}",
                        "step_ms": "-" if step.seconds is None else f"{1e3 * step.seconds:.1f}",
                        "efficiency": "-" if step.efficiency is None else f"{step.efficiency:.3f}",
                    }
                )
    return table


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _both(name: str, speed: float | None, batch: int) -> list[Step]:
    """DDP on all numbers of GPUs, then FSDP."""
    parameters = parameters_of(name)
    return [derive(parameters, gpus, batch, speed, fsdp=fsdp) for fsdp in (False, True) for gpus in GPUS]


COLUMNS = [f"{way}, {gpus} GPUs" if gpus == GPUS[0] else str(gpus) for way in ("DDP", "FSDP") for gpus in GPUS]


def sent_table() -> str:
    """What each GPU sends for the large models, as the page has it."""
    lines = [_line(["model", "parameters", *COLUMNS]), "|" + "---|" * (2 + len(COLUMNS))]
    for name in LARGE:
        cells = [f"{step.bytes / 1e6:,.0f} MB, {1e3 * step.messages:.1f} ms" for step in _both(name, None, 1)]
        lines.append(_line([name, f"{parameters_of(name) / 1e6:.1f} M", *cells]))
    return "\n".join(lines)


def step_table(figures: dict[str, Measured]) -> str:
    """Step times and efficiencies of what has been measured, the large models first; what has not is named."""
    names = [*(name for name in LARGE if name in figures), *sorted(set(figures) - set(LARGE))]
    missing = [name for name in LARGE if name not in figures]
    lines = []
    if names:
        lines = [_line(["model", "measured: images/s", "batch", *COLUMNS]), "|" + "---|" * (3 + len(COLUMNS))]
    for name in names:
        own = figures[name]
        steps = _both(name, own.images_per_second, own.batch)
        cells = [f"{1e3 * step.seconds:,.0f} ms, {100 * step.efficiency:.1f} %" for step in steps]
        speed = f"{own.images_per_second:,.0f} ({own.gpu}, {own.run}, {own.date})"
        lines.append(_line([name, speed, str(own.batch), *cells]))
    if missing:
        lines += [""] * bool(lines)
        lines.append(f"**Not measured on a GPU yet, so without step times: {', '.join(missing)}.**")
    return "\n".join(lines)


def write_page(path: Path, figures: dict[str, Measured]) -> None:
    """Puts both tables between their marks in the page.

    Raises:
        ValueError: it has no such marks.
    """
    text = path.read_text(encoding="utf-8")
    for mark, table in (("sent", sent_table()), ("steps", step_table(figures))):
        block = re.compile(rf"(<!-- {mark} -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)
        if len(block.findall(text)) != 1:
            raise ValueError(f"{path} has not one place between <!-- {mark} --> and <!-- end -->")
        text = block.sub(lambda found, table=table: found[1] + table + found[2], text)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="foveal bench scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", action="append", help="a model's name; may be repeated (default: the large ones, and the measured)"
    )
    parser.add_argument("--images-per-second", type=float, help="of training on one GPU, measured; with one --model")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the tables of `foveal bench gpu` (the package's own)"
    )
    parser.add_argument("--batch", type=int, help="images for each GPU (default: the measured, else the recipe's)")
    parser.add_argument("--overlap", type=float, default=0.8, help="share of the window that hides messages (0.8)")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    parser.add_argument("--page", type=Path, help="also write both tables into this page (docs/scaling.md)")
    options = parser.parse_args(arguments)
    figures = measured(options.results)
    names = options.model or [*LARGE, *sorted(set(figures) - set(LARGE))]
    for name in names:
        if not timm.is_model(name):
            parser.error(f"there is no model {name!r}")
    speed = options.images_per_second
    if speed is not None and (speed <= 0 or len(names) != 1):
        parser.error("--images-per-second is one model's, above 0: name it with --model")
    if not 0 <= options.overlap <= 1:
        parser.error(f"--overlap must lie between 0 and 1, got {options.overlap}")
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    if not options.results.is_dir():
        parser.error(f"--results {options.results} is no folder")
    table = rows(names, figures, speed, options.batch, options.overlap)
    console = Console(width=None if sys.stdout.isatty() else 200)
    print_table("foveal bench scaling: derived, not measured", table, console)
    if speed is None:
        for name in (n for n in names if n in figures):
            own = figures[name]
            console.print(
                f"{name}: {own.images_per_second:,.0f} images/s, batch {own.batch}, {own.run}, {own.gpu}, {own.date}",
                highlight=False,
            )
        if missing := [name for name in names if name not in figures]:
            console.print(
                f"step times wait for a measured figure of {', '.join(missing)}: `foveal bench gpu`, or --model NAME "
                "--images-per-second N",
                highlight=False,
                soft_wrap=True,
            )
    if options.csv:
        write_csv(options.csv, table)
        console.print(f"wrote {options.csv}")
    if options.page:
        write_page(options.page, figures)
        console.print(f"wrote {options.page}")
    return 0
