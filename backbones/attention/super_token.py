"""Attention of super tokens (STViT)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.tracing import is_dynamic, without_size_guards
from ..layers import fx_leaf
from .full import TokenAttention2d
from .maps import map_sizes


class SuperTokenAttention2d(nn.Module):
    """Super token attention (STViT, arXiv:2211.11167, section 3.2), with one iteration of sampling.

    The map is divided into cells of ``token_size`` positions, with a super token each. Every position is associated
    with the super tokens of the 3x3 cells around it, by a softmax over their similarities (`associate`). Super tokens
    become the average of their positions, attend to each other, and every position gets the sum of its nine. No
    gradient flows through the association, as in the authors' training. The map is zero-padded to whole cells at the
    right and the bottom; padding is not masked, as there.

    Args:
        dim: channels.
        num_heads: heads of the attention between super tokens; must divide ``dim``.
        token_size: rows and columns of a cell; 1: plain attention over all positions.

    Raises:
        ValueError: on arguments that do not fit together; the message names them.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import SuperTokenAttention2d
        >>> attention = SuperTokenAttention2d(dim=64, num_heads=2, token_size=8)
        >>> attention(torch.randn(1, 28, 36, 64)).shape
        torch.Size([1, 28, 36, 64])
    """

    def __init__(self, dim: int, num_heads: int, token_size: int) -> None:
        super().__init__()
        if not isinstance(token_size, (int, np.integer)) or token_size < 1:
            raise ValueError(f"token_size must be an int of at least 1, got {token_size!r}")
        self.token_size = int(token_size)
        self.stoken_refine = TokenAttention2d(dim, num_heads)

    def extra_repr(self) -> str:
        return f"token_size={self.token_size}"

    @fx_leaf
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, W, dim]`` to the same shape, for any H and W."""
        if self.token_size == 1:
            return self.stoken_refine(x)
        return _attend_super_tokens(x, self.token_size, self.stoken_refine)


@without_size_guards
def _attend_super_tokens(x: torch.Tensor, size: int, refine: nn.Module) -> torch.Tensor:
    pixels = _to_cells(x, size)
    weights = associate(pixels)
    tokens = refine(_sample(pixels, weights))
    return _from_cells(weights.to(tokens.dtype) @ _neighbors(tokens), size, map_sizes(x)[1:3])


def _padded(x: torch.Tensor, size: int) -> torch.Tensor:
    """``[B, H, W, C]`` with zeros at the right and the bottom up to multiples of ``size``."""
    H, W = map_sizes(x)[1:3]
    # of positive numbers: ONNX rounds others to zero
    bottom, right = ((length + size - 1) // size * size - length for length in (H, W))
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if is_dynamic(H, W) or bottom or right else x


def _to_cells(x: torch.Tensor, size: int) -> torch.Tensor:
    """``[B, H, W, C]`` to zero-padded cells of ``size`` rows and columns, ``[B, h, w, size * size, C]``."""
    x = _padded(x, size)
    x = x.unflatten(1, (x.shape[1] // size, size)).unflatten(3, (x.shape[2] // size, size)).transpose(2, 3)
    # flatten would make exporters guard on the number of cells
    return x.clone(memory_format=torch.contiguous_format).flatten(3, 4)


def _from_cells(x: torch.Tensor, size: int, shape: tuple[int, int]) -> torch.Tensor:
    """Cells ``[B, h, w, size * size, C]`` to ``[B, *shape, C]``, without the padding."""
    x = x.unflatten(3, (size, size)).transpose(2, 3).clone(memory_format=torch.contiguous_format)
    x = x.flatten(3, 4).flatten(1, 2)
    if not is_dynamic(*shape):
        return x[:, : shape[0], : shape[1]]
    row, column = (torch.arange(length, device=x.device) for length in shape)  # exporters do not know a slice's length
    return x.index_select(1, row).index_select(2, column)


def associate(pixels: torch.Tensor) -> torch.Tensor:
    """Weights of the super tokens of the 3x3 cells around each position, row by row; without gradient.

    The logits are products with the averages of the cells, divided by ``C ** 0.5``; cells outside the map count as
    zeros, and so have a weight.

    Args:
        pixels: ``[B, h, w, P, C]``, the P positions of each of h x w cells.

    Returns:
        ``[B, h, w, P, 9]``, at least in float32.
    """
    pixels = pixels.detach()
    logits = pixels @ (_neighbors(pixels.mean(3)) * pixels.shape[-1] ** -0.5).transpose(-1, -2)
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _sample(pixels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The super tokens ``[B, h, w, C]``: averages of the positions ``[B, h, w, P, C]`` around with their weights."""
    tokens = _add_neighbors(weights.to(pixels.dtype).transpose(-1, -2) @ pixels)
    total = _add_neighbors(weights.sum(3)[..., None])
    return (tokens / (total + 1e-12)).to(pixels.dtype)


def _neighbors(tokens: torch.Tensor) -> torch.Tensor:
    """The tokens ``[B, h, w, C]`` of the 3x3 cells around each, zeros outside the map: ``[B, h, w, 9, C]``."""
    h, w = tokens.shape[1:3]
    padded = F.pad(tokens, (0, 0, 1, 1, 1, 1))
    rows = torch.stack([padded[:, i : i + h] for i in range(3)], 3)
    return torch.stack([rows[:, :, i : i + w] for i in range(3)], 4).flatten(3, 4)


def _add_neighbors(parts: torch.Tensor) -> torch.Tensor:
    """The transpose of `_neighbors`: adds nine parts ``[B, h, w, 9, C]`` to the cells around: ``[B, h, w, C]``."""
    h, w = parts.shape[1:3]
    rows = _add_overlapping(parts.unflatten(3, (3, 3)).unbind(4))[:, :, 1 : 1 + w].unbind(3)
    return _add_overlapping(rows)[:, 1 : 1 + h]


def _add_overlapping(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of three tensors, each one position after the previous along the third axis from the end."""
    before, at, after = parts
    return F.pad(before, (0, 0, 0, 0, 0, 2)) + F.pad(at, (0, 0, 0, 0, 1, 1)) + F.pad(after, (0, 0, 0, 0, 2, 0))
