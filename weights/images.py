"""Image files as model inputs, and the score of a classifier on an ImageFolder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.config import resolve_data_config
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from ..backbones.images import MODES, image_suffixes, is_hidden, label_names, preprocessing, read_image, to_mode

_BATCH = 32


def metadata(model: Any) -> dict[str, Any]:
    """The preprocessing of a classifier, in timm's terms, and its class names, if known."""
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    facts = {key: config[key] for key in ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")}
    facts["architecture"], names = model.pretrained_cfg["architecture"], label_names(model)
    return facts if names is None else facts | {"label_names": names}


def sample_images(paths: Sequence[str | Path], channels: int) -> dict[str, Image.Image | Tensor]:
    """Images to compare on, by name, as `read_image` returns them; without paths scikit-learn's two sample images, if
    the model takes 1 or 3 channels."""
    if paths or channels not in MODES:
        return {str(path): read_image(path, channels) for path in paths}
    try:
        from sklearn.datasets import load_sample_images  # takes a second to import
    except ModuleNotFoundError as error:
        raise ImportError("sample images need scikit-learn: pip install 'foveal[export]', or pass --image") from error
    found = load_sample_images()
    photos = zip(found.filenames, found.images, strict=True)
    return {Path(name).name: to_mode(Image.fromarray(pixels), channels) for name, pixels in photos}


def read_batches(model: Any, paths: Sequence[str | Path]) -> list[Tensor]:
    """Image files, or all images in folders, in batches for a classifier: ``[B, C, H, W]`` each."""
    files: list[Path] = []
    for path in map(Path, paths):
        below = sorted(each for each in path.rglob("*") if _is_image(path, each))
        files += below if path.is_dir() else [path]
    if not files:
        raise ValueError(f"no images in {', '.join(map(str, paths))}")
    transform, channels = preprocessing(model), model.pretrained_cfg["input_size"][0]
    return list(torch.stack([transform(read_image(file, channels)) for file in files]).split(_BATCH))


def _is_image(folder: str | Path, path: str | Path) -> bool:
    return Path(path).suffix.lower() in image_suffixes() and not any(
        map(is_hidden, Path(path).relative_to(folder).parts)
    )


class _Folders(ImageFolder):
    """A folder for each class, but for hidden ones."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not is_hidden(name)]
        return classes, {name: label for label, name in enumerate(classes)}


@torch.no_grad()
def top1(
    model: Any,
    images: str | Path,
    config: Mapping[str, Any],
    run: Callable[[Tensor], Tensor] | None = None,
    batch: int | None = None,
) -> tuple[float, int]:
    """Top-1 score of a classifier on an ImageFolder, in per cent, and the number of images.

    Args:
        images: a folder for each class, sorted like the classes or named by the ``label_names`` of ``config``.
        config: the model's config.json.
        run: what computes the logits, by default the model.

    Raises:
        ValueError: the folders are not the classes of the model, or it has none.
        OSError: there are no images, or one cannot be read.
    """
    if (config.get("model_args") or {}).get("features_only"):
        raise ValueError(f"{config['architecture']} is a backbone that returns feature maps: there is no top-1 score")
    channels = model.pretrained_cfg["input_size"][0]
    try:
        read = functools.partial(read_image, channels=channels)
        data = _Folders(images, preprocessing(model), loader=read, is_valid_file=functools.partial(_is_image, images))
    except FileNotFoundError as error:
        raise OSError(f"{images}: {error}") from error
    labels = config.get("label_names")
    unknown = sorted(set(data.classes) - set(labels)) if labels else data.classes
    if unknown and (labels or len(data.classes) != model.num_classes):
        raise ValueError(
            f"{images} has {len(data.classes)} folders, the model {model.num_classes} classes; "
            f"not among them: {', '.join(unknown[:8])}"
        )
    order = torch.tensor([(labels or data.classes).index(name) for name in data.classes])
    loader, compute = DataLoader(data, batch or _BATCH), run or model
    correct = sum(int((compute(x).argmax(1) == order[target]).sum()) for x, target in loader)
    return 100 * correct / len(data), len(data)
