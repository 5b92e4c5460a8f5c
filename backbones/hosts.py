"""What the hosts of agent and InLine attention (DeiT, PVT, Swin, CSWin) share: the attention to the whole map, facts of
the published files, names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from .attention import AgentAttention2d, InlineAttention2d, SoftmaxAttention2d
from .base import NamesError, bare_names
from .layers import positive_pair

CODE = {"agent": "Agent-Attention", "inline": "InLine"}
PAPER = {"agent": "arXiv:2312.08874", "inline": "arXiv:2412.06590"}
UNPUBLISHED: dict[str, Any] = dict(license="apache-2.0", origin_url=None, notes=None)  # of a model that is ours


def family(name: str) -> str:
    """The family of a model with a host: ``"Agent Attention"`` or ``"InLine"``."""
    return "InLine" if "inline_" in name else "Agent Attention"


def host_attention(
    kind: str, num_heads: int, agents: Any, map_size: tuple[int, int], agent_shape: Any = None, **options: Any
) -> Callable[[int], nn.Module]:
    """What makes an attention to the whole map from its channels: ``"agent"``, ``"inline"`` or ``"softmax"``, with
    ``options`` of its class. Other arguments are of `AgentAttention2d`.

    Raises:
        ValueError: another ``kind``, or a shape of agents for one without them.
    """
    kinds: dict[str, Any] = {
        "agent": partial(AgentAttention2d, agents=agents, map_size=map_size, agent_shape=agent_shape),
        "inline": InlineAttention2d,
        "softmax": SoftmaxAttention2d,
    }
    if kind not in kinds:
        raise ValueError(f"attention must be one of {', '.join(kinds)}, got {kind!r}")
    if kind != "agent" and agent_shape is not None:
        raise ValueError(f"agent_shape {agent_shape} is of attention agent, not {kind}")
    return partial(kinds[kind], num_heads=num_heads, **options)


def attention_of_stages(
    kind: str,
    sizes: Sequence[tuple[int, int]],
    agent_shapes: Sequence[int | Sequence[int]] | None,
    options: Mapping[str, Any] | None = None,
    **per_stage: Sequence[Any],
) -> list[Callable[[int], nn.Module]]:
    """`host_attention` of each stage, given the ``sizes`` of its map in training, and ``depths``, ``num_heads``,
    ``agents`` and whatever else is ``per_stage``.

    Raises:
        ValueError: on arguments that do not fit together.
    """
    shapes = [None] * len(sizes) if agent_shapes is None else agent_shapes
    lengths = {name: len(each) for name, each in dict(per_stage, agent_shapes=shapes).items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"depths {tuple(per_stage['depths'])} differ in length from others, which have {lengths}")
    if kind != "agent" and agent_shapes is not None:
        raise ValueError(f"agent_shapes {agent_shapes} are of attention agent, not {kind}")
    each = zip(per_stage["num_heads"], per_stage["agents"], sizes, shapes, strict=True)
    return [host_attention(kind, *arguments, **(options or {})) for arguments in each]


def stage_sizes(img_size: int | Sequence[int], stages: int, rounds_up: bool = True) -> list[tuple[int, int]]:
    """(H, W) of the map of each stage, at strides 4, 8 and so on; at least 1."""
    rows, columns = positive_pair("img_size", img_size)
    strides = [4 * 2**i for i in range(stages)]
    if rounds_up:
        return [(-(-rows // stride), -(-columns // stride)) for stride in strides]
    return [(max(1, rows // stride), max(1, columns // stride)) for stride in strides]


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
