"""A detector in evaluation mode on one image of a fixed size, in a form that exporters can trace.

torchvision's evaluation branches on the number of boxes; here only the number of rows depends on the image. The outputs
equal those of `Detector`: the top candidates of every level are taken before the score threshold instead of after it,
which selects the same ones, and boxes of different classes (or levels) are separated exactly, where torchvision offsets
them in float32 if they are few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import clip_boxes_to_image, nms, roi_align

from .cascade import CascadeHeads
from .conditional_detr import detections, valid_cells
from .detector import Detector
from .parts import AlignedPool

Suppress = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, float], torch.Tensor]


def suppress(
    boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, count: int, threshold: float
) -> torch.Tensor:
    """Non-maximum suppression within each group, by torchvision's operator.

    Args:
        boxes: ``[n, 4]``, corners, none negative.
        scores: ``[n]``, none negative.
        groups: ``[n]``, integers from 0 to ``count`` - 1.
        threshold: maximum IoU with a box of a higher score.

    Returns:
        Indices of the kept boxes, in descending order of score.
    """
    side = F.pad(boxes.double().flatten(), (0, 1)).max() + 1  # also for no boxes
    apart = boxes.double() + (groups * side)[:, None]
    return nms(apart, scores.double(), threshold)


@torch.library.custom_op("foveal::suppress", mutates_args=())
def suppress_op(
    boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, count: int, threshold: float
) -> torch.Tensor:
    """`suppress` as one node, for exporters with their own operator for it."""
    return suppress(boxes, scores, groups, count, threshold)


@suppress_op.register_fake
def _(boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, count: int, threshold: float) -> torch.Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


class OneImage(nn.Module):
    """A detector in evaluation mode for one image of a fixed size.

    Args:
        model: the detector; its modules are shared, not copied.
        size: rows and columns of the image. The resize to the detector's own size is part of the graph.
        suppress: function for the non-maximum suppression.
    """

    mean: torch.Tensor
    std: torch.Tensor
    anchors: torch.Tensor | None
    valid: torch.Tensor | None

    def __init__(self, model: Detector, size: tuple[int, int], suppress: Suppress = suppress) -> None:
        super().__init__()
        self.model: Detector = model
        self.size, self.suppress = size, suppress
        transform = model.detector.transform
        channels = len(transform.image_mean)
        parameter = next(model.parameters())
        with torch.no_grad():
            batch, _ = transform([parameter.new_zeros(channels, *size)])
            maps = list(model.backbone(batch.tensors).values())
        self.seen: tuple[int, int] = tuple(batch.image_sizes[0])  # size of the resized image
        self.padding = [p - s for p, s in zip(batch.tensors.shape[-2:], self.seen, strict=True)]  # padding
        self.detect = {"two_stage": self._regions, "one_stage": self._dense, "box_queries": self._queries}[model.kind]
        anchors = valid = None
        if model.kind == "box_queries":
            valid = valid_cells([self.seen], batch.tensors.shape[-2:], maps[-1].shape[-2:], parameter.device)
        else:
            generator = model.detector.rpn if model.kind == "two_stage" else model.detector
            generator = generator.anchor_generator
            anchors = generator(batch, maps)[0]
            per_place = generator.num_anchors_per_location()
            self.counts = [n * x.shape[-2:].numel() for n, x in zip(per_place, maps, strict=True)]
        for name, value in (("mean", transform.image_mean), ("std", transform.image_std)):
            self.register_buffer(name, parameter.new_tensor(value).view(-1, 1, 1), persistent=False)
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("valid", valid, persistent=False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``[1, C, H, W]``, float in [0, 1], to ``boxes`` ``[n, 4]`` in the image's pixels, ``labels`` int64 ``[n]``,
        ``scores`` ``[n]`` in descending order, and for a head with masks ``masks`` ``[n, 1, H, W]``."""
        x = (image - self.mean) / self.std
        if self.seen != self.size:
            x = F.interpolate(x, self.seen, mode="bilinear", align_corners=False)
        x = F.pad(x, (0, self.padding[1], 0, self.padding[0]))
        maps = list(self.model.backbone(x).values())
        boxes, labels, scores = self.detect(maps)
        masks = self._masks(maps, boxes, labels) if self.model.masks else None
        rows, columns = (own / seen for own, seen in zip(self.size, self.seen, strict=True))
        boxes = boxes * boxes.new_tensor([columns, rows, columns, rows])
        found = boxes, labels - self.model.first_class, scores
        return found if masks is None else (*found, paste(masks, boxes, self.size))

    def _best(
        self,
        boxes: torch.Tensor,
        scores: torch.Tensor,
        groups: torch.Tensor,
        keep: torch.Tensor,
        count: int,
        threshold: float,
        limit: int,
    ) -> torch.Tensor:
        """Indices of the top ``limit`` boxes among ``keep`` after suppression, in descending order of score."""
        kept = keep.nonzero()[:, 0]
        left = self.suppress(boxes[kept], scores[kept], groups[kept], count, threshold)
        first = (torch.ones_like(left).cumsum(0) <= limit).nonzero()[:, 0]
        torch._check(first.shape[0] <= limit)  # unknown to the tracer
        return kept[left[first]]

    def _dense(self, maps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """RetinaNet, FCOS: top candidates of every level, then NMS per class."""
        detector = self.model.detector
        outputs = detector.head(maps)
        scores = outputs["cls_logits"][0].sigmoid()
        classes = scores.shape[-1]
        if "bbox_ctrness" in outputs:
            scores = (scores * outputs["bbox_ctrness"][0].sigmoid()).sqrt()
        chosen, best, start = [], [], 0
        for count, level in zip(self.counts, scores.split(self.counts), strict=True):
            top = level.flatten().topk(min(detector.topk_candidates, count * classes))
            best.append(top.values)
            chosen.append(top.indices + start * classes)
            start += count
        scores, at = torch.cat(best), torch.cat(chosen)
        place, labels = at // classes, at % classes
        assert self.anchors is not None
        codes, anchors = outputs["bbox_regression"][0][place], self.anchors[place]
        decode = getattr(detector.box_coder, "decode_single", detector.box_coder.decode)
        boxes = clip_boxes_to_image(decode(codes, anchors), self.seen)
        limits = classes, detector.nms_thresh, detector.detections_per_img
        keep = self._best(boxes, scores, labels, scores > detector.score_thresh, *limits)
        return boxes[keep], labels[keep], scores[keep]

    def _queries(self, maps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Conditional DETR: the top pairs of a query and a class."""
        detector = self.model.detector
        logits, boxes = detector.head(maps[-1], self.valid)
        limits = detector.detections_per_img, detector.score_thresh
        found = detections(logits[-1, 0], boxes[-1, 0], self.seen, *limits)
        return found["boxes"], found["labels"], found["scores"]

    def _regions(self, maps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Faster, Mask and Cascade Mask R-CNN: classify the proposals, then NMS per class."""
        heads = self.model.detector.roi_heads
        proposals = self._proposals(maps)
        if isinstance(heads, CascadeHeads):
            pool = lambda regions: pool_regions(heads.box_roi_pool, maps, regions[0])  # noqa: E731
            logits, codes, (proposals,) = heads.refine(pool, [proposals], [self.seen])
        else:
            pooled = pool_regions(heads.box_roi_pool, maps, proposals)
            logits, codes = heads.box_predictor(heads.box_head(pooled))
        classes = logits.shape[-1]
        boxes = heads.box_coder.decode_single(codes, proposals).reshape(-1, 4)
        boxes = clip_boxes_to_image(boxes, self.seen).reshape(-1, classes, 4)[:, 1:].reshape(-1, 4)
        scores = logits.softmax(-1)[:, 1:]
        labels = torch.arange(1, classes, device=scores.device).expand_as(scores).reshape(-1)
        scores = scores.reshape(-1)
        keep = (scores > heads.score_thresh) & _larger(boxes, 1e-2)
        keep = self._best(boxes, scores, labels, keep, classes, heads.nms_thresh, heads.detections_per_img)
        return boxes[keep], labels[keep], scores[keep]

    def _proposals(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """``[n, 4]``"""
        rpn = self.model.detector.rpn
        assert self.anchors is not None
        objectness, deltas = rpn.head(maps)
        logits, codes, chosen, levels, start = [], [], [], [], 0
        for level, count in enumerate(self.counts):
            own = objectness[level][0].permute(1, 2, 0).reshape(-1)
            top = own.topk(min(rpn.pre_nms_top_n(), count))
            own = deltas[level][0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
            logits.append(top.values)
            codes.append(own[top.indices])
            chosen.append(top.indices + start)
            levels.append(torch.full_like(top.indices, level))
            start += count
        boxes = rpn.box_coder.decode_single(torch.cat(codes), self.anchors[torch.cat(chosen)])
        boxes, scores = clip_boxes_to_image(boxes, self.seen), torch.cat(logits).sigmoid()
        keep = (scores >= rpn.score_thresh) & _larger(boxes, rpn.min_size)
        limits = len(self.counts), rpn.nms_thresh, rpn.post_nms_top_n()
        return boxes[self._best(boxes, scores, torch.cat(levels), keep, *limits)]

    def _masks(self, maps: list[torch.Tensor], boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Masks of the detected boxes, ``[n, side, side]``."""
        heads = self.model.detector.roi_heads
        pooled = pool_regions(heads.mask_roi_pool, maps, boxes)
        if isinstance(heads, CascadeHeads):
            return heads.mask_probabilities(pooled, labels)[:, 0]
        logits = heads.mask_predictor(heads.mask_head(pooled))
        own = labels[:, None, None, None].expand(-1, 1, *logits.shape[-2:])
        return logits.gather(1, own)[:, 0].sigmoid()


def _larger(boxes: torch.Tensor, side: float) -> torch.Tensor:
    return (boxes[:, 2:] - boxes[:, :2] >= side).all(1)


def pool_regions(pool: Any, maps: list[torch.Tensor], regions: torch.Tensor) -> torch.Tensor:
    """Apply a detector's region pool to the regions ``[n, 4]`` of one image: ``[n, C, side, side]``."""
    aligned = isinstance(pool, AlignedPool)
    levels = pool.map_levels([regions])
    regions = F.pad(regions, (1, 0))
    pooled = maps[0].new_zeros(regions.shape[0], maps[0].shape[1], *pool.output_size)
    for level, scale in enumerate(pool.scales):
        here = (levels == level).nonzero()[:, 0]
        samples = 0 if aligned else pool.sampling_ratio
        own = roi_align(maps[level], regions[here], pool.output_size, scale, samples, aligned)
        pooled = pooled.index_put((here,), own)
    return pooled


def paste(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Paste masks ``[n, side, side]`` of boxes into an image of ``size``: ``[n, 1, rows, columns]``.

    As torchvision does it (a border of zeros, whole pixels, bilinear), as a product with two matrices.
    """
    padded = F.pad(masks, (1, 1, 1, 1))
    side = padded.shape[-1]
    centres, halves = (boxes[:, 2:] + boxes[:, :2]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * (side / (side - 2))
    starts, ends = (centres - halves).long(), (centres + halves).long()
    along = []
    for axis, length in ((1, size[0]), (0, size[1])):
        at = torch.arange(length, device=boxes.device)
        start, end = starts[:, axis, None], ends[:, axis, None]
        width = (end - start + 1).clamp(min=1)
        source = ((at - start + 0.5) * (side / width) - 0.5).clamp(0, side - 1)
        weights = 1 - (source[:, :, None] - torch.arange(side, device=boxes.device)).abs()
        inside = (at >= start) & (at < start + width)
        along.append((weights.clamp(min=0) * inside[:, :, None]).to(masks.dtype))
    return (along[0] @ padded @ along[1].transpose(1, 2))[:, None]
