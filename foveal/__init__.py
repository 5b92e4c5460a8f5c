"""foveal: local-attention vision backbones for timm.

Importing this package registers all models with timm: at once if timm is already imported, otherwise when it is. So
``import foveal`` is fast, and `foveal --help` does not import PyTorch.
"""

from __future__ import annotations

import importlib as _importlib
import importlib.util as _util
import sys as _sys
from collections.abc import Sequence as _Sequence
from importlib.abc import MetaPathFinder as _MetaPathFinder
from importlib.machinery import ModuleSpec as _ModuleSpec
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from ._version import __version__

if _TYPE_CHECKING:
    from torch.nn import Module as _Module

    from .backbones import list_models
    from .backbones.replace import replace_attention
    from .kernels import backend

__all__ = ["__version__", "backend", "list_models", "load", "replace_attention"]

_LAZY = {"backend": ".kernels", "list_models": ".backbones", "replace_attention": ".backbones.replace"}


class _RegisterWithTimm(_MetaPathFinder):
    """An import hook that imports the backbones, and so registers them, after timm has been imported."""

    def find_spec(
        self, name: str, path: _Sequence[str] | None = None, target: _ModuleType | None = None
    ) -> _ModuleSpec | None:
        if name != "timm":
            return None
        _sys.meta_path.remove(self)
        spec = _util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: _ModuleType) -> None:
            execute(module)
            _importlib.import_module(".backbones", __name__)

        spec.loader.exec_module = execute_and_register  # on this loader instance only
        return spec


if "timm" in _sys.modules:
    from . import backbones as backbones
else:
    _sys.meta_path.insert(0, _RegisterWithTimm())


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(_importlib.import_module(_LAZY[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def load(source: str | _Path, **kwargs: _Any) -> _Module:
    """Build a model in evaluation mode, with its trained weights.

    Args:
        source: a model name with published weights (``"dinat_tiny"``, ``"dinat_large.in22k_ft_in1k"``); a run folder of
            ``foveal train`` (its ``best/`` is loaded); a model folder written by timm (``config.json`` and
            ``model.safetensors``), ``foveal convert`` or ``foveal export --to safetensors``; or a ``.safetensors`` file
            in such a folder; or an upsampler's name or folder (``"naf"``, see `foveal.heads.upsamplers`).
        kwargs: for classifiers, passed to `timm.create_model`: ``num_classes``, ``in_chans``, ``features_only`` ...

    Raises:
        ValueError: if `source` is none of these, names an unknown architecture, or has no weights that fit it.
        OSError: if published weights cannot be downloaded.

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
    from .backbones import loading

    path = loading.local_path(source)
    file = path if path.suffix == ".safetensors" and path.is_file() else None
    if str(source).strip() and (path.is_dir() or file is not None):
        from .heads.checkpoint import load_dense, read_dense_config  # imports torchvision's detectors

        folder = path if file is None else path.parent
        if (dense := read_dense_config(folder)) is not None:
            if kwargs:
                raise ValueError(f"{source} takes no arguments, got {', '.join(kwargs)}")
            loading.refuse_exported(dense[0])
            return load_dense(folder, file)
    elif not loading.is_model(str(source)):
        from .heads.upsamplers import PUBLISHED, load_upsampler

        if str(source) in PUBLISHED:
            if kwargs:
                raise ValueError(f"{source} takes no arguments, got {', '.join(kwargs)}")
            return load_upsampler(source)
    return loading.load(source, **kwargs)
