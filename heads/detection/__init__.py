"""Detectors: torchvision's and others of their kind, over any backbone and neck."""

from .detector import Detector

__all__ = ["Detector"]
