"""Composites: cut-outs with exact masks pasted into photos, written as COCO JSON and as semantic maps.

:func:`write_composites` pastes handwritten digits (the 1,797 of scikit-learn, 8x8 pixels in 17 grey levels, enlarged)
into the photos of scikit-learn and scikit-image; :func:`write_tuxpaint` pastes the stamps of Tux Paint into its
template photos. Both write::

    ROOT/annotations/instances_train.json   COCO: boxes, masks (run lengths), areas      and instances_val.json
    ROOT/train/000000.jpg                   the composites                               and val/
    ROOT/semantic/train/000000.png          class of each pixel: 0 background, 1 .. 10   and semantic/val/
    ROOT/manifest.json                      options, counts, versions; written last

Training and held-out composites share no cut-outs or photos. Later cut-outs cover earlier ones, but a minimum of each
stays visible: everything visible is annotated. An image depends only on the seed, its split and its number, not on how
many are written.
"""

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import typer
from PIL import Image

from .class_names import DIGITS
from .guard import DataError
from .memory import load_digits

VERSION = 1  # of the drawing; a folder of another version is not reused
SPLITS = ("train", "val")
MANIFEST = "manifest.json"
MIN_VISIBLE = 0.8  # of a cut-out's pixels, after all others are placed
ATTEMPTS = 20  # places tried for a cut-out before it is left out

# Photos by split, without those of writing and of coins, which resemble digits.
PHOTOGRAPHS = {
    "train": (
        *("china.jpg", "astronaut.png", "brick.png", "camera.png", "coffee.png", "grass.png", "hubble_deep_field.jpg"),
        *("ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg"),
    ),
    "val": ("flower.jpg", "chelsea.png", "gravel.png", "rocket.jpg"),
}
SCIKIT_LEARN = ("china.jpg", "flower.jpg")

# Classes of the Tux Paint stamps: the folders under stamps/ whose PNG files belong to them.
TUXPAINT = {
    "bird": ("animals/birds",),
    "coin": ("symbols/money/canadian", "symbols/money/euro", "symbols/money/japanese", "symbols/money/us"),
    "flower": ("plants/flowers",),
    "fruit": ("food/fruit",),
    "house": ("town/houses",),
    "insect": ("animals/insects",),
    "mammal": ("animals/mammals", "animals/marsupials"),
    "road sign": ("town/roadsigns",),
    "vegetable": ("food/vegetables",),
    "vehicle": ("vehicles",),
}
NOT_BACKGROUND = ("sheep.jpg",)  # shows a class


@dataclass(frozen=True)
class CutOut:
    """rgb: float ``[H, W, 3]`` in 0..255; alpha: float ``[H, W]`` in 0..1; category: COCO's id, from 1."""

    rgb: np.ndarray
    alpha: np.ndarray
    category: int


@dataclass(frozen=True)
class Composite:
    """image: uint8 ``[H, W, 3]``; masks: bool ``[N, H, W]``, the visible parts; categories: their N ids, from 1."""

    image: np.ndarray
    masks: np.ndarray
    categories: tuple[int, ...]

    @property
    def semantic(self) -> np.ndarray:
        """uint8 ``[H, W]``: the category of each pixel, 0 where no cut-out is."""
        semantic = np.zeros(self.image.shape[:2], np.uint8)
        for mask, category in zip(self.masks, self.categories, strict=True):
            semantic[mask] = category
        return semantic


# Draws a cut-out for a composite, given the background, float [H, W, 3] in 0..255, to contrast with it.
Draw = Callable[[np.random.Generator, np.ndarray], CutOut]
Sources = dict[str, tuple[list[np.ndarray], Draw]]  # by split: photos and cut-outs


