"""Images with a class for each pixel: the folder layouts of published sets, augmentation, and their loader.

A mask is an image of one channel (or a palette) whose values are classes; 255 is a pixel without one, which neither the
loss nor the score counts. What a data set calls otherwise (ADE20K's 0, the ids of Cityscapes) is mapped to this on
reading. Images and masks are paired by name; one without the other, an unreadable file, and a mask of another size than
its image are booked as bad samples, with name and reason. A label outside the classes stops the run: it says that the
classes are not those of the data.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ...backbones.images import to_mode
from ...configs.schema import SegmentAugmentConfig, SegmentConfig, SegmentDataConfig
from ...heads.segmentation.inference import rescale_size
from .class_names import ADE20K, CITYSCAPES, CITYSCAPES_IDS, VOC
from .factory import CHANNELS, Data
from .files import ATTEMPTS, UNREADABLE, DenseLoader, Found
from .guard import BadSamples, DataError, Excluded, check_classes
from .memory import DIGITS
from .order import EpochOrder

IGNORE = 255  # a pixel without a class
MAX_CLASSES = 255
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
SPLITS = {"ade20k": ("training", "validation")}  # of training and evaluation where the recipe leaves them open
NAMES = {"ade20k": ADE20K, "cityscapes": CITYSCAPES, "voc": VOC, "digits": ("background", *DIGITS)}


class Pair(NamedTuple):
    """Where an image and its mask are, or should be."""

    image: Path
    mask: Path


class Batch(NamedTuple):
    """images: float ``[B, C, H, W]`` in [0, 1]; targets: int64 ``[B, H, W]``, 255 where there is no class."""

    images: Tensor
    targets: Tensor


Item = tuple[Tensor | None, Tensor | None, Found, str]  # image, mask, bad samples met on the way, what stops the run


def split_name(config: SegmentDataConfig, train: bool) -> str:
    """The split of training or of evaluation: the recipe's, else the one of the layout."""
    given = config.train_split if train else config.val_split
    return given or SPLITS.get(config.kind, ("train", "val"))[not train]


def find_classes(config: SegmentDataConfig) -> list[str]:
    """The class names by index.

    Raises:
        DataError: none are given where the layout has none, one is given twice, or there are too many.
    """
    if config.classes is not None:
        classes = list(config.classes)
    elif config.kind in NAMES:
        classes = list(NAMES[config.kind])
    else:
        raise DataError(f"data.classes is needed for data.kind={config.kind}: the names by label")
    check_classes(classes, f"data.kind={config.kind}")
    if len(classes) > MAX_CLASSES:
        raise DataError(f"{len(classes)} classes: masks hold at most {MAX_CLASSES}, {IGNORE} is the pixel without one")
    return classes


# ---- layouts


def find_pairs(config: SegmentDataConfig, split: str) -> list[Pair]:
    """Every image and every mask of a split, paired, sorted by name.

    Layouts below ``data.root``:

    * ade20k: ``images/SPLIT/*.jpg``, ``annotations/SPLIT/*.png``
    * cityscapes: ``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png``, ``gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png`` (or
      ``..._labelIds.png``)
    * voc: ``ImageSets/Segmentation/SPLIT.txt`` names, ``JPEGImages/NAME.jpg``, ``SegmentationClass/NAME.png``
    * folder: ``data.images`` and ``data.masks``, with SPLIT in place of ``{split}``; folders below them may nest

    Raises:
        DataError: a folder or list is missing, or there is no image.
    """
    if not config.root:
        raise DataError(f"data.root is needed for data.kind={config.kind}")
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(f"the data folder {root} does not exist (data.root)")
    if config.kind == "voc":
        pairs = _voc(root, split)
    elif config.kind == "cityscapes":
        pairs = _cityscapes(root, split)
    elif config.kind == "ade20k":
        pairs = _join(root / "images" / split, root / "annotations" / split)
    else:
        images, masks = (root / pattern.replace("{split}", split) for pattern in (config.images, config.masks))
        pairs = _join(images, masks)
    if not any(pair.image.is_file() for pair in pairs):
        raise DataError(f"no images of the split {split!r} in {root} (data.kind={config.kind})")
    return pairs


