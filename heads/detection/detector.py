"""The detector around any of the heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..backbone import Backbone
from ..dense import DenseModel, same_draws

Target = dict[str, torch.Tensor]


class Detector(DenseModel):
    """A detector with torchvision's interface and classes 0 .. ``num_classes`` - 1.

    Args:
        detector: what a constructor of `registry.HEADS` returns.
        head: its entry there.
        num_classes: without the background.

    Attributes:
        kind: of its head, see `HeadSpec`.
        masks: whether it predicts masks and needs them in training.
    """

    task = "detect"
    detector: Any  # torchvision's, and others with its interface

    def __init__(self, detector: nn.Module, head: Any, num_classes: int) -> None:
        super().__init__()
        self.detector = detector
        self.num_classes = num_classes
        self.kind: str = head.kind
        self.masks: bool = head.masks
        self.first_class: int = head.first_class

    @property
    def max_detections(self) -> int:
        """Of an image, in evaluation."""
        return self.selector.detections_per_img

    @max_detections.setter
    def max_detections(self, count: int) -> None:
        self.selector.detections_per_img = count

    @property
    def selector(self) -> Any:
        """The part that selects the detections, with ``score_thresh`` and ``detections_per_img``."""
        return self.detector.roi_heads if self.kind == "two_stage" else self.detector

    @property
    def backbone(self) -> Backbone:
        return self.detector.backbone

    def normalizers(self, images: list[torch.Tensor], targets: list[Target]) -> torch.Tensor | None:
        """The divisors of a training batch's losses, float ``[1]`` or ``[losses]``; None if they are the same for each
        image: RetinaNet's mean over images, the R-CNNs' sampled regions per image. The R-CNNs' mask loss is a mean over
        the regions on objects, which are not counted here."""
        own = getattr(self.detector, "normalizers", None)
        return None if own is None else own(images, targets)

    def forward(self, images: list[torch.Tensor], targets: list[Target] | None = None) -> Any:
        """Losses in training, detections in evaluation.

        Args:
            images: float ``[C, H, W]`` each, in [0, 1], of any sizes. In evaluation they are resized to the detector's
                ``min_size`` and ``max_size``; in training they are not.
            targets: in training, for each image ``boxes`` float ``[N, 4]`` (corners, pixels), ``labels`` int64 ``[N]``
                and for a head with masks ``masks`` uint8 ``[N, H, W]``.

        Returns:
            In training a dict of losses. In evaluation for each image, in descending order of ``scores`` ``[N]``:
            ``boxes`` ``[N, 4]`` in pixels of the image, ``labels`` ``[N]`` and, with masks, ``masks`` float
            ``[N, 1, H, W]``, the probability of each pixel.
        """
        found = self.detector(images, targets and self._numbered(targets))
        if self.training:
            return found
        return [each | {"labels": each["labels"] - self.first_class} for each in found]

    def _numbered(self, targets: list[Target]) -> list[Target]:
        return [target | {"labels": target["labels"] + self.first_class} for target in targets]

    @torch.no_grad()
    def held_out_losses(self, images: list[torch.Tensor], targets: list[Target]) -> dict[str, torch.Tensor]:
        """The training losses, by name, in evaluation mode: for resized images, without dropout, and without updating
        batch norms. Regions and points are sampled with a fixed seed."""
        assert not self.training
        # these return losses instead of detections; their submodules stay in evaluation mode
        parts = [self.detector]
        if self.kind == "two_stage":
            parts += [self.detector.rpn, self.detector.roi_heads]
        with same_draws(images[0].device):
            try:
                for part in parts:
                    part.training = True
                return self.detector(images, self._numbered(targets))
            finally:
                for part in parts:
                    part.training = False
