"""Tables of the models: size and cost as measured here, accuracy and licence as published.

PyTorch is imported only where needed: `foveal list` reads `figures.csv`, which ``python -m foveal.zoo`` writes.
"""

from __future__ import annotations

import csv
import functools
import re
from fnmatch import fnmatch
from importlib.resources import files
from typing import Any

from .figures import FILE, Figures, figures, write

FAMILIES = (
    "NAT",
    "DiNAT",
    "DiNAT_s",
    "isotropic",
    "HaloNet",
    "HaloNet hybrid",
    "MaxViT",
    "OverLoCK",
    "CARE",
    "AsCAN",
    "VAN",
    "ShiftViT",
    "RMT",
    "RaftMLP",
    "STViT",
    "SG-Former",
    "TransNeXt",
    "MoH-ViT",
    "Triplet",
    "FAN",
    "TAP-FAN",
    "Agent Attention",
    "InLine",
)

# timm's models that are compared with ours: name, and top-1 with training on ImageNet-1K only, from the READMEs of
# microsoft/Swin-Transformer, facebookresearch/ConvNeXt and dingmyu/davit.
PEERS = {
    "swin_tiny_patch4_window7_224": ("Swin", 81.2),
    "swin_small_patch4_window7_224": ("Swin", 83.2),
    "swin_base_patch4_window7_224": ("Swin", 83.5),
    "convnext_tiny": ("ConvNeXt", 82.1),
    "convnext_small": ("ConvNeXt", 83.1),
    "convnext_base": ("ConvNeXt", 83.8),
    "davit_tiny": ("DaViT", 82.8),
}
CORE_ML = ("CARE", "VAN", "ShiftViT", "RMT", "RaftMLP")  # the families that coremltools 9 converts
# timm's implementation of our models, for the same weights
SAME = {"maxvit_tiny_tf_224": "maxvit_tiny_224", "halonet26t": "halo26t", "halonet50ts": "halo50ts"}


def describe(name: str) -> dict[str, Any]:
    """The fields of `Figures` for a model, and what it is exported to (see `exports`).

    Args:
        name: of a model of this package or of timm, with or without a tag. Only timm's models are built.
    """
    architecture, _, tag = name.partition(".")
    row = figures().get(architecture)
    if row is None or tag:
        row = count(name)
    facts = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(row).items()}
    facts["input"] = facts.pop("input_size")
    return facts | {"name": name, "exports": exports(row.family) if row.family != "timm" else ""}


@functools.cache  # a fraction of a second each
def count(name: str) -> Figures:
    """The row of `figures` for a registered model, of this package or timm's, with or without a tag."""
    from timm.models import get_arch_pretrained_cfgs

    from .backbones import family, list_models
    from .backbones.base import registered_cfg
    from .backbones.profile import profile
    from .weights.manifest import of_model

    architecture = name.partition(".")[0]
    counted, cfgs, cfg = profile(name), get_arch_pretrained_cfgs(architecture), registered_cfg(name)
    released = of_model(architecture)
    weights = released.get(cfg.tag or "")
    return Figures(
        name=name,
        family=family(architecture) if architecture in list_models() else "timm",
        parameters=counted.parameters,
        macs=counted.macs,
        input_size=counted.input_size,
        any_size=not cfg.fixed_input_size,
        top1=weights.score.get("top1") if weights else None,
        tags=tuple(sorted(full.partition(".")[2] for full, each in cfgs.items() if "." in full and each.has_weights)),
        code_licence=next((each.code_licence for each in released.values()), cfg.license or ""),
        weights_licence=weights.weights_licence if weights else "",
    )


def select(pattern: str, sort: str, max_params: float | None, any_size: bool) -> list[dict[str, Any]]:
    """The models that match, as `describe` has them, sorted by a field of it: the best top-1 first, else the least."""
    rows = [describe(name) for name in figures() if fnmatch(name, pattern.lower())]
    rows = [row for row in rows if max_params is None or row["parameters"] <= max_params]
    rows = [row for row in rows if row["any_size"] or not any_size]
    sign = -1 if sort == "top1" else 1
    return sorted(rows, key=lambda row: (row[sort] is None, row[sort] if sort == "name" else sign * (row[sort] or 0)))