def _files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files below ``folder`` by their path in it without suffix.

    Raises:
        DataError: no such folder, or two files that differ in their suffix alone.
    """
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in folder.parent.iterdir())[:10]) if folder.parent.is_dir() else "nothing"
        raise DataError(f"the folder {folder} does not exist; {folder.parent} has {there or 'nothing'}")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    files: dict[str, Path] = {}
    for path in found:
        name = str(path.relative_to(folder).with_suffix(""))
        if name in files:
            raise DataError(f"{files[name]} and {path} have one name, by which images and masks are paired")
        files[name] = path
    return files


def _join(images: Path, masks: Path) -> list[Pair]:
    left, right = _files(images, IMAGE_SUFFIXES), _files(masks, (".png",))
    missing = {name: images / f"{name}.*" for name in right if name not in left}
    return [
        Pair(left.get(name, missing.get(name)), right.get(name, masks / f"{name}.png")) for name in sorted(left | right)
    ]


def _voc(root: Path, split: str) -> list[Pair]:
    listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    try:
        names = listing.read_text(encoding="utf-8").split()
    except OSError as error:
        raise DataError(f"the list of the split {split!r} can't be read: {error}") from None
    return [Pair(root / "JPEGImages" / f"{n}.jpg", root / "SegmentationClass" / f"{n}.png") for n in sorted(names)]


def _cityscapes(root: Path, split: str) -> list[Pair]:
    end = "_leftImg8bit"
    images = {n.removesuffix(end): p for n, p in _files(root / "leftImg8bit" / split, (".png",)).items()}
    fine = root / "gtFine" / split
    every = _files(fine, (".png",))
    ends = ("_gtFine_labelTrainIds", "_gtFine_labelIds")
    kind = next((e for e in ends if any(name.endswith(e) for name in every)), ends[0])
    masks = {n.removesuffix(kind): p for n, p in every.items() if n.endswith(kind)}
    missing = root / "leftImg8bit" / split
    return [
        Pair(images.get(n, missing / f"{n}{end}.png"), masks.get(n, fine / f"{n}{kind}.png"))
        for n in sorted(images | masks)
    ]


def label_map(config: SegmentDataConfig, num_classes: int, mask: Path) -> np.ndarray:
    """int16 ``[256]``: the class of each value of a mask file; 255 for none, -1 for a value that is no label."""
    table = np.full(256, -1, np.int16)
    if config.kind == "cityscapes" and mask.stem.endswith("_labelIds"):
        table[:34] = IGNORE
        for index, value in enumerate(CITYSCAPES_IDS.values()):
            table[value] = index
    elif config.kind == "ade20k" or config.reduce_zero_label:
        table[0] = IGNORE
        table[1 : num_classes + 1] = np.arange(num_classes)
    else:
        table[:num_classes] = np.arange(num_classes)
    table[config.ignore_label] = IGNORE
    return table


# ---- reading


class BadMask(ValueError):
    """A mask file that does not belong to its image, or holds no classes."""


class LabelOutOfRange(ValueError):
    """A mask holds a value that is no class of the data."""


def read_mask(path: Path, table: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W]``, classes and 255.

    Args:
        table: from :func:`label_map`.

    Raises:
        LabelOutOfRange: names the value and the file.
        BadMask: pixels that are no numbers of classes (colours, floats).
        OSError: unreadable.
    """
    with Image.open(path) as image:
        if image.mode not in ("L", "P", "1", "I", "I;16"):
            raise BadMask(f"the mask {path} holds {image.mode} pixels; classes are one channel of whole numbers")
        values = np.asarray(image)
    if values.dtype == bool:
        values = values.astype(np.uint8)
    high, low = int(values.max(initial=0)), int(values.min(initial=0))
    if low < 0 or high > 255:
        raise LabelOutOfRange(f"the mask {path} holds the label {high if high > 255 else low}")
    labels = table[values]
    if (labels < 0).any():
        wrong = sorted(set(values[labels < 0].tolist()))
        text = ", ".join(map(str, wrong[:5])) + (" ..." if len(wrong) > 5 else "")
        raise LabelOutOfRange(f"the mask {path} holds the label{'s' * (len(wrong) > 1)} {text}")
    return labels.astype(np.uint8)


