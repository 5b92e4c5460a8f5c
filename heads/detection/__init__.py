"""Detectors: torchvision's and others of their kind, over any backbone and neck."""

from .detector import HEADS, WITH_MASKS, Detector, Pyramid

__all__ = ["HEADS", "WITH_MASKS", "Detector", "Pyramid"]
