"""Parameters and multiply-accumulates (MACs) of a model, counted on shapes alone.

What is counted: every matrix product and convolution; for each query of neighborhood attention its ``Kh * Kw`` keys,
once for the logits and once for the values; for neighborhood aggregation its ``Kh * Kw`` values; whatever the backend
computes and masks away. What is not: normalization, activations, softmax, additions, pooling, resampling. One MAC is
what papers of this field print as one FLOP.

``python -m foveal.backbones.profile`` counts every model and writes the table of `foveal.figures`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .. import figures
from ..kernels import Call, recording
from . import family, list_models
from .base import registered_cfg


@dataclass(frozen=True)
class Profile:
    """Size and cost of a model at one input.

    Examples:
        >>> from foveal.backbones.profile import Profile, profile
        >>> counted = profile("test_foveal_dinat")
        >>> isinstance(counted, Profile) and counted.macs > counted.parameters > 0
        True
    """

    parameters: int
    macs: int
    input_size: tuple[int, int, int]  # channels, rows, columns


def profile(name: str, img_size: int | tuple[int, int] | None = None, **kwargs: Any) -> Profile:
    """Count the parameters, and the MACs of one image, of a model that timm can create.

    Args:
        name: a registered model, with or without a pretrained tag.
        img_size: rows and columns of the input; None takes the model's own default size.
        kwargs: passed to `timm.create_model`.

    Examples:
        >>> from foveal.backbones.profile import profile
        >>> profile("test_foveal_dinat", img_size=(64, 96), num_classes=10).input_size
        (3, 64, 96)
    """
    with torch.device("meta"):
        model: Any = timm.create_model(name, **kwargs).eval()
    channels, rows, columns = model.pretrained_cfg["input_size"]
    channels = kwargs.get("in_chans", channels)
    if img_size is not None:
        rows, columns = (img_size, img_size) if isinstance(img_size, int) else img_size

    macs: list[int] = []

    def count_macs(call: Call) -> Tensor:
        macs.append(_macs(call))
        return call.empty_output()  # a backend may compute more than the windows hold, and counts here like any product

    image = torch.empty(1, channels, rows, columns, device="meta")
    with torch.no_grad(), recording(count_macs), FlopCounterMode(display=False) as flops:
        model(image)
    return Profile(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=flops.get_total_flops() // 2 + sum(macs),
        input_size=(channels, rows, columns),
    )


def _macs(call: Call) -> int:
    """Of a neighborhood operation."""
    problem = call.problem
    batch, _, _, heads, depth = problem.shape
    pairs = batch * heads * math.prod(problem.query_size) * math.prod(problem.kernel_size)
    return pairs * (depth + problem.value_depth if call.operation == "neighborhood_attention" else depth)


def count(name: str) -> figures.Figures:
    """The row of `figures.figures` for a registered model, of this package or timm's, with or without a tag."""
    architecture = name.partition(".")[0]
    counted, cfgs = profile(name), get_arch_pretrained_cfgs(architecture)
    return figures.Figures(
        name=name,
        family=family(architecture) if architecture in list_models() else "timm",
        parameters=counted.parameters,
        macs=counted.macs,
        input_size=counted.input_size,
        tags=tuple(sorted(full.partition(".")[2] for full, cfg in cfgs.items() if "." in full and cfg.has_weights)),
        licence=registered_cfg(name).license or "",
    )


if __name__ == "__main__":
    figures.write([count(name) for name in list_models()])
    print(figures.FILE)
