"""Neighborhood attention for export with a dynamic height or width.

B batch, H W map, h w queries, N heads, D query/key channels, V value channels, M M2 tiles of rows and columns,
T T2 queries of a tile, S S2 keys of its span (``kernels/dynamic.py``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import dynamic
from ..bias import Bias, DecomposedRelativePositionBias, RelativePositionBias
from ..dynamic import DynamicAxisTiling
from ..problem import Problem
from ..tiling import working_dtype
from ..tracing import without_size_guards


def unsupported_reason(problem: Problem) -> str | None:
    """Runs everything, on any device."""
    return None


def _table_and_mask(table: Tensor, a: DynamicAxisTiling, b: DynamicAxisTiling) -> Tensor:
    """Table and mask of every tile, [M, M2, N, T*T2, S*S2], from a table [N, 2Kh-1, 2Kw-1]."""
    table = F.pad(table, (0, 1, 0, 1), value=float("-inf"))  # a row and a column for keys that are not seen
    bias = table.index_select(2, b.row.flatten()).index_select(1, a.row.flatten())
    bias = bias.unflatten(2, (b.tiles, b.tile, b.span)).unflatten(1, (a.tiles, a.tile, a.span))  # N M T S M2 T2 S2
    return bias.permute(1, 4, 0, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def _decomposed_bias(
    tiles: Tensor, bias: DecomposedRelativePositionBias, a: DynamicAxisTiling, b: DynamicAxisTiling
) -> Tensor:
    """q . rows + q . columns for every query and key of a tile: [B, M, M2, N, T*T2, S*S2]."""
    sums = []
    for embedding, at, shape in (
        (bias.rows, a.row, (1, a.tiles, 1, 1, a.tile, 1, a.span)),
        (bias.columns, b.row, (1, 1, b.tiles, 1, 1, b.tile, b.span)),
    ):
        embedding = (embedding if embedding.ndim == 3 else embedding[None]).to(tiles.dtype)
        dots = (tiles @ embedding.transpose(-1, -2)).unflatten(4, (a.tile, b.tile))  # B M M2 N T T2 2K-1
        at = at.clamp(max=embedding.shape[1] - 1).reshape(shape).expand(*dots.shape[:6], -1)
        sums.append(dots.gather(-1, at))
    return (sums[0].unsqueeze(-1) + sums[1].unsqueeze(-2)).flatten(6, 7).flatten(4, 5)


@without_size_guards
def forward(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, problem: Problem) -> Tensor:
    """[B, h, w, N, D] x [B, H, W, N, D] x [B, H, W, N, V] -> [B, h, w, N, V]."""
    working = working_dtype(q.dtype)
    a = dynamic.axis_tiling(problem.rows, k.shape[1], q.device)
    b = dynamic.axis_tiling(problem.columns, k.shape[2], q.device)
    tiles = dynamic.query_tiles(q, a, b).to(working)
    keys = dynamic.key_spans(k, a, b, problem.boundary).to(working)
    values = dynamic.key_spans(v, a, b, problem.boundary)
    if isinstance(bias, RelativePositionBias):
        added = _table_and_mask(bias.table.to(working), a, b)
    else:
        added = _table_and_mask(tiles.new_zeros(1, *(2 * size - 1 for size in problem.kernel_size)), a, b)
        if bias is not None:
            added = added + _decomposed_bias(tiles, bias, a, b)
    logits = (tiles * problem.scale) @ keys.transpose(-1, -2) + added
    weights = logits.softmax(-1).to(values.dtype)
    if problem.dropout_p > 0:
        weights = F.dropout(weights, problem.dropout_p)
    return dynamic.from_query_tiles(weights @ values, a, b)
