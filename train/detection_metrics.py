"""COCO's average precision of boxes and masks; each image counts once, with any number of processes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as run_lengths

from .data import DetectionBatch
from .data.index import DetectionIndex
from .scoring import Metrics, Scorer

# The first six metrics of COCO's summary; small, medium and large are areas below 32 x 32, up to 96 x 96, and above.
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
# index of the image, boxes [N, 4], scores [N], labels [N], run lengths or None
Found = tuple[int, np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]] | None]
KINDS: dict[str, Any] = {"box": "bbox", "mask": "segm"}


def metric_labels(masks: bool) -> dict[str, str]:
    """Metric -> label: ``box_ap``, ``box_ap50``, ... and, with ``masks``, ``mask_ap``, ..."""
    kinds = ("box", "mask") if masks else ("box",)
    return {
        f"{kind}_{name}": f"{kind} {name.replace('ap', 'AP').replace('_', ', ')}" for kind in kinds for name in FIGURES
    }


def average_precision(
    truth: dict[str, Any], results: Sequence[dict[str, Any]], kind: str, max_detections: int = 100
) -> tuple[dict[str, float | None], list[dict[str, float | None]]]:
    """COCO's metrics in percent, over all classes, and for each class in the order of the ids; None for a class or a
    size without objects.

    Args:
        truth: ``images``, ``annotations``, ``categories`` in COCO's format.
        results: ``image_id``, ``category_id``, ``score``, and ``bbox`` or ``segmentation`` (run lengths).
        kind: ``"box"`` or ``"mask"``.
        max_detections: per image and class, those with the highest scores.
    """
    other = {"mask": "bbox", "box": "segmentation"}[kind]  # if present, COCO's tools take sizes of masks from boxes
    results = [{key: value for key, value in result.items() if key != other} for result in results]
    if kind == "mask":
        sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
        truth = truth | {"annotations": [_masked(entry, *sizes[entry["image_id"]]) for entry in truth["annotations"]]}
    truth, results = _number_ids(truth, results)
    known = COCO(truth)
    evaluation = COCOeval_faster(known, known.loadRes(results), KINDS[kind], print_function=lambda *_: None)
    evaluation.params.maxDets = [max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    counts = evaluation.eval["counts"]  # thresholds, recalls, classes, sizes, limits
    precision = np.asarray(evaluation.eval["precision"]).reshape(counts)[..., -1]
    return _figures(precision, kind), [_figures(precision[:, :, [k]], kind) for k in range(counts[2])]


def _masked(entry: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """An object without a mask has an empty one, as in COCO's tools: it is never found."""
    empty = {"size": [height, width], "counts": [height * width]}
    return entry | {"segmentation": entry["segmentation"] or empty}


def _number_ids(
    truth: dict[str, Any], results: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same with small integers for the ids of images and categories, which can be text. The order stays: COCO's
    tools take detections of equal scores by the image."""
    ids = sorted((each["id"] for each in truth["images"]), key=lambda value: (isinstance(value, str), value))
    images = {value: number for number, value in enumerate(ids, 1)}
    categories = {each["id"]: number for number, each in enumerate(truth["categories"], 1)}

    def numbered(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        keys = ({"image_id": images[e["image_id"]], "category_id": categories[e["category_id"]]} for e in entries)
        return [entry | key for entry, key in zip(entries, keys, strict=True)]

    new = {
        "images": [each | {"id": images[each["id"]]} for each in truth["images"]],
        "categories": [each | {"id": categories[each["id"]]} for each in truth["categories"]],
        "annotations": numbered(truth["annotations"]),
    }
    return truth | new, numbered(results)


def _figures(precision: np.ndarray, kind: str) -> dict[str, float | None]:
    """COCO's summary of precisions ``[thresholds, recalls, classes, sizes]``: means over those that are defined."""
    parts = (precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *np.moveaxis(precision[..., 1:], -1, 0))
    means = (100 * float(part[part > -1].mean()) if (part > -1).any() else None for part in parts)
    return {f"{kind}_{name}": mean for name, mean in zip(FIGURES, means, strict=True)}


class CocoScorer(Scorer):
    """Collects detections as boxes and run lengths.

    Args:
        index: the ground truth.
        masks: score masks, too.
        max_detections: per image, those with the highest scores; None: 100.

    Attributes, after `run`:
        by_class: number of objects and metrics of each class, in the order of the index's categories.
    """

    def __init__(self, index: DetectionIndex, masks: bool, max_detections: int | None = None):
        self.index, self.masks, self.max_detections = index, masks, max_detections or 100
        self.by_class: list[dict[str, Any]] = []
        self.found: list[Found] = []  # after `run` of all processes, in the order of the images

    def add(self, batch: DetectionBatch, predictions: Sequence[dict[str, torch.Tensor]]) -> int:
        """predictions: a detector's output, a dictionary per image of the batch."""
        for number, each in zip(batch.numbers, predictions, strict=True):
            codes = encode_masks(each["masks"]) if self.masks else None
            boxes, scores = (each[key].float().cpu().numpy() for key in ("boxes", "scores"))
            self.found.append((number, boxes, scores, each["labels"].cpu().numpy(), codes))
        return len(batch.numbers)

    def results(self) -> list[dict[str, Any]]:
        """The detections in COCO's result format, with the ids of the annotation file."""
        ids = self.index.label_ids()
        results = []
        for number, boxes, scores, labels, codes in self.found:
            boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
            for i, (box, score, label) in enumerate(zip(boxes, scores.tolist(), labels.tolist(), strict=True)):
                entry = {"image_id": self.index.image_id(number), "category_id": ids[label]}
                entry |= {"bbox": box, "score": score}
                results.append(entry | ({"segmentation": codes[i]} if codes is not None else {}))
        return results

    def compute(self) -> Metrics:
        """The metrics over all processes; the main process computes them."""
        self.found = sorted(gather_object(self.found), key=lambda entry: entry[0])
        found: list[Any] = [{}, []]
        if PartialState().is_main_process:
            truth, results = self.index.truth([entry[0] for entry in self.found]), self.results()
            objects = Counter(each["category_id"] for each in truth["annotations"] if not each["iscrowd"])
            found[1] = [{"objects": objects[key]} for key in self.index.label_ids()]
            for kind in ("box", "mask") if self.masks else ("box",):
                metrics, by_class = average_precision(truth, results, kind, self.max_detections)
                found[0] |= metrics
                for figures, more in zip(found[1], by_class, strict=True):
                    figures |= more
        broadcast_object_list(found)
        metrics, self.by_class = found
        return metrics


def encode_masks(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Masks of probabilities ``[N, 1, H, W]`` above 0.5 as COCO's compressed run lengths, for JSON."""
    if len(masks) == 0:
        return []
    bits = (masks[:, 0] > 0.5).byte().cpu().numpy()
    codes = run_lengths.encode(np.asfortranarray(bits.transpose(1, 2, 0)))
    return [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in codes]
