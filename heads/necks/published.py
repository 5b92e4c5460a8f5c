"""Translate A3-FPN's published weights to `A3FPN` (mason-ching/A3-FPN, commit 95cb097)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..names import check_fit
from .a3fpn import A3FPN, sources

_SAMPLER = re.compile(r"(up|down)sample(\d?)")
_RENAMED = (
    (r"\.MCA\.weight_level_(\d)\.", lambda m: f".fusion.compress.{int(m[1]) - 1}."),
    (r"\.MCA\.weight_levels\.bottlenecks\.", ".fusion.weights.blocks."),
    (r"\.MCA\.weight_levels\.conv3\.conv\.", ".fusion.weights.conv3."),
    (r"\.MCA\.weight_levels\.", ".fusion.weights."),
    (r"\.MCA\.context_conv\.", ".fusion.context."),
    (r"\.MCA\.resampler(\d)\.", lambda m: f".fusion.resamplers.{int(m[1]) - 1}."),
    (r"\.resampling\.offset_mask_dw\.", ".resampling.context."),
    (r"\.resampling\.offset_mask\.", ".resampling.points."),
    (r"\.resampling\.value_proj\.", ".resampling.value."),
    (r"\.resampling\.output_proj\.", ".resampling.output."),
    (r"\.resampling\.center_feature_scale_proj_", ".resampling.center_gate."),
    (r"\.ICA\.gn\.", ".reassemble.gate."),
    (r"\.ICA\.", ".reassemble."),
)


def load_published(neck: A3FPN, state_dict: Mapping[str, Any]) -> None:
    """Load the authors' weights into a neck with their settings.

    Args:
        state_dict: see `published_state`.

    Raises:
        ValueError: names or shapes that do not fit the neck, which is then unchanged.
    """
    state = published_state(neck, state_dict)
    check_fit(neck.state_dict(), state)
    neck.load_state_dict(state)


def published_state(neck: A3FPN, state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The authors' weights under the names of a neck with their settings.

    Weights of unused outputs, and folded convolutions stored in addition to their branches, are left out.

    Args:
        state_dict: the neck's weights, alone or in the checkpoint of a whole model (``neck.`` in mmdetection,
            ``backbone.a3fpn.`` in detectron2, ``decode_head.a3fpn.`` in mmsegmentation, ``...pixel_decoder.a3fpn.`` in
            Mask2Former).
    """
    state, own, start = _neck_weights(state_dict), neck.state_dict(), neck.start_level
    # mmdetection's always has conv44, used or not; the maps after it are extra_convs
    conv44 = len(neck.extra) > len({name.split(".")[1] for name in state if name.startswith("extra_convs.")})
    result: dict[str, torch.Tensor] = {}
    unused = {f"conv{i}{i}" for i in range(start)} | (set() if conv44 else {"conv44"})
    smallest = len(neck.levels[0])
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        if body := _body(name):
            height, position = body
            level = neck.levels[height - smallest][position]
            if height == len(neck.squeeze) and level < start:
                continue  # an unused output
            name = f"columns.{height - smallest}.{level}." + _level_name(name.split(".", 2)[2], height, position)
        elif first in unused:
            continue
        elif first == "extra_convs":
            i, _, rest = rest.partition(".")
            name = f"extra.{int(i) + conv44}.{rest}"
        elif first == "conv44":
            name = f"extra.0.{rest}"
        elif len(first) == len("conv0"):
            name = f"squeeze.{first[-1]}.{rest}"
        else:
            name = f"outputs.{int(first[-1]) - start}.{rest}"
        if name in own and tensor.ndim == 2 and own[name].ndim == 4:  # linear layers are 1x1 convolutions here
            tensor = tensor[:, :, None, None]
        result[name] = tensor
    return result


def _neck_weights(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The neck's tensors from a whole model's, without their prefix."""
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    prefixes = {name[: name.index("a3fpn_body.")] for name in state_dict if "a3fpn_body." in name}
    if len(prefixes) != 1:
        found = ", ".join(sorted(prefixes)) or "none"
        raise ValueError(f"the weights of one A3-FPN are needed, prefixes of a3fpn_body: {found}")
    (prefix,) = prefixes
    own = re.compile(r"a3fpn_body\.|conv[0-4]+\.|extra_convs\.")
    state = {n[len(prefix) :]: torch.as_tensor(t) for n, t in state_dict.items() if n.startswith(prefix)}
    # folded convolutions, which the authors store in addition to their branches
    return {n: t for n, t in state.items() if own.match(n) and not re.search(r"bottlenecks\.\d+\.conv\.", n)}


def _body(name: str) -> tuple[int, int] | None:
    """Height of the column and level of a published name."""
    match = re.match(r"a3fpn_body\.a3fpn_(\d+)_level(\d+)\.", name)
    return (int(match[1]), int(match[2])) if match else None


def _level_name(name: str, height: int, level: int) -> str:
    if match := _SAMPLER.match(name):
        factor = int(match[2] or 2)
        source = level + int(math.log2(factor)) * (1 if match[1] == "up" else -1)
        rest = name.partition(".sample_layer.")[2].removeprefix("0.")
        return f"samples.{sources(level, height).index(source)}.conv.{rest}"
    name = "." + name
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name[1:]
