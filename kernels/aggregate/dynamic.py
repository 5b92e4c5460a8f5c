"""Neighborhood aggregation for export with a dynamic height or width.

B batch, H W map, N heads, C channels, K = Kh * Kw keys of a window, M M2 tiles of rows and columns, T T2 queries of a
tile, S S2 keys of its span (``kernels/dynamic.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dynamic
from ..dynamic import DynamicAxisTiling
from ..problem import Problem
from ..tiling import working_dtype
from ..tracing import without_size_guards
from .softmax import mix_by


def unsupported_reason(problem: Problem) -> str | None:
    """Runs everything, on any device."""
    return None


def _tilings(problem: Problem, x: Tensor) -> tuple[DynamicAxisTiling, DynamicAxisTiling]:
    return dynamic.axis_tiling(problem.rows, x.shape[1], x.device), dynamic.axis_tiling(
        problem.columns, x.shape[2], x.device
    )


def _places(problem: Problem, a: DynamicAxisTiling, b: DynamicAxisTiling) -> Tensor:
    """Where the keys of each query lie in the span of its tile: [M, M2, T*T2, K]."""
    row, column = (
        side.first[..., None] + torch.arange(size, device=side.first.device)
        for side, size in zip((a, b), problem.kernel_size, strict=True)
    )
    places = row[:, None, :, None, :, None] * b.span + column[None, :, None, :, None, :]
    return places.flatten(4, 5).flatten(2, 3)


@without_size_guards
def forward(weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """[B, H, W, N, Kh*Kw] x [B, H, W, N, D] -> [B, H, W, N, D]."""
    working = working_dtype(v.dtype)
    a, b = _tilings(problem, v)
    tiles = dynamic.query_tiles(weights.to(working), a, b)
    places = _places(problem, a, b)[:, :, None].expand(*tiles.shape[:4], -1, -1)
    matrix = tiles.new_zeros(*tiles.shape[:5], a.span * b.span).scatter(-1, places, tiles)
    values = dynamic.key_spans(v.to(working), a, b, problem.boundary)
    return dynamic.from_query_tiles(matrix @ values, a, b).to(v.dtype)


mix = mix_by(forward)


@without_size_guards
def logits(q: Tensor, k: Tensor, problem: Problem) -> Tensor:
    """[B, H, W, N, D] x [B, H, W, N, D] -> [B, H, W, N, Kh*Kw]: ``q . k`` for the keys of every window."""
    working = working_dtype(k.dtype)
    a, b = _tilings(problem, k)
    tiles = dynamic.query_tiles(q.to(working), a, b)
    products = tiles @ dynamic.key_spans(k.to(working), a, b, problem.boundary).transpose(-1, -2)
    places = _places(problem, a, b)[:, :, None].expand(*tiles.shape[:4], -1, -1)
    return dynamic.from_query_tiles(products.gather(-1, places), a, b).to(k.dtype)
