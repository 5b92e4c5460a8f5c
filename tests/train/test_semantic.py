"""Loaders of semantic segmentation: layouts, masks, augmentation, and everything that can be wrong with files."""

import re
from pathlib import Path

import imgviz
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from foveal.configs.schema import (
    SegmentAugmentConfig,
    SegmentConfig,
    SegmentDataConfig,
    SegmentModelConfig,
    load_config,
    save_config,
)
from foveal.heads.build import build_segmenter
from foveal.heads.checkpoint import save_dense
from foveal.train import evaluate, plots, predict, train
from foveal.train.data import DataError, build_segmentation_data, find_classes
from foveal.train.data.class_names import ADE20K, CITYSCAPES, CITYSCAPES_IDS, VOC
from foveal.train.data.dense_transforms import PhotometricDistort, SemanticMask, segmentation_transform
from foveal.train.data.masks import read_masks, split_name
from foveal.train.data.transforms import seeded

SIZE = (20, 28)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def mask(values: list[int], size: tuple[int, int] = SIZE) -> np.ndarray:
    """Stripes of the given values."""
    stripes = np.array(values, np.uint8)[np.arange(size[1]) * len(values) // size[1]]
    return np.broadcast_to(stripes, size).copy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ROOT/images/SPLIT and ROOT/masks/SPLIT: 12 training and 5 held-out images of three classes."""
    for split, count in (("train", 12), ("val", 5)):
        for i in range(count):
            save(tmp_path / "images" / split / f"{i:02}.png", picture(i))
            save(tmp_path / "masks" / split / f"{i:02}.png", mask([0, 1, 255, 2]))
    return tmp_path


def build(root: Path, train: bool = False, **data):
    settings = {"kind": "folder", "classes": ["a", "b", "c"], "workers": 0, **data}
    config = SegmentConfig(
        output="-", model=SegmentModelConfig(name="-"), data=SegmentDataConfig(root=str(root), **settings)
    )
    config.augment = SegmentAugmentConfig(crop_size=[16, 24])
    config.train.batch_size = 4
    classes = find_classes(config.data)
    return build_segmentation_data(config, classes, [0.5] * 3, device=torch.device("cpu"), train=train)


def values(root: Path, **data) -> list[int]:
    """The classes of the first held-out mask, from left to right."""
    batch = next(build(root, **data).val.epoch(0))
    row = batch.targets[0, 0].tolist()
    return [v for i, v in enumerate(row) if i == 0 or v != row[i - 1]]


# ---- layouts


def test_ade20k(tmp_path):
    for split in ("training", "validation"):
        save(tmp_path / "images" / split / "ADE_1.jpg", picture())
        save(tmp_path / "annotations" / split / "ADE_1.png", mask([0, 1, 150, 12]))
    assert values(tmp_path, kind="ade20k", classes=None) == [255, 0, 149, 11]
    config = SegmentDataConfig(kind="ade20k", root=str(tmp_path))
    assert (split_name(config, True), split_name(config, False)) == ("training", "validation")
    assert len(ADE20K) == len(set(ADE20K)) == 150
    assert (ADE20K[0], ADE20K[149]) == ("wall", "flag")


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path, kind):
    stored = {"labelIds": [7, 33, 3, 19, 255], "labelTrainIds": [0, 18, 255, 6, 255]}[kind]
    name = "val/bonn/bonn_000001_000019"
    save(tmp_path / "leftImg8bit" / f"{name}_leftImg8bit.png", picture())
    save(tmp_path / "gtFine" / f"{name}_gtFine_{kind}.png", mask(stored))
    save(tmp_path / "gtFine" / f"{name}_gtFine_color.png", picture())
    assert values(tmp_path, kind="cityscapes", classes=None) == [0, 18, 255, 6, 255]
    assert len(CITYSCAPES) == 19
    assert [CITYSCAPES_IDS[name] for name in ("road", "car", "train")] == [7, 26, 31]


def write_voc(root: Path) -> dict:
    """The VOC photograph of imgviz and its annotation as the data set has them."""
    data = imgviz.data.voc()
    (root / "JPEGImages").mkdir()
    Image.fromarray(data["rgb"]).save(root / "JPEGImages" / "2011_000006.jpg", quality=95, subsampling=0)
    labels = Image.fromarray(np.where(data["class_label"] < 0, 255, data["class_label"]).astype(np.uint8))
    labels.putpalette(imgviz.label_colormap().tobytes())
    (root / "SegmentationClass").mkdir()
    labels.save(root / "SegmentationClass" / "2011_000006.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2011_000006\n")
    return data


def test_voc_photograph_with_its_annotation(tmp_path):
    data = write_voc(tmp_path)
    assert tuple(data["class_names"]) == VOC
    batch = next(build(tmp_path, kind="voc", classes=None).val.epoch(0))
    expected = np.where(data["class_label"] < 0, 255, data["class_label"])
    assert (batch.targets[0].numpy() == expected).all()
    assert set(np.unique(expected)) > {0, 15}  # persons are in it
    difference = np.abs(batch.images[0].permute(1, 2, 0).numpy() * 255 - data["rgb"].astype(float))
    assert difference.mean() < 2  # JPEG


def test_voc_photograph_is_drawn(tmp_path):
    """The picture shows the photograph, then the colours of the VOC masks."""
    data = imgviz.data.voc()
    truth = np.where(data["class_label"] < 0, 255, data["class_label"]).astype(np.uint8)
    plots.segmentations([(data["rgb"], truth, np.zeros_like(truth))], list(VOC), tmp_path / "p" / "x.png", "title")
    with Image.open(tmp_path / "p" / "x.png") as file:
        drawn = np.asarray(file.convert("RGB"))
    colours = {tuple(c) for c in drawn.reshape(-1, 3)}
    palette = imgviz.label_colormap()
    assert {tuple(palette[label]) for label in np.unique(truth) if label != 255} <= colours


def test_colours_are_those_of_voc():
    assert (plots.label_colours(256) == imgviz.label_colormap()).all()


def test_folder_with_nested_folders_and_patterns(tmp_path):
    save(tmp_path / "val" / "a" / "x.jpg", picture())
    save(tmp_path / "semantic" / "val" / "a" / "x.png", mask([2, 255, 1]))
    assert values(tmp_path, images="{split}", masks="semantic/{split}") == [2, 255, 1]


def test_labels_from_one_and_another_ignored_value(tmp_path):
    save(tmp_path / "images" / "val" / "x.png", picture())
    save(tmp_path / "masks" / "val" / "x.png", mask([0, 1, 3, 99]))
    assert values(tmp_path, reduce_zero_label=True, ignore_label=99) == [255, 0, 2, 255]


@pytest.mark.parametrize("colour", [False, True], ids=["L", "RGB"])
def test_masks_of_0_and_255(tmp_path, colour):
    """255 is a class where data.values says so; grey stored in three channels is grey."""
    labels = mask([0, 128, 255])
    save(tmp_path / "images" / "val" / "x.png", picture())
    save(tmp_path / "masks" / "val" / "x.png", np.dstack([labels] * 3) if colour else labels)
    assert values(tmp_path, classes=None, values={0: "background", 255: "object", 128: None}) == [0, 255, 1]
    with pytest.raises(DataError, match=r"object.*data\.classes.*thing"):
        values(tmp_path, classes=["background", "object"], values={0: "background", 255: "thing"})
    with pytest.raises(ValueError, match="256"):
        values(tmp_path, classes=None, values={0: "background", 1: "object", 256: "object"})


COLOURS = np.array([(0, 0, 0), (128, 64, 0), (192, 192, 128)], np.uint8)


def save_colours(root: Path, split: str = "val", count: int = 4, mode: str = "RGB", folder: str = "masks") -> None:
    for i in range(count):
        save(root / "images" / split / f"{i}.png", picture(i))
        path = root / folder / split / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        stripes = Image.fromarray(COLOURS[mask([0, 1, 2])])
        (stripes.quantize(3) if mode == "P" else stripes.convert(mode)).save(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("given", ["'#804000'", "[128, 64, 0]", "'128, 64,0'"])
def test_masks_of_colours(tmp_path, mode, given):
    save_colours(tmp_path, mode=mode)
    pairs = f"data.values={{'#000000': ground, {given}: no, '#C0C080': null}}"
    config = load_config(None, ["output=-", "model.name=-", pairs], SegmentConfig)
    assert config.data.values == {"#000000": "ground", "#804000": "no", "#c0c080": None}
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", [], SegmentConfig).data.values == config.data.values
    assert find_classes(config.data) == ["ground", "no"]
    assert values(tmp_path, classes=None, values=config.data.values) == [0, 1, 255]
    assert values(tmp_path, classes=["no", "ground"], values=config.data.values) == [1, 0, 255]


def test_colours_that_no_class_has_are_counted_and_named(tmp_path):
    save_colours(tmp_path)
    known = {"#000000": "ground", "#804000": "pole"}
    with pytest.raises(DataError, match=r"4 of 4 masks.* 1 colours.*#c0c080 \(720 pixels\).*0\.png.*1\.png"):
        build(tmp_path, classes=None, values=known)
    assert values(tmp_path, classes=None, values=known | {"other": None}) == [0, 1, 255]
    assert values(tmp_path, classes=None, values=known | {"other": "pole"}) == [0, 1]
    data = build(tmp_path, classes=None, values=known | {"#c0c080": None})
    save(tmp_path / "masks" / "val" / "3.png", COLOURS[mask([0, 1, 2])] + 1)
    with pytest.raises(DataError, match=r"3\.png.*#010101.*data\.values"):
        list(data.val.epoch(0))
    with pytest.raises(DataError, match=r"#000000, 1"):
        build(tmp_path, classes=None, values={"#000000": "ground", 1: "pole"})
    with pytest.raises(ValueError, match="#80400"):
        build(tmp_path, classes=None, values={"#80400": "pole"})


def test_classes_are_left_out_and_ordered_by_name(tmp_path):
    save(tmp_path / "images" / "val" / "x.png", picture())
    save(tmp_path / "masks" / "val" / "x.png", mask([0, 1, 2]))
    named = {0: "ground", 1: "tree", 2: "car"}
    assert values(tmp_path, classes=["car", "ground"], values=named) == [1, 255, 0]
    data = build(tmp_path, classes=["car", "ground"], values=named)
    assert any("tree" in note for note in data.notes)
    with pytest.raises(DataError, match=r"cars.*car"):
        build(tmp_path, classes=["cars", "ground"], values=named)
    save(tmp_path / "leftImg8bit/val/b/b_leftImg8bit.png", picture())
    save(tmp_path / "gtFine/val/b/b_gtFine_labelIds.png", mask([7, 26, 0, 33]))
    assert values(tmp_path, kind="cityscapes", classes=["car", "road"]) == [1, 0, 255]
    save(tmp_path / "annotations/validation/x.png", mask([0, 1, 150]))
    save(tmp_path / "images/validation/x.png", picture())
    assert values(tmp_path, kind="ade20k", classes=["flag", "sky"]) == [255, 0]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("ending", ["", "_L", "_mask"])
@pytest.mark.parametrize("masks", ["masks/{split}", "images/{split}"])
def test_names_of_masks(tmp_path, suffix, ending, masks):
    for name in ("x", "y_L"):
        save(tmp_path / "images" / "val" / f"{name}.jpg", picture())
        if ending or masks.startswith("masks"):
            save(tmp_path / masks.format(split="val") / f"{name}{ending}{suffix}", mask([2, 0, 1]))
    if not ending and masks.startswith("images"):
        return
    data = build(tmp_path, masks=masks, max_bad_fraction=0.5)
    read = [batch.targets[0].unique().tolist() for batch in data.val.epoch(0)]
    assert read == [[0, 1, 2]]


def test_what_mask_folders_pass_over_is_counted(folder, tmp_path):
    images, masks = folder / "images" / "val", folder / "masks" / "val"
    save(masks / "00.jpg", mask([0]))
    save(masks / ".ipynb_checkpoints" / "01-checkpoint.png", mask([0]))
    (images / "._00.png").write_bytes(b"")
    (images / "Thumbs.db").write_bytes(b"")
    (images / "notes.pdf").write_bytes(b"")
    save(masks / "more.png", mask([0]))
    (masks / "02.png").unlink()
    data = build(folder, max_bad_fraction=0.5)
    (report,) = data.bad.reports
    assert report.counts() == {
        "hidden file": 3,
        "not read as .pdf": 1,
        "not read as .jpg": 1,
        "image without a mask": 1,
        "mask without an image": 1,
    }
    assert any(all(name in note for name in ("02.png", "more.png", "notes.pdf", "00.jpg")) for note in data.notes)
    data.bad.write(tmp_path / "bad_samples.csv")
    assert "more.png" in (tmp_path / "bad_annotations.csv").read_text()


def test_grey_images_and_masks_of_16_bits(tmp_path):
    save(tmp_path / "images" / "val" / "x.png", picture()[..., 0])
    save(tmp_path / "masks" / "val" / "x.png", mask([0, 2]).astype(np.uint16))
    batch = next(build(tmp_path, in_chans=1).val.epoch(0))
    assert batch.images.shape == (1, 1, *SIZE)
    assert batch.targets.unique().tolist() == [0, 2]


def test_evaluation_takes_every_image_at_its_own_size(folder):
    save(folder / "images" / "val" / "02.png", picture(2, (11, 40)))
    save(folder / "masks" / "val" / "02.png", mask([0, 1], (11, 40)))
    batches = list(build(folder).val.epoch(0))
    assert [tuple(b.images.shape) for b in batches] == [(2, 3, 20, 28), (1, 3, 11, 40), (1, 3, 20, 28), (1, 3, 20, 28)]
    assert torch.equal(batches[0].images[1], torch.from_numpy(picture(1)).permute(2, 0, 1) / 255)


# ---- what is wrong with files


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda image, mask: mask.unlink(), "FileNotFoundError.*masks/val/03.png"),
        (lambda image, mask: image.unlink(), "FileNotFoundError.*images/val/03"),
        (lambda image, mask: image.write_bytes(image.read_bytes()[:200]), "OSError"),
        (lambda image, mask: mask.write_bytes(b"no picture"), "UnidentifiedImageError.*masks/val/03.png"),
        (lambda image, path: save(path, mask([0, 1], (20, 27))), "BadMask.*27x20.*28x20"),
        (lambda image, path: save(path, picture()), "BadMask.*RGB"),
    ],
    ids=["no mask", "no image", "cut image", "no picture", "mask of another size", "mask of colours"],
)
def test_bad_samples_are_counted_and_named(folder, damage, reason, tmp_path):
    damage(folder / "images/val/03.png", folder / "masks/val/03.png")
    data = build(folder, max_bad_fraction=0.2)
    assert sum(len(batch.images) for batch in data.val.epoch(0)) == 4
    ((name, text),) = data.bad.names.items()
    assert "03" in Path(name).name
    assert re.match(reason, text)
    data.bad.write(tmp_path / "bad_samples.csv")
    assert "03" in (tmp_path / "bad_samples.csv").read_text()
    with pytest.raises(DataError, match=r"1 of 5 .* 1\.00%.*03"):
        list(build(folder).val.epoch(0))


def test_in_training_a_neighbour_takes_the_place(folder):
    (folder / "masks/train/03.png").unlink()
    data = build(folder, train=True, max_bad_fraction=0.1)
    assert [len(batch.images) for batch in data.train.epoch(0)] == [4, 4, 4]
    assert [Path(name).name for name in data.bad.names] == ["03.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_out_of_range_stops_with_its_file(folder, workers):
    save(folder / "masks" / "val" / "03.png", mask([0, 3, 7, 254]))
    with pytest.raises(DataError, match=r"03\.png .*3, 7, 254.*data\.classes has 3"):
        list(build(folder, max_bad_fraction=1.0, workers=workers).val.epoch(0))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"root": "/nowhere"}, "/nowhere"),
        ({"val_split": "test"}, "images/test .*train, val"),
        ({"kind": "voc", "classes": None}, r"'val'.*val\.txt"),
        ({"classes": None}, r"data\.classes"),
        ({"classes": ["a", "b", "a"]}, ": a$"),
        ({"classes": [str(i) for i in range(256)]}, "256.*255"),
        ({"kind": "ade20k", "classes": None, "val_split": "val"}, "annotations/val"),
        ({"masks": "labels/{split}"}, "labels/val"),
        ({"in_chans": 4}, r"data\.in_chans=4.*00\.png"),
    ],
)
def test_mistakes_are_named(folder, change, names):
    with pytest.raises(DataError, match=names):
        build(**({"root": folder} | change))


def test_two_images_of_one_name(folder):
    """One of them would go without a word."""
    save(folder / "images" / "val" / "02.jpg", picture())
    with pytest.raises(DataError, match=r"02\.jpg .*02\.png"):
        build(folder)


def test_a_split_without_images(folder):
    for path in (folder / "images" / "val").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="'val'"):
        build(folder)
    config = SegmentDataConfig(kind="folder", root=str(folder))
    index = read_masks(folder, config, "train", 3)
    assert len(index) == 12
    assert Path(index.mask_name(11)) == folder / "masks" / "train" / "11.png"


# ---- augmentation


def test_augmentation_depends_on_seed_pass_and_image_alone(folder):
    """Not on the processes that read, nor on what came before: a resumed epoch goes on with the same images."""
    whole = list(build(folder, train=True).train.epoch(3))
    rest = list(build(folder, train=True, workers=2).train.epoch(3, start=1))
    assert len(whole) == 3
    for a, b in zip(whole[1:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)
    other = next(build(folder, train=True).train.epoch(4))
    assert not torch.equal(other.images, whole[0].images)
    state = torch.get_rng_state()
    list(build(folder, train=True).train.epoch(0))
    assert torch.equal(state, torch.get_rng_state())  # which the model's dropout draws from


def augment(image: torch.Tensor, labels: torch.Tensor, seed: int, **config) -> tuple[torch.Tensor, torch.Tensor]:
    transform = segmentation_transform(SegmentAugmentConfig(**config), [124, 116, 104], antialias=True)
    with seeded(seed):
        return transform(tv_tensors.Image(image), SemanticMask(labels))


def test_labels_stay_with_their_pixels():
    """An image that shows its labels still does after resize, crop and flip; beyond its border is the fill."""
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 6, (6, 8)).astype(np.uint8))
    labels = labels.repeat_interleave(10, 0).repeat_interleave(10, 1)  # squares of 10
    image = (labels * 40)[None].repeat(3, 1, 1)
    inside = 0
    for seed in range(20):
        config = {"crop_size": [70, 90], "scale": [80, 60], "ratio_range": [0.5, 2.0], "photometric": False}
        pixels, targets = augment(image, labels, seed, **config)
        assert (pixels.shape, targets.shape) == ((3, 70, 90), (70, 90))
        outside = targets == 255
        assert (pixels[:, outside] == torch.tensor([[124], [116], [104]])).all()
        agree = (pixels[0].int() - targets.int() * 40).abs() < 20
        assert agree[~outside].float().mean() > 0.8  # all but the borders of the squares
        inside += int(not outside.any())
    assert 0 < inside < 20  # smaller and larger than the crop


def test_resize_samples_at_pixel_centres():
    image = torch.arange(0, 240, 10, dtype=torch.uint8).view(1, 4, 6)
    labels = torch.arange(24, dtype=torch.uint8).view(4, 6)
    pixels, targets = augment(image, labels, 0, crop_size=[8, 12], ratio_range=[2.0, 2.0], hflip=0.0, photometric=False)
    assert torch.equal(targets, labels.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert (pixels[0].float() - 10 * targets.float()).abs().max() <= 20


def test_masks_are_resized_at_pixel_centres():
    """As their images are; torchvision's own masks move by up to half a pixel."""
    values = torch.arange(24, dtype=torch.uint8).view(1, 4, 6)
    half = F.resize(SemanticMask(values.repeat_interleave(4, 1).repeat_interleave(4, 2)), [8, 12])
    assert type(half) is SemanticMask
    assert torch.equal(half, values.repeat_interleave(2, 1).repeat_interleave(2, 2))
    edge = torch.arange(9, dtype=torch.uint8).view(3, 3)
    assert F.resize(SemanticMask(edge), [1, 1]).item() == 4  # the middle one
    image, mask = tv_tensors.Image(torch.rand(1, 7, 9)), SemanticMask(torch.zeros(7, 9))
    assert F.resize(image, [5], max_size=6).shape[-2:] == F.resize(mask, [5], max_size=6).shape


def test_crops_avoid_a_single_class():
    """Three places in four show at least a quarter of each class; one of the others is only kept after ten tries."""
    labels = torch.zeros(40, 100, dtype=torch.uint8)
    labels[:, 50:] = 1
    image = torch.zeros(3, 40, 100, dtype=torch.uint8)

    def shares(limit: float) -> list[float]:
        config = {
            "crop_size": [40, 60],
            "ratio_range": [1.0, 1.0],
            "cat_max_ratio": limit,
            "hflip": 0.0,
            "photometric": False,
        }
        found = [augment(image, labels, seed, **config)[1].float().mean().item() for seed in range(60)]
        return [max(share, 1 - share) for share in found]

    assert max(shares(1.0)) > 0.8
    assert max(shares(0.75)) < 0.75


def test_photometric_distortion_bounds():
    """Brightness by an eighth, contrast and saturation by half, hue by a tenth of the circle; each half the time."""
    image = torch.tensor([[90, 110], [60, 140]], dtype=torch.uint8).view(1, 2, 2)
    change = PhotometricDistort()
    with seeded(0):
        drawn = torch.stack([change(tv_tensors.Image(image)) for _ in range(1000)]).float()
        params = [change.make_params([tv_tensors.Image(torch.zeros(3, 4, 4))]) for _ in range(1000)]
    assert 0.2 < (drawn == image).flatten(1).all(1).float().mean() < 0.3  # a quarter is left alone
    assert 100 * 0.875 - 1 <= drawn.mean((1, 2, 3)).min() < 90
    assert 110 < drawn.mean((1, 2, 3)).max() <= 100 * 1.125 + 1
    spread = drawn.flatten(1).amax(1) - drawn.flatten(1).amin(1)
    assert 40 * 0.875 - 2 <= spread.min() < 45
    assert 110 < spread.max() <= 120 * 1.125 + 2
    hues = [each["hue_factor"] for each in params if each["hue_factor"] is not None]
    assert 0.08 < max(map(abs, hues)) <= 0.1
    assert all(each["channel_permutation"] is None for each in params)


def test_balanced_sampling_of_masks(tmp_path):
    """One mask of twenty has the rare class; a damaged one counts as without a class."""
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
        (tmp_path / kind / "val").mkdir()
        for number in range(20):
            pixels = np.zeros((16, 16) if kind == "masks" else (16, 16, 3), np.uint8)
            pixels[:4] = 1 if kind == "masks" and number == 3 else 0
            pixels[4:] = number if kind == "images" else 0
            for split in ("train", "val"):
                Image.fromarray(pixels).save(tmp_path / kind / split / f"{number:02}.png")
    (tmp_path / "masks/train/07.png").write_bytes(b"no image")
    given = [f"data.root={tmp_path}", "data.classes=[ground, rare]", "data.workers=0", "train.batch_size=20"]
    given += ["output=-", "model.name=-", "augment.crop_size=[16,16]", "augment.photometric=false"]
    given += ["augment.ratio_range=[1,1]", "data.max_bad_fraction=0.5"]
    share = {}
    for sampling in ("uniform", "balanced"):
        config = load_config(None, [*given, f"data.sampling={sampling}"], SegmentConfig)
        data = build_segmentation_data(config, ["ground", "rare"], [0.0] * 3, device=torch.device("cpu"))
        seen = [image for epoch in range(20) for image in next(iter(data.train.epoch(epoch))).targets]
        share[sampling] = sum(1 in image for image in seen) / len(seen)
    assert share["uniform"] == 1 / 20
    expected = 1 / (1 + 19 * 19**-0.5)  # 19 readable masks have the ground
    assert abs(share["balanced"] - expected) < 5 * (expected / 400) ** 0.5


@pytest.mark.parametrize("kind", ["folder", "auto"])
def test_images_without_masks_are_evaluated_to_files(kind, tmp_path):
    """As those of a detector: what the model finds is written, and is what `predict` finds."""
    model = build_segmenter("test_foveal_dinat", "semantic_fpn", num_classes=3, head_kwargs={"channels": 32}).eval()
    save_dense(tmp_path / "model", model, ["a", "b", "c"], {"in_chans": 3, "mean": [0.5] * 3, "std": [0.5] * 3})
    root = tmp_path / "data"
    inside = {"folder": "images/val", "auto": "."}[kind]
    (root / inside / "sub").mkdir(parents=True)
    draw = np.random.default_rng(0)
    both = ["2.jpg"] if kind == "auto" else []  # folder pairs by name
    for name in ("1.jpg", "2.png", "sub/3.png", *both):
        Image.fromarray(draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / inside / name)
    given = [f"data.root={root}", f"data.kind={kind}", "data.classes=[a,b,c]", "data.workers=0", "train.threads=1"]
    given += ["data.masks=null"] if kind == "folder" else []
    result = evaluate(tmp_path / "model", given)
    assert (result["n"], result["miou"], result["classes"]["a"]["iou"]) == (3 + len(both), None, None)
    written = sorted((tmp_path / "predictions").rglob("*.png"))
    names = ["1.png", *(["2.jpg.png", "2.png.png"] if both else ["2.png"]), "sub/3.png"]
    assert [str(path.relative_to(tmp_path / "predictions" / inside)) for path in written] == names
    list(predict(tmp_path / "model", [root / inside / "1.jpg"], output=tmp_path / "found"))
    assert written[0].read_bytes() == (tmp_path / "found" / "1.png").read_bytes()
    with pytest.raises(DataError, match=r"masks"):
        train("small", [*given, f"output={tmp_path / 'run'}", "auto=[]"], "segment", Console(quiet=True))


def test_label_studio_s_brush_masks_are_named(tmp_path):
    for folder, names in (("images", ["a"]), ("masks", ["task-1-annotation-2-by-1-tag-car-0"])):
        (tmp_path / folder).mkdir()
        for name in names:
            mask = np.zeros((40, 50, *[3] * (folder == "images")), np.uint8)
            mask[:20] = 255
            Image.fromarray(mask).save(tmp_path / folder / f"{name}.png")
    with pytest.raises(DataError, match=r"1 brush masks.*tag-car-0"):
        train("small", [f"data.root={tmp_path}", f"output={tmp_path / 'run'}"], "segment", Console(quiet=True))
