"""Data for training: readers return an `Index`, datasets decode and augment its samples, loaders make batches."""

from .dense_transforms import IGNORE
from .factory import (
    Data,
    build_classification_data,
    build_detection_data,
    build_image_data,
    build_segmentation_data,
    find_classes,
)
from .guard import BadSamples, DataError
from .loader import DetectionBatch, Loader, SegmentationBatch
from .workers import WorkerError, workers_end

__all__ = [
    "IGNORE",
    "BadSamples",
    "Data",
    "DataError",
    "DetectionBatch",
    "Loader",
    "SegmentationBatch",
    "WorkerError",
    "build_classification_data",
    "build_detection_data",
    "build_image_data",
    "build_segmentation_data",
    "find_classes",
    "workers_end",
]
