"""Dense prediction on the backbones: feature pyramids, detectors and segmenters."""
