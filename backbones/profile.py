"""Parameters and multiply-accumulates (MACs) of a model, counted on the meta device.

Counted are all matrix products and convolutions; for each query of neighborhood attention its ``Kh * Kw`` keys, once
for the logits and once for the values; for neighborhood aggregation its ``Kh * Kw`` values, independent of the backend.
Not counted are normalization, activations, softmax, position biases, additions, pooling and resampling. One MAC is what
papers usually report as one FLOP; PyTorch's ``FlopCounterMode`` counts it as two, and otherwise the same.

`foveal.zoo` writes the table of all models, ``foveal/figures.csv``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..kernels import Call, recording
from .attention import LogPositionBias


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
        img_size: rows and columns of the input; None: the model's default size.
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
        rows, columns = (img_size, img_size) if isinstance(img_size, (int, np.integer)) else img_size
    return of_model(model, (channels, rows, columns))


def of_model(model: torch.nn.Module, input_size: tuple[int, int, int]) -> Profile:
    """Count the parameters, and the MACs of one image ``(channels, rows, columns)``, of a model on the meta device."""
    macs: list[int] = []

    def count_macs(call: Call) -> Tensor:
        macs.append(call.flops // 2)
        return call.empty_output()  # not the backend's own products, which may exceed the windows

    image = torch.empty(1, *input_size, device="meta")
    with torch.no_grad(), recording(count_macs), FlopCounterMode(display=False) as flops:
        model(image)
    counts: Any = flops.get_flop_counts()
    biases = [counts[f"{type(model).__name__}.{n}"] for n, m in model.named_modules() if isinstance(m, LogPositionBias)]
    counted = flops.get_total_flops() - sum(sum(each.values()) for each in biases)
    return Profile(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counted // 2 + sum(macs),
        input_size=input_size,
    )
