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


@dataclass(frozen=True)
class LayersCase:
    """The distinct neighborhood operations of a model for images of a size, each once."""

    model: str
    batch: int
    rows: int
    columns: int

    @property
    def id(self) -> str:
        return f"{self.model} {self.batch}x{self.rows}x{self.columns}"


# DiNAT-T first, whose maps the aims are about; then the largest, the higher resolution, and the maps of a detector.
GPU_LAYERS = (
    LayersCase("dinat_tiny", 128, 224, 224),
    LayersCase("dinat_large", 128, 224, 224),
    LayersCase("dinat_large_384", 32, 384, 384),
    LayersCase("dinat_tiny", 2, 800, 1216),
    LayersCase("halo_h1", 128, 256, 256),
    LayersCase("halo_h4", 64, 384, 384),
    LayersCase("maxvit_tiny_224", 128, 224, 224),
    LayersCase("overlock_t", 128, 224, 224),
)
TINY_LAYERS = tuple(
    LayersCase(f"test_foveal_{family}", 1, 64, 64) for family in ("dinat", "halonet", "maxvit", "overlock")
)


@dataclass(frozen=True)
class ConvCase:
    """A depthwise convolution: ``[batch, channels, size, size]``, kernel x kernel."""

    channels: int
    size: int
    kernel_size: int
    batch: int = 128

    @property
    def id(self) -> str:
        return f"{self.batch}x{self.channels}x{self.size}x{self.size} k{self.kernel_size}"

    def flops(self, backward: bool) -> int:
        """Operations of a forward, or of a forward and a backward."""
        return 2 * self.batch * self.channels * self.size**2 * self.kernel_size**2 * (3 if backward else 1)

    def bytes(self, backward: bool, item: int = 2) -> int:
        """The fewest bytes to move: input, weight and output; again both, and three gradients."""
        tensor, weight = self.batch * self.channels * self.size**2, self.channels * self.kernel_size**2
        return item * (5 * tensor + 3 * weight if backward else 2 * tensor + weight)


# OverLoCK-T (arXiv 2502.20087) at 224: the large kernel of each stage.
GPU_CONVS = (ConvCase(64, 56, 17), ConvCase(128, 28, 15), ConvCase(256, 14, 13), ConvCase(512, 7, 7))
TINY_CONVS = (ConvCase(8, 9, 7, 1),)

GPU_HALO = (HaloCase("halonet26t", 256, 128), HaloCase("halonet_h1", 256, 128))
TINY_HALO = (HaloCase("halonet26t", 256, 1),)


@dataclass(frozen=True)
class SpeedCase:
    """A model whose images per second are measured; ``peer``: what ours is compared with."""

    model: str
    size: int
    peer: str = ""
    batch: int = 128

    @property
    def id(self) -> str:
        return self.model


# Each of ours behind its peer; the comparisons that have an aim come first.
GPU_MODELS = (
    SpeedCase("swin_tiny_patch4_window7_224", 224),
    SpeedCase("dinat_tiny", 224, "swin_tiny_patch4_window7_224"),
    SpeedCase("maxvit_tiny_tf_224", 224),
    SpeedCase("maxvit_tiny_224", 224, "maxvit_tiny_tf_224"),
    SpeedCase("halonet26t", 256),
    SpeedCase("halo26t", 256, "halonet26t"),
    SpeedCase("convnext_tiny", 224),
    SpeedCase("nat_tiny", 224, "convnext_tiny"),
    SpeedCase("davit_tiny", 224),
    SpeedCase("overlock_t", 224, "convnext_tiny"),
    # those that are trained on many GPUs, whose steps docs/scaling.md derives from these figures
    SpeedCase("dinat_large", 224, batch=64),
    SpeedCase("dinat_s_large", 224, batch=64),
    SpeedCase("overlock_b", 224),
    SpeedCase("maxvit_large_224", 224, batch=64),
    SpeedCase("maxvit_xlarge_224", 224, batch=64),
    SpeedCase("halo_h7", 600, batch=32),
    SpeedCase("ascan_large", 224),
)
TINY_MODELS = (SpeedCase("test_vit", 160, batch=1), SpeedCase("test_foveal_dinat", 64, "test_vit", 1))

# timm's models of the same sizes, timed beside every one of ours
ZOO_PEERS = (
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "davit_tiny",
    "maxvit_tiny_tf_224",
    "halonet26t",
    "halonet50ts",
)
