"""Base class of detectors and segmenters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .backbone import Backbone, decays, grouped
from .legacy import migrate_config, migrate_in_place

FORMAT, WEIGHTS = "foveal-dense", "model.safetensors"


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """A context with a fixed seed for PyTorch's random numbers, which restores the generators at its end."""
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(0)
        yield


class DenseModel(nn.Module):
    """A backbone and its heads; the base class of `Detector`, `Segmenter` and `Mask2Former`.

    Attributes:
        task: ``"detect"`` or ``"segment"``.
        arguments: of the builder, to build the same model again; empty if no builder made it.
        classes: class names by index, if loaded from a folder.
        config: the folder's config.json, likewise.
    """

    task: ClassVar[str]
    backbone: Backbone
    classes: list[str]
    config: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def parameter_groups(
        self,
        weight_decay: float,
        layer_decay: float | None = None,
        backbone_lr_ratio: float = 1.0,
        *,
        lr: float | None = None,
    ) -> list[dict[str, Any]]:
        """Optimizer groups: those of the backbone's body (`Backbone.parameter_groups`); neck and heads at the full
        rate, without decay for vectors, biases and embeddings."""
        body = {id(p) for p in self.backbone.body.parameters()}
        rest = [(name, p) for name, p in self.named_parameters() if id(p) not in body]
        kept = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Embedding)}
        kept |= {name for name, _ in rest if name.endswith("level_embed")}
        groups = self.backbone.parameter_groups(weight_decay, layer_decay, backbone_lr_ratio, lr=lr)
        return groups + grouped([(p, 1.0, decays(name, p, kept)) for name, p in rest], weight_decay, lr)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        migrate_in_place(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def read_dense_config(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder of the model (for a run: its ``best/``) and its config.json; None if it is not a dense model's.

    Raises:
        ValueError: if config.json is not JSON.

    Examples:
        >>> from foveal.heads.build import build_segmenter
        >>> from foveal.heads.checkpoint import read_dense_config, save_dense
        >>> model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=2)
        >>> save_dense("folder", model, ["cat", "dog"], {"in_chans": 3})
        >>> found = read_dense_config("folder")
        >>> found is not None and found[1]["task"]
        'segment'
    """
    folder = Path(folder)
    # a run replaces best/ by two renames; if killed between them, it leaves the previous one as best.old/
    for candidate in (folder / "best", folder / "best.old", folder):
        file = candidate / "config.json"
        if file.is_file():
            try:
                config = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file} is not JSON: {error}") from None
            is_dense = isinstance(config, dict) and config.get("format") == FORMAT
            return (candidate, migrate_config(config)) if is_dense else None
    return None
