"""`foveal bench SECTION ...`: ours and peers on the same inputs in one process, as a table and a CSV file.

`foveal bench gpu` is layers, halo and models on a GPU, each within its share of the seconds. Tables are written
after every row, so that an interrupted run leaves what it has measured. `foveal bench plots` draws the tables.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import cases, data, engine, instructions, models, operations, plots, served
from .measure import Bench, Row, columns, environment, quiet, read_csv, reason, write_csv


@dataclass(frozen=True)
class Section:
    """A benchmark, `foveal bench NAME`.

    Args:
        rows: takes a case and a `Bench` and yields rows.
        cpu, cuda, tiny: the cases on a CPU, on a GPU and for a dry run.
        compiles: measure compiled implementations in a second pass, with ``compiled=True``.
        share: of the time limit, relative to the other sections of the run.
    """

    rows: Callable[..., Iterator[Row]]
    cpu: Sequence[Any] = ()
    cuda: Sequence[Any] = ()
    tiny: Sequence[Any] = ()
    compiles: bool = False
    share: int = 1


SECTIONS = {
    "kernels": Section(operations.kernel_rows, cases.DINAT_TINY, tiny=cases.DINAT_TINY[-1:]),
    "aggregate": Section(operations.aggregate_rows, cases.OVERLOCK_XT, tiny=cases.OVERLOCK_XT[4:5]),
    "windows": Section(operations.window_rows, cases.WINDOWS, cases.GPU_WINDOWS, cases.TINY_WINDOWS),
    "halo": Section(operations.halo_rows, cases.HALO, cases.GPU_HALO, cases.TINY_HALO),
    "layers": Section(operations.layer_rows, (), cases.GPU_LAYERS, cases.TINY_LAYERS, compiles=True, share=10),
    "models": Section(models.model_rows, cases.MODELS, cases.GPU_MODELS, cases.TINY_PAIRS, compiles=True, share=10),
    "zoo": Section(models.zoo_rows, models.zoo_cases(), tiny=cases.TINY_MODELS),
    "compiled": Section(models.compiled_rows, models.compiled_cases(), tiny=cases.TINY_MODELS),
    "roofline": Section(models.roofline_rows, cases.ROOFLINE, tiny=cases.TINY_MODELS),
    "data": Section(data.data_rows, data.CASES, tiny=data.TINY),
    "engine": Section(engine.engine_rows, engine.CASES, tiny=engine.TINY),
    "instructions": Section(instructions.instruction_rows, cases.COMPILED, tiny=cases.COMPILED[3:4]),
    "served": Section(served.served_rows, served.CASES, tiny=served.TINY),
}
GPU = ("layers", "halo", "models")
LABELS = (  # columns that identify a row
    *("case", "operation", "files", "augmentation", "layer", "part", "map", "heads", "depth", "rule", "bias"),
    *("boundary", "input", "batch", "model", "dtype", "run", "backend", "by", "loader", "loop"),
)
SLOWER = 1.05  # what `--compare` lists


def measure(name: str, options: argparse.Namespace, console: Console) -> tuple[list[Row], int]:
    """The rows of a section, and the number of failed cases."""
    section = SECTIONS[name]
    seconds = options.seconds * section.share / sum(SECTIONS[each].share for each in options.sections)
    bench = Bench(options.device, options.rounds, seconds, options.exports)
    known, path = environment(bench), _target(name, options)
    console.print("  ".join(f"{key} {value}" for key, value in known.items()), highlight=False)
    rows: list[Row] = []
    failed = 0
    passes = [section.rows]
    if section.compiles and (options.tiny or bench.cuda):
        passes.append(partial(section.rows, compiled=True))
    for measured, case in itertools.product(passes, _chosen(name, options)):
        if bench.spent:
            console.print(f"{name}: time limit reached; the remaining cases were not measured")
            break
        try:
            for row in measured(case, bench):
                rows.append(row)
                if path:
                    write_csv(path, rows, known)
        except ImportError:
            raise  # a missing extra concerns every case
        except Exception as error:  # noqa: BLE001 - the other cases are still measured
            failed += 1
            print(f"{name}: {case.id} failed: {reason(error)}", file=sys.stderr)
        console.print(f"[dim]{name}: {case.id} done[/dim]")
    if path and rows:
        console.print(f"wrote {path}", soft_wrap=True)
    return rows, failed + sum(bool(row.get("note")) and _ours(row) for row in rows)


def _ours(row: Row) -> bool:
    """Whether a row is ours and must not fail; some peers on a GPU may."""
    return "rule" not in row or row["by"].startswith("foveal")


def _chosen(name: str, options: argparse.Namespace) -> list[Any]:
    section = SECTIONS[name]
    found = section.tiny if options.tiny else section.cuda if options.device == "cuda" else section.cpu
    return [case for case in found if options.only in case.id]


def _target(name: str, options: argparse.Namespace) -> Path | None:
    """Path of the table of a section."""
    if options.output is None:
        return options.csv
    if name == "instructions":
        return options.output / "instructions-sm90.csv"
    on_gpu = options.device == "cuda" or (options.tiny and name in GPU)
    return options.output / (f"gpu-{name}.csv" if on_gpu else f"{name}-cpu-{os.cpu_count()}core.csv")


# ---------------------------------------------------------------------------------------------------- reporting


def print_table(title: str, rows: Sequence[Row], console: Console) -> None:
    table = Table(title=title)
    for key in (keys := columns(rows)):
        table.add_column(key.replace("_", " "), justify="left" if key in LABELS else "right")
    for row in rows:
        table.add_row(*(str(row.get(key, "")) for key in keys))
    console.print(table)


def against_earlier(rows: Sequence[Row], earlier: Sequence[Row]) -> list[str]:
    """Compare milliseconds with an earlier table: the mean ratio, and the rows that are slower."""
    labels = [key for key in rows[0] if key in LABELS and key in earlier[0]]
    known = {tuple(str(row[key]) for key in labels): row for row in earlier}
    ratios = {}
    for row in rows:
        key = tuple(str(row[label]) for label in labels)
        for figure in (figure for figure in row if figure.endswith("_ms")):
            if row[figure] and known.get(key, {}).get(figure):
                ratios[(*key, figure)] = float(row[figure]) / float(known[key][figure])
    if not ratios:
        return ["no row matches a row of the earlier table"]
    lines = [f"{statistics.geometric_mean(ratios.values()):.3f} times the earlier time, {len(ratios)} figures"]
    slower = sorted(((ratio, key) for key, ratio in ratios.items() if ratio > SLOWER), reverse=True)
    return lines + [f"{ratio:.2f} times: {', '.join(key)}" for ratio, key in slower]


def geometric_means(rows: Sequence[Row]) -> list[str]:
    """Geometric means of our speed and memory relative to each peer, over the layers that both ran."""

    def key(row: Row) -> tuple[str, ...]:
        return tuple(str(row[k]) for k in ("case", "map", "heads", "rule"))

    own = {key(row): row for row in rows if row["by"] == "foveal"}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row, mode in itertools.product(rows, ("forward", "forward_backward")):
        mine, time, memory = own.get(key(row), {}), f"{mode}_ms", f"{mode}_extra_mib"
        if row["by"] != "foveal" and row.get(time) and mine.get(time):
            ratios = (row[time] / mine[time], max(row[memory], 0.1) / max(mine[memory], 0.1))
            found.setdefault((mode, row["by"]), []).append(ratios)
    lines = []
    for (mode, peer), ratios in sorted(found.items()):
        speed, memory = (statistics.geometric_mean(each) for each in zip(*ratios, strict=True))
        lines.append(f"{mode}: {speed:.2f} times as fast as {peer}, 1/{memory:.2f} of its memory, {len(ratios)} layers")
    return lines


# ------------------------------------------------------------------------------------------------------ shell


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="foveal bench",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"gpu: {', '.join(GPU)} on a CUDA GPU. `foveal bench plots --help`: draw the tables.",
    )
    parser.add_argument("sections", nargs="+", choices=(*SECTIONS, "gpu"), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu; for `gpu`: cuda")
    parser.add_argument("--rounds", type=int, help="maximum rounds of timing (default 15, on a GPU 100)")
    parser.add_argument("--only", default="", help="only cases whose name contains this text, such as 56x56")
    parser.add_argument("--csv", type=Path, help="also write the table of one section here")
    parser.add_argument("--output", type=Path, help="also write a table for each section into this folder")
    parser.add_argument("--compare", type=Path, help="list rows slower than in this table (CSV) of an earlier run")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit for all sections together")
    parser.add_argument("--exports", type=Path, help="folder of the exports of `served`; those in it are used")
    parser.add_argument("--tiny", action="store_true", help="dry run: very small cases with meaningless figures")
    options = parser.parse_args(arguments)
    if "gpu" in options.sections:
        options.sections = [name for name in options.sections if name != "gpu"] or list(GPU)
        options.device = options.device or "cuda"
    options.device = options.device or "cpu"
    if options.rounds is None:
        options.rounds = 1 if options.tiny else 100 if options.device == "cuda" else 15
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--device cuda needs a CUDA GPU; torch {torch.__version__} (built for CUDA {torch.version.cuda}) has none"
        )
    if len(options.sections) > 1 and (options.csv or options.compare):
        parser.error(f"--csv and --compare are for one section, got {', '.join(options.sections)}; see --output")
    for name in options.sections:
        if not _chosen(name, options):
            where = "--tiny" if options.tiny else options.device
            parser.error(f"section {name} has no case for {where} whose name contains {options.only!r}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run ``foveal bench``.

    Returns:
        1 if one of our implementations or a case failed, else 0.

    Raises:
        SystemExit: with 2, for invalid arguments.
        ImportError: an extra is missing.
    """
    if [*arguments[:1]] == ["plots"]:
        return plots.main(arguments[1:])
    options = _parse(arguments)
    earlier = read_csv(options.compare) if options.compare else []
    console = Console(width=None if sys.stdout.isatty() else 200)
    status = 0
    for name in options.sections:
        with quiet(options.device == "cuda"):
            rows, failed = measure(name, options, console)
        status = 1 if failed else status
        if rows:
            print_table(f"foveal bench {name}", rows, console)
            lines = geometric_means(rows) if name == "layers" else []
            console.print(*lines, *(against_earlier(rows, earlier) if earlier else ()), sep="\n", highlight=False)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
