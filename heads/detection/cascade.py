"""The region heads of Cascade R-CNN (Cai & Vasconcelos, CVPR 2018, arXiv 1712.00726), with a mask head for each stage.

Each stage classifies and refines the boxes of the previous one, with a higher IoU threshold. Details that the paper
leaves open follow mmdetection, whose weights these heads load.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.ops import Conv2dNormActivation, box_iou, clip_boxes_to_image, generalized_box_iou_loss, roi_align

from ..body import check_foldable

OVERLAPS = (0.5, 0.6, 0.7)  # IoU threshold of positive boxes, by stage
CODES = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # scale of the box deltas
# the inverse of mmdetection's standard deviations: the last stage's is 1 % more than the paper's
MMDET_DEVIATIONS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
STAGES = len(OVERLAPS)
BOX_HEADS = ("4conv1fc", "2fc")

Pool = Callable[[list[Tensor]], Tensor]  # regions [N, 4] of each image -> pooled features [sum of N, C, h, w]
# (logits, boxes per image, masks and classes of its objects, matched object of each box) -> loss
MaskLoss = Callable[[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]], Tensor]


def aligned_mask_loss(
    logits: Tensor, boxes: list[Tensor], masks: list[Tensor], labels: list[Tensor], matched: list[Tensor]
) -> Tensor:
    """torchvision's ``maskrcnn_loss`` with the targets of mmdetection and detectron2: the object's mask pooled by
    aligned RoIAlign, half a pixel from torchvision's, and rounded to 0 or 1.

    Args:
        logits: ``[N, classes, side, side]``, of the boxes of all images.
        boxes: ``[n, 4]`` of each image, N in all.
        masks: ``[objects, H, W]`` of each image, 0 or 1.
        labels: ``[objects]``, each image's.
        matched: ``[n]`` of each image: the object of each box.
    """
    wanted = []
    for own, mask, which in zip(boxes, masks, matched, strict=True):
        regions = torch.cat([which[:, None].to(own), own], 1)
        wanted.append(roi_align(mask[:, None].to(own), regions, logits.shape[-2:], sampling_ratio=0, aligned=True))
    classes = torch.cat([own[which] for own, which in zip(labels, matched, strict=True)])
    if not len(classes):  # the mean would be NaN
        return logits.sum() * 0
    target = (torch.cat(wanted)[:, 0] >= 0.5).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(
        logits[torch.arange(len(classes), device=classes.device), classes], target
    )


class BoxHead(nn.Module):
    """Box head of a stage: pooled regions ``[N, C, side, side]`` to ``[N, width]``.

    Args:
        kind: ``"4conv1fc"``: four convolutions with BatchNorm and a fully connected layer; ``"2fc"``: two fully
            connected layers.
    """

    def __init__(self, kind: str, channels: int, side: int, width: int) -> None:
        super().__init__()
        convs, layers = (4, 1) if kind == "4conv1fc" else (0, 2)
        self.convs = nn.Sequential(*(Conv2dNormActivation(channels, channels) for _ in range(convs)))
        sizes = [channels * side**2] + [width] * layers
        self.fcs = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x).flatten(1)
        for layer in self.fcs:
            x = layer(x).relu()
        return x

    def reparameterize(self) -> None:
        """Fold the norms into the convolutions before them, for inference. Idempotent."""
        for block in self.convs:
            conv, norm = block[0], block[1]
            if isinstance(norm, nn.Identity):
                continue
            check_foldable(conv, norm)
            statistics = norm.running_mean, norm.running_var, norm.eps
            folded = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
            conv.weight, conv.bias = folded
            block[1] = nn.Identity()


def box_predictor(width: int, num_classes: int, agnostic: bool) -> FastRCNNPredictor:
    """Logits of all classes (the background is the first of ``num_classes``) and box deltas, per class or
    class-agnostic."""
    predictor = FastRCNNPredictor(width, num_classes)
    if agnostic:
        predictor.bbox_pred = nn.Linear(width, 4)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):  # Fast R-CNN, section 3.1
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    return predictor


class CascadeMaskRCNN(MaskRCNN):
    """torchvision's Mask R-CNN with `CascadeHeads`.

    Args:
        coders: of the boxes, by stage.
        mask_loss: of a stage's masks; torchvision's ``maskrcnn_loss`` or `aligned_mask_loss`.
        kwargs: of `MaskRCNN`; ``box_head``, ``box_predictor``, ``mask_head`` and ``mask_predictor`` hold a module for
            each stage.
    """

    def __init__(
        self, backbone: nn.Module, coders: Sequence[BoxCoder], mask_loss: MaskLoss = maskrcnn_loss, **kwargs: Any
    ) -> None:
        super().__init__(backbone, **kwargs)
        self.roi_heads = CascadeHeads(self.roi_heads, coders, mask_loss)


class CascadeHeads(RoIHeads):
    """Three stages of boxes, classes and masks.

    In training each stage samples from the refined boxes of the previous one (without the ground-truth boxes added to
    them) and the ground-truth boxes. In evaluation logits and mask probabilities are averaged over the stages, and the
    boxes are those of the last one.

    Box loss: generalized IoU (weight 10) for boxes per class, smooth L1 of the deltas for class-agnostic boxes.

    Args:
        heads: torchvision's, with a module for each stage.
        coders: of the boxes, by stage.
        mask_loss: as for `CascadeMaskRCNN`.
    """

    def __init__(self, heads: RoIHeads, coders: Sequence[BoxCoder], mask_loss: MaskLoss) -> None:
        super().__init__(
            heads.box_roi_pool,
            heads.box_head,
            heads.box_predictor,
            fg_iou_thresh=OVERLAPS[0],  # unused, like the coder
            bg_iou_thresh=OVERLAPS[0],
            batch_size_per_image=heads.fg_bg_sampler.batch_size_per_image,
            positive_fraction=heads.fg_bg_sampler.positive_fraction,
            bbox_reg_weights=None,
            score_thresh=heads.score_thresh,
            nms_thresh=heads.nms_thresh,
            detections_per_img=heads.detections_per_img,
            mask_roi_pool=heads.mask_roi_pool,
            mask_head=heads.mask_head,
            mask_predictor=heads.mask_predictor,
        )
        self.coders, self.mask_loss = list(coders), mask_loss
        self.box_coder = self.coders[-1]  # decodes the detections
        self.agnostic = self.box_predictor[0].bbox_pred.out_features == 4  # with the background there are two classes

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's `RoIHeads`: detections in evaluation, losses (``loss_classifier_0`` ...) in training."""
        # half precision, which the maps may have, is too coarse for pixel coordinates
        proposals = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in proposals]
        if self.training:
            self.check_targets(targets)
            return [], self._losses(features, proposals, image_shapes, targets)

        def pool(regions: list[Tensor]) -> Tensor:
            return self.box_roi_pool(features, regions, image_shapes)

        logits, codes, proposals = self.refine(pool, proposals, image_shapes)
        boxes, scores, labels = self.postprocess_detections(logits, codes, proposals, image_shapes)
        masks = self.mask_probabilities(self.mask_roi_pool(features, boxes, image_shapes), torch.cat(labels))
        masks = masks.split([len(each) for each in labels])
        names = ("boxes", "labels", "scores", "masks")
        found = zip(boxes, labels, scores, masks, strict=True)
        return [dict(zip(names, each, strict=True)) for each in found], {}

    def predict(self, stage: int, pooled: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Logits ``[N, classes]`` and deltas ``[N, 4 or 4 classes]`` of a stage, in ``dtype``."""
        logits, codes = self.box_predictor[stage](self.box_head[stage](pooled))
        return logits.to(dtype), codes.to(dtype)

    def refine(
        self, pool: Pool, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """All stages, in evaluation.

        Returns:
            the mean logits ``[N, classes]``, the deltas ``[N, 4 classes]`` of the last stage, and the regions
            ``[N, 4]`` of each image that the deltas refer to.
        """
        total: Tensor | float = 0.0
        for stage in range(STAGES):
            logits, codes = self.predict(stage, pool(proposals), proposals[0].dtype)
            total = total + logits
            if stage < STAGES - 1:
                proposals = self._moved(stage, proposals, codes, logits[:, 1:].argmax(1) + 1, image_shapes)
        if self.agnostic:
            codes = codes.repeat(1, logits.shape[1])
        return total / STAGES, codes, proposals

    def mask_probabilities(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Mask probabilities of regions for these classes, ``[N, 1, side, side]``."""
        total: Tensor | float = 0.0
        for head, predictor in zip(self.mask_head, self.mask_predictor, strict=True):
            logits = predictor(head(pooled))
            own = labels[:, None, None, None].expand(-1, 1, *logits.shape[-2:])
            total = total + logits.gather(1, own).sigmoid()
        return total / STAGES

    def _own(self, codes: Tensor, labels: Tensor) -> Tensor:
        """The deltas ``[N, 4]`` for these classes."""
        if self.agnostic:
            return codes
        return codes.unflatten(1, (-1, 4)).gather(1, labels[:, None, None].expand(-1, 1, 4))[:, 0]

    def _moved(
        self,
        stage: int,
        regions: list[Tensor],
        codes: Tensor,
        labels: Tensor,
        image_shapes: list[tuple[int, int]],
    ) -> list[Tensor]:
        boxes = self.coders[stage].decode_single(self._own(codes, labels), torch.cat(regions))
        split = boxes.split([each.shape[0] for each in regions])
        return [clip_boxes_to_image(own, shape) for own, shape in zip(split, image_shapes, strict=True)]

    # ---- training

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        dtype = proposals[0].dtype
        objects = [target["boxes"].to(dtype) for target in targets]
        names = [target["labels"] for target in targets]
        masks = [target["masks"] for target in targets]
        losses = {}
        for stage, weight in enumerate(LOSS_WEIGHTS):
            samples = self._samples(stage, proposals, objects, names)
            regions, labels, matched, given = (list(each) for each in zip(*samples, strict=True))
            every = torch.cat(labels)
            positive = [own[label > 0] for own, label in zip(regions, labels, strict=True)]
            which = [own[label > 0] for own, label in zip(matched, labels, strict=True)]
            logits, codes = self.predict(stage, self.box_roi_pool(features, regions, image_shapes), dtype)
            moves = self._own(codes, every)[every > 0]
            wanted = torch.cat([own[index] for own, index in zip(objects, which, strict=True)])
            share = weight / max(len(every), 1)
            losses[f"loss_classifier_{stage}"] = share * F.cross_entropy(logits, every, reduction="sum")
            losses[f"loss_box_reg_{stage}"] = share * self._box_loss(stage, moves, torch.cat(positive), wanted)

            pooled = self.mask_roi_pool(features, positive, image_shapes)
            found = self.mask_predictor[stage](self.mask_head[stage](pooled))
            losses[f"loss_mask_{stage}"] = weight * self.mask_loss(found, positive, masks, names, which)

            if stage < STAGES - 1:
                chosen = torch.where(every > 0, every, logits[:, 1:].argmax(1) + 1)
                moved = self._moved(stage, regions, codes.detach(), chosen, image_shapes)
                proposals = [own[~is_given] for own, is_given in zip(moved, given, strict=True)]
        return losses

    def _samples(
        self, stage: int, proposals: list[Tensor], objects: list[Tensor], names: list[Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each image the sampled regions ``[N, 4]``, their labels (0: background), their matched objects, and
        whether they are ground-truth boxes."""
        every = []
        for own, boxes, classes in zip(proposals, objects, names, strict=True):
            regions = torch.cat([own, boxes])
            given = torch.arange(len(regions), device=own.device) >= len(own)
            if len(boxes):
                overlaps, matched = box_iou(boxes, regions).max(0)
                labels = classes[matched].where(overlaps >= OVERLAPS[stage], 0)
            else:
                labels = matched = torch.zeros(len(regions), dtype=torch.int64, device=own.device)
            every.append((regions, labels, matched, given))
        positive, negative = self.fg_bg_sampler([labels for _, labels, _, _ in every])
        chosen = [torch.where(one | other)[0] for one, other in zip(positive, negative, strict=True)]
        return [tuple(part[which] for part in parts) for parts, which in zip(every, chosen, strict=True)]

    def _box_loss(self, stage: int, codes: Tensor, regions: Tensor, wanted: Tensor) -> Tensor:
        """Summed loss of deltas, positive regions, and ground-truth boxes, all ``[N, 4]``."""
        coder = self.coders[stage]
        if self.agnostic:
            return F.smooth_l1_loss(codes, coder.encode_single(wanted, regions), reduction="sum")
        return 10 * generalized_box_iou_loss(coder.decode_single(codes, regions), wanted, reduction="sum")