def published(name: str) -> dict[str, Any]:
    """Published facts of the weights that ``pretrained=True`` loads.

    Returns:
        ``top1`` in percent or None; ``larger``, the pre-training dataset beyond ImageNet-1K or ""; ``weights_licence``.
    """
    from .backbones.base import registered_cfg
    from .weights.manifest import of_model

    if name in PEERS:
        return {"top1": PEERS[name][1], "larger": "", "weights_licence": ""}
    name = SAME.get(name, name)
    tag = registered_cfg(name).tag or ""
    weights = of_model(name).get(tag)
    if weights is None:
        return {"top1": None, "larger": "", "weights_licence": "none published"}
    larger = re.match(r"(in2[12]k)(_ft|$)", tag)
    trained = f"ImageNet-{larger[1][2:].upper()}" if larger else ""
    if larger and not larger[2]:
        trained += " (that classifier)"
    return {"top1": weights.score.get("top1"), "larger": trained, "weights_licence": weights.weights_licence}


def facts(name: str) -> dict[str, Any]:
    """`describe` and `published`, whether the model is ours, and which of ours is the ``same``."""
    found = describe(name) | published(name) | {"ours": name in figures(), "same": SAME.get(name, "")}
    if name in PEERS:
        found["family"] = PEERS[name][0]
    elif name in SAME:
        found["family"] = f"{figures()[SAME[name]].family.partition(' ')[0]}, timm's"
    return found


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorted by family, then by size."""
    rank = {family: at for at, family in enumerate(FAMILIES)}
    return sorted(rows, key=lambda row: (rank.get(row["family"], len(rank)), row["family"], row["parameters"]))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table of models as text, with the columns of `HEAD`, from `describe` and `published`."""
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
    """Milliseconds per image on the CPU, from `foveal bench zoo`, and images per second on the GPU, from `foveal bench
    gpu` (inference in bfloat16, the faster of eager and compiled). Empty if not measured."""
    (cpu,) = [row["forward_ms"] for row in _table("zoo-cpu-2core.csv") if row["model"] == name] or [""]
    gpu = [
        float(row["images_per_second"])
        for row in _table("gpu-models.csv")
        if row["model"] == name and row["images_per_second"] and row.get("gpu")
    ]
    return f"{float(cpu):,.0f}" if cpu else "", f"{max(gpu):,.0f}" if gpu else ""


@functools.cache
def _table(name: str) -> list[dict[str, str]]:
    """A shipped table of results; empty if there is no such table."""
    file = files("foveal.benchmarks") / "results" / name
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.is_file() else []


def exports(family: str) -> str:
    """Export formats of a family; ``all``: safetensors, ONNX, pt2, AOTInductor and OpenVINO."""
    from .weights import ANY_SIZE

    free = ("dynamic size",) if family in ANY_SIZE else ()
    return ", ".join(("all", *(("Core ML",) if family in CORE_ML else ()), *free))


