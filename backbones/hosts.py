"""What the hosts of agent and InLine attention (DeiT, PVT, Swin, CSWin) share: facts of the published files, names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .base import NamesError, bare_names

CODE = {"agent": "Agent-Attention", "inline": "InLine"}
PAPER = {"agent": "arXiv:2312.08874", "inline": "arXiv:2412.06590"}
UNPUBLISHED: dict[str, Any] = dict(license="apache-2.0", origin_url=None, notes=None)  # of a model that is ours


def family(name: str) -> str:
    """The family of a model with a host: ``"Agent Attention"`` or ``"InLine"``."""
    return "InLine" if "inline_" in name else "Agent Attention"


def published_cfg(
    kind: str, file: str, size: int = 224, *, paper: str, stride: int = 32, **facts: Any
) -> dict[str, Any]:
    """The cfg of a model with the authors' ``file`` and the host's ``paper``; images are squashed to the square."""
    return {
        "url": f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1" if file else "",
        "input_size": (3, size, size),
        "pool_size": (size // stride, size // stride),
        "crop_pct": 0.875,
        "crop_mode": "squash",
        "classifier": "head",
        "license": "none stated",
        "origin_url": f"https://github.com/LeapLabTHU/{CODE[kind]}",
        "paper_ids": [PAPER[kind], paper],
        "notes": ("The authors' repository has no licence for code or weights.",),
        **facts,
    }


def own_convolution(name: str) -> str:
    """Our name of a parameter of the authors' depthwise convolution ``dwc``; others as they are."""
    return re.sub(r"\.dwc\.(weight|bias)$", r".dwc.conv.\1", name)


def check_agent_shapes(checkpoint: Mapping[str, Any], model: Any, tensors: int) -> None:
    """Raise a NamesError for a detector's or segmenter's checkpoint if ``model.agent_shapes`` is None: its weights fit,
    but the authors' dense models have more agents than their classifiers. ``tensors`` is the number that fits."""
    if model.agent_shapes is None and any(name.startswith("backbone.") for name in bare_names(checkpoint)):
        raise NamesError(
            "the checkpoint is of a dense model, which may have more agents: create the model with agent_shapes=... "
            "(of the authors' models those that `foveal info` states for the dense checkpoint)",
            tensors,
        )
