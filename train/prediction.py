"""``foveal predict``: what a trained model finds in image files."""

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
    """What was found in an image file, the highest score first; ``error`` where the file cannot be read.

    Each of the ``results`` has a ``label`` and a ``score``: the probability of the class (classifier), the confidence
    (detector) or the share of the pixels (segmenter); that of a detector also the ``box`` (x1, y1, x2, y2 in pixels)
    and the ``category_id`` of its annotations.

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
    """The classes of image files (classifier), the objects (detector) or the classes of the pixels (segmenter) in them.

    Args:
        source: what `foveal.load` takes: a run, a model folder, of a classifier also a name with published weights.
        top: classifier: how many classes; at most as many as the model has.
        threshold: detector: lowest score.
        images: files, folders (all images below them) and videos (each frame; OpenCV reads them).
        output: detector, segmenter: folder to write to. None: nothing is written.
        formats: what is written. Detector: ``"drawn"`` (the usual one: NAME.png, the image with its objects),
            ``"coco"`` (predictions.json), ``"yolo"`` (labels/NAME.txt) and, with masks, ``"masks"`` (NAME.png, the
            number of the object at each pixel). Segmenter: ``"masks"`` (the usual one: a palette image of the classes)
            and ``"drawn"``. Of both ``"drawn"`` and ``"masks"`` each has a folder of its name.
        device: None: a GPU if there is one, else the CPU.

    Yields:
        a `Prediction` for each image. A file that cannot be read has an ``error`` and does not end the iteration.

    Raises:
        ValueError: ``source`` cannot be loaded, a format that the model does not have, an unknown device, or drawings
            would replace images or each other.
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
        raise ValueError(f"{source} is a classifier: it has nothing to draw into {output}")
    if output is None and formats:
        raise ValueError(f"formats={list(formats)} are written into a folder: name it by output")
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
    ValueError: an unknown device, or one that this machine does not have.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r}: {str(error).splitlines()[0]}") from None
    return place
