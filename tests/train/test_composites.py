"""Composites: exact masks, tight boxes, the same bytes again, and nothing held out that was trained on."""

import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycocotools_mask
from pycocotools.coco import COCO

from foveal.train.data import DataError, composites
from foveal.train.data.composites import CutOut, compose, digit_cut_outs, write_composites, write_tuxpaint
from foveal.train.data.memory import load_digits

COUNTS = {"train": 6, "val": 3}
SIZE = 96


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_composites(tmp_path_factory.mktemp("data") / "digits", 6, 3, SIZE, seed=7)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def instances(root: Path, split: str) -> dict:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_boxes_and_semantic_maps_agree(root: Path, split: str, capsys: pytest.CaptureFixture[str]):
    coco = COCO(root / "annotations" / f"instances_{split}.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == [str(digit) for digit in range(10)]
    assert len(coco.imgs) == COUNTS[split]
    for image in coco.imgs.values():
        with Image.open(root / split / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"]) == (SIZE, SIZE)
        expected = np.zeros((SIZE, SIZE), np.uint8)
        annotations = coco.imgToAnns[image["id"]]
        assert annotations
        for annotation in annotations:
            mask = coco.annToMask(annotation).astype(bool)
            assert not expected[mask].any(), "masks overlap"
            expected[mask] = annotation["category_id"]
            assert annotation["area"] == mask.sum() > 0
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
            assert annotation["iscrowd"] == 0
        with Image.open(root / "semantic" / split / f"{Path(image['file_name']).stem}.png") as file:
            np.testing.assert_array_equal(np.asarray(file), expected)


def test_run_lengths_are_those_of_pycocotools():
    random = np.random.default_rng(0)
    for mask in (random.random((5, 7)) < 0.5, np.ones((3, 2), bool), np.eye(4, dtype=bool), np.zeros((2, 3), bool)):
        size = list(mask.shape)
        encoded = pycocotools_mask.frPyObjects({"size": size, "counts": composites.run_lengths(mask)}, *size)
        assert encoded == pycocotools_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        np.testing.assert_array_equal(pycocotools_mask.decode(encoded), mask)


def test_a_cut_out_covers_earlier_ones_exactly_where_it_is_solid():
    """Against plain painting: each cut-out has its own colour and an edge of half cover."""
    alpha = np.full((20, 20), 0.4)
    alpha[4:16, 4:16] = 1.0
    colours = itertools.cycle(range(1, 26))

    def draw(random: np.random.Generator, background: np.ndarray) -> CutOut:
        colour = next(colours)
        return CutOut(np.full((20, 20, 3), 10.0 * colour), alpha, colour)

    black = np.zeros((48, 48, 3), np.uint8)
    made = [compose(black, 48, (8, 8), draw, np.random.default_rng(seed)) for seed in range(20)]
    assert any(mask.sum() < 144 for each in made for mask in each.masks), "nothing was covered"
    for each in made:
        assert len(each.masks) >= 2
        assert (each.masks.sum((1, 2)) >= composites.MIN_VISIBLE * 144).all()
        last = each.image[each.masks[-1]]
        np.testing.assert_array_equal(last, np.full_like(last, 10 * each.categories[-1]))
        np.testing.assert_array_equal(each.semantic > 0, each.masks.any(0))


def test_the_same_bytes_again_and_others_with_another_seed(root: Path, tmp_path: Path):
    again = write_composites(tmp_path / "again", 6, 3, SIZE, seed=7)
    assert contents(again) == contents(root)
    fewer = contents(write_composites(tmp_path / "fewer", 2, 3, SIZE, seed=7))
    assert fewer["train/000001.jpg"] == contents(root)["train/000001.jpg"]
    other = contents(write_composites(tmp_path / "other", 6, 3, SIZE, seed=8))
    images = [name for name in other if name.endswith(".jpg")]
    assert len(images) == 9
    assert not any(other[name] == contents(root)[name] for name in images)


def test_no_digit_and_no_photograph_is_in_both_splits():
    assert not set(composites.PHOTOGRAPHS["train"]) & set(composites.PHOTOGRAPHS["val"])
    pictures = {split: {p.tobytes() for p in composites._photographs(split)} for split in composites.SPLITS}
    assert len(pictures["train"]) == 11
    assert len(pictures["val"]) == 4
    assert not pictures["train"] & pictures["val"]
    digits = {split: {image.tobytes() for image in images} for split, (images, _) in load_digits(0.2).items()}
    assert len(digits["train"]) + len(digits["val"]) == 1797  # no two of the images are alike
    assert not digits["train"] & digits["val"]


def test_composites_of_a_split_show_its_digits_alone():
    """Trained and held-out cut-outs are drawn from the arrays they are given: of one digit, all show it."""
    images, labels = (array[:1] for array in load_digits(0.2)["val"])
    draw = digit_cut_outs(images, labels)
    background = np.zeros((SIZE, SIZE, 3))
    random = np.random.default_rng(0)
    drawn = [draw(random, background) for _ in range(5)]
    assert {each.category for each in drawn} == {int(labels[0]) + 1}
    assert len({each.alpha.shape for each in drawn}) > 1  # in other sizes and turns
    for each in drawn:
        assert each.alpha.min() >= 0
        assert each.alpha.max() == 1


def test_a_complete_folder_is_taken_as_it_is(root: Path):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_composites(root, 6, 3, SIZE, seed=7) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_folder_of_something_else_is_refused(root: Path, tmp_path: Path):
    before = contents(root)
    with pytest.raises(DataError, match=r"seed 7.*8"):
        write_composites(root, 6, 3, SIZE, seed=8)
    with pytest.raises(DataError, match=r"size 96.*128"):
        write_composites(root, 6, 3, 128, seed=7)
    assert contents(root) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"mine .*manifest\.json"):
        write_composites(tmp_path / "mine", 6, 3, SIZE, seed=7)
    (tmp_path / "mine" / "manifest.json").write_text('{"version": 1')
    with pytest.raises(DataError, match=r"mine .*manifest\.json"):
        write_composites(tmp_path / "mine", 6, 3, SIZE, seed=7)
    with pytest.raises(DataError, match=r"val_images.*0.*1"):
        write_composites(tmp_path / "none", 6, 0, SIZE, seed=7)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(composites, "annotate", full)
    with pytest.raises(OSError, match="No space left"):
        write_composites(tmp_path / "digits", 2, 1, SIZE, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tuxpaint(tmp_path: Path) -> Path:
    """What the two Debian packages unpack to, in small: a disc of its own colour for each stamp."""
    share = tmp_path / "usr" / "share" / "tuxpaint"
    y, x = np.mgrid[:40, :40]
    disc = np.where((x - 19.5) ** 2 + (y - 19.5) ** 2 < 15**2, 255, 0).astype(np.uint8)
    for number, folders in enumerate(composites.TUXPAINT.values()):
        folder = share / "stamps" / folders[-1] / "photo"
        folder.mkdir(parents=True)
        for stamp in range(5):
            rgba = np.zeros((40, 40, 4), np.uint8)
            rgba[..., 0], rgba[..., 1], rgba[..., 2] = 20 * number + 40, 50 * stamp, 255
            rgba[..., 3] = disc
            Image.fromarray(rgba).save(folder / f"{stamp}.png")
        Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(folder / "0_mirror.png")  # would fail: nothing to crop
    (share / "templates").mkdir()
    for number in range(5):
        Image.new("RGB", (80, 60), (0, 0, 40 * number)).save(share / "templates" / f"{number}.jpg")
    return tmp_path


def test_tuxpaint(tuxpaint: Path, tmp_path: Path):
    root = tmp_path / "coco"
    command = [sys.executable, "-m", composites.__name__, str(tuxpaint)]
    subprocess.run([*command, str(root), "--train-images=8", "--val-images=4", "--size=64"], check=True)
    assert [c["name"] for c in instances(root, "val")["categories"]] == list(composites.TUXPAINT)
    for split, images in (("train", 8), ("val", 4)):
        found = instances(root, split)
        assert len(found["images"]) == images
        assert len(found["annotations"]) >= images / 2
        for annotation in found["annotations"]:
            with Image.open(root / split / f"{annotation['image_id'] - 1:06}.jpg") as file:
                pixels = np.asarray(file)
            size = annotation["segmentation"]["size"]
            mask = pycocotools_mask.decode(pycocotools_mask.frPyObjects(annotation["segmentation"], *size)).astype(bool)
            assert (
                abs(np.median(pixels[mask][:, 0]) - 20 * (annotation["category_id"] - 1) - 40) < 10
            )  # its stamp's red
            assert mask.sum() > 0.5 * annotation["bbox"][2] * annotation["bbox"][3]  # a disc fills most of its box
    with pytest.raises(DataError, match=r"nowhere.*`make tuxpaint-coco`"):
        write_tuxpaint(tmp_path / "nowhere", tmp_path / "other", 1, 1, 64, 0)


def test_no_stamp_is_in_both_splits(tuxpaint: Path, monkeypatch: pytest.MonkeyPatch):
    taken = []
    monkeypatch.setattr(composites, "stamp_cut_outs", lambda stamps: taken.append({path for path, _ in stamps}))
    composites._tuxpaint_sources(tuxpaint)
    train, val = taken
    assert len(train) == 30
    assert len(val) == 20
    assert not train & val
    assert {path.parents[1] for path in train} == {path.parents[1] for path in val}  # every class in both
