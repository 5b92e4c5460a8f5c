"""foveal: vision backbones that look closely around each point, created by name with ``timm.create_model``."""

from ._version import __version__

__all__ = ["__version__"]