def read_pair(pair: Pair, table: np.ndarray, channels: int) -> tuple[Tensor, Tensor]:
    """Image uint8 ``[C, H, W]`` and classes uint8 ``[H, W]``.

    Raises:
        LabelOutOfRange, BadMask, OSError: see :func:`read_mask`; other errors of ``UNREADABLE``: a damaged file.
    """
    for what, path in (("image", pair.image), ("mask", pair.mask)):
        if not path.is_file():
            raise FileNotFoundError(f"the {what} {path} does not exist")
    with Image.open(pair.image) as file:
        pixels = np.array(to_mode(file, channels))
    labels = read_mask(pair.mask, table)
    if labels.shape != pixels.shape[:2]:
        sizes = " but the image ".join("x".join(map(str, shape[::-1])) for shape in (labels.shape, pixels.shape[:2]))
        raise BadMask(f"the mask {pair.mask} is {sizes} pixels")
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1), torch.from_numpy(
        labels
    )


# ---- augmentation


def resize_pair(image: Tensor, labels: Tensor, size: tuple[int, int], antialias: bool) -> tuple[Tensor, Tensor]:
    """Image bilinear, labels nearest, both sampled at the centres of the new pixels."""
    if tuple(image.shape[-2:]) == size:
        return image, labels
    image = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=antialias)[0]
    return image, F.interpolate(labels[None, None], size, mode="nearest-exact")[0, 0]


def photometric(image: Tensor, random: np.random.Generator) -> Tensor:
    """The photometric distortion of SSD (Liu et al., arXiv 1512.02325) as segmentation recipes use it: each with
    probability 1/2, brightness by up to 32, contrast by 0.5 to 1.5 (before or after the rest), and, of colour images,
    saturation by 0.5 to 1.5 and hue by up to a tenth of the circle. uint8 ``[C, H, W]`` in and out."""
    values = np.arange(256.0)

    def apply(curve: np.ndarray) -> None:
        nonlocal image
        image = torch.from_numpy(curve.round().clip(0, 255).astype(np.uint8))[image.long()]

    def contrast() -> None:
        if random.random() < 0.5:
            apply(values * random.uniform(0.5, 1.5))

    if random.random() < 0.5:
        apply(values + random.uniform(-32, 32))
    first = random.random() < 0.5
    if first:
        contrast()
    if len(image) == 3:
        saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
        hue = random.uniform(-0.1, 0.1) if random.random() < 0.5 else 0.0
        image = shift_colour(image, saturation, hue)
    if not first:
        contrast()
    return image


def shift_colour(image: Tensor, saturation: float, hue: float) -> Tensor:
    """uint8 RGB ``[3, H, W]`` with its HSV saturation scaled and its hue turned by a part of the circle, in 256 steps
    each."""
    if saturation == 1.0 and round(hue * 256) == 0:
        return image
    hsv = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("HSV"))
    hsv[..., 0] += np.uint8(round(hue * 256) % 256)  # wraps, as hue does
    hsv[..., 1] = (np.arange(256) * saturation).round().clip(0, 255).astype(np.uint8)[hsv[..., 1]]
    shifted = Image.merge("HSV", [Image.fromarray(hsv[..., i]) for i in range(3)]).convert("RGB")
    return torch.from_numpy(np.array(shifted)).permute(2, 0, 1)