def compose(
    photograph: np.ndarray, size: int, objects: tuple[int, int], draw: Draw, random: np.random.Generator
) -> Composite:
    """A square of ``photograph`` (uint8 ``[H, W, 3]``), ``size`` pixels wide, with ``objects`` (fewest, most) tried."""
    background = _background(photograph, size, random)
    image = background.copy()
    owner = np.full((size, size), -1)
    areas: list[int] = []  # of the whole cut-outs
    categories: list[int] = []
    for _ in range(random.integers(objects[0], objects[1] + 1)):
        cut_out = draw(random, background)
        height, width = cut_out.alpha.shape
        solid = cut_out.alpha > 0.5
        if not solid.any():
            continue
        for _ in range(ATTEMPTS):
            top, left = random.integers(0, size - height + 1), random.integers(0, size - width + 1)
            place = (slice(top, top + height), slice(left, left + width))
            covered = owner[place][solid]
            lost = np.bincount(covered[covered >= 0], minlength=len(areas))
            visible = np.bincount(owner[owner >= 0], minlength=len(areas)) - lost
            if np.all(visible >= MIN_VISIBLE * np.array(areas)):
                image[place] += cut_out.alpha[..., None] * (cut_out.rgb - image[place])
                owner[place][solid] = len(areas)
                areas.append(int(solid.sum()))
                categories.append(cut_out.category)
                break
    masks = owner == np.arange(len(areas))[:, None, None]
    return Composite(np.round(image).clip(0, 255).astype(np.uint8), masks, tuple(categories))


