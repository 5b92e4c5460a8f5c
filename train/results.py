"""Where predictions come from and go to: files, folders and videos; drawings, masks, COCO JSON and YOLO text."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..backbones.images import image_suffixes, is_hidden
from ..files import atomic, write_json
from .task import Predictor

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


@dataclass
class Source:
    """An image to predict.

    Attributes:
        name: of the file, with ``#NUMBER`` for a frame of a video.
        place: of what is written for it, below the output folder and without a suffix.
        frame: number of the frame of a video, from 0.
    """

    name: str
    place: Path
    path: Path
    frame: int | None = None


def find_images(paths: Sequence[str | Path]) -> list[Source]:
    """The images of files, folders (all below them, by name; hidden ones are left out) and videos (each frame).

    Raises:
        ValueError: a folder without an image, or a video that cannot be read.
        ImportError: a video without OpenCV.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            files = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
            names = [name for name in files if name.suffix.lower() in image_suffixes()]
            names = [name for name in names if not any(map(is_hidden, name.parts))]
            if names and (other := [str(name) for name in files if name not in {*names}]):
                text = f"{', '.join(other[:3])}{', ...' * (len(other) > 3)}"
                warnings.warn(f"{path}: {len(other):,} files that are hidden or no images: {text}", stacklevel=2)
            if not names:
                raise ValueError(f"{path} has no image file: known are {', '.join(sorted(image_suffixes()))}")
            found += [Source(str(path / name), name.with_suffix(""), path / name) for name in names]
        elif path.suffix.lower() in VIDEOS and path.is_file():
            with _video(path) as video:
                count = 0
                while video.grab():
                    place = Path(f"{path.stem}_{count:06}")
                    found.append(Source(f"{path}#{count}", place, path, count))
                    count += 1
        else:
            found.append(Source(str(path), Path(path.stem), path))
    return found


def read_images(sources: Sequence[Source]) -> Iterator[str | Image.Image]:
    """The path of each source, or the image of a frame, in their order."""
    number = 0
    while number < len(sources):
        first = sources[number]
        if first.frame is None:
            yield first.name
            number += 1
            continue
        with _video(first.path) as video:
            while number < len(sources) and sources[number].path == first.path:
                ok, pixels = video.read()
                if not ok:
                    raise OSError(f"{sources[number].name} cannot be read")
                yield Image.fromarray(pixels[..., ::-1])
                number += 1


@contextmanager
def _video(path: Path) -> Iterator[Any]:
    try:
        import cv2
    except ImportError:
        raise ImportError(f"{path}: a video needs OpenCV: pip install opencv-python-headless") from None
    video = cv2.VideoCapture(str(path))
    try:
        if not video.isOpened():
            raise ValueError(f"{path} cannot be read as a video")
        yield video
    finally:
        video.release()


class Writer:
    """Writes predictions below a folder.

    Args:
        formats: of `Predictor.formats`; the first of these where none is given.

    Raises:
        ValueError: a format that the model does not have, or files that would replace images or each other.
    """

    def __init__(self, folder: Path, formats: Sequence[str], sources: Sequence[Source], predictor: type[Predictor]):
        for name in formats:
            if name not in predictor.formats:
                known = ", ".join(predictor.formats) or "none"
                raise ValueError(f"the model has no results of format {name!r}; its formats: {known}")
        self.folder, self.formats = folder, list(formats) or list(predictor.formats[:1])
        self.entries: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        pictures = [name for name in self.formats if name in ("drawn", "masks")]
        self.folders = {name: folder / name if len(pictures) > 1 else folder for name in pictures}
        self.folders["yolo"] = folder / "labels"
        own = {source.path.resolve(): source.name for source in sources}
        taken: dict[Path, str] = {}
        for source in sources:
            for place in (self.folders[name] / f"{source.place}.png" for name in pictures):
                if place.resolve() in own:
                    name = own[place.resolve()]
                    raise ValueError(
                        f"the drawing of {source.name} would replace the image {name}; name another folder"
                    )
            if source.place in taken:
                place = folder / f"{source.place}.png"
                raise ValueError(f"{taken[source.place]} and {source.name} would both be drawn to {place}")
            taken[source.place] = source.name

    def add(self, source: Source, predictor: Predictor, image: Tensor, found: Any) -> None:
        """Writes the files of one image."""
        for name in self.formats:
            if name == "coco":
                number = len(self.images) + 1
                size = {"height": image.shape[-2], "width": image.shape[-1]}
                self.images.append({"id": number, "file_name": source.name, **size})
                for entry in predictor.coco(found):
                    self.entries.append({"id": len(self.entries) + 1, "image_id": number, **entry, "iscrowd": 0})
                continue
            place = self.folders[name] / f"{source.place}{'.txt' if name == 'yolo' else '.png'}"
            place.parent.mkdir(parents=True, exist_ok=True)
            if name == "yolo":
                with atomic(place) as new:
                    new.write_text("".join(f"{line}\n" for line in predictor.yolo(image, found)), encoding="utf-8")
            elif name == "masks":
                predictor.masks(image, found, place)
            else:
                predictor.draw(image, found, place, Path(source.name).name)

    def finish(self, predictor: Predictor) -> None:
        """Writes the files of all images."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if "coco" in self.formats:
            categories = [{"id": key, "name": name} for key, name in predictor.categories().items()]
            content = {"images": self.images, "annotations": self.entries, "categories": categories}
            write_json(self.folder / "predictions.json", content)
        if "yolo" in self.formats:
            with atomic(self.folder / "classes.txt") as new:
                new.write_text("".join(f"{name}\n" for name in predictor.categories().values()), encoding="utf-8")
