"""foveal: vision backbones that look closely around each point, created by name with ``timm.create_model``.

Importing this package registers every model with timm. It stays light: training, plots and export are imported by the
commands that use them.
"""

from ._version import __version__
from .backbones import list_models
from .backbones.halonet import replace_attention
from .backbones.loading import load
from .kernels import backend

__all__ = ["__version__", "backend", "list_models", "load", "replace_attention"]
