"""Update the tables in recipes.md, weights.md and speed.md from the headers of the recipes, the manifest, and the
tables of `foveal bench`.

Usage: ``python docs/tables.py``. A test checks that the pages are up to date.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from pathlib import Path

from foveal.configs.schema import RECIPES, recipe_names
from foveal.weights.manifest import checkpoints
from foveal.zoo import published

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
FAMILIES = {
    "nat": "NAT, DiNAT, DiNAT_s, isotropic",
    "halonet": "HaloNet, timm's hybrids",
    "maxvit": "MaxViT",
    "overlock": "OverLoCK",
    "ascan": "AsCAN",
    "care": "CARE",
    "van": "VAN",
    "shiftvit": "ShiftViT",
    "rmt": "RMT",
    "raftmlp": "RaftMLP",
    "stvit": "STViT",
    "sgformer": "SG-Former",
    "transnext": "TransNeXt",
    "moh_vit": "MoH-ViT",
    "triplet": "Triplet attention",
    "fan": "FAN",
    "tap_fan": "TAP-FAN",
    "agent": "Agent Attention",
    "inline": "InLine",
    "a3fpn": "A3-FPN",
    "uplift": "UPLiFT",
    "naf": "NAF",
    "conditional_detr": "Conditional DETR",
}


def header(recipe: str) -> dict[str, str]:
    """The header of a recipe: Command, Hardware, Time, Score, Status."""
    text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    fields: dict[str, str] = {}
    key = ""
    for line in text.splitlines():
        if match := re.match(r"# ([A-Z][a-z]+): +(.+)", line):
            key, fields[match[1]] = match[1], match[2]
        elif key and (match := re.match(r"#  +(.+)", line)):  # a continuation line, indented
            fields[key] += f" {match[1]}"
        else:
            key = ""
    return fields


def measured() -> str:
    rows = []
    for name in recipe_names():
        fields = header(name)
        if fields["Status"].startswith("measured"):
            rows.append(f"| `{name}` | {fields['Score']} | {fields['Time']} | {fields['Hardware']} |")
    return "\n".join(["| recipe | score | time | hardware |", "|---|---|---|---|", *rows])


def others(task: str) -> str:
    rows = []
    for name in recipe_names():
        fields = header(name)
        if name.startswith(f"{task}/") and not fields["Status"].startswith("measured"):
            source = (
                "published" if fields["Status"].startswith("published figure") else fields["Status"].partition("; ")[2]
            )
            score = re.sub(r":? foveal evaluate .*", "", fields["Score"])
            rows.append(f"| `{name.partition('/')[2]}` | {score} | {source or 'not run'} |")
    return "\n".join(["| recipe | target score | source |", "|---|---|---|", *rows])


def families() -> str:
    rows = []
    for family, title in FAMILIES.items():
        of = [each for each in checkpoints().values() if each.family == family]
        if not of:
            rows.append(f"| {title} | none published | | |")
            continue
        tasks = ", ".join(f"{count} {task}" for task, count in Counter(each.task for each in of).items())
        rows.append(f"| {title} | {tasks} | {of[0].code_licence} | {of[0].weights_licence} |")
    total = len(checkpoints())
    table = ["| family | files | licence of the code | licence of the weights |", "|---|---|---|---|", *rows]
    return "\n".join([*table, f"| all | {total} | | |"])


def measurements(section: str) -> list[dict[str, str]]:
    """The rows of a table of `foveal bench`; none before it is measured."""
    path = RESULTS / f"{section}-cpu-2core.csv"
    return list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []


def beside(row: dict[str, str], figure: str) -> str:
    """A figure, with its ratio to the peer's."""
    unit = "ms" if figure.endswith("_ms") else "MiB"
    value, ratio = row.get(figure), row.get(f"{figure.rpartition('_')[0]}_over_peer")
    return f"{float(value):.4g} {unit}" + f" ({ratio})" * bool(ratio) if value else ""


