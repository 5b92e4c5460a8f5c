"""What a backend is told about a call: sizes and options, no tensors."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch

from .window import Window


def tracing() -> bool:
    """Whether a compiler or exporter records the operators of this call instead of running them once."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@dataclass(frozen=True)
class Problem:
    """One call of an operation, as far as a backend needs it to say whether it can run it."""

    shape: tuple[int, ...]  # B, H, W, heads, D of the keys; of the values where there are none
    value_depth: int
    rows: Window
    columns: Window
    dtype: torch.dtype
    device: str  # "cpu", "cuda", ...
    needs_grad: bool
    tracing: bool  # under torch.compile, torch.export, torch.jit.trace or an ONNX exporter
    # of attention alone
    bias: type | None = None  # TableBias, FactoredBias or None
    scale: float = 1.0
    dropout_p: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        """H and W of the keys as constants: under a tracer too, a plan is for one size."""
        return operator.index(self.shape[1]), operator.index(self.shape[2])

    @property
    def query_size(self) -> tuple[int, int]:
        """H and W of the queries."""
        height, width = self.size
        return self.rows.queries(height), self.columns.queries(width)

    @property
    def boundary(self) -> str:
        return self.rows.boundary

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.rows.kernel_size, self.columns.kernel_size

    @property
    def stride(self) -> tuple[int, int]:
        return self.rows.stride, self.columns.stride

    @property
    def query_stride(self) -> tuple[int, int]:
        return self.rows.query_stride, self.columns.query_stride

    @property
    def dilation(self) -> tuple[int, int]:
        return self.rows.dilation, self.columns.dilation
