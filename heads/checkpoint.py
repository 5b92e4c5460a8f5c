"""Folders of detectors and segmenters: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from ..files import atomic
from .body import without_wrappers
from .build import BUILDERS, build_dense
from .dense import FORMAT, WEIGHTS, DenseModel
from .dense import read_dense_config as read_dense_config
from .legacy import migrate_state_dict

Model = TypeVar("Model", bound=nn.Module)


def _foldable(model: nn.Module) -> list[tuple[str, Any]]:
    """The outermost modules that can be reparameterized, by name."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        if hasattr(module, "reparameterize") and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    return found


def reparameterize(model: Model) -> Model:
    """Fold training-only branches and norms of backbone, neck and heads in place, for inference.

    Outputs equal those in evaluation mode up to rounding. `save_dense` and `load_dense` keep this form.

    Returns:
        The model itself.

    Examples:
        >>> import torch
        >>> from foveal.heads.build import build_segmenter
        >>> from foveal.heads.checkpoint import reparameterize
        >>> model = build_segmenter("test_foveal_care", "semantic_fpn", num_classes=5).eval()
        >>> image = torch.rand(1, 3, 64, 64)
        >>> before = model(image)
        >>> torch.allclose(reparameterize(model)(image), before, atol=1e-4)
        True
    """
    for _, module in _foldable(model):
        module.reparameterize()
    return model


def save_dense(
    folder: str | Path, model: DenseModel, classes: Sequence[str], preprocessing: Mapping[str, Any], **more: Any
) -> None:
    """Write ``config.json`` and ``model.safetensors`` of a detector or segmenter into ``folder``, for `load_dense`.

    Args:
        model: of `build_detector` or `build_segmenter`.
        classes: their names by index.
        preprocessing: description of the images for readers; the model applies it itself.
        more: further entries of config.json.

    Raises:
        ValueError: a model without the arguments of a builder, or not one name per class.

    Examples:
        >>> from foveal.heads.build import build_segmenter
        >>> from foveal.heads.checkpoint import save_dense
        >>> model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=2)
        >>> save_dense("folder", model, ["cat", "dog"], {"in_chans": 3})
        >>> import foveal
        >>> foveal.load("folder").classes
        ['cat', 'dog']
    """
    if not model.arguments:
        raise ValueError(f"{type(model).__name__} has no arguments: build it by build_detector or build_segmenter")
    if len(classes) != model.arguments.get("num_classes", 0):
        raise ValueError(f"{len(classes)} class names for num_classes={model.arguments['num_classes']}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "task": model.task,
        "arguments": model.arguments,
        "classes": list(classes),
        "preprocessing": dict(preprocessing),
        **more,
    }
    text = json.dumps(config, indent=2) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic(folder / WEIGHTS) as file:
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with atomic(folder / "config.json") as file:
        file.write_text(text, encoding="utf-8")


def load_dense(folder: str | Path, file: Path | None = None) -> Any:
    """Load what `save_dense` wrote, or a run's ``best/``, in evaluation mode.

    Args:
        file: another weights file in the folder.

    Returns:
        A `DenseModel` with ``classes`` (names by index) and ``config`` (the content of config.json).

    Raises:
        ValueError: the folder has no dense model, or config and weights do not fit.

    Examples:
        >>> from foveal.heads.build import build_segmenter
        >>> from foveal.heads.checkpoint import load_dense, save_dense
        >>> model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=2)
        >>> save_dense("folder", model, ["cat", "dog"], {"in_chans": 3})
        >>> load_dense("folder").config["arguments"]["head"]
        'semantic_fpn'
    """
    found = read_dense_config(folder)
    if found is None:
        raise ValueError(f"{folder} holds no detector or segmenter: no config.json with format {FORMAT!r}")
    folder, config = found
    if config.get("task") not in BUILDERS:
        raise ValueError(f"{folder}/config.json: task is {config.get('task')!r}, must be one of {', '.join(BUILDERS)}")
    missing = {"arguments", "classes", "preprocessing"} - set(config)
    if missing:
        raise ValueError(f"{folder}/config.json lacks {', '.join(sorted(missing))}")
    try:
        model = build_dense(config["task"], config["arguments"])
        tensors = safetensors.torch.load_file(file or folder / WEIGHTS)
        # of a model that was saved inside torch.compile's or DDP's wrapper
        tensors = migrate_state_dict(without_wrappers(tensors))
        for name, module in _foldable(model):
            stored = {key for key in tensors if key.startswith(f"{name}.")}
            if stored != {f"{name}.{key}" for key in module.state_dict()}:
                module.reparameterize()  # in the form in which it was saved
        model.load_state_dict(tensors)
    except (TypeError, FileNotFoundError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder} can't be loaded: {error}") from error
    model.classes, model.config = config["classes"], config
    return model.eval()