class SemanticAugment:
    """Random resize, crop, flip and photometric distortion; what the crop lacks is filled with ``fill`` and 255.

    Args:
        fill: of each channel, 0..255.
    """

    def __init__(self, config: SegmentAugmentConfig, fill: Sequence[int], antialias: bool):
        self.config, self.antialias = config, antialias
        self.fill = torch.tensor(fill, dtype=torch.uint8).view(-1, 1, 1)

    def __call__(self, image: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """uint8 ``[C, H, W]`` and ``[H, W]`` of any size to those of the crop's."""
        config = self.config
        size = rescale_size(image.shape[-2:], config.scale, random.uniform(*config.ratio_range))
        image, labels = resize_pair(image, labels, size, self.antialias)
        rows, columns = self._crop(labels, random)
        image, labels = image[:, rows, columns], labels[rows, columns]
        if random.random() < config.hflip:
            image, labels = image.flip(-1), labels.flip(-1)
        if config.photometric:
            image = photometric(image, random)
        height, width = labels.shape
        whole = self.fill.expand(-1, *config.crop_size).clone()
        whole[:, :height, :width] = image
        targets = torch.full(tuple(config.crop_size), IGNORE, dtype=torch.uint8)
        targets[:height, :width] = labels
        return whole, targets

    def _crop(self, labels: Tensor, random: np.random.Generator) -> tuple[slice, slice]:
        """A place where no class covers more than ``cat_max_ratio`` of what is labelled, else the tenth tried."""
        for _ in range(10):
            place = []
            for length, side in zip(labels.shape, self.config.crop_size, strict=True):
                start = int(random.integers(max(length - side, 0) + 1))
                place.append(slice(start, start + side))
            if self.config.cat_max_ratio >= 1:
                break
            counts = torch.bincount(labels[tuple(place)].flatten().long(), minlength=256)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < self.config.cat_max_ratio * counts.sum():
                break
        return place[0], place[1]


# ---- loading


class SemanticImages(Dataset):
    """Pairs of image and mask. An index is (pass, number): the augmentation depends on both and on the seed alone, so
    it is the same whichever process draws it, and again after a resume.

    Args:
        augment: None for evaluation: images and masks as they are.
    """

    def __init__(
        self,
        config: SegmentDataConfig,
        pairs: Sequence[Pair],
        num_classes: int,
        augment: SemanticAugment | None,
        seed: int,
    ):
        self.config, self.pairs, self.num_classes = config, list(pairs), num_classes
        self.augment, self.seed = augment, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, position: int) -> tuple[Tensor, Tensor]:
        """Image and labels as in the files; raises what `read_pair` raises."""
        pair = self.pairs[position]
        return read_pair(pair, label_map(self.config, self.num_classes, pair.mask), self.config.in_chans)

    def __getitem__(self, index: tuple[int, int]) -> Item:
        number, first = index
        found: Found = []
        for attempt in range(ATTEMPTS if self.augment is not None else 1):
            position = (first + attempt) % len(self)
            try:
                image, labels = self.read(position)
            except LabelOutOfRange as error:
                return None, None, found, f"{error}, but data.classes has {self.num_classes} (data.kind, data.classes)"
            except UNREADABLE as error:
                found.append((str(self.pairs[position].image), f"{type(error).__name__}: {error}"))
                continue
            if self.augment is not None:
                image, labels = self.augment(image, labels, np.random.default_rng((self.seed, number, first)))
            return image, labels, found, ""
        return None, None, found, ""


