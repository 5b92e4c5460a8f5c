"""foveal: vision backbones that look closely around each point, created by name with ``timm.create_model``.

Importing this package registers every model with timm. It stays light: training, plots and export are imported by the
commands that use them.
"""

from pathlib import Path as _Path
from typing import Any as _Any

from torch.nn import Module as _Module

from ._version import __version__
from .backbones import list_models, loading
from .backbones.halonet import replace_attention
from .kernels import backend

__all__ = ["__version__", "backend", "list_models", "load", "replace_attention"]


def load(source: str | _Path, **kwargs: _Any) -> _Module:
    """Build a model in evaluation mode, with its trained weights.

    Args:
        source: a model name with published weights (``"dinat_tiny"``, ``"dinat_large.in22k_ft_in1k"``); a folder that
            ``foveal train`` wrote (its ``best/`` is taken), of a classifier, a detector or a segmenter; a model folder
            as timm writes it (``config.json`` beside ``model.safetensors``), or as ``foveal convert`` does or ``foveal
            export --to safetensors``; or one ``.safetensors`` file inside such a folder.
        kwargs: of a classifier, passed to `timm.create_model`: ``num_classes``, ``in_chans``, ``features_only`` ...

    Raises:
        ValueError: if `source` is none of these, names an unknown architecture, has no trained weights, or its weights
            do not fit the architecture.
        OSError: if published weights cannot be fetched.

    Examples:
        >>> import foveal, timm, torch
        >>> model = timm.create_model("test_foveal_dinat", num_classes=3)
        >>> timm.models.save_for_hf(model, "folder", safe_serialization=True)
        >>> foveal.load("folder")(torch.randn(1, 3, 96, 64)).shape
        torch.Size([1, 3])
        >>> maps = foveal.load("folder", features_only=True)(torch.randn(1, 3, 96, 64))
        >>> [tuple(each.shape[2:]) for each in maps]
        [(24, 16), (12, 8), (6, 4), (3, 2)]
    """
    path = loading.local_path(source)
    file = path if path.suffix == ".safetensors" and path.is_file() else None
    if str(source).strip() and (path.is_dir() or file is not None):
        from .heads.build import load_dense, read_dense_config  # detectors take torchvision's with them

        folder = path if file is None else path.parent
        if (dense := read_dense_config(folder)) is not None:
            if kwargs:
                raise ValueError(f"{source} is loaded as it was trained; given are {', '.join(kwargs)}")
            loading.refuse_exported(dense[0])
            return load_dense(folder, file)
    return loading.load(source, **kwargs)
