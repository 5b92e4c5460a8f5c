"""``foveal predict``: what a trained model finds in image files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..backbones.loading import local_path, refuse_exported
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
) -> Iterator[Prediction]:
    """The classes of image files (classifier), the objects (detector) or the classes of the pixels (segmenter) in them.

    Args:
        source: what `foveal.load` takes: a run, a model folder, of a classifier also a name with published weights.
        top: classifier: how many classes; at most as many as the model has.
        threshold: detector: lowest score.
        output: detector, segmenter: folder for ``NAME.png``, the image with its objects drawn or the classes as a
            palette image. None: nothing is drawn.

    Yields:
        a `Prediction` for each image. A file that cannot be read has an ``error`` and does not end the iteration.

    Raises:
        ValueError: ``source`` cannot be loaded, a classifier has nothing to draw, or drawings would replace images or
            each other.

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
    if output is not None and not predictor_class.draws:
        raise ValueError(f"{source} is a classifier: it has nothing to draw into {output}")
    places = drawing_paths(images, Path(output)) if output is not None else [None] * len(images)
    predictor = predictor_class(source, top=top, threshold=threshold)
    for path, place in zip(images, places, strict=True):
        try:
            image = predictor.read(path)
        except OSError as error:
            yield Prediction(str(path), error=error)
            continue
        with torch.no_grad():
            results, found = predictor.predict(image)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            predictor.draw(image, found, place, Path(path).name)
        yield Prediction(str(path), results)


def drawing_paths(images: Sequence[str | Path], folder: Path) -> list[Path]:
    """Where the drawings of image files go: ``folder/NAME.png``.

    Raises:
        ValueError: two of them would go to the same file, or one to an image's own.
    """
    own = {Path(path).resolve(): path for path in images}
    taken: dict[Path, str | Path] = {}
    for path in images:
        place = folder / f"{Path(path).stem}.png"
        if place.resolve() in own:
            raise ValueError(
                f"the drawing of {path} would replace the image {own[place.resolve()]}; name another folder"
            )
        if place in taken:
            raise ValueError(f"{taken[place]} and {path} would both be drawn to {place}")
        taken[place] = path
    return list(taken)
