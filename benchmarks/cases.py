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


@dataclass(frozen=True)
class AggregateCase:
    """One neighborhood aggregation: ``[batch, rows, columns, heads, depth]``, kernel x kernel keys."""

    layer: str
    rows: int
    columns: int
    heads: int
    depth: int
    kernel_size: int
    batch: int = 8

    @property
    def id(self) -> str:
        return f"{self.rows}x{self.columns} k{self.kernel_size} depth {self.depth}"


# OverLoCK-XT (arXiv 2502.20087): both kernels of its stages at 224, one also with heads twice as deep, and stage
# 3 at the sizes of segmentation and detection.
OVERLOCK_XT = (
    AggregateCase("stage 3, 224", 14, 14, 8, 16, 13),
    AggregateCase("stage 3, 224", 14, 14, 8, 16, 5),
    AggregateCase("stage 3, 224", 14, 14, 8, 32, 13),
    AggregateCase("stage 4, 224", 7, 7, 12, 14, 7),
    AggregateCase("stage 4, 224", 7, 7, 12, 14, 5),
    AggregateCase("stage 3, 448", 28, 28, 8, 16, 13, 2),
    AggregateCase("stage 3, 448", 28, 28, 8, 16, 5, 2),
    AggregateCase("stage 3, 800x1216", 50, 76, 8, 16, 13, 1),
    AggregateCase("stage 3, 800x1216", 50, 76, 8, 16, 5, 1),
)


@dataclass(frozen=True)
class HaloCase:
    """The distinct halo attention layers of one of timm's models at an input size."""

    model: str
    size: int
    batch: int = 4

    @property
    def id(self) -> str:
        return f"{self.model} {self.size}"


HALO = (
    HaloCase("halonet_h1", 256, 2),
    HaloCase("halonet_h1", 512, 2),
    HaloCase("halonet26t", 256),
    HaloCase("halonet26t", 512),
    HaloCase("halonet50ts", 256),
)


@dataclass(frozen=True)
class ModelCase:
    """A model and the peer that does the same job at the same cost.

    ``same``: the peer holds the same parameters under the same names; they are copied and the answers compared.
    ``unfold``: the peer is the same model with its neighborhood aggregation done by unfolding.
    """

    ours: str
    peer: str
    batch: int
    size: int
    same: bool = False
    unfold: bool = False

    @property
    def id(self) -> str:
        return self.ours

    @property
    def peer_name(self) -> str:
        return f"{self.peer} by unfold" if self.unfold else self.peer


MODELS = (
    ModelCase("dinat_tiny", "swin_tiny_patch4_window7_224", 8, 224),
    ModelCase("maxvit_tiny_224", "maxvit_tiny_tf_224", 4, 224, same=True),
    ModelCase("overlock_xt", "overlock_xt", 4, 224, same=True, unfold=True),
    ModelCase("halo26t", "halonet26t", 4, 256, same=True),
)
