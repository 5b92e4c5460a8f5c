"""Parameters and multiply-accumulates (MACs) of a model, counted on shapes alone.

What is counted: every matrix product and convolution, and for each query of neighborhood attention its ``Kh * Kw``
keys, once for the logits and once for the values, whatever the backend computes and masks away. What is not:
normalization, activations, softmax, additions, pooling. One MAC is what papers of this field print as one FLOP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from . import attention


@dataclass(frozen=True)
class Profile:
    """Size and cost of a model at one input."""

    parameters: int
    macs: int
    input_size: tuple[int, int, int]  # channels, rows, columns


def profile(name: str, img_size: int | tuple[int, int] | None = None, **kwargs: Any) -> Profile:
    """Count the parameters, and the MACs of one image, of a model that timm can create.

    Args:
        name: a registered model, with or without a pretrained tag.
        img_size: rows and columns of the input; None takes the model's own default size.
        kwargs: passed to `timm.create_model`.
    """
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs).eval()
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


@contextmanager
def _neighborhood_macs() -> Iterator[list[int]]:
    """Answer neighborhood attention by shape and note its MACs, one entry per call.

    A backend is free to compute more than the windows hold (tiles with a mask), and none of them has to run on tensors
    without data, so the operation itself is set aside while counting.
    """
    macs: list[int] = []

    def count(q, k, v, *, kernel_size, **_):  # q, k [B, H, W, heads, D]; v [B, H, W, heads, Dv]
        queries = q.shape[:-1].numel()
        macs.append(queries * kernel_size[0] * kernel_size[1] * (q.shape[-1] + v.shape[-1]))
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    original = attention.neighborhood_attention
    attention.neighborhood_attention = count
    try:
        yield macs
    finally:
        attention.neighborhood_attention = original
