"""The shapes that are measured: layers of the published models, not sizes that suit a kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionCase:
    """One neighborhood-attention layer: ``[batch, size, size, heads, depth]``, kernel x kernel keys."""

    layer: str
    size: int
    heads: int
    dilation: int
    batch: int = 8
    depth: int = 32
    kernel_size: int = 7

    @property
    def id(self) -> str:
        return f"{self.size}x{self.size} d{self.dilation}"


# DiNAT-Tiny at 224 (arXiv 2209.15001): the layers of each level, once for each dilation.
DINAT_TINY = (
    AttentionCase("level 0", 56, 2, 1),
    AttentionCase("level 0", 56, 2, 8),
    AttentionCase("level 1", 28, 4, 1),
    AttentionCase("level 1", 28, 4, 4),
    AttentionCase("level 2", 14, 8, 1),
    AttentionCase("level 2", 14, 8, 2),
    AttentionCase("level 3", 7, 16, 1),
)

# (ours, the peer that does the same job at the same cost, batch, input size)
MODELS = (("dinat_tiny", "swin_tiny_patch4_window7_224", 8, 224),)
