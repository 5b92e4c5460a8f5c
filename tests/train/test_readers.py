"""Images as tools and cameras write them: turned by a tag, of any kind that Pillow reads, among files that are none."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image

from foveal.backbones.images import read_image
from foveal.configs.schema import AugmentConfig
from foveal.train.data.coco import index_objects
from foveal.train.data.dataset import ClassificationDataset, DetectionDataset, SegmentationDataset
from foveal.train.data.files import image_size
from foveal.train.data.folder import read_folder, scan_folder
from foveal.train.data.index import ClassificationIndex, SegmentationIndex, encode_paths
from foveal.train.data.shards import Options, encode, make_shards
from foveal.train.data.transforms import EvalTransform, TrainTransform
from foveal.train.results import find_images
from foveal.weights.images import read_batches, top1

PREPROCESSING = {"input_size": (3, 24, 24), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
TURNED = {3: 180, 6: 90, 8: 270}  # the tag, and by how many degrees to the left the camera had stored it


@pytest.fixture(params=TURNED)
def photographs(request, tmp_path: Path) -> tuple[Path, Path]:
    """One photograph, stored upright and turned."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[ExifTags.Base.Orientation] = request.param
    image.save(tmp_path / "upright.png")
    image.rotate(TURNED[request.param], expand=True).save(tmp_path / "turned.png", exif=exif)
    return tmp_path / "upright.png", tmp_path / "turned.png"


@pytest.mark.parametrize("decode", ["timm", "fast", "draft", None])
def test_classifiers_are_trained_and_scored_upright(photographs, decode):
    transform = EvalTransform(PREPROCESSING)
    if decode is not None:
        transform = TrainTransform(AugmentConfig(), decode, (3, 24, 24), (0.5, 0.5, 0.5))
    index = ClassificationIndex(paths=encode_paths(photographs), label=np.zeros(2, np.int64))
    dataset = ClassificationDataset(index, transform, train=False, seed=0)
    images = []
    for number in range(2):
        torch.manual_seed(0), np.random.seed(0)
        __import__("random").seed(0)
        images.append(dataset[0, number][0][0])
    assert torch.equal(*images)


def test_detectors_compare_the_upright_size(photographs):
    content = {
        "images": [{"id": i, "file_name": p.name, "height": 40, "width": 60} for i, p in enumerate(photographs)],
        "annotations": [],
        "categories": [{"id": 1, "name": "a"}],
    }
    index = index_objects("-", photographs[0].parent, content, masks=False)
    dataset = DetectionDataset(index, 3, None, 0)
    first, second = (dataset[0, number][0]["image"] for number in range(2))
    assert torch.equal(first, second)
    assert {image_size(photograph) for photograph in photographs} == {(40, 60)}


def test_segmenters_and_shards_are_upright(photographs):
    masks = [photographs[0].with_name("mask.png")] * 2
    Image.fromarray(np.eye(40, 60, dtype=np.uint8)).save(masks[0])
    table = np.full(256, -1, np.int16)
    table[:2] = 0, 1
    index = SegmentationIndex(paths=encode_paths(photographs), masks=encode_paths(masks), table=table)
    first, second = (SegmentationDataset(index, 3, None, 0)[0, number][0]["image"] for number in range(2))
    assert torch.equal(first, second)
    stored = [encode(str(path), Options(max_size=30))[1] for path in photographs]
    assert stored[0] == stored[1]
    assert read_image(photographs[0], 3).tobytes() == read_image(photographs[1], 3).tobytes()


def test_exports_are_scored_on_all_that_pillow_reads_and_nothing_hidden(tmp_path):
    for name in ("a", "b", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
        for file in ("1.tif", "2.bmp", "3.webp", "4.png", "._4.png"):
            Image.new("RGB", (32, 32)).save(tmp_path / name / file)
    model = timm.create_model("test_foveal_dinat", num_classes=2).eval()
    assert top1(model, tmp_path, {})[1] == 8
    assert sum(map(len, read_batches(model, [tmp_path]))) == 8


def test_predictions_and_shards_name_what_they_pass_over(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "1.png")
    (tmp_path / "train" / "a" / "notes.pdf").write_bytes(b"")
    (tmp_path / "train" / "a" / "._1.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 files.*\._1\.png.*notes\.pdf"):
        assert len(find_images([tmp_path])) == 2
    with pytest.warns(UserWarning, match=r"hidden file.*\._1\.png.*notes\.pdf"):
        make_shards(tmp_path, tmp_path / "shards", Options())


def test_class_folders_hold_all_that_pillow_reads_and_nothing_hidden(tmp_path):
    for name in ("a", "b", ".ipynb_checkpoints"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for file in ("1.tif", "2.bmp", "3.webp", "4.png", "._4.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / file)
    (tmp_path / "train" / "a" / "notes.pdf").write_text("x")
    assert scan_folder(tmp_path, "train") == ["a", "b"]
    index = read_folder(tmp_path, "train", ["a", "b"])
    assert len(index) == 8
    assert index.report.counts() == {"hidden file": 2, "no image that is read": 1}
    (tmp_path / "train" / "a" / "b").mkdir()
    (tmp_path / "train" / "a" / ".cache").mkdir()
    for name in ("b", ".cache"):
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a" / name / "5.png")
    index = read_folder(tmp_path, "train", ["a", "b"])
    assert (len(index), index.label.tolist()) == (8, 4 * [0] + 4 * [1])
    assert index.report.counts()["image in a folder below its class"] == 1
    assert [row[0] for row in index.report.rows if "a/.cache" in row[0]] == ["a/.cache/5.png"]
