"""The difference between the outputs of an exported model and the original's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

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
        ExportError: it exceeds ``limit``, or is NaN; the message names the input.
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
    """Largest error over largest value, the maximum over the outputs; NaN if any output contains one."""
    errors = [((b - a).abs().max() / a.abs().max()).item() for a, b in zip(expected, got, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def detection_error(model: Detector) -> Difference:
    """`detections_differ` with the score threshold and the number of detections of a model."""
    owner = model.selector

    def difference(expected: Outputs, got: Outputs, images: Tensor) -> float:
        return detections_differ(expected, got, images.shape[-2:], owner.score_thresh, owner.detections_per_img)

    return difference


def detections_differ(expected: Outputs, got: Outputs, size: Sequence[int], threshold: float, limit: int) -> float:
    """The difference between two sets of detections in one image: the largest over matched boxes (relative to the
    longer side), scores and masks; infinite if a detection has no match.

    The order does not matter. Detections with a score within `TOLERANCE` of the cut-off need no match. Masks are pasted
    in whole pixels, and compared where both boxes round to the same ones.

    Args:
        expected, got: ``boxes`` ``[n, 4]``, ``labels`` ``[n]``, ``scores`` ``[n]``, optionally ``masks``.
        size: rows and columns of the image.
        threshold, limit: score threshold and maximum number of detections.
    """
    scores, worst, unmatched, left = expected[2], 0.0, [], set(range(len(got[2])))
    apart = (expected[0][:, None] - got[0]).abs().amax(-1) / max(size)
    cost = torch.maximum(apart, (scores[:, None] - got[2]).abs())
    cost = cost.masked_fill(expected[1][:, None] != got[1], math.inf)
    for i in range(len(scores)):
        j = int(cost[i].argmin()) if len(got[2]) else 0
        if not len(got[2]) or cost[i, j] > TOLERANCE:
            unmatched.append(float(scores[i]))
            continue
        worst = max(worst, float(cost[i, j]), _masks_differ(expected, got, i, j))
        cost[:, j] = math.inf  # each detection matches one other
        left.discard(j)
    end = max(threshold, float(scores.min())) if len(scores) == limit else threshold
    unmatched += [float(got[2][j]) for j in left]
    return worst if all(abs(score - end) <= TOLERANCE for score in unmatched) else math.inf


def _masks_differ(expected: Outputs, got: Outputs, i: int, j: int) -> float:
    if len(expected) == 3:
        return 0.0
    ours, theirs = (expand_boxes(boxes, 30 / 28).long() for boxes in (expected[0][[i]], got[0][[j]]))
    return float((expected[3][i] - got[3][j]).abs().max()) if torch.equal(ours, theirs) else 0.0
