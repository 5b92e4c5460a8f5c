"""Relative position biases that the kernels add to the logits before the softmax."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .cache import TensorCache


@dataclass(frozen=True, eq=False)
class RelativePositionBias:
    """One learned number per head and relative position (NAT, arXiv 2204.07143; MaxViT, arXiv 2204.01697).

    ``table`` is ``[heads, 2*Kh - 1, 2*Kw - 1]``; the entry for a key at ``t`` and a query at ``i`` (indices inside
    their dilation group) is ``table[head, th - ih + Kh - 1, tw - iw + Kw - 1]``. ``cache`` stores what a backend
    derives from the table in evaluation.

    Examples:
        >>> import torch
        >>> from foveal.kernels import RelativePositionBias, neighborhood_attention
        >>> q = k = v = torch.randn(1, 14, 14, 2, 32)
        >>> bias = RelativePositionBias(torch.zeros(2, 2 * 7 - 1, 2 * 7 - 1))
        >>> neighborhood_attention(q, k, v, kernel_size=7, bias=bias).shape
        torch.Size([1, 14, 14, 2, 32])
    """

    table: Tensor
    cache: TensorCache | None = None

    def expected(self, heads: int, depth: int, kernel_size: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], ...]]:
        rows, columns = (2 * k - 1 for k in kernel_size)
        return {"table": ((heads, rows, columns),)}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table,)


@dataclass(frozen=True, eq=False)
class DecomposedRelativePositionBias:
    """Row and column embeddings dotted with the query (HaloNet, arXiv 2103.12731; Bottleneck Transformers).

    ``rows`` is ``[2*Kh - 1, D]`` or, one set per head, ``[heads, 2*Kh - 1, D]``; ``columns`` likewise with ``Kw``.
    The bias of a key at ``t`` for the query ``q`` at ``i`` is
    ``q . rows[th - ih + Kh - 1] + q . columns[tw - iw + Kw - 1]`` with the unscaled query.

    ``counted`` matters only with a query stride, which must then divide the stride: offsets then count the queries
    that share a window, not positions. At a query stride of 2 the third query, four positions after the first, has an
    offset of two (timm's ``HaloAttn``).

    Examples:
        >>> import torch
        >>> from foveal.kernels import DecomposedRelativePositionBias, neighborhood_attention
        >>> q = k = v = torch.randn(1, 16, 16, 2, 32)
        >>> rows, columns = torch.zeros(2, 2 * 14 - 1, 32)  # HaloNet: blocks of 8, a halo of 3
        >>> bias = DecomposedRelativePositionBias(rows, columns)
        >>> neighborhood_attention(q, k, v, kernel_size=14, stride=8, boundary="mask", bias=bias).shape
        torch.Size([1, 16, 16, 2, 32])
    """

    rows: Tensor
    columns: Tensor
    counted: bool = False

    def expected(self, heads: int, depth: int, kernel_size: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], ...]]:
        rows, columns = (2 * k - 1 for k in kernel_size)
        return {
            "rows": ((rows, depth), (heads, rows, depth)),
            "columns": ((columns, depth), (heads, columns, depth)),
        }

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.rows, self.columns)


Bias = RelativePositionBias | DecomposedRelativePositionBias
