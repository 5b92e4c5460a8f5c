"""Pascal VOC's boxes: read as torchvision reads them, learned and measured as VOC means them."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCDetection

from foveal.configs.schema import ConfigError, DetectConfig, load_config
from foveal.train import detect, evaluate, train
from foveal.train.data import DataError
from foveal.train.data.voc import read_voc
from foveal.train.detection_metrics import average_precision

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def write(root: Path, year: str, sets: dict[str, list[str]], size: tuple[int, int] = (64, 80)) -> Path:
    """Images of noise with a bright dog each, and a difficult cat at the left edge; corners from 1 on, both inside."""
    draw, (height, width) = np.random.default_rng(0), size
    folder = root / f"VOC{year}"
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    for split, names in sets.items():
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            pixels = draw.integers(0, 90, (height, width, 3), dtype=np.uint8)
            x, y = draw.integers(20, width - 32), draw.integers(0, height - 30)
            pixels[y : y + 30, x : x + 32, 0] = 230
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
            objects = OBJECT.format(x + 1, y + 1, x + 32, y + 30, name="dog", difficult=0)
            objects += OBJECT.format(1, 1, "10.5", 20, name="cat", difficult=1)
            sizes = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
            text = f"<annotation><filename>{name}.jpg</filename>{sizes}{objects}</annotation>"
            (folder / "Annotations" / f"{name}.xml").write_text(text)
    return root


@pytest.fixture
def devkit(tmp_path) -> Path:
    root = write(tmp_path / "VOCdevkit", "2007", {"trainval": ["000005", "000007"], "test": ["000001", "000002"]})
    return write(root, "2012", {"trainval": ["2008_000008"]})


def test_against_torchvision(devkit):
    found = read_voc(devkit, "VOC2007/trainval+VOC2012/trainval", train=True)
    assert [found.name(i).removeprefix(f"{devkit}/") for i in range(3)] == [
        *("VOC2007/JPEGImages/000005.jpg", "VOC2007/JPEGImages/000007.jpg", "VOC2012/JPEGImages/2008_000008.jpg")
    ]
    names = found.categories
    assert len(names) == 20
    assert [names[i] for i in (1, 12, 20)] == ["aeroplane", "dog", "tvmonitor"]
    mine = [(names[a["category_id"]], a["bbox"]) for a in found.truth(range(3))["annotations"]]
    theirs = []
    for year in ("2007", "2012"):
        for _, target in VOCDetection(str(devkit.parent), year=year, image_set="trainval"):
            for each in target["annotation"]["object"]:
                x1, y1, x2, y2 = (float(each["bndbox"][end]) for end in ("xmin", "ymin", "xmax", "ymax"))
                theirs.append((each["name"], [x1 - 1, y1 - 1, x2 - (x1 - 1), y2 - (y1 - 1)]))
    assert mine == theirs
    assert found.crowd.tolist() == [False] * 6
    assert read_voc(devkit, "VOC2007/test", train=False).crowd.tolist() == [False, True] * 2


def test_what_is_difficult_is_neither_demanded_nor_wrong(devkit):
    """Every dog found, and two boxes on each cat: a perfect score. A dog where none is spoils it."""
    index = read_voc(devkit, "VOC2007/test", train=False)
    truth = index.truth(range(len(index)))
    dogs = [a for a in truth["annotations"] if not a["iscrowd"]]
    cats = [a for a in truth["annotations"] if a["iscrowd"]]
    found = [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in dogs + cats + cats]
    assert average_precision(truth, found, "box")[0]["box_ap50"] == 100.0
    wrong = found[0] | {"bbox": [40.0, 1.0, 5.0, 5.0], "score": 0.9}
    assert average_precision(truth, [*found, wrong], "box")[0]["box_ap50"] < 100.0


def test_it_trains_and_is_measured(devkit, detect_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(detect.Task, "draw", lambda *_: None)
    monkeypatch.setattr(detect.plots, "curves", lambda *_: None)
    sets = ["data.train_annotations=VOC2007/trainval+VOC2012/trainval", "data.val_annotations=VOC2007/test"]
    options = [f"output={tmp_path / 'run'}", f"data.root={devkit}", "data.kind=voc", *sets]
    train(detect_recipe, [*options, "schedule.epochs=1", "train.batch_size=3"], "detect")
    with (tmp_path / "run/metrics.csv").open() as file:
        assert float(next(csv.DictReader(file))["box_ap50"]) >= 0
    assert evaluate(tmp_path / "run")["n"] > 0


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda kit: (kit / "VOC2007/ImageSets/Main/test.txt").unlink(), r"VOC2007/test.*test\.txt"),
        (lambda kit: (kit / "VOC2007/Annotations/000002.xml").unlink(), r"000002\.xml"),
        (lambda kit: (kit / "VOC2007/Annotations/000002.xml").write_text("<annotation>"), r"000002\.xml.*column"),
        (lambda kit: (kit / "VOC2007/Annotations/000002.xml").write_text("<annotation/>"), r"000002\.xml.*size"),
        (
            lambda kit: (kit / "VOC2007/Annotations/000002.xml").write_text(
                "<annotation><size><width>9</width><height>9</height></size>"
                + OBJECT.format(1, 2, 3, 4, name="yeti", difficult=0)
                + "</annotation>"
            ),
            r"000002\.xml.*'yeti'",
        ),
    ],
)
def test_damage_is_named(devkit, damage, names):
    damage(devkit)
    with pytest.raises(DataError, match=names):
        read_voc(devkit, "VOC2007/test", train=False)


def test_boxes_as_fractions_stop_the_run(devkit):
    for path in (devkit / "VOC2007/Annotations").iterdir():
        text = re.sub(
            r"<(xm..|ym..)>([\d.]+)<", lambda found: f"<{found[1]}>{float(found[2]) / 100}<", path.read_text()
        )
        path.write_text(text)
    with pytest.raises(DataError, match=r"fractions.*000001\.jpg"):
        read_voc(devkit, "VOC2007/test", train=False)


def test_classes_are_chosen_by_name(devkit):
    """VOC's own by their numbers, others after them; what is not named is left out."""
    xml = devkit / "VOC2007/Annotations/000002.xml"
    xml.write_text(xml.read_text().replace(">dog<", ">yeti<"))
    index = read_voc(devkit, "VOC2007/test", train=True, classes=["yeti", "cat"])
    assert index.categories == {21: "yeti", 8: "cat"}
    assert index.labels.tolist() == [1, 0, 1]
    assert "dog 1" in str(index.report)
    again = read_voc(devkit, "VOC2007/trainval", train=False, categories=index.categories, classes=["yeti", "cat"])
    assert (again.categories, again.labels.tolist()) == ({21: "yeti", 8: "cat"}, [1, 1])
    with pytest.raises(DataError, match=r"'yetis'.*yeti"):
        read_voc(devkit, "VOC2007/test", train=True, classes=["yetis", "cat"])


