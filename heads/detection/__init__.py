"""Detectors on any backbone and neck, with torchvision's interface."""

from .detector import Detector

__all__ = ["Detector"]
