"""How far the outputs of an exported model are from the original's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import expand_boxes

from ..heads.detection import Detector
from .folder import TOLERANCE
from .formats import ExportError, Run

Outputs = Sequence[Tensor]
Difference = Callable[[Outputs, Outputs, Tensor], float]  # of expected and actual outputs for images [B, C, H, W]


def compare(
    expected: Mapping[str, Outputs], run: Run, inputs: Mapping[str, Tensor], limit: float, difference: Difference
) -> float:
    """The largest difference over all inputs.

    Raises:
        ExportError: if it is more than ``limit``, or not a number; the message names the input.
    """
    worst = 0.0
    for name, images in inputs.items():
        apart = difference(expected[name], run(images), images)
        if not apart <= limit:  # also true of NaN
            raise ExportError(
                f"the exported model differs from the original by {apart:.1e} on {name}, more than {limit:g}; "
                "nothing was written"
            )
        worst = max(worst, apart)
    return worst


def relative_error(expected: Outputs, got: Outputs, images: Tensor | None = None) -> float:
    """Largest error over largest value, the worst of the outputs; NaN if any output holds one."""
    errors = [((b - a).abs().max() / a.abs().max()).item() for a, b in zip(expected, got, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def detection_error(model: Detector) -> Difference:
    """`detections_differ` with the score threshold and the number of detections of a model."""
    owner: Any = getattr(model.detector, "roi_heads", model.detector)

    def difference(expected: Outputs, got: Outputs, images: Tensor) -> float:
        return detections_differ(expected, got, images.shape[-2:], owner.score_thresh, owner.detections_per_img)

    return difference


def detections_differ(expected: Outputs, got: Outputs, size: Sequence[int], threshold: float, limit: int) -> float:
    """How far two sets of detections in one image are apart: the largest difference of matched boxes (of the image's
    longer side), scores and masks; infinite if one has an object that the other lacks.

    Detections may come in another order. Those whose scores are within `TOLERANCE` of the cut-off may be in one set
    only. Masks are pasted in whole pixels, and compared where rounding chose the same ones.

    Args:
        expected, got: ``boxes`` ``[n, 4]``, ``labels`` ``[n]``, ``scores`` ``[n]``, perhaps ``masks``.
        size: rows and columns of the image.
        threshold, limit: the lowest score and the largest number of detections.
    """
    boxes, labels, scores = expected[:3]
    apart = (boxes[:, None] - got[0]).abs().amax(-1) / max(size) if len(boxes) and len(got[0]) else None
    worst, left, missing = 0.0, set(range(len(got[0]))), []
    for i in range(len(boxes)):
        choices = sorted(left)
        if choices:
            cost = torch.maximum(apart[i, choices], (scores[i] - got[2][choices]).abs())
            cost = cost.masked_fill(got[1][choices] != labels[i], math.inf)
            best = int(cost.argmin())
            if cost[best] <= TOLERANCE:
                j = choices[best]
                left.remove(j)
                worst = max(worst, float(cost[best]), _masks_differ(expected, got, i, j))
                continue
        missing.append(float(scores[i]))
    end = max(threshold, float(scores.min())) if len(scores) == limit else threshold
    others = missing + [float(got[2][j]) for j in left]
    return worst if all(abs(score - end) <= TOLERANCE for score in others) else math.inf


def _masks_differ(expected: Outputs, got: Outputs, i: int, j: int) -> float:
    if len(expected) == 3:
        return 0.0
    ours, theirs = (expand_boxes(boxes, 30 / 28).long() for boxes in (expected[0][[i]], got[0][[j]]))
    return float((expected[3][i] - got[3][j]).abs().max()) if torch.equal(ours, theirs) else 0.0
