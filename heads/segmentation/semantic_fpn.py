"""Semantic FPN: the semantic branch of Panoptic FPN (Kirillov et al., arXiv 1901.02446, section 3.1)."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..backbone import Neck
from .layers import Classifier, ConvNormAct, resize


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class SemanticFPN(nn.Module):
    """Semantic FPN head: each level is upsampled to the finest by steps of 3x3 convolution, group norm, ReLU and 2x
    bilinear upsampling (the finest: one step without upsampling); the sum is classified.

    Args:
        neck: with output strides that double; ``spec`` is its `ShapeSpec`.
        channels: width of the steps, a multiple of 32 (the groups of the norms).
        dropout: channel dropout before the classifier; the paper has none.
        convention: ``"paper"``, or ``"mmseg"``: mmsegmentation's FPNHead, which has batch norm and doubles the sides of
            every level, then resizes it to the finest; of another size only where sides are odd.

    Raises:
        ValueError: strides that do not double from level to level, a width that 32 does not divide, or another
            convention.
    """

    def __init__(
        self, neck: Neck, num_classes: int, *, channels: int = 128, dropout: float = 0.0, convention: str = "paper"
    ):
        super().__init__()
        if convention not in ("paper", "mmseg"):
            raise ValueError(f'semantic FPN: convention must be "paper" or "mmseg", got {convention!r}')
        spec = neck.spec
        if any(b != 2 * a for a, b in zip(spec.strides, spec.strides[1:], strict=False)):
            raise ValueError(f"semantic FPN: strides must double from level to level, got {spec.strides}")
        self.mmseg = convention == "mmseg"
        norm = nn.BatchNorm2d if self.mmseg else group_norm
        if channels % 32 and not self.mmseg:
            raise ValueError(f"semantic FPN: channels is {channels}, must be a multiple of the 32 groups of its norms")
        self.neck = neck
        self.steps = nn.ModuleList(
            nn.ModuleList(ConvNormAct(c if j == 0 else channels, channels, 3, norm) for j in range(max(i, 1)))
            for i, c in enumerate(spec.channels)
        )
        self.classifier = Classifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The backbone's maps to logits ``[B, num_classes, h, w]`` at the finest one's size."""
        levels = self.neck(maps)
        sizes = [level.shape[-2:] for level in levels]
        total: Tensor | None = None
        for i, (x, steps) in enumerate(zip(levels, self.steps, strict=True)):
            for j, step in enumerate(steps):
                # to the next finer level's size: twice this one's, unless a side is odd
                x = step(x)
                double = self.mmseg and i > 0
                x = resize(x, [2 * side for side in x.shape[-2:]] if double else sizes[max(i - 1 - j, 0)])
            if self.mmseg:
                x = resize(x, sizes[0])
            total = x if total is None else total + x
        return self.classifier(total)
