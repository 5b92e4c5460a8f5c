"""Context-mixing dynamic convolution (OverLoCK)."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import nn

from ...kernels import RelativePositionBias, neighborhood_mix
from ...kernels.tracing import without_size_guards
from ..layers import is_plain


@without_size_guards
def context_mixing(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj: nn.Conv2d,
    tables: Sequence[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Context-mixing dynamic convolution (OverLoCK's ContMix, arXiv:2502.20087).

    The affinities of a position's query to S pooled positions of the context are projected to the weights of its own
    convolution kernel, one for each head and table, with a relative position bias and a softmax over the kernel. At the
    borders the window is shifted inside the map.

    The weight of a plain ``proj`` is multiplied with the pooled keys before the queries, which gives the same product
    without storing the affinities. Any other ``proj`` is called with the affinities.

    Args:
        q: queries ``[B, H, W, heads, D]``.
        k: keys ``[B, S, heads, D]``.
        v: values ``[B, H, W, C]``. The channels are divided equally among the tables' kernels, in the order of
            ``tables``, and then among the heads.
        proj: from affinities ``[B * heads, S, H, W]`` to logits, a 1x1 convolution from S channels to the concatenated
            kernels.
        tables: position biases ``[heads, 2 * K - 1, 2 * K - 1]``, one for each kernel of K x K.
        scale: of the affinities.

    Returns:
        ``[B, H, W, C]``.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import context_mixing
        >>> q, k = torch.randn(1, 14, 14, 2, 8), torch.randn(1, 49, 2, 8)
        >>> proj = torch.nn.Conv2d(49, 7 * 7 + 5 * 5, 1)
        >>> tables = torch.zeros(2, 13, 13), torch.zeros(2, 9, 9)
        >>> context_mixing(q, k, torch.randn(1, 14, 14, 32), proj, tables, 8**-0.5).shape
        torch.Size([1, 14, 14, 32])
    """
    H, W, heads = q.shape[1:4]
    sizes = [(operator.index(table.shape[-1]) + 1) // 2 for table in tables]  # ints, also under torch.jit.trace
    q = q.permute(0, 3, 1, 2, 4).flatten(2, 3)  # B heads HW D
    k = (scale * k).permute(0, 2, 3, 1)  # B heads D S
    shares = v.unflatten(-1, (len(tables), heads, -1)).unbind(3)
    areas = [size * size for size in sizes]
    biases: Sequence[torch.Tensor | None]
    if is_plain(proj) and proj.bias is not None:
        kernels = proj.weight.flatten(1).split(areas)  # K*K S
        maps = [(q @ (k @ kernel.t())).unflatten(2, (H, W)).permute(0, 2, 3, 1, 4) for kernel in kernels]
        biases = proj.bias.split(areas)
    else:
        affinities = (k.mT @ q.mT).flatten(0, 1).unflatten(2, (H, W))  # B*heads S H W
        maps = proj(affinities).unflatten(0, (-1, heads)).permute(0, 3, 4, 1, 2).split(areas, -1)
        biases = [None] * len(sizes)
    mixed = []
    for size, table, logits, bias, share in zip(sizes, tables, maps, biases, shares, strict=True):  # B H W heads K*K
        table = RelativePositionBias(table)
        mixed.append(neighborhood_mix(logits, share, kernel_size=size, bias=table, kernel_bias=bias))
    return torch.stack(mixed, dim=3).flatten(3)