def test_documents_of_types_are_refused(devkit):
    xml = devkit / "VOC2007/Annotations/000002.xml"
    xml.write_text("<!DOCTYPE a [<!ENTITY x 'y'>]>" + xml.read_text())
    with pytest.raises(DataError, match=r"000002\.xml"):
        read_voc(devkit, "VOC2007/test", train=True)


def test_a_set_of_difficult_objects_cannot_be_scored(devkit, detect_recipe, tmp_path):
    for path in (devkit / "VOC2007/Annotations").glob("00000[12].xml"):
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    sets = ["data.train_annotations=VOC2007/trainval", "data.val_annotations=VOC2007/test"]
    options = [f"output={tmp_path / 'run'}", f"data.root={devkit}", "data.kind=voc", *sets, "train.batch_size=2"]
    with pytest.raises(DataError, match=r"4 objects.*000001\.jpg: dog"):
        train(detect_recipe, options, "detect")


def test_masks_are_refused(devkit, detect_recipe, tmp_path):
    options = [f"output={tmp_path / 'run'}", f"data.root={devkit}", "data.kind=voc", "model.head=mask_rcnn"]
    with pytest.raises((ConfigError, DataError), match=r"data\.kind=voc"):
        train(detect_recipe, options, "detect")


def test_the_recipe():
    config = load_config("detect/resnet50_a3fpn_faster_rcnn_voc", [], DetectConfig)
    updates = config.schedule.epochs * config.train.steps_per_epoch
    assert (updates, config.train.batch_size * 4, config.optim.lr, config.optim.lr_batch) == (18_000, 8, 0.02, 8)
    assert [round(part * updates) for part in config.schedule.milestones] == [11_000, 16_000]
    assert round(config.schedule.warmup_fraction * updates) == 100
    with pytest.raises(ConfigError, match=r"data\.kind"):
        load_config("detect/resnet50_a3fpn_faster_rcnn_voc", ["data.kind=vok"], DetectConfig)