def filled_rows(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return "Not measured yet."
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


RUNTIMES = ("eager", "AOTInductor", "onnxruntime", "openvino")


def served() -> str:
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in measurements("served"):
        top1, threads = published(row["model"])["top1"], row.get("runtime_threads", row["threads"])
        name = f"`{row['model']}`" + (f" ({top1:.1f})" if top1 else "")
        beside_whom = f"`{row['peer']}`" if row.get("peer") else ""
        cells = found.setdefault((name, beside_whom, threads, row["dtype"]), {})
        cells.setdefault(row["by"], beside(row, "forward_ms"))
    rows = [(*key, *(cells.get(by, "") for by in RUNTIMES)) for key, cells in found.items()]
    return filled_rows(("model (top-1)", "beside", "threads", "dtype", *RUNTIMES), rows)


FIGURES = ("forward_ms", "forward_backward_ms")
SHARES = ("forward", "forward_backward")
DTYPES = ("float32", "bfloat16")


def roofline() -> str:
    """A row for each model: its shares of the product, and its times over those of the peer, whose row comes next."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    peers: dict[str, str] = {}
    rows = measurements("roofline")
    for row, after in zip(rows, [*rows[1:], {}], strict=True):
        name = f"`{row['model']}`" + ", `native`" * (row.get("native") == "1" and row["forward_over_peer"] != "1.0")
        found.setdefault(name, {}).setdefault(row["dtype"], row)
        if row["forward_over_peer"] not in ("", "1.0"):
            peers[name] = after["model"]
    shown = []
    for name, of in found.items():
        shares = [of[dtype][f"{each}_share"] for dtype in DTYPES for each in SHARES]
        ratios = [" / ".join(of[dtype][f"{each}_over_peer"] for each in SHARES) for dtype in DTYPES]
        beside_whom = (f"`{peers[name]}`", ", ".join(ratios)) if name in peers else ("", "")
        shown.append((name, of["float32"]["threads"], *shares, *beside_whom))
    head = ("model", "threads", *(f"{dtype}: {what}" for dtype in DTYPES for what in ("forward", "with backward")))
    return filled_rows((*head, "timm's model", "time over its: float32, bfloat16"), shown)


def windows() -> str:
    rows = []
    for row in measurements("windows"):
        if row["by"] in ("sdpa", "eager"):  # the ratios are to the first; for the second, see the whole table
            continue
        shape = f"{row['map']} {row['rule']}, {row['batch']} x {row['heads']} x {row['depth']}"
        memory = [figure.replace("_ms", "_extra_mib") for figure in FIGURES]
        rows.append((row["case"], shape, row["bias"], row["by"], *(beside(row, each) for each in (*FIGURES, *memory))))
    head = ("shapes of", "map and window, batch x heads x depth", "bias", "by", "forward", "with backward")
    return filled_rows((*head, "memory", "with backward"), rows)


def same() -> str:
    rows = []
    for row in measurements("models"):
        if row.get("forward_resident_mib"):
            memory = [each.replace("_ms", f"_{kind}_mib") for kind in ("extra", "resident") for each in FIGURES]
            rows.append((f"`{row['model']}`", row["input"], *(beside(row, each) for each in (*FIGURES, *memory))))
    head = (f"{what}{backward}" for what in ("time", "memory", "process") for backward in ("", ", with backward"))
    return filled_rows(("model", "input", *head), rows)


TABLES = {
    "speed.md": {"roofline": roofline, "served": served, "same": same, "windows": windows},
    "recipes.md": {
        "measured": measured,
        **{task: lambda t=task: others(t) for task in ("classify", "detect", "segment", "upsample")},
    },
    "weights.md": {"families": families},
}


def filled(page: str) -> str:
    """A page with up-to-date tables; each is between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    text = (HERE / page).read_text(encoding="utf-8")
    for name, make in TABLES[page].items():
        pattern, table = rf"(?<=<!-- table: {name} -->\n).*?(?=<!-- end -->)", make()
        text, count = re.subn(pattern, lambda _, table=table: f"\n{table}\n\n", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page} needs one place for the table {name}, found {count}")
    return text


if __name__ == "__main__":
    for page in TABLES:
        temporary = HERE / f"{page}.new"
        temporary.write_text(filled(page), encoding="utf-8")
        os.replace(temporary, HERE / page)
        print(HERE / page)
