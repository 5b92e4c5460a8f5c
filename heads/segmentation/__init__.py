"""Semantic segmentation heads, the segmenter around them, and inference on whole photographs."""

from .inference import fitted, probabilities, slide
from .layers import FCN
from .mask2former import Mask2Former
from .segmenter import Segmenter
from .semantic_fpn import SemanticFPN
from .upernet import PyramidPooling, UPerNet

__all__ = [
    "FCN",
    "Mask2Former",
    "PyramidPooling",
    "Segmenter",
    "SemanticFPN",
    "UPerNet",
    "fitted",
    "probabilities",
    "slide",
]
