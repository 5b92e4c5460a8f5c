"""What is known of each model: size and cost counted here, accuracy and licence as published."""

from __future__ import annotations

import csv
import functools
import re
from importlib.resources import files
from typing import Any

from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from .backbones import family, list_models
from .backbones.profile import profile
from .weights import ANY_SIZE
from .weights.manifest import of_model

FAMILIES = ("NAT", "DiNAT", "DiNAT_s", "isotropic", "HaloNet", "HaloNet hybrid", "MaxViT", "OverLoCK", "CARE", "AsCAN")

# Of timm's models that are measured beside ours: what to call them, and the top-1 of training on ImageNet-1K alone, as
# the READMEs of microsoft/Swin-Transformer, facebookresearch/ConvNeXt and dingmyu/davit list it.
PEERS = {
    "swin_tiny_patch4_window7_224": ("Swin", 81.2),
    "swin_small_patch4_window7_224": ("Swin", 83.2),
    "swin_base_patch4_window7_224": ("Swin", 83.5),
    "convnext_tiny": ("ConvNeXt", 82.1),
    "convnext_small": ("ConvNeXt", 83.1),
    "convnext_base": ("ConvNeXt", 83.8),
    "davit_tiny": ("DaViT", 82.8),
}
CORE_ML = ("CARE",)  # the families that coremltools 9 converts
# timm's own implementation of models of ours, for the same weights
SAME = {"maxvit_tiny_tf_224": "maxvit_tiny_224", "halonet26t": "halo26t", "halonet50ts": "halo50ts"}

_profile = functools.cache(profile)  # a fraction of a second each


def describe(name: str) -> dict[str, Any]:
    """Family, parameters, MACs, input, tags of the weights and licence of a model that timm creates.

    Args:
        name: with or without a tag.
    """
    architecture = name.partition(".")[0]
    cfgs = get_arch_pretrained_cfgs(architecture)
    counted = _profile(name)
    return {
        "name": name,
        "family": family(architecture) if architecture in list_models() else "timm",
        "parameters": counted.parameters,
        "macs": counted.macs,
        "input": list(counted.input_size),
        "tags": sorted(full.partition(".")[2] for full, cfg in cfgs.items() if "." in full and cfg.has_weights),
        "licence": getattr(get_pretrained_cfg(name), "license", None),
    }


def published(name: str) -> dict[str, Any]:
    """What is published of the weights that ``pretrained=True`` loads.

    Returns:
        ``top1`` in percent or None, ``larger``: the data set beyond ImageNet-1K that they were trained on, or "", and
        ``weights_licence``.
    """
    if name in PEERS:
        return {"top1": PEERS[name][1], "larger": "", "weights_licence": ""}
    name = SAME.get(name, name)
    tag = get_pretrained_cfg(name).tag or ""
    weights = of_model(name).get(tag)
    if weights is None:
        return {"top1": None, "larger": "", "weights_licence": "none published"}
    larger = re.match(r"(in2[12]k)(_ft|$)", tag)
    trained = f"ImageNet-{larger[1][2:].upper()}" if larger else ""
    if larger and not larger[2]:
        trained += " (that classifier)"
    return {"top1": weights.score.get("top1"), "larger": trained, "weights_licence": weights.weights_licence}


def facts(name: str) -> dict[str, Any]:
    """Both together, whether it is ours, and which of ours is the ``same``; peers have a family of their own."""
    found = describe(name) | published(name) | {"ours": name in list_models(), "same": SAME.get(name, "")}
    if name in PEERS:
        found["family"] = PEERS[name][0]
    elif name in SAME:
        found["family"] = f"{family(SAME[name]).partition(' ')[0]}, timm's"
    return found


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorted by family, then by size."""
    rank = {family: at for at, family in enumerate(FAMILIES)}
    return sorted(rows, key=lambda row: (rank.get(row["family"], len(rank)), row["family"], row["parameters"]))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table of models as text, under `HEAD`; from `describe` and `published`."""
    return (
        row["name"],
        str(row["input"][1]),
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['macs'] / 1e9:.2f}",
        f"{row['top1']:.1f}" if row["top1"] else "",
        row["larger"],
        row["weights_licence"],
        *measured(row["name"]),
        exports(row["family"]),
    )


HEAD = (
    *("name", "input", "parameters", "GMACs", "top-1, published", "pre-trained on", "licence of the weights"),
    *("CPU, ms", "GPU, images/s", "exports"),
)


def measured(name: str) -> tuple[str, str]:
    """Milliseconds of one image on the CPU of `foveal bench zoo`; images per second of `foveal bench gpu`, inference in
    bfloat16, the faster of eager and compiled. Empty where there is no figure."""
    (cpu,) = [row["forward_ms"] for row in _table("zoo-cpu-2core.csv") if row["model"] == name] or [""]
    gpu = [
        float(row["images_per_second"])
        for row in _table("gpu-models.csv")
        if row["model"] == name and row["mode"] == "inference" and row["images_per_second"] and row.get("gpu")
    ]
    return f"{float(cpu):,.0f}" if cpu else "", f"{max(gpu):,.0f}" if gpu else ""


@functools.cache
def _table(name: str) -> list[dict[str, str]]:
    """A table of results that this package ships, none if there is no such table."""
    file = files("foveal.benchmarks") / "results" / name
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.is_file() else []


def exports(family: str) -> str:
    """What `foveal export` writes of a family: ``all``: safetensors, ONNX, pt2, AOTInductor and OpenVINO."""
    free = ("any size",) if family in ANY_SIZE else ()
    return ", ".join(("all", *(("Core ML",) if family in CORE_ML else ()), *free))


def table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """`HEAD`, and a row for each model, in order; without the columns that are empty in all rows."""
    lines = [cells(row | published(row["name"])) for row in in_order(rows)]
    kept = [any(column) for column in zip(*lines, strict=True)]
    return [tuple(cell for cell, keep in zip(line, kept, strict=True) if keep) for line in (HEAD, *lines)]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The models as a Markdown table, by family and size, with what is published of their default weights."""
    head, *lines = table(rows)
    text = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, *others in lines:
        text.append(f"| `{name}` | {' | '.join(others)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(text)
