"""Classify image files with a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from ..backbones.loading import load
from .images import label_names, preprocessing, read_image


def predict(
    source: str | Path, images: Sequence[str | Path], top: int = 5
) -> Iterator[tuple[str, list[tuple[str, float]] | OSError]]:
    """The most probable classes of each image, prepared as the model's ``pretrained_cfg`` says.

    Args:
        source: what `foveal.load` takes.
        top: how many classes; at most as many as the model has.

    Yields:
        the path, and (label, probability) pairs, the most probable first; or, for an image that cannot be read, the
        error, since the others may still be fine. A class without a known name is ``class INDEX``.

    Raises:
        ValueError: if `source` cannot be loaded or has no classifier.

    Examples:
        >>> import timm
        >>> model = timm.create_model("test_foveal_dinat", num_classes=3)
        >>> timm.models.save_for_hf(model, "folder", safe_serialization=True)
        >>> from PIL import Image
        >>> Image.new("RGB", (80, 60)).save("image.png")
        >>> from foveal.weights.predict import predict
        >>> for path, answers in predict("folder", ["image.png"], top=2):
        ...     print(path, answers if isinstance(answers, OSError) else len(answers))
        image.png 2
    """
    model = load(source)
    if model.num_classes < 1:
        raise ValueError(f"{source} has no classifier")
    transform = preprocessing(model)
    labels = _labels(model, source)
    channels = model.pretrained_cfg["input_size"][0]
    for path in images:
        try:
            image = read_image(path, channels)
        except OSError as error:
            yield str(path), error
            continue
        try:
            prepared = transform(image)
        except (ValueError, MemoryError, ArithmeticError) as error:  # a strip of one pixel grows with its long side
            reason = f"cannot be resized from {image.width}x{image.height}: {error or type(error).__name__}"
            yield str(path), OSError(f"{path}: {reason}")
            continue
        with torch.inference_mode():
            logits = model(prepared[None])
        if logits.shape != (1, model.num_classes):
            raise ValueError(f"{source} gives {list(logits.shape)} of an image, not {model.num_classes} logits")
        probabilities = logits.softmax(-1)[0]
        best = probabilities.topk(min(top, len(probabilities)))
        answers = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        yield str(path), [(labels[i] if labels else f"class {i}", p) for i, p in answers]


def _labels(model: nn.Module, source: str | Path) -> Sequence[str] | None:
    """The names that came with the weights, else timm's of the ImageNet the classifier has the size of."""
    names = label_names(model)
    if names is not None:
        if len(names) != model.num_classes:
            raise ValueError(f"{source} has {len(names)} label_names for {model.num_classes} classes")
        return names
    subset = infer_imagenet_subset(model)
    if not subset:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(model.num_classes)]
