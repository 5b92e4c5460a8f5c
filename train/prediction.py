"""``foveal predict``: runs a trained model on image files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..backbones.loading import local_path, refuse_exported
from .results import Source, Writer, find_images, read_images
from .task import Predictor, Result
from .tasks import find_task, import_remembered, task_of


@dataclass(frozen=True)
class Prediction:
    """The results for an image file, the highest score first, or the ``error`` if it cannot be read.

    A result has a ``label`` and a ``score``: the probability of the class (classifier), the confidence (detector) or
    the share of pixels (segmenter). Those of a detector also have the ``box`` (x1, y1, x2, y2 in pixels) and the
    ``category_id`` of its training annotations.

    Examples:
        >>> from foveal.train import Prediction, Result
        >>> print(Prediction("image.png", [Result("cat", 0.75, box=(3.0, 4.0, 20.0, 24.0))]).results[0])
         75.00 %  cat  from (3, 4) to (20, 24)
    """

    path: str
    results: list[Result] = field(default_factory=list)
    error: OSError | None = None


def predict(
    source: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    threshold: float = 0.5,
    output: str | Path | None = None,
    formats: Sequence[str] = (),
    device: str | torch.device | None = None,
) -> Iterator[Prediction]:
    """Predicts the class of images (classifier), the objects in them (detector) or the class of each pixel (segmenter).

    Args:
        source: as for `foveal.load`: a run, a model folder, or the name of a classifier with published weights.
        images: files, folders (all images below them) and videos (each frame; needs OpenCV).
        top: classifier: number of classes to return.
        threshold: detector: minimum score.
        output: detector, segmenter: folder to write to; None: nothing is written.
        formats: files to write. Detector: ``"drawn"`` (default: NAME.png, the image with its objects), ``"coco"``
            (predictions.json), ``"yolo"`` (labels/NAME.txt, polygons where there are masks) and, with masks,
            ``"masks"`` (NAME.png, the number of the object at each pixel). Segmenter: ``"masks"`` (default: a palette
            image of the classes) and ``"drawn"``. With both ``"drawn"`` and ``"masks"``, each has its own folder.
        device: None: a GPU if there is one, else the CPU.

    Yields:
        a `Prediction` per image; an unreadable file has an ``error`` and does not end the iteration.

    Raises:
        ValueError: ``source`` cannot be loaded, the model does not have a format, the device is unknown, or an output
            file would overwrite an image or another output.
        ImportError: a video without OpenCV.

    Examples:
        >>> import timm
        >>> from PIL import Image
        >>> from foveal.train import predict
        >>> model = timm.create_model("test_foveal_dinat", num_classes=3)
        >>> timm.models.save_for_hf(model, "folder", safe_serialization=True)
        >>> Image.new("RGB", (80, 60)).save("image.png")
        >>> for prediction in predict("folder", ["image.png"], top=2):
        ...     print(prediction.path, [result.label for result in prediction.results])  # doctest: +ELLIPSIS
        image.png ['class ...', 'class ...']
    """
    folder = local_path(source)
    import_remembered(source)
    kind = task_of(folder)
    if kind != "classify":
        refuse_exported(folder)
        source = folder
    predictor_class: type[Predictor] = find_task(kind).Predictor
    sources = find_images(images)
    if output is not None and not predictor_class.formats:
        raise ValueError(f"{source} is a classifier and writes no files (output={output})")
    if output is None and formats:
        raise ValueError(f"formats={list(formats)} need an output folder (output)")
    writer = None if output is None else Writer(Path(output), formats, sources, predictor_class)
    predictor = predictor_class(source, top=top, threshold=threshold)
    yield from _predict(predictor, sources, writer, _device(device))


def _predict(
    predictor: Predictor, sources: Sequence[Source], writer: Writer | None, device: torch.device
) -> Iterator[Prediction]:
    predictor.model.to(device)
    for each, given in zip(sources, read_images(sources), strict=True):
        try:
            image = predictor.read(given)
        except OSError as error:
            yield Prediction(each.name, error=error)
            continue
        with torch.no_grad():
            results, found = predictor.predict(image.to(device))
        if writer is not None:
            writer.add(each, predictor, image, found)
        yield Prediction(each.name, results)
    if writer is not None:
        writer.finish(predictor)


def _device(device: str | torch.device | None) -> torch.device:
    """Raises:
    ValueError: an unknown or unavailable device.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r}: {str(error).splitlines()[0]}") from None
    return place
