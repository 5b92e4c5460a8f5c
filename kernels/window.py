"""The window rule: which keys a query sees. Every backend, mask, count and test derives from this file.

Per axis, a query at ``x`` on an axis of length ``X`` belongs to the dilation group ``g = x % d`` and has the index
``i = x // d`` among the ``L`` positions of that group. Its keys are the ``K`` indices from ``start(i)`` on, in the same
group, so at the positions ``t * d + g``. The ``s`` queries of a stride group share the window of their leader::

    lead  = (i // s) * s + s // 2
    left  = K // 2,  right = K - 1 - left
    start = clamp(min(lead, L - 1), left, L - 1 - right) - left      boundary "shift"
    start = lead - left                                             boundary "zero", "mask"

Sources: Neighborhood Attention Transformer (arXiv 2204.07143) for the window, Dilated NAT (arXiv 2209.15001) for the
dilation, Generalized Neighborhood Attention (arXiv 2504.16922) for the stride, HaloNet (arXiv 2103.12731) for blocks
with a halo.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BOUNDARIES = ("shift", "zero", "mask")


@dataclass(frozen=True)
class Window:
    """The window of one axis.

    ``boundary`` says what happens where a window would leave the map: ``"shift"`` moves it inside (every query sees
    exactly ``kernel_size`` keys), ``"zero"`` leaves it and lets keys and values of zero take part in the softmax,
    ``"mask"`` leaves it and drops the keys outside from the softmax.
    """

    kernel_size: int
    stride: int = 1
    dilation: int = 1
    boundary: str = "shift"

    @property
    def left(self) -> int:
        """Keys before the leader of an unmoved window."""
        return self.kernel_size // 2

    @property
    def right(self) -> int:
        """Keys after the leader of an unmoved window."""
        return self.kernel_size - 1 - self.left

    def group_length(self, length: int, group: int = 0) -> int:
        """Positions congruent to ``group`` modulo the dilation on an axis of ``length``."""
        return (length - group + self.dilation - 1) // self.dilation

    def start(self, index: int, length: int) -> int:
        """First key index of the query ``index`` in a dilation group of ``length`` positions."""
        lead = index // self.stride * self.stride + self.stride // 2
        if self.boundary == "shift":
            lead = min(max(min(lead, length - 1), self.left), length - 1 - self.right)
        return lead - self.left

    def starts(self, index: Tensor, length: int | Tensor) -> Tensor:
        """``start`` for a tensor of indices; ``length`` may be a tensor that broadcasts against it."""
        lead = torch.div(index, self.stride, rounding_mode="floor") * self.stride + self.stride // 2
        if self.boundary == "shift":
            last = torch.as_tensor(length, device=index.device) - 1
            lead = torch.minimum(torch.clamp(torch.minimum(lead, last), min=self.left), last - self.right)
        return lead - self.left

    def table_row(self, key: Tensor, query: Tensor) -> Tensor:
        """Row of a ``[2K - 1]`` bias table for a key and a query index of the same group."""
        return key - query + self.kernel_size - 1

    def keys(self, length: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The keys of all queries of an axis: ``(position, inside, row)``, each ``[length, K]``.

        ``position`` is clamped to the map where ``inside`` is false; ``row`` indexes a bias table of ``2K - 1`` rows.
        """
        x = torch.arange(length, device=device)
        group, index = x % self.dilation, torch.div(x, self.dilation, rounding_mode="floor")
        in_group = torch.div(length - group + self.dilation - 1, self.dilation, rounding_mode="floor")
        key = self.starts(index, in_group)[:, None] + torch.arange(self.kernel_size, device=device)
        position = key * self.dilation + group[:, None]
        inside = (key >= 0) & (key < in_group[:, None])
        return position.clamp(0, max(length - 1, 0)), inside, self.table_row(key, index[:, None])
