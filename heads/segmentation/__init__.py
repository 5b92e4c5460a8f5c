"""Semantic segmentation heads, the segmenter around them, and inference on images of any size."""

from ..legacy import moved
from .inference import label_map, probabilities, rescale_size, slide_inference
from .layers import FCN
from .mask2former import Mask2Former
from .segmenter import Segmenter
from .semantic_fpn import SemanticFPN
from .upernet import PyramidPooling, UPerNet

__getattr__ = moved(
    __name__,
    {"fitted": "segmentation.inference:rescale_size", "slide": "segmentation.inference:slide_inference"},
)

__all__ = [
    "FCN",
    "Mask2Former",
    "PyramidPooling",
    "Segmenter",
    "SemanticFPN",
    "UPerNet",
    "label_map",
    "probabilities",
    "rescale_size",
    "slide_inference",
]
