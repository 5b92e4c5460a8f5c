"""Description of a call for the backends: sizes and options, no tensors."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from .bias import DecomposedRelativePositionBias
from .tracing import is_dynamic, tracing
from .window import Window


def subclassed(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors is a subclass that may have no storage; Dynamo sees through those."""
    plain = (Tensor, nn.Parameter, FakeTensor, type(None))
    return not torch.compiler.is_dynamo_compiling() and any(type(t) not in plain for t in tensors)


@torch.compiler.assume_constant_result
def old_gpu(device: torch.device) -> str:
    """The compute capability of an NVIDIA GPU below 8.0, else ""."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}" if major < 8 else ""


def of_tensors(first: Tensor, *others: Tensor | None) -> dict[str, Any]:
    """The fields of a `Problem` that follow from its tensors; dtype and device are those of the first."""
    return {
        "dtype": first.dtype,
        "device": first.device.type,
        "needs_grad": torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (first, *others)),
        "tracing": tracing(),
        "subclass": subclassed(first, *others),
        "old_gpu": old_gpu(first.device) if first.device.type == "cuda" else "",
    }


@dataclass(frozen=True)
class Problem:
    """One call of an operation: what a backend needs to decide whether it can run it, and to run it."""

    shape: tuple[int, ...]  # B, H, W, heads, D of the keys; of the values where there are none
    value_depth: int
    rows: Window
    columns: Window
    dtype: torch.dtype
    device: str  # "cpu", "cuda", ...
    needs_grad: bool
    tracing: bool  # under torch.compile, torch.export, torch.jit.trace or an ONNX exporter
    subclass: bool = False  # whether a tensor is a subclass such as DTensor; unknown under Dynamo
    old_gpu: str = ""  # the compute capability of a GPU below 8.0
    # attention only
    bias: type | None = None  # RelativePositionBias, DecomposedRelativePositionBias or None
    scale: float = 1.0
    dropout_p: float = 0.0

    @property
    def dynamic_shape(self) -> bool:
        """Whether the call is traced with a dynamic height or width."""
        return is_dynamic(*self.shape[1:3])

    @property
    def size(self) -> tuple[int, int]:
        """H and W of the keys as constants, also under tracing: a plan is for one size."""
        return operator.index(self.shape[1]), operator.index(self.shape[2])

    @property
    def plain_windows(self) -> bool:
        """Whether attention is dense inside non-overlapping windows: blocks that tile the map (MaxViT's block
        attention), or dilation groups of one window each (its grid attention)."""
        return self.bias is not DecomposedRelativePositionBias and all(
            window.query_stride == 1
            and window.offset == 0
            and (
                length == window.kernel_size * window.dilation
                or (window.stride == window.kernel_size and length % (window.kernel_size * window.dilation) == 0)
            )
            for window, length in zip(self.windows, self.shape[1:3], strict=True)
        )

    @property
    def query_size(self) -> tuple[int, int]:
        """H and W of the queries."""
        height, width = self.size
        return self.rows.queries(height), self.columns.queries(width)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key in its window, of all images and heads."""
        return self.shape[0] * self.shape[3] * math.prod(self.query_size) * math.prod(self.kernel_size)

    def output_shape(self, operation: str) -> tuple[int, ...]:
        """Shape of the output of ``operation``, a `Call.operation`."""
        depth = math.prod(self.kernel_size) if operation == "neighborhood_logits" else self.value_depth
        return self.shape[0], *self.query_size, self.shape[3], depth

    @property
    def windows(self) -> tuple[Window, Window]:
        """The windows of rows and columns."""
        return self.rows, self.columns

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
    def offset(self) -> tuple[int, int]:
        return self.rows.offset, self.columns.offset

    @property
    def dilation(self) -> tuple[int, int]:
        return self.rows.dilation, self.columns.dilation
