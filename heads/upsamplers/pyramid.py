"""Maps of strides that a backbone does not have, finer ones by an upsampler."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import ShapeSpec, power_of_two
from .base import Upsampler


class Pyramid(nn.Module):
    """Maps of ``strides`` from those of a body. The upsampler is not trained and stays in evaluation mode.

    Strides that the body lacks: finer ones are the body's finest map, upsampled; coarser ones its coarsest map,
    max-pooled (as in ViTDet, arXiv 2203.16527, section 3). Of a body whose stride is no power of two (14), images are
    resized (by 14/16), so that its map has the stride 16 of the image.

    Args:
        spec: of the body's maps.
        mean, std: of the images that the backbone takes, as `statistics`.

    Attributes:
        spec: of the output maps.

    Raises:
        ValueError: an upsampler for other channels or another stride, strides that the body has already or that lie
            between its own, or images of other than three channels.
    """

    def __init__(
        self,
        upsampler: Upsampler,
        spec: ShapeSpec,
        strides: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.upsampler = upsampler.requires_grad_(False).eval()
        own = [power_of_two(stride) for stride in spec.strides]
        self.ratio = spec.strides[0], own[0]
        if any(stride * own[0] != spec.strides[0] * each for stride, each in zip(spec.strides, own, strict=True)):
            raise ValueError(f"maps of strides {spec.strides} can't become maps of strides {tuple(own)} by one resize")
        wanted = sorted(strides)
        finer = [stride for stride in wanted if stride < own[0]]
        between = [stride for stride in wanted if own[0] < stride < own[-1] and stride not in own]
        if not finer:
            raise ValueError(
                f"there is nothing to upsample for strides {wanted}: the backbone has maps at {spec.strides}; "
                "out_indices chooses its coarse maps only"
            )
        if between or len(set(own)) < len(own) or any(stride & (stride - 1) for stride in wanted):
            raise ValueError(f"no maps of strides {wanted} can be made from maps of strides {spec.strides}")
        if upsampler.channels not in (None, spec.channels[0]):
            raise ValueError(
                f"this {upsampler.kind} takes maps of {upsampler.channels} channels, the backbone's have "
                f"{spec.channels[0]}: it is for another backbone, or for another map (out_indices)"
            )
        if upsampler.patch not in (None, spec.strides[0]):
            raise ValueError(
                f"this {upsampler.kind} takes maps of stride {upsampler.patch}, the backbone's has stride "
                f"{spec.strides[0]}: it is for another backbone, or for another map (out_indices)"
            )
        if len(mean) != 3 and upsampler.kind != "bilinear":
            raise ValueError(f"{upsampler.kind} needs RGB images, not images of {len(mean)} channels")
        self._own, self._strides, self._finer = own, wanted, finer
        channels = dict(zip(own, spec.channels, strict=True))
        found = [channels.get(stride, spec.channels[0 if stride < own[0] else -1]) for stride in wanted]
        self.spec = ShapeSpec(tuple(found), tuple(wanted))
        self.statistics(mean, std)

    def statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set mean and standard deviation of the images, per channel, of values in [0, 1]."""
        self._scale, self._shift = [1.0] * len(mean), [0.0] * len(mean)
        if self.upsampler.statistics is not None:
            rows = list(zip(mean, std, *self.upsampler.statistics, strict=True))
            self._scale = [own / theirs for _, own, _, theirs in rows]
            self._shift = [(own - theirs) / scale for own, _, theirs, scale in rows]

    def train(self, mode: bool = True) -> Pyramid:
        super().train(mode)
        self.upsampler.eval()
        return self

    def resized(self, images: Tensor) -> Tensor:
        """The images that the body takes."""
        numerator, denominator = self.ratio
        if numerator == denominator:
            return images
        size = [side * numerator // denominator for side in images.shape[-2:]]
        return F.interpolate(images, size, mode="bilinear", align_corners=False)

    def forward(self, images: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """The body's images and its maps to those of `spec`."""
        scale, shift = (images.new_tensor(x).view(-1, 1, 1) for x in (self._scale, self._shift))
        (h, w), finest = maps[0].shape[-2:], self._own[0]
        sizes = [(h * (finest // stride), w * (finest // stride)) for stride in self._finer]
        made = dict(zip(self._finer, self.upsampler.maps(images * scale + shift, maps[0], sizes), strict=True))
        made |= dict(zip(self._own, maps, strict=True))
        for stride in self._strides:
            if stride not in made:
                made[stride] = F.max_pool2d(maps[-1], stride // self._own[-1])
        return [made[stride] for stride in self._strides]
