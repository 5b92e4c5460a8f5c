"""``foveal data``: shows the content of a data folder and its irregularities, and finds errors before a training."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw
from torch import Tensor

from ...backbones.images import read_pixels, to_rgb
from ...configs.schema import SCHEMAS, load_config
from ...files import atomic
from .auto import DataSet, read_set, size_range
from .dataset import SegmentationDataset
from .dense_transforms import IGNORE
from .factory import found_channels
from .files import UNREADABLE, Files, image_size, same_files
from .formats import find_boxes, first_names
from .guard import Report
from .index import ClassificationIndex, DetectionIndex, Index, SegmentationIndex, clip_boxes
from .pairs import SAMPLED, find_masks

SHOWN = 16  # images of a contact sheet
SIDE = 240  # of each, in pixels
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#000075", "#f032e6")


@dataclass
class Survey:
    """Lines for the user, and errors that would spoil a training."""

    data: DataSet
    lines: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def find_task(root: Path) -> str:
    """``detect`` if the folder has boxes, ``segment`` if it has masks, else ``classify``."""
    files = Files(root)
    found = find_boxes(files)
    if found is not None and found.images:
        return "detect"
    try:
        find_masks(files)
    except ValueError:
        return "classify"
    return "segment"


def survey(root: str | Path, overrides: Sequence[str] = (), task: str | None = None) -> Survey:
    """Reads all annotations and the header of every image.

    Args:
        root: the folder.
        overrides: ``key=value`` pairs of a recipe's ``data`` (and ``seed``).
        task: None: detected.

    Raises:
        DataError, ConfigError: an unknown format, or an invalid override.

    Examples:
        >>> from foveal.train.data.composites import write_composites
        >>> from foveal.train.data.survey import survey
        >>> write_composites("digits", 8, 4, 64, seed=0)
        >>> found = survey("digits", task="detect")
        >>> found.data.found.format, found.wrong
        ('COCO JSON', [])
    """
    task = task or find_task(Path(root))
    given = ["output=-", "model.name=-", "data.kind=auto", f"data.root={root}", *overrides]
    config = load_config(None, given, SCHEMAS[task])
    data = read_set(config, masks=None)
    result = Survey(data, [f"for {task}: {data.found.format} in {root}", f"split: {data.division.text}"])
    parts = {"train": data.train, "held out": data.val}
    bad = _images(result, parts)
    count = len(bad.rows) + sum("cannot be opened" in reason for *_, reason in data.found.report.rows)
    if count > config.data.max_bad_fraction * len(data.found.images):
        result.wrong.append(f"{count:,} images can't be read, more than data.max_bad_fraction allows")
    if values := data.found.values:
        text = yaml.safe_dump(values, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
        result.lines.append(f"masks: data.values={text.strip()}")
    _classes(result, parts)
    _odd(result, parts, bad)
    return result


def _images(result: Survey, parts: dict[str, Index]) -> Report:
    """Adds image sizes and duplicates across the split; reports images that cannot be opened."""
    bad, sizes = Report("images"), []
    for index in parts.values():
        for number in range(len(index)):
            name = index.name(number)
            try:
                size = image_size(name)
            except UNREADABLE as error:
                bad.rows.append((name, None, f"image cannot be opened: {type(error).__name__}"))
                continue
            sizes.append(size)
            if isinstance(index, DetectionIndex) and size != tuple(index.sizes[number].tolist()):
                bad.rows.append((name, None, "image size differs from the annotations"))
    channels = found_channels(result.data.train)
    more = f", {channels} channels" if channels != 3 else ""
    result.lines.append(f"images: {len(sizes):,}, {size_range(np.array(sizes).reshape(-1, 2))}{more}")
    side = {index.name(number): part for part, index in parts.items() for number in range(len(index))}
    pairs = [f"{name} = {first}" for name, first in same_files(side).items() if side[name] != side[first]]
    if pairs:
        result.wrong.append(f"{len(pairs):,} images are in both training and held-out parts: {first_names(pairs)}")
    return bad


def _classes(result: Survey, parts: dict[str, Index]) -> None:
    """Adds a table of objects, images or masks by class."""
    data = result.data
    kind = {"detect": "objects", "classify": "images", "segment": "masks with it"}[data.task]
    counts = {
        part: _mask_classes(result, index, len(data.classes))
        if isinstance(index, SegmentationIndex)
        else data.by_class(index)
        for part, index in parts.items()
    }
    width = max(map(len, [*data.classes, "class"]))
    result.lines.append(f"{kind} by class:")
    result.lines.append(f"  {'class':{width}}  {'train':>9}  {'held out':>9}")
    for label, name in enumerate(data.classes):
        result.lines.append(f"  {name:{width}}  " + "  ".join(f"{count[label]:>9,}" for count in counts.values()))
    for part, count in counts.items():
        missing = [name for name, number in zip(data.classes, count, strict=True) if not number]
        if missing and part == "train":
            result.wrong.append(f"classes without training data: {first_names(missing, 5)}")
        elif missing:
            result.lines.append(f"classes without held-out data, so without a score: {first_names(missing, 5)}")
    if isinstance(data.train, DetectionIndex):
        sides = np.sqrt(data.train.boxes[:, 2] * data.train.boxes[:, 3])
        if len(sides):
            low, middle, high = np.quantile(sides, [0.05, 0.5, 0.95])
            each = len(sides) / max(len(data.train), 1)
            result.lines.append(
                f"objects: {each:.1f} per image, sides {low:.0f} to {high:.0f} pixels (5 to 95 %), median {middle:.0f}"
            )
        held_out = data.val
        if isinstance(held_out, DetectionIndex) and len(held_out.crowd) and held_out.crowd.all():
            result.wrong.append("all held-out objects are crowds or difficult: nothing can be scored")


def _mask_classes(result: Survey, index: SegmentationIndex, classes: int) -> np.ndarray:
    """Number of masks that contain each class, over at most `SAMPLED` masks."""
    count = np.zeros(classes, np.int64)
    dataset = SegmentationDataset(index, found_channels(index), None, 0)
    for number in range(0, len(index), -(-len(index) // SAMPLED) or 1):
        try:
            found = np.unique(np.asarray(dataset.read(number)["mask"]))
        except UNREADABLE as error:
            if len(result.wrong) < 5:
                result.wrong.append(str(error))
            continue
        count[found[found != IGNORE]] += 1
    return count


def _odd(result: Survey, parts: dict[str, Index], bad: Report) -> None:
    found = result.data.found
    notes = [*found.notes, *result.data.division.notes]
    for report in (*(index.report for index in parts.values()), bad):
        notes += report.notes
        for reason, count in report.counts().items():
            names = [str(sample) for sample, _, why in report.rows if why == reason]
            notes.append(f"{count:,} x {reason}: {first_names(names)}")
    result.lines += ["odd:", *(f"  {note}" for note in notes)] if notes else ["nothing odd"]


def draw(data: DataSet, path: Path) -> int:
    """Writes a contact sheet of training images with their boxes, masks or classes; returns how many it shows."""
    index, channels = data.train, found_channels(data.train)
    tiles = []
    for number in np.linspace(0, len(index) - 1, min(SHOWN, len(index))).round().astype(int).tolist():
        try:
            tiles.append(_tile(data, index, number, channels))
        except UNREADABLE:
            continue
    columns = min(4, len(tiles)) or 1
    sheet = Image.new("RGB", (columns * SIDE, -(-len(tiles) // columns) * SIDE), "white")
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (place % columns * SIDE, place // columns * SIDE))
    with atomic(path) as new:
        sheet.save(new, "PNG")
    return len(tiles)


def _picture(image: Image.Image | Tensor) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(to_rgb(image.permute(1, 2, 0).clamp(0, 255).byte().numpy()))


def _tile(data: DataSet, index: Index, number: int, channels: int) -> Image.Image:
    if isinstance(index, SegmentationIndex):
        sample = SegmentationDataset(index, channels, None, 0).read(number)
        image = _picture(sample["image"])
        mask = np.asarray(sample["mask"])
        colours = np.array([(0, 0, 0), *(_rgb(label) for label in range(1, 256))], np.uint8)
        image = Image.blend(image, Image.fromarray(colours[mask]), 0.5)
    else:
        with index.open(number) as file:
            image = _picture(read_pixels(file, channels))
    scale = (SIDE - 8) / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size])
    pen = ImageDraw.Draw(image)
    if isinstance(index, DetectionIndex):
        rows = index.rows(number)
        for box, label in zip(clip_boxes(index.boxes[rows], index.sizes[number]), index.labels[rows], strict=True):
            x1, y1, x2, y2 = (box * scale).tolist()
            pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=COLOURS[label % len(COLOURS)], width=2)
            _write(pen, (x1, y1), data.classes[label], COLOURS[label % len(COLOURS)])
    elif isinstance(index, ClassificationIndex):
        _write(pen, (0, 0), data.classes[index.label[number]], "#000000")
    tile = Image.new("RGB", (SIDE, SIDE), "white")
    tile.paste(image, (4, 4))
    return tile


def _write(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: str) -> None:
    text = text.encode("latin-1", "replace").decode("latin-1")  # the characters of Pillow's font
    pen.rectangle(pen.textbbox(place, text), fill=colour)
    pen.text(place, text, fill="white")


def _rgb(label: int) -> tuple[int, int, int]:
    text = COLOURS[label % len(COLOURS)]
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:], 16)
