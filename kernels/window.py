"""The window rule: which keys a query sees. All backends, masks, FLOP counts and tests follow this file.

Per axis, a query at ``x`` on an axis of length ``X`` belongs to the dilation group ``g = x % d`` and has the index
``i = x // d`` among the ``L`` positions of that group. Its keys are the ``K`` indices ``t`` from ``start(i)`` on in the
same group, at the positions ``t * d + g``. The ``s`` positions of a stride group share the window of their leader::

    lead  = (i // s) * s + s // 2
    left  = K // 2,  right = K - 1 - left
    start = clamp(min(lead, L - 1), left, L - 1 - right) - left      boundary "shift"
    start = lead - left                                             boundary "zero", "mask"

With a query stride ``n`` (and no dilation) there are queries only at every n-th position: query ``j`` has the index
``i = j * n``.

With an ``offset`` (boundary "zero" or "mask", no query stride), the stride groups begin at the indices congruent to it
modulo ``s``: above, ``(i // s) * s`` is ``((i + a) // s) * s - a`` with ``a = -offset % s``, the positions that the
first group lacks. Windows shifted by ``offset`` with the map rolled and masked, as in Swin, are blocks
(``s = K``) with boundary "mask".

A bias table is indexed by the offset ``t - i``. If ``counted``, the ``s / n`` queries of a stride group count as
adjacent: for the table alone, ``i`` is ``(j // (s / n)) * s + j % (s / n)``.

Sources: Neighborhood Attention Transformer (arXiv 2204.07143) for the window, Dilated NAT (arXiv 2209.15001) for the
dilation, Generalized Neighborhood Attention (arXiv 2504.16922) for the stride, HaloNet (arXiv 2103.12731) for blocks
with a halo and strided queries; ``counted`` is timm's ``HaloAttn``; Swin (arXiv 2103.14030) for shifted windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BOUNDARIES = ("shift", "zero", "mask")


@dataclass(frozen=True)
class Window:
    """The window of one axis. Queries are numbered, keys indexed in their dilation group.

    ``boundary`` applies to windows that leave the map: ``"shift"`` moves them inside (every query sees exactly
    ``kernel_size`` keys), with ``"zero"`` keys and values outside are zero and take part in the softmax, ``"mask"``
    excludes the keys outside.
    """

    kernel_size: int
    stride: int = 1
    dilation: int = 1
    boundary: str = "shift"
    query_stride: int = 1  # above 1 only without dilation
    counted: bool = False  # only where query_stride divides stride
    offset: int = 0  # others only with boundary "zero" or "mask" and query_stride 1

    @property
    def arguments(self) -> tuple:
        """The window as plain values, for Dynamo and operator schemas."""
        return self.kernel_size, self.stride, self.dilation, self.boundary, self.query_stride, self.counted, self.offset

    @property
    def left(self) -> int:
        """Keys before the leader of an unmoved window."""
        return self.kernel_size // 2

    @property
    def right(self) -> int:
        """Keys after the leader of an unmoved window."""
        return self.kernel_size - 1 - self.left

    @property
    def ahead(self) -> int:
        """Positions that the first stride group lacks."""
        return -self.offset % self.stride

    def group_length(self, length: int, group: int = 0) -> int:
        """Positions congruent to ``group`` modulo the dilation on an axis of ``length``."""
        return (length - group + self.dilation - 1) // self.dilation

    def queries(self, length: int) -> int:
        """Queries on ``length`` positions, of an axis or of a dilation group."""
        return (length + self.query_stride - 1) // self.query_stride

    def start(self, query: int, length: int) -> int:
        """First key index of a query in a dilation group of ``length`` positions."""
        index = query * self.query_stride + self.ahead
        lead = index // self.stride * self.stride - self.ahead + self.stride // 2
        if self.boundary == "shift":
            lead = min(max(min(lead, length - 1), self.left), length - 1 - self.right)
        return lead - self.left

    def starts(self, query: Tensor, length: int | Tensor) -> Tensor:
        """``start`` for a tensor of queries; ``length`` may be a tensor that broadcasts against it."""
        index = query * self.query_stride + self.ahead if self.ahead else query * self.query_stride
        first = torch.div(index, self.stride, rounding_mode="floor") * self.stride
        lead = first + (self.stride // 2 - self.ahead)
        if self.boundary == "shift":
            last = torch.as_tensor(length, device=query.device) - 1
            lead = torch.minimum(torch.clamp(torch.minimum(lead, last), min=self.left), last - self.right)
        return lead - self.left

    def table_row(self, key: Tensor, query: Tensor) -> Tensor:
        """Row of a ``[2K - 1]`` bias table for a key index and a query of the same group."""
        if self.counted:
            together = self.stride // self.query_stride
            group = torch.div(query, together, rounding_mode="floor")
            index = query + group * (self.stride - together)
        else:
            index = query * self.query_stride
        return key - index + self.kernel_size - 1

    @property
    def rows_between(self) -> int:
        """Rows of a bias table from a query to its neighbour; if ``counted``, inside a stride group."""
        return 1 if self.counted else self.query_stride

    def keys(self, length: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The keys of all queries of an axis: ``(position, inside, row)``, each ``[queries, K]``.

        ``position`` is clamped to the map where ``inside`` is false; ``row`` indexes a bias table of ``2K - 1`` rows.
        """
        x = torch.arange(self.queries(length), device=device)
        group, query = x % self.dilation, torch.div(x, self.dilation, rounding_mode="floor")
        in_group = torch.div(length - group + self.dilation - 1, self.dilation, rounding_mode="floor")
        key = self.starts(query, in_group)[:, None] + torch.arange(self.kernel_size, device=device)
        position = key * self.dilation + group[:, None]
        inside = (key >= 0) & (key < in_group[:, None])
        last = torch.sym_max(length - 1, 0) if isinstance(length, torch.SymInt) else max(length - 1, 0)
        return position.clamp(0, last), inside, self.table_row(key, query[:, None])


def window_list(rows: Window, columns: Window) -> list[int]:
    """The windows as a list of ints, for the schemas of operators."""
    pairs = ((w.kernel_size, w.stride, w.dilation, w.query_stride, int(w.counted), w.offset) for w in (rows, columns))
    return [BOUNDARIES.index(rows.boundary), *(x for pair in pairs for x in pair)]


@lru_cache(maxsize=1024)
def windows_of(numbers: tuple[int, ...]) -> tuple[Window, Window]:
    """The inverse of `window_list`."""
    boundary = BOUNDARIES[numbers[0]]
    rows, columns = (
        Window(size, stride, dilation, boundary, apart, bool(counted), offset)
        for size, stride, dilation, apart, counted, offset in (numbers[1:7], numbers[7:])
    )
    return rows, columns


def pairs_of(queries: Sequence[int], window: Sequence[int]) -> int:
    """Pairs of a query and a key, of queries ``[B, h, w, heads, ...]`` and a `window_list`."""
    return math.prod(queries[:4]) * window[1] * window[7]