def _collate(items: list[Item]) -> tuple[list[Tensor], list[Tensor], Found, str]:
    """Stacks neighbours of one size; several stacks where sizes change."""
    found = [pair for _, _, pairs, _ in items for pair in pairs]
    fatal = next((text for *_, text in items if text), "")
    groups: list[tuple[list[Tensor], list[Tensor]]] = []
    for image, labels, *_ in items:
        if image is None or labels is None:
            continue
        if not groups or groups[-1][0][0].shape != image.shape:
            groups.append(([], []))
        groups[-1][0].append(image)
        groups[-1][1].append(labels)
    return [torch.stack(g[0]) for g in groups], [torch.stack(g[1]) for g in groups], found, fatal


class SemanticLoader(DenseLoader):
    """Batches of images and classes; see `DenseLoader`. Evaluation gives images as they are, those of one size that
    follow each other together, so a batch of the order may come as several."""

    def __init__(self, dataset: SemanticImages, order: EpochOrder, device: torch.device, bad: BadSamples, workers: int):
        super().__init__(dataset, order, device, bad, workers, collate=_collate)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of a pass over the data from the ``start``-th on.

        Raises:
            DataError: a label out of range, or too many bad samples.
        """
        for images, targets, found, fatal in self._read(epoch, start):
            if fatal:
                raise DataError(fatal)
            self.bad.add(found)
            if self.order.train and sum(map(len, images)) == 0:
                raise DataError(f"no readable image within {ATTEMPTS} neighbours of a whole batch: {found[:3]}")
            for stack, labels in zip(images, targets, strict=True):
                pixels = stack.to(self.device, non_blocking=True).float().div_(255)
                yield Batch(pixels, labels.to(self.device, non_blocking=True).long())


def build_semantic_data(
    config: SegmentConfig,
    classes: Sequence[str],
    mean: Sequence[float],
    *,
    device: torch.device,
    train: bool = True,
    rank: int = 0,
    world: int = 1,
) -> Data:
    """Builds the loaders.

    Args:
        config: the whole recipe.
        classes: names by index, from :func:`find_classes`.
        mean: by channel, of values in [0, 1]: the colour of what a crop lacks.
        device: where batches go.
        train: False builds the evaluation loader alone.

    Raises:
        DataError: data that are missing.
    """
    data = config.data
    if data.in_chans not in CHANNELS:
        raise DataError(f"data.in_chans is {data.in_chans}; images have 1 (grey) or 3 (RGB) channels")
    if data.kind == "digits":
        data = _write_digits(data)
    bad, excluded = BadSamples(data.max_bad_fraction), Excluded.read(data.exclude)
    loaders: dict[bool, SemanticLoader] = {}
    for training in (True, False) if train else (False,):
        pairs = find_pairs(data, split_name(data, training))
        pairs = [p for p in pairs if not excluded.holds(str(p.image), os.path.relpath(p.image, data.root))]
        pairs = pairs[: data.limit if training else data.val_limit]
        if not pairs:
            raise DataError(f"data.exclude={data.exclude} leaves no sample of {split_name(data, training)!r}")
        fill = [round(255 * value) for value in mean]
        augment = SemanticAugment(config.augment, fill, data.antialias) if training else None
        dataset = SemanticImages(data, pairs, len(classes), augment, config.seed)
        size = config.train.batch_size if training else config.train.val_batch_size or config.train.batch_size
        order = EpochOrder(len(pairs), size, train=training, seed=config.seed, rank=rank, world=world)
        loaders[training] = SemanticLoader(dataset, order, device, bad, data.workers)
    return Data(loaders.get(True), loaders[False], {}, bad, [excluded.note()] if excluded else [])


def _write_digits(config: SegmentDataConfig) -> SegmentDataConfig:
    """Writes the composites of handwritten digits unless they are there; where they are to be read."""
    from .composites import write_composites

    if not config.root:
        raise DataError(
            "data.root is needed for data.kind=digits: the folder to write composites to, or to find them in"
        )
    write_composites(config.root, config.digits_train, config.digits_val, config.digits_size, seed=0)
    return replace(config, kind="folder", images="{split}", masks="semantic/{split}")
