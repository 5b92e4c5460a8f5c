"""The softmax of ``neighborhood_mix`` in standard operators, for backends that do not fuse it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..cache import CONSTANTS
from ..problem import Problem
from ..tracing import without_size_guards
from ..window import Window


def weights(logits: Tensor, table: Tensor | None, kernel_bias: Tensor | None, problem: Problem) -> Tensor:
    """Softmax of ``logits`` ``[B, H, W, N, Kh*Kw]`` plus biases, in at least float32: the same shape and dtype."""
    size = problem.shape[1:3] if problem.dynamic_shape else problem.size
    # heads before positions, as q @ k^T per head lies in memory; any other order makes the softmax copy
    z = logits.permute(0, 3, 1, 2, 4).to(torch.promote_types(logits.dtype, torch.float32))
    if table is not None:
        bias = expand_table(table, problem.rows, problem.columns, size)
        z = z + (bias if kernel_bias is None else bias + kernel_bias)
    elif kernel_bias is not None:
        z = z + kernel_bias
    if problem.boundary == "mask":
        rows, columns = (
            CONSTANTS.get(_rows_and_inside, window, length, z.device)[1]
            for window, length in zip(problem.windows, size, strict=True)
        )
        inside = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2)
        z = z.masked_fill(~inside, float("-inf"))
    return z.softmax(-1).to(logits.dtype).permute(0, 2, 3, 1, 4)


def mix_by(forward: Callable[[Tensor, Tensor, Problem], Tensor]) -> Callable[..., Tensor]:
    """``mix`` for a backend that computes the weights before its ``forward``."""

    @without_size_guards
    def mix(logits: Tensor, v: Tensor, table: Tensor | None, kernel_bias: Tensor | None, problem: Problem) -> Tensor:
        made = weights(logits, table, kernel_bias, problem)
        if problem.boundary == "mask":
            rows, columns = (replace(window, boundary="zero") for window in (problem.rows, problem.columns))
            problem = replace(problem, rows=rows, columns=columns)
        return forward(made, v, problem)

    return mix


def expand_table(table: Tensor, rows: Window, columns: Window, size: Sequence[int]) -> Tensor:
    """Expand a bias table ``[N, 2*Kh - 1, 2*Kw - 1]`` to every position of a map of ``size``: ``[N, H, W, Kh*Kw]``."""
    row, column = (
        CONSTANTS.get(_rows_and_inside, window, length, table.device)[0]
        for window, length in zip((rows, columns), size, strict=True)
    )
    table = table.index_select(1, row.flatten()).index_select(2, column.flatten())
    table = table.unflatten(2, column.shape).unflatten(1, row.shape)  # N H Kh W Kw
    return table.transpose(2, 3).flatten(3)


def fold_table(grad: Tensor, table: Tensor, problem: Problem) -> Tensor:
    """The gradient of a table from that of its expansion, ``[H, W, N, Kh*Kw]``, the transpose of `expand_table`."""
    row, column = (
        CONSTANTS.get(_rows_and_inside, window, length, grad.device)[0]
        for window, length in zip(problem.windows, problem.size, strict=True)
    )
    grad = grad.permute(2, 0, 1, 3).unflatten(3, problem.kernel_size).transpose(2, 3)  # N H Kh W Kw
    heads, rows, columns = table.shape
    folded = grad.new_zeros(heads, row.numel(), columns).index_add_(2, column.flatten(), grad.flatten(3).flatten(1, 2))
    return grad.new_zeros(heads, rows, columns).index_add_(1, row.flatten(), folded).to(table.dtype)


def _rows_and_inside(window: Window, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every position of an axis and every key of its window, both ``[length, K]``: the row of the table, and
    whether the key is inside the map."""
    _, inside, row = window.keys(length, device)
    return row, inside