def table(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """`HEAD` and a row for each model, in order, without columns that are empty in all rows."""
    lines = [cells(row | published(row["name"])) for row in in_order(rows)]
    kept = [any(column) for column in zip(*lines, strict=True)]
    return [tuple(cell for cell, keep in zip(line, kept, strict=True) if keep) for line in (HEAD, *lines)]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The models as a Markdown table, by family and size, with the published facts of their default weights."""
    head, *lines = table(rows)
    text = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, *others in lines:
        text.append(f"| `{name}` | {' | '.join(others)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(text)


# ---- one model


def info(name: str) -> dict[str, Any]:
    """The output of `foveal info NAME --json`: the figures of `describe`, paper, origin, preprocessing, weights that
    timm loads, all published checkpoints of the model, dilations by level, and notes.

    Raises:
        ValueError: unknown model.
    """
    from timm.models import get_arch_pretrained_cfgs

    from .backbones.base import registered_cfg
    from .backbones.loading import resolve
    from .weights import cards
    from .weights.manifest import checkpoints, of_model

    checkpoint = checkpoints().get(name)
    found = resolve(name if checkpoint is None or checkpoint.task == "classify" else checkpoint.model)
    cfg = registered_cfg(found.name)
    prep = ("interpolation", "crop_pct", "mean", "std")
    return describe(found.name) | {
        "paper": ", ".join(filter(None, [cfg.paper_name, words(cfg.paper_ids)])),
        "origin": cfg.origin_url,
        "preprocessing": {key.removesuffix("_pct"): _plain(getattr(cfg, key)) for key in prep},
        "classes": cfg.num_classes,
        "weights": {
            full.partition(".")[2]: each.url or f"https://huggingface.co/{each.hf_hub_id}"
            for full, each in sorted(get_arch_pretrained_cfgs(found.architecture).items())
            if "." in full and each.has_weights
        },
        "published": {
            tag: {
                "task": each.task,
                "score": dict(each.score),
                "licence_of_weights": each.weights_licence,
                "licence_of_code": each.code_licence,
                "address": each.address or each.page,
                "mirrors": list(each.mirrors),
                "note": " ".join(filter(None, [each.note, each.about])),
            }
            for tag, each in of_model(found.architecture).items()
        },
        "dilations": _dilations(found.name),
        "notes": list(cfg.notes or ()),
        **({"card": cards.facts(checkpoint)} if checkpoint is not None else {}),
    }


def info_rows(name: str) -> list[tuple[str, str]]:
    """The lines of `foveal info NAME`: (heading, text); the heading is empty if it repeats the line above."""
    from .weights.manifest import of_model

    facts = info(name)
    prep = facts["preprocessing"]
    size = "x".join(map(str, facts["input"]))
    rows = [
        ("name", facts["name"]),
        ("family", facts["family"]),
        ("parameters", f"{facts['parameters']:,}"),
        ("GMACs", f"{facts['macs'] / 1e9:.3f} for one image of {size}"),
        ("", "matrix products, convolutions, and kernel x kernel keys for each query;"),
        ("", "normalization, activations, softmax, position biases, additions are not counted"),
        ("dilations", "  ".join(words(level) for level in facts["dilations"] or ())),
        (
            "preprocessing",
            f"{prep['interpolation']}, crop {prep['crop']}, mean {words(prep['mean'])}, std {words(prep['std'])}",
        ),
        ("classes", str(facts["classes"])),
        ("licence", f"of the code: {facts['code_licence'] or '-'}"),
        ("paper", facts["paper"] or "-"),
        ("origin", facts["origin"] or "-"),
    ]
    released = of_model(facts["name"].partition(".")[0])
    for tag, each in released.items():
        place = each.address or f"{each.file}, {each.page}"
        rows += [
            ("weights" if each.task == "classify" else each.task, f"{tag}  {place}"),
            ("", f"{each.score_text() or 'no score'}, published; licence of the weights: {each.weights_licence}"),
        ]
    if not released:
        rows += [("weights", f"{tag}  {url}") for tag, url in (facts["weights"] or {"-": "none published"}).items()]
    rows += [("exports", facts["exports"]), ("input sizes", "any" if facts["any_size"] else f"{size} only")]
    rows += [("note", note) for note in facts["notes"]]
    return [row for row in rows if row[1]]


def family_card(architecture: str) -> str:
    """The model card of a model's family, Markdown."""
    from timm.models import model_entrypoint

    from .backbones.loading import resolve

    architecture = resolve(architecture).architecture
    if architecture not in figures():
        raise ValueError(f"{architecture} is timm's; this package has cards for its own models")
    module = model_entrypoint(architecture).__module__.rpartition(".")[2]
    family = {"Agent Attention": "agent", "InLine": "inline"}.get(figures()[architecture].family, module)
    return (files("foveal.weights") / "model_cards" / f"{family}.md").read_text(encoding="utf-8")


def words(value: Any) -> str:
    """A list as text, separated by commas; None as ""."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value or "")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _dilations(name: str) -> list[list[int | str]] | None:
    """The dilation of every attention layer by level (in one list for models without levels); None without any."""
    import timm
    import torch

    from .backbones.attention import NeighborhoodAttention2d

    with torch.device("meta"):
        model = timm.create_model(name)
    levels_name = getattr(model, "levels_name", None)
    stages = getattr(model, levels_name) if levels_name else [model]
    levels = [[m.dilation for m in stage.modules() if isinstance(m, NeighborhoodAttention2d)] for stage in stages]
    return levels if any(levels) else None


if __name__ == "__main__":
    from .backbones import list_models

    write([count(name) for name in list_models()])
    print(FILE)
