"""Detectors: torchvision's, over any backbone and neck."""

from .detector import HEADS, Detector, Pyramid

__all__ = ["HEADS", "Detector", "Pyramid"]
