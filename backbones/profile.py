"""Parameters and multiply-accumulates (MACs) of a model, counted on shapes alone.

What is counted: every matrix product and convolution; for each query of neighborhood attention its ``Kh * Kw`` keys,
once for the logits and once for the values; for neighborhood aggregation its ``Kh * Kw`` values; whatever the backend
computes and masks away. What is not: normalization, activations, softmax, additions, pooling, resampling. One MAC is
what papers of this field print as one FLOP.

``python -m foveal.backbones.profile`` counts every model and writes the table of `foveal.backbones.figures`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch.utils.flop_counter import FlopCounterMode

from . import attention, family, figures, list_models


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

    image = torch.empty(1, channels, rows, columns, device="meta")
    with torch.no_grad(), _neighborhood_macs() as macs, FlopCounterMode(display=False) as flops:
        model(image)
    return Profile(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=flops.get_total_flops() // 2 + sum(macs),
        input_size=(channels, rows, columns),
    )


def count(name: str) -> figures.Figures:
    """The row of `figures.figures` for a registered model, counted anew."""
    counted, cfgs = profile(name), get_arch_pretrained_cfgs(name)
    return figures.Figures(
        name=name,
        family=family(name),
        parameters=counted.parameters,
        macs=counted.macs,
        input_size=counted.input_size,
        tags=tuple(sorted(full.partition(".")[2] for full, cfg in cfgs.items() if "." in full and cfg.has_weights)),
        licence=get_pretrained_cfg(name).license or "",
    )


@contextmanager
def _neighborhood_macs() -> Iterator[list[int]]:
    """Answer the neighborhood operations by shape and note their MACs, one entry per call.

    A backend is free to compute more than the windows hold (tiles with a mask), and none of them has to run on tensors
    without data, so the operations themselves are set aside while counting.
    """
    macs: list[int] = []

    def attend(q, k, v, *, kernel_size, **_):  # q, k [B, H, W, heads, D]; v [B, H, W, heads, Dv]
        rows, columns = to_2tuple(kernel_size)
        macs.append(q.shape[:-1].numel() * rows * columns * (q.shape[-1] + v.shape[-1]))
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    def mix(weights, v, **_):  # weights [B, H, W, heads, Kh * Kw]; v [B, H, W, heads, D]
        macs.append(weights.numel() * v.shape[-1])
        return torch.empty_like(v)

    stand_ins = {"neighborhood_attention": attend, "neighborhood_mix": mix}
    originals = {name: getattr(attention, name) for name in stand_ins}
    for name, stand_in in stand_ins.items():
        setattr(attention, name, stand_in)
    try:
        yield macs
    finally:
        for name, original in originals.items():
            setattr(attention, name, original)


if __name__ == "__main__":
    figures.write([count(name) for name in list_models()])
    print(figures.FILE)
