"""`foveal bench scaling`: step time and communication at many GPUs, derived from a measured single-GPU figure.

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
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from rich.console import Console

from .run import print_table, write_csv

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


def parameters_of(name: str) -> int:
    """Trained parameters of a model, without its memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def rows(names: list[str], speed: float | None, batch: int | None, overlap: float) -> list[dict[str, object]]:
    table = []
    for name in names:
        parameters = parameters_of(name)
        images = batch or LARGE.get(name, 64)
        for gpus in GPUS:
            for fsdp in (False, True):
                step = derive(parameters, gpus, images, speed, fsdp=fsdp, overlap=overlap)
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


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="foveal bench scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", action="append", help="a model's name; may be repeated (default: the large ones)")
    parser.add_argument("--images-per-second", type=float, help="of training on one GPU, measured; with one --model")
    parser.add_argument("--batch", type=int, help="images for each GPU (default: the recipe's)")
    parser.add_argument("--overlap", type=float, default=0.8, help="share of the window that hides messages (0.8)")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    names = options.model or list(LARGE)
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
    table = rows(names, speed, options.batch, options.overlap)
    console = Console(width=None if sys.stdout.isatty() else 200)
    print_table("foveal bench scaling: derived, not measured", table, console)
    if speed is None:
        console.print("step times wait for a measured figure: --model NAME --images-per-second N")
    if options.csv:
        write_csv(options.csv, table)
        console.print(f"wrote {options.csv}")
    return 0