def _background(photograph: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """A random square of the photo, from half of ``size`` pixels up to its short side, resized to ``size``, flipped
    with probability 0.5, with permuted colour channels scaled by up to 40 %, since there are few photos."""
    short = min(photograph.shape[:2])
    side = random.integers(min(size // 2, short), short + 1)
    top, left = (random.integers(0, length - side + 1) for length in photograph.shape[:2])
    square = Image.fromarray(photograph[top : top + side, left : left + side])
    crop = np.asarray(square.resize((size, size), Image.Resampling.BOX if side >= size else Image.Resampling.BILINEAR))
    if random.random() < 0.5:
        crop = crop[:, ::-1]
    return np.clip(crop[..., random.permutation(3)] * random.uniform(0.6, 1.4, 3), 0, 255)


def _luminance(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.299, 0.587, 0.114])


def digit_cut_outs(images: np.ndarray, labels: np.ndarray) -> Draw:
    """Draw enlarged digits, 25 to 45 % of a composite high, rotated by up to 12 degrees.

    Args:
        images: uint8 ``[N, 8, 8]``, ink on 0.
        labels: ``[N]``, 0 .. 9.
    """

    def draw(random: np.random.Generator, background: np.ndarray) -> CutOut:
        index = random.integers(len(images))
        ink = images[index]
        rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
        ink = np.pad(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
        height = random.uniform(0.25, 0.45) * len(background)
        width = height * ink.shape[1] / ink.shape[0] * random.uniform(0.85, 1.15)
        bicubic = Image.Resampling.BICUBIC
        enlarged = Image.fromarray(ink.astype(np.float32)).resize((round(width), round(height)), bicubic)
        turned = enlarged.rotate(random.uniform(-12, 12), bicubic, expand=True)
        # a sharper edge than that of the enlarged pixels
        alpha = np.clip((np.asarray(turned, np.float64) / 255 - 0.25) / 0.4, 0, 1)
        # the one of six colours that differs most from the background
        colours = random.uniform(0, 255, (6, 3))
        colour = colours[np.argmax(np.abs(_luminance(colours) - _luminance(background).mean()))]
        return CutOut(np.broadcast_to(colour, (*alpha.shape, 3)), alpha, int(labels[index]) + 1)

    return draw


def stamp_cut_outs(stamps: Sequence[tuple[Path, int]]) -> Draw:
    """Draw stamps, the long side 25 to 60 % of a composite, rotated by up to 15 degrees, flipped with probability 0.5;
    every category equally often.

    Args:
        stamps: image files with alpha, and their categories.
    """
    by_category: dict[int, list[Path]] = {}
    for path, category in stamps:
        by_category.setdefault(category, []).append(path)
    cache: dict[Path, Image.Image] = {}

    def draw(random: np.random.Generator, background: np.ndarray) -> CutOut:
        category = int(random.choice(sorted(by_category)))
        path = by_category[category][random.integers(len(by_category[category]))]
        if path not in cache:
            with Image.open(path) as file:
                stamp = file.convert("RGBA").convert("RGBa")  # premultiplied alpha: transparent pixels have no colour
            stamp = stamp.crop(stamp.getchannel("a").getbbox())
            stamp.thumbnail((512, 512), Image.Resampling.BOX)
            cache[path] = stamp
        stamp = cache[path]
        scale = random.uniform(0.25, 0.6) * len(background) / max(stamp.size)
        stamp = stamp.resize([max(1, round(side * scale)) for side in stamp.size], Image.Resampling.HAMMING)
        stamp = stamp.rotate(random.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
        pixels = np.asarray(stamp, np.float64)
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        alpha = pixels[..., 3] / 255
        rgb = np.where(alpha[..., None] > 0, pixels[..., :3] / np.maximum(alpha[..., None], 1 / 255), 0)
        return CutOut(rgb, alpha, category)

    return draw


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a bool mask ``[H, W]``: column by column, zeros first."""
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels, prepend=False))
    return np.diff(changes, prepend=0, append=pixels.size).tolist()


def annotate(mask: np.ndarray) -> dict[str, Any]:
    """COCO's annotation of a non-empty mask ``[H, W]``: the box is left, top, width, height in pixels."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "iscrowd": 0,
    }


def write_composites(root: Path, train_images: int, val_images: int, size: int, seed: int = 0) -> Path:
    """Write composites of handwritten digits to ``root``, unless they exist, and return it; a fifth of the digits is
    held out.

    Args:
        train_images, val_images: number of composites.
        size: side in pixels.
        seed: other seeds give other composites of the same digits and photos.

    Raises:
        DataError: ``root`` has other content.
        ImportError: scikit-image is not installed.
    """

    def sources() -> Sources:
        digits = load_digits(val_fraction=0.2)
        return {split: (_photographs(split), digit_cut_outs(*digits[split])) for split in SPLITS}

    return _write(root, _ask("digits", train_images, val_images, size, seed), DIGITS, (2, 5), sources)


def write_tuxpaint(
    source: Path, root: Path, train_images: int = 3000, val_images: int = 300, size: int = 160, seed: int = 0
) -> None:
    """Write composites of Tux Paint's stamps to ``root``, unless they exist; a quarter of each class is held out.

    Args:
        source: the folder with ``usr`` into which Debian's packages ``tuxpaint-stamps-default`` and ``tuxpaint-data``
            (GPL-2) were unpacked.
        root, train_images, val_images, size, seed: as for :func:`write_composites`.

    Raises:
        DataError: ``root`` has other content, or ``source`` lacks the packages.
    """
    asked = _ask("tuxpaint", train_images, val_images, size, seed)
    _write(root, asked, tuple(TUXPAINT), (1, 4), lambda: _tuxpaint_sources(source))


def _ask(kind: str, train_images: int, val_images: int, size: int, seed: int) -> dict[str, Any]:
    given = {"train_images": (train_images, 1), "val_images": (val_images, 1), "size": (size, 32), "seed": (seed, 0)}
    for name, (value, least) in given.items():
        if value < least:
            raise DataError(f"composites: {name} is {value}, must be at least {least}")
    images = {"train": train_images, "val": val_images}
    return {"version": VERSION, "kind": kind, "images": images, "size": size, "seed": seed}


def _photographs(split: str) -> list[np.ndarray]:
    """Read the files directly: the packages' functions would download missing ones."""
    import skimage
    import sklearn.datasets

    folders = {True: Path(sklearn.datasets.__file__).parent / "images", False: Path(skimage.__file__).parent / "data"}
    photographs = []
    for name in PHOTOGRAPHS[split]:
        with Image.open(folders[name in SCIKIT_LEARN] / name) as file:
            photographs.append(np.asarray(file.convert("RGB")))
    return photographs


def _tuxpaint_sources(source: Path) -> Sources:
    share = source / "usr" / "share" / "tuxpaint"
    photographs = sorted(path for path in share.glob("templates/*.jpg") if path.name not in NOT_BACKGROUND)
    stamps: dict[str, list[tuple[Path, int]]] = {split: [] for split in SPLITS}
    for category, (name, folders) in enumerate(TUXPAINT.items(), start=1):
        files = sorted(path for folder in folders for path in (share / "stamps" / folder).rglob("*.png"))
        files = [path for path in files if not path.stem.endswith("_mirror")]  # mirrored copies of others
        if len(files) < 4 or len(photographs) < 4:
            raise DataError(
                f"{share} has {len(photographs)} photographs under templates/ and {len(files)} stamps of a {name}; it "
                "takes Debian's tuxpaint-data and tuxpaint-stamps-default, unpacked: `make tuxpaint-coco`"
            )
        for number, index in enumerate(np.random.default_rng(0).permutation(len(files))):
            stamps["train" if number % 4 else "val"].append((files[index], category))
    pictures: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for number, path in enumerate(photographs):
        with Image.open(path) as file:
            pictures["train" if number % 4 else "val"].append(np.asarray(file.convert("RGB")))
    return {split: (pictures[split], stamp_cut_outs(stamps[split])) for split in SPLITS}


def _write(
    root: Path, asked: dict[str, Any], classes: Sequence[str], objects: tuple[int, int], sources: Callable[[], Sources]
) -> Path:
    if _complete(root, asked):
        return root
    drawn = sources()
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        folder = Path(scratch) / root.name
        counts = {}
        for number, split in enumerate(SPLITS):
            composites = _composites(*drawn[split], objects, asked["size"], (asked["seed"], number))
            images = itertools.islice(composites, asked["images"][split])
            counts[split] = _write_split(folder, split, images, classes)
        libraries = {"numpy": np.__version__, "pillow": PIL.__version__}
        manifest = asked | {"classes": list(classes), "objects": counts, "libraries": libraries}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        try:
            folder.rename(root)
        except OSError:
            if not _complete(root, asked):  # unless another process has written the same meanwhile
                raise
    return root


def _complete(root: Path, asked: dict[str, Any]) -> bool:
    """Whether ``root`` has the requested composites; False if it is missing or empty.

    Raises:
        DataError: it has other content.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        found = {key: manifest[key] for key in asked}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{root} holds no composites (its {MANIFEST}: {error}); name another folder") from None
    for key, value in asked.items():
        if found[key] != value:
            raise DataError(f"{root} holds composites with {key} {found[key]!r}, not {value!r}; name another folder")
    return True


def _composites(
    photographs: Sequence[np.ndarray], draw: Draw, objects: tuple[int, int], size: int, seed: tuple[int, int]
) -> Iterator[Composite]:
    for number in itertools.count():
        random = np.random.default_rng((*seed, number))
        yield compose(photographs[int(random.integers(len(photographs)))], size, objects, draw, random)


def _write_split(folder: Path, split: str, composites: Iterable[Composite], classes: Sequence[str]) -> int:
    """Write one split and return its number of objects."""
    images, semantic = folder / split, folder / "semantic" / split
    instances = folder / "annotations" / f"instances_{split}.json"
    for each in (images, semantic, instances.parent):
        each.mkdir(parents=True, exist_ok=True)
    coco: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for number, composite in enumerate(composites):
        height, width = composite.image.shape[:2]
        name = f"{number:06}"
        Image.fromarray(composite.image).save(images / f"{name}.jpg", quality=92)
        Image.fromarray(composite.semantic).save(semantic / f"{name}.png")
        coco["images"].append({"id": number + 1, "file_name": f"{name}.jpg", "width": width, "height": height})
        for mask, category in zip(composite.masks, composite.categories, strict=True):
            ids = {"id": len(coco["annotations"]) + 1, "image_id": number + 1, "category_id": category}
            coco["annotations"].append(ids | annotate(mask))
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    instances.write_text(json.dumps(coco | {"categories": categories}), encoding="utf-8")
    return len(coco["annotations"])


if __name__ == "__main__":  # make tuxpaint-coco
    typer.run(write_tuxpaint)
