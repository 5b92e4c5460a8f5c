"""InLine attention: linear attention whose weights sum to one, without a softmax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .full import SoftmaxAttention2d, contiguous
from .maps import DepthwiseConv


class InlineAttention2d(SoftmaxAttention2d):
    """InLine attention (arXiv:2412.06590, section 4), linear in the number of positions.

    The weight of key j for query i is ``1 / N + s (q_i k_j - mean over j) / N``, with ``s = D ** -0.5``. So the output
    is the mean of the values, plus the query times the covariance of keys and values. A 3x3 depthwise convolution of
    the values is added, whose kernel is computed from the mean of the input, for each image.

    Args:
        dim: channels.
        num_heads: heads; must divide ``dim``.
        lepe: add a 3x3 depthwise convolution with a learned kernel, too, as in CSWin.
        class_token: as in `SoftmaxAttention2d`. The token is not convolved; the mean that makes the kernels
            includes it.
        split_q: likewise.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.

    Examples:
        >>> import torch
        >>> from foveal.backbones.attention import InlineAttention2d
        >>> InlineAttention2d(dim=64, num_heads=2)(torch.randn(1, 16, 20, 64)).shape
        torch.Size([1, 16, 20, 64])
    """

    def __init__(
        self, dim: int, num_heads: int, *, lepe: bool = False, class_token: bool = False, split_q: bool = False
    ) -> None:
        super().__init__(dim, num_heads, class_token=class_token, split_q=split_q)
        self.residual = nn.Sequential(  # with the authors' names
            nn.Conv1d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)
        )
        self.dwc = DepthwiseConv(dim, 3) if lepe else None

    def _mix(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: tuple[int, int], source: torch.Tensor
    ) -> torch.Tensor:
        """The kernel is of the mean of ``source``."""
        kernel = self.residual(source.mean(1)[..., None]).unflatten(1, (-1, 9))[..., 0]
        values = self._to_map(v, size)
        local = _convolve(values, kernel)
        if self.dwc is not None:
            local = local + self.dwc(values)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        return _attend_linearly(q, k, v).flatten(2) + self._to_tokens(local)


def _attend_linearly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``[B, N, heads, D]`` each, and the output."""
    count: Any = k.shape[1]
    factor = (q.shape[-1] ** -0.5 / count) ** 0.5  # of both sides, for half precision
    centred = (k - k.mean(1, keepdim=True)) * factor
    q, keys, values = contiguous(q.transpose(1, 2), centred.permute(0, 2, 3, 1), (v * factor).transpose(1, 2))
    (y,) = contiguous((q @ (keys @ values)).transpose(1, 2))
    return y + v.mean(1, keepdim=True)


def _convolve(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Depthwise 3x3 convolution of ``[B, H, W, C]`` with a kernel ``[B, C, 9]`` for each image, zero-padded.

    As nine products: a convolution of ``B * C`` groups is slow in training and would record B in exports."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    taps = kernel[:, None, None].unbind(-1)
    y = padded[:, :height, :width] * taps[0]
    for i in range(1, 9):
        row, column = divmod(i, 3)
        y = torch.addcmul(y, padded[:, row : row + height, column : column + width], taps[i])
    return y
