"""``data.kind=auto``: the same objects in every format are read to the same boxes; damaged files cost themselves."""

import csv
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from foveal.cli import app
from foveal.configs.schema import SCHEMAS, DetectConfig, load_config
from foveal.train import evaluate, train
from foveal.train.data import DataError, build_detection_data
from foveal.train.data.auto import draw, read_set
from foveal.train.data.dataset import SegmentationDataset
from foveal.train.data.files import Files, read_xml, split_of
from foveal.train.data.formats import read_yolo_files
from foveal.train.data.survey import draw as draw_sheet
from foveal.train.data.survey import survey

CLASSES = ("cat", "dog")
Truth = dict[str, list[tuple[int, tuple[int, int, int, int]]]]  # stem -> class and corners
WIDTH, HEIGHT = 40, 32


def truth(count: int = 10, first: int = 0) -> Truth:
    return {f"im {i}": [(i % 2, (2, 3, 12 + i % 5, 20)), (1, (20, 8, 36, 24))] for i in range(first, first + count)}


def write_images(folder: Path, names: Truth) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        noise = np.random.default_rng(len(name) + int(name.split()[1])).integers(0, 255, (HEIGHT, WIDTH, 3))
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{name}.jpg")


def write_coco(file: Path, names: Truth, folder: str = "") -> None:
    images, annotations = [], []
    for name, objects in names.items():
        images.append({"id": len(images), "file_name": f"{folder}{name}.jpg", "height": HEIGHT, "width": WIDTH})
        for label, (x1, y1, x2, y2) in objects:
            entry = {"id": len(annotations), "image_id": images[-1]["id"], "category_id": label}
            polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
            annotations.append(entry | {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": [polygon], "iscrowd": 0})
    file.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": i, "name": name, "supercategory": "none"} for i, name in enumerate(CLASSES)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def roboflow_coco(root: Path) -> None:
    for split, names in (("train", truth(6)), ("valid", truth(4, 6))):
        write_images(root / split, names)
        write_coco(root / split / "_annotations.coco.json", names)


def coco_named_otherwise(root: Path) -> None:
    write_images(root / "images", truth())
    write_coco(root / "annotations" / "my export.json", truth(), "C:\\photos\\")


def write_voc(folder: Path, names: Truth) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, objects in names.items():
        tree = ElementTree.Element("annotation")
        ElementTree.SubElement(tree, "filename").text = f"{name}.jpg"
        size = ElementTree.SubElement(tree, "size")
        for key, value in (("width", WIDTH), ("height", HEIGHT)):
            ElementTree.SubElement(size, key).text = str(value)
        for label, corners in objects:
            entry = ElementTree.SubElement(tree, "object")
            ElementTree.SubElement(entry, "name").text = CLASSES[label]
            box = ElementTree.SubElement(entry, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                ElementTree.SubElement(box, key).text = str(value)
        ElementTree.ElementTree(tree).write(folder / f"{name}.xml")


def voc(root: Path) -> None:
    write_images(root / "images", truth())
    write_voc(root / "annotations", truth())


def voc_with_sets(root: Path) -> None:
    year = root / "VOC2030"
    write_images(year / "JPEGImages", truth())
    write_voc(year / "Annotations", truth())
    (year / "ImageSets" / "Main").mkdir(parents=True)
    for split, names in (("train", truth(6)), ("val", truth(4, 6))):
        (year / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(name.replace(" ", "_") for name in names))
    for path in [*year.rglob("*.jpg"), *year.rglob("*.xml")]:  # names in lists have no blanks
        path.rename(path.with_name(path.name.replace(" ", "_")))
    for path in year.rglob("*.xml"):
        path.write_text(path.read_text().replace("im ", "im_"))


def write_yolo(folder: Path, names: Truth, polygons: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, objects in names.items():
        lines = []
        for label, (x1, y1, x2, y2) in objects:
            w, h = WIDTH, HEIGHT
            box = [(x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h]
            shape = [x1 / w, y1 / h, x2 / w, y1 / h, x2 / w, y2 / h, x1 / w, y2 / h]
            lines.append(" ".join(map(str, [label, *(shape if polygons else box)])))
        (folder / f"{name}.txt").write_text("\n".join(lines))


def yolo(root: Path, polygons: bool = False) -> None:
    for split, names in (("train", truth(6)), ("val", truth(4, 6))):
        write_images(root / "images" / split, names)
        write_yolo(root / "labels" / split, names, polygons)
    settings = {"path": "/elsewhere", "train": "images/train", "val": "images/val", "names": dict(enumerate(CLASSES))}
    (root / "data.yaml").write_text(yaml.safe_dump(settings))


def yolo_polygons(root: Path) -> None:
    yolo(root, polygons=True)


def cvat_yolo(root: Path) -> None:
    write_images(root / "obj_train_data", truth())
    write_yolo(root / "obj_train_data", truth())
    (root / "obj.names").write_text("\n".join(CLASSES))
    (root / "obj.data").write_text("classes = 2\nnames = data/obj.names\ntrain = data/train.txt\n")
    (root / "train.txt").write_text("\n".join(f"data/obj_train_data/{name}.jpg" for name in truth()))


def label_studio_yolo(root: Path) -> None:
    write_images(root / "images", truth())
    write_yolo(root / "labels", truth())
    (root / "classes.txt").write_text("\n".join(CLASSES))
    (root / "notes.json").write_text(json.dumps({"categories": [{"id": 0, "name": "cat"}]}))


def cvat_coco(root: Path) -> None:
    write_images(root / "images" / "default", truth())
    write_coco(root / "annotations" / "instances_default.json", truth())
    content = json.loads((root / "annotations" / "instances_default.json").read_text())
    content |= {"licenses": [{"name": "", "id": 0, "url": ""}], "info": {"contributor": "", "year": ""}}
    for entry in content["images"]:
        entry |= {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}
    for entry in content["annotations"]:
        entry |= {"id": entry["id"] + 1, "attributes": {"occluded": False, "rotation": 0.0}, "segmentation": []}
    (root / "annotations" / "instances_default.json").write_text(json.dumps(content))


def cvat_voc(root: Path) -> None:
    write_images(root / "JPEGImages", truth())
    write_voc(root / "Annotations", truth())
    for path in (root / "Annotations").iterdir():
        more = "<folder></folder><source><database>Unknown</database></source><segmented>0</segmented>"
        text = path.read_text().replace("<annotation>", f"<annotation>{more}")
        text = text.replace("</name>", "</name><truncated>0</truncated><occluded>0</occluded><difficult>0</difficult>")
        text = text.replace("</bndbox>", "</bndbox><attributes><attribute><name>a</name></attribute></attributes>")
        path.write_text(re.sub(r"(<[xy]m..>\d+)", r"\1.0", text))
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "default.txt").write_text("".join(f"{name}\n" for name in truth()))
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\ncat:9,8,7::\ndog:1,2,3::\n")


def cvat_yolo_parts(root: Path) -> None:
    for part, names in (("Train", truth(6)), ("Validation", truth(4, 6))):
        write_images(root / f"obj_{part}_data", names)
        write_yolo(root / f"obj_{part}_data", names)
        (root / f"{part}.txt").write_text("\n".join(f"data/obj_{part}_data/{name}.jpg" for name in names))
    (root / "obj.names").write_text("".join(f"{name}\n" for name in CLASSES))
    (root / "obj.data").write_text("classes = 2\ntrain = data/Train.txt\nvalid = data/Validation.txt\n")


def cvat_ultralytics(root: Path) -> None:
    yolo(root)
    settings = {"path": ".", "train": "train.txt", "val": "val.txt", "names": dict(enumerate(CLASSES))}
    (root / "data.yaml").write_text(yaml.safe_dump(settings))
    for split, names in (("train", truth(6)), ("val", truth(4, 6))):
        (root / f"{split}.txt").write_text("".join(f"data/images/{split}/{name}.jpg\n" for name in names))


def label_studio_coco(root: Path, folder: str = "images/") -> None:
    """Names of uploads begin with a code."""
    write_images(root / "images", truth())
    write_coco(root / "result.json", truth(), f"{folder}1f0c2d3e-")
    for path in (root / "images").iterdir():
        path.rename(path.with_name(f"1f0c2d3e-{path.name}"))
    content = json.loads((root / "result.json").read_text())
    for entry in content["annotations"]:
        entry |= {"ignore": 0, "segmentation": []}
    content["info"] = {"year": 2024, "version": "1.0", "contributor": "Label Studio"}
    (root / "result.json").write_text(json.dumps(content))


def label_studio_coco_of_windows(root: Path) -> None:
    label_studio_coco(root, "..\\..\\label-studio\\media\\upload\\4\\")


def label_studio_voc(root: Path) -> None:
    write_images(root / "images", truth())
    write_voc(root / "Annotations", truth())
    for path in (root / "Annotations").iterdir():  # names without a suffix
        path.write_text(path.read_text().replace(".jpg</filename>", "</filename>"))


def labelme(root: Path) -> None:
    write_images(root, truth())
    for name, objects in truth().items():
        shapes = [
            {"label": CLASSES[label], "points": [corners[:2], corners[2:]], "shape_type": "rectangle"}
            for label, corners in objects
        ]
        content = {"shapes": shapes, "imagePath": f"{name}.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH}
        (root / f"{name}.json").write_text(json.dumps(content))


FORMATS: list[Callable[[Path], None]] = [
    *(roboflow_coco, coco_named_otherwise, voc, voc_with_sets, yolo, yolo_polygons, cvat_yolo, label_studio_yolo),
    *(cvat_coco, cvat_voc, cvat_yolo_parts, cvat_ultralytics),
    *(label_studio_coco, label_studio_coco_of_windows, label_studio_voc, labelme),
]


def read(root: Path, *overrides: str, masks: bool = False, **kwargs):
    given = ["output=o", "model.name=m", "data.kind=auto", f"data.root={root}", "data.workers=0", "train.batch_size=2"]
    config = load_config(None, [*given, *overrides], DetectConfig)
    return build_detection_data(config, masks=masks, device=torch.device("cpu"), **kwargs)


@pytest.mark.parametrize("write", FORMATS, ids=lambda each: each.__name__)
def test_every_format_gives_the_same_objects(write, tmp_path):
    write(tmp_path)
    data = read(tmp_path)
    assert list(data.categories.values()) == list(CLASSES)
    indices = [loader.dataset.index for loader in (data.train, data.val)]
    assert sum(map(len, indices)) == 10
    divided = (roboflow_coco, voc_with_sets, yolo, yolo_polygons, cvat_yolo_parts, cvat_ultralytics)
    if write in divided:
        assert [len(index) for index in indices] == [6, 4]
        assert not data.division.rows
    else:
        assert [len(index) for index in indices] == [8, 2]
        assert len(data.division.rows) == 10
    for index in indices:
        for number in range(len(index)):
            target = index.target(number)
            expected = truth()[Path(index.name(number)).stem.rpartition("-")[2].replace("_", " ")]
            assert target["labels"].tolist() == [label for label, _ in expected]
            assert torch.allclose(target["boxes"], torch.tensor([box for _, box in expected]).float(), atol=1e-4)


@pytest.mark.parametrize("write", [yolo_polygons, labelme, roboflow_coco], ids=lambda each: each.__name__)
def test_polygons_are_masks(write, tmp_path):
    write(tmp_path)
    target = read(tmp_path, masks=True).train.dataset.index.target(0)
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert target["masks"][0, y1:y2, x1:x2].all()
    assert target["masks"][0].sum() == (x2 - x1) * (y2 - y1)


def damaged_copies(write: Callable[[Path], None], folder: Path, count: int) -> Iterator[Path]:
    """Copies of a data set in which all files but images are truncated, or have up to three bytes changed."""
    (folder / "whole").mkdir()
    write(folder / "whole")
    random_bytes = random.Random(0)
    for trial in range(count):
        root = folder / str(trial)
        shutil.copytree(folder / "whole", root)
        for path in root.rglob("*"):
            if path.is_file() and path.suffix != ".jpg":
                content = bytearray(path.read_bytes())
                if trial % 2:
                    content = content[: random_bytes.randrange(len(content))]
                else:
                    for _ in range(3):
                        content[random_bytes.randrange(len(content))] = random_bytes.randrange(256)
                path.write_bytes(content)
        yield root


@pytest.mark.parametrize("write", FORMATS, ids=lambda each: each.__name__)
def test_damaged_files_are_errors_or_reported(write, tmp_path):
    """A DataError or fewer images, never another exception."""
    for root in damaged_copies(write, tmp_path, 25):
        with suppress(DataError):
            read(root)


@pytest.mark.parametrize("declared", ["<!DOCTYPE a [<!ENTITY x 'y'>]>", "<!DOCTYPE a SYSTEM 'file:///etc/passwd'>"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_document_types_are_refused(declared, encoding, tmp_path):
    text = f"<?xml version='1.0' encoding='{encoding}'?>{declared}<annotation/>"
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match="DOCTYPE"):
        read_xml(tmp_path / "a.xml")


def test_what_cannot_be_used_is_reported_by_name(tmp_path):
    yolo(tmp_path)
    label = tmp_path / "labels" / "train" / "im 0.txt"
    label.write_text("0 0.5 0.5 0.2 0.2\n0 20 10 8 8\n7 0.5 0.5 0.2 0.2\nx\n0 0.5 0.5")
    (tmp_path / "images" / "train" / "im 1.jpg").write_bytes(b"no image")
    (tmp_path / "labels" / "train" / "im 2.txt").unlink()
    data = read(tmp_path)
    counts = data.bad.reports[0].counts()
    assert sorted(counts.values()) == [1, 1, 1, 2]
    for value in ("class 7", "UnidentifiedImageError"):
        assert any(value in reason for reason in counts)
    rows = {(sample, row) for sample, row, _ in data.bad.reports[0].rows}
    assert rows == {*(("labels/train/im 0.txt", row) for row in (2, 3, 4, 5)), ("images/train/im 1.jpg", None)}
    assert any("im 2.jpg" in note for note in data.notes)


def change_boxes(root: Path, kind: str) -> None:
    """Writes the boxes of all files otherwise."""
    if kind.startswith("voc"):
        for path in root.rglob("*.xml"):
            tree = ElementTree.parse(path)
            for box in tree.iter("bndbox"):
                x1, y1, x2, y2 = (float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
                new = {"voc fractions": (x1 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y2 / HEIGHT)}
                new["voc sizes"] = (x2, y2, x2 - x1, y2 - y1)
                for key, value in zip(("xmin", "ymin", "xmax", "ymax"), new[kind], strict=True):
                    box.find(key).text = str(value)
            tree.write(path)
    for path in root.rglob("*.txt") if kind.startswith("yolo") else ():
        rows = [list(map(float, line.split())) for line in path.read_text().splitlines()]
        lines = []
        for label, x, y, w, h in rows:
            corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            pixels = [value * (WIDTH, HEIGHT)[i % 2] for i, value in enumerate(corners)]
            lines.append([int(label), *(pixels if kind == "yolo pixels" else corners)])
        path.write_text("\n".join(" ".join(map(str, line)) for line in lines))
    for path in root.rglob("*.json") if kind.startswith("labelme") else ():
        content = json.loads(path.read_text())
        for shape in content["shapes"]:
            shape["points"] = [[x / WIDTH, y / HEIGHT] for x, y in shape["points"]]
        path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("write", "kind", "named"),
    [
        (voc, "voc fractions", r"fractions.*im \d\.jpg"),
        (voc, "voc sizes", r"no area.*im \d\.jpg"),
        (yolo, "yolo corners", r"centre.*im \d\.jpg"),
        (yolo, "yolo pixels", r"no usable object.*not fractions.*im \d\.txt"),
        (labelme, "labelme fractions", r"fractions.*im \d\.jpg"),
    ],
)
def test_boxes_of_other_conventions_stop_the_run(write, kind, named, tmp_path):
    write(tmp_path)
    change_boxes(tmp_path, kind)
    with pytest.raises(DataError, match=named):
        read(tmp_path)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_a_held_out_part_alone_is_evaluated(task, split, tmp_path):
    if task == "classify":
        class_folders(tmp_path, split)
    elif task == "detect":
        write_images(tmp_path / split, truth())
        write_coco(tmp_path / split / "_annotations.coco.json", truth())
    else:
        write_masks(tmp_path / split, tmp_path / split, "_mask")
    found = labels_of(tmp_path, task=task, train=False)
    assert len(found.val) == (15 if task == "classify" else 10)
    assert found.lines()


def test_what_cannot_be_divided_is_said(tmp_path):
    voc(tmp_path)
    images = sorted((tmp_path / "images").iterdir())
    for path in images[1:]:
        shutil.copyfile(images[0], path)
    with pytest.raises(DataError, match=r"train 10, val 0|train 0, val 10"):
        read(tmp_path)
    (tmp_path / "mine.csv").write_text("images/im 0.jpg,train\n")
    with pytest.raises(DataError, match="train 1, val 0"):
        read(tmp_path, f"data.split={tmp_path / 'mine.csv'}")


def test_classes_are_named_ordered_and_left_out(tmp_path):
    voc(tmp_path)
    assert list(read(tmp_path, "data.classes=[dog,cat]").categories.values()) == ["dog", "cat"]
    alone = read(tmp_path, "data.classes=[dog]")
    assert list(alone.categories.values()) == ["dog"]
    assert set(alone.train.dataset.index.labels) == {0}
    assert any("cat 5" in note for note in alone.notes)
    with pytest.raises(DataError, match="dogs"):
        read(tmp_path, "data.classes=[dogs]")


def test_the_order_of_a_trained_models_classes_is_kept(tmp_path):
    voc(tmp_path)
    index = read(tmp_path, categories={5: "dog", 9: "cat"}, train=False).val.dataset.index
    assert (index.categories, len(index)) == ({5: "dog", 9: "cat"}, 10)
    expected = [label for name in sorted(truth()) for label, _ in truth()[name]]
    assert index.labels.tolist() == [1 - label for label in expected]


# classification and segmentation


def labels_of(root: Path, *overrides: str, task: str = "classify", train: bool = True):
    given = ["output=o", "model.name=m", "data.kind=auto", f"data.root={root}"]
    config = load_config(None, [*given, *overrides], SCHEMAS[task])
    return read_set(config, train=train)


def class_folders(root: Path, *above: str, counts: tuple[int, int] = (10, 5)) -> None:
    for name, count in zip(CLASSES, counts, strict=True):
        write_images(root.joinpath(*above, name), {f"{name} {i}": [] for i in range(count)})


def flat_with_table(root: Path, header: str = "id,breed") -> None:
    class_folders(root / "x")
    rows = [(path.stem, path.parent.name) for path in sorted(root.rglob("*.jpg"))]
    for path in sorted(root.rglob("*.jpg")):
        path.rename(root / path.name)
    (root / "labels.csv").write_text("\n".join([header, *map(",".join, rows)]))


def one_hot(root: Path) -> None:
    flat_with_table(root)
    lines = [line.split(",") for line in (root / "labels.csv").read_text().splitlines()[1:]]
    rows = [f"{name}.jpg, {int(label == 'cat')}, {int(label == 'dog')}" for name, label in lines]
    (root / "labels.csv").unlink()
    (root / "_classes.csv").write_text("\n".join(["filename, cat, dog", *rows]))


@pytest.mark.parametrize(
    "write", [class_folders, lambda root: class_folders(root, "archive", "all"), flat_with_table, one_hot]
)
def test_classified_images(write, tmp_path):
    write(tmp_path)
    found = labels_of(tmp_path)
    assert found.classes == list(CLASSES)
    assert found.by_class(found.train).tolist() == [8, 4]
    assert found.by_class(found.val).tolist() == [2, 1]
    for index in (found.train, found.val):
        assert all(found.classes[label] in index.name(i) for i, label in enumerate(index.label))


def test_splits_of_classified_images(tmp_path):
    class_folders(tmp_path, "training", counts=(4, 3))
    class_folders(tmp_path, "valid", counts=(2, 1))
    class_folders(tmp_path, "test", counts=(1, 1))
    found = labels_of(tmp_path)
    assert (len(found.train), len(found.val), found.division.rows) == (7, 3, [])
    assert any("test" in note for note in found.division.notes)
    assert len(labels_of(tmp_path, "data.val_split=test", train=False).val) == 2
    with pytest.raises(DataError, match="tests"):
        labels_of(tmp_path, "data.val_split=tests")


def test_rows_without_images_are_reported(tmp_path):
    flat_with_table(tmp_path)
    with (tmp_path / "labels.csv").open("a") as file:
        file.write("\nnowhere,cat\ncat 1,\nx\n")
    report = labels_of(tmp_path).train.report
    assert sorted(report.counts().values()) == [1, 2]
    assert "nowhere" in str(report)


def write_masks(images: Path, masks: Path, ending: str = "", values: tuple[int, ...] = (0, 1, 2)) -> None:
    write_images(images, {f"im {i}": [] for i in range(10)})
    masks.mkdir(parents=True, exist_ok=True)
    for i in range(10):
        mask = np.full((HEIGHT, WIDTH), values[0], np.uint8)
        mask[4:20, 5:30] = values[i % (len(values) - 1) + 1]
        Image.fromarray(mask).save(masks / f"im {i}{ending}.png")


@pytest.mark.parametrize(
    ("images", "masks", "ending"), [("a", "b", ""), (".", ".", ""), (".", ".", "_mask"), ("x/photos", "y", "_L")]
)
def test_masks_are_found_by_content(images, masks, ending, tmp_path):
    write_masks(tmp_path / images, tmp_path / masks, ending)
    found = labels_of(tmp_path, task="segment")
    assert found.classes == ["background", "class 1", "class 2"]
    assert (len(found.train), len(found.val)) == (8, 2)
    dataset = SegmentationDataset(found.train, 3, None, 0)
    sample = dataset.read(0)
    assert sorted(torch.as_tensor(sample["mask"]).unique().tolist())[0] == 0
    named = labels_of(tmp_path, "data.classes=[ground,tree,car]", task="segment")
    assert (named.classes, named.train.table[:4].tolist()) == (["ground", "tree", "car"], [0, 1, 2, -1])
    fewer = labels_of(tmp_path, "data.classes=[class 2,background]", task="segment")
    assert fewer.train.table[[0, 1, 2, 3, 255]].tolist() == [1, 255, 0, -1, 255]
    assert any("class 1" in note for note in fewer.found.notes)


def test_masks_of_0_and_255_are_background_and_object(tmp_path):
    write_masks(tmp_path / "a", tmp_path / "b", values=(0, 255))
    found = labels_of(tmp_path, task="segment")
    assert found.classes == ["background", "object"]
    assert found.train.table[[0, 255, 1]].tolist() == [0, 1, -1]


PAINT = {"#000000": "Void", "#804000": "Pole", "#c0c080": "Sky"}


def write_colours(images: Path, masks: Path, ending: str = "", void: str = "#000000") -> None:
    write_masks(images, masks, ending)
    colours = np.array([bytes.fromhex(colour[1:]) for colour in (void, *list(PAINT)[1:])]).view(np.uint8).reshape(3, 3)
    for path in masks.glob(f"*{ending}.png"):
        Image.fromarray(colours[np.asarray(Image.open(path))]).save(path)


def camvid(root: Path) -> None:
    """As published, and as it is on Kaggle."""
    write_colours(root / "701_StillsRaw_full", root / "LabeledApproved_full", "_L")
    lines = [" ".join(map(str, bytes.fromhex(colour[1:]))) + f"\t\t{name}" for colour, name in PAINT.items()]
    (root / "label_colors.txt").write_text("\n".join([*lines, "1 2 3\tBus"]))


def camvid_table(root: Path) -> None:
    write_colours(root / "images", root / "masks")
    lines = [",".join([name, *map(str, bytes.fromhex(colour[1:]))]) for colour, name in PAINT.items()]
    (root / "class_dict.csv").write_text("\n".join(["name,r,g,b", *lines]))


def cvat_masks(root: Path) -> None:
    write_colours(root / "JPEGImages", root / "SegmentationClass")
    (root / "SegmentationObject").mkdir()
    for path in (root / "SegmentationClass").iterdir():
        shutil.copyfile(path, root / "SegmentationObject" / path.name)
    lines = [f"{name}:{','.join(map(str, bytes.fromhex(colour[1:])))}::" for colour, name in PAINT.items()]
    (root / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]))
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "default.txt").write_text("\n".join(f"im {i}" for i in range(10)))


@pytest.mark.parametrize("write", [camvid, camvid_table, cvat_masks])
def test_colours_are_named_by_the_files_of_tools(write, tmp_path):
    write(tmp_path)
    found = labels_of(tmp_path, task="segment")
    assert found.classes == list(PAINT.values())
    assert found.found.values == PAINT
    mask = torch.as_tensor(SegmentationDataset(found.train, 3, None, 0).read(0)["mask"])
    assert (mask[0, 0], mask[5, 6] in (1, 2)) == (0, True)
    rest = labels_of(tmp_path, "data.classes=[Sky,Pole]", task="segment")
    labels = rest.val.table[[0x000000, 0x804000, 0xC0C080, 0x010101]]
    assert (rest.classes, labels.tolist()) == (["Sky", "Pole"], [255, 1, 0, -1])
    assert any("Void" in note for note in rest.found.notes)


def test_colours_without_names_are_proposed(tmp_path):
    write_colours(tmp_path / "a", tmp_path / "b", void="#e0e0c0")
    found = survey(tmp_path, task="segment")
    proposed = next(line for line in found.lines if "data.values=" in line).partition("data.values=")[2]
    assert (found.data.classes, found.wrong) == (["#804000", "#c0c080"], [])
    assert any("#804000, #c0c080" in note for note in found.data.found.notes)
    again = labels_of(tmp_path, f"data.values={proposed}", task="segment")
    assert (
        again.found.values == found.data.found.values == {"#804000": "#804000", "#c0c080": "#c0c080", "#e0e0c0": None}
    )
    named = labels_of(tmp_path, "data.classes=[pole,sky]", task="segment")
    assert named.train.table[[0x804000, 0xC0C080, 0xE0E0C0]].tolist() == [0, 1, 255]


def test_given_values_are_read_and_others_stop_the_run(tmp_path):
    write_colours(tmp_path / "a", tmp_path / "b")
    given = "data.values={'#804000': pole, '#c0c080': sky, '#000000': null}"
    assert labels_of(tmp_path, given, task="segment").train.table[[0x804000, 0xC0C080, 0]].tolist() == [0, 1, 255]
    with pytest.raises(DataError, match=r"#c0c080.*data\.values.*b/im 1\.png"):
        labels_of(tmp_path, "data.values={'#804000': pole, '#000000': ground}", task="segment")
    write_masks(tmp_path / "c" / "a", tmp_path / "c" / "b", values=(0, 255, 1, 7))
    given = labels_of(tmp_path / "c", "data.values={0: no, 255: yes, other: null}", task="segment")
    assert (given.classes, given.train.table[[0, 255, 1]].tolist()) == (["no", "yes"], [0, 1, 255])
    with pytest.raises(DataError, match=r"1, 7.*data\.values"):
        labels_of(tmp_path / "c", "data.values={0: no, 255: yes}", task="segment")
    first = labels_of(tmp_path / "c", "data.reduce_zero_label=true", "data.ignore_label=7", task="segment")
    assert first.train.table[[0, 1, 7, 255]].tolist() == [255, 0, 255, 1]


def test_masks_divided_by_lists(tmp_path):
    cvat_masks(tmp_path)
    lists = tmp_path / "ImageSets" / "Segmentation"
    for split, numbers in (("Train", range(6)), ("Validation", range(6, 9))):  # CVAT's names of parts
        (lists / f"{split}.txt").write_text("\n".join(f"im_{i}" for i in numbers))
    for path in tmp_path.rglob("im *.*"):
        path.rename(path.with_name(path.name.replace(" ", "_")))
    found = labels_of(tmp_path, task="segment")
    assert (len(found.train), len(found.val), found.division.rows) == (6, 3, [])


def test_a_segmenter_of_colours_is_evaluated_as_it_was_trained(tmp_path):
    camvid(tmp_path / "data")
    run = tmp_path / "run"
    options = [
        *("data.kind=auto", f"data.root={tmp_path / 'data'}", f"output={run}", "schedule.epochs=1", "data.workers=0"),
        *("model.name=test_foveal_dinat", "train.batch_size=4", "train.threads=1", "augment.crop_size=[32,32]"),
        *("data.classes=[Sky,Pole]", "log.trackers=[]", "model.head=semantic_fpn", "model.head_kwargs.channels=32"),
        *("model.neck_kwargs.out_channels=16", "model.auxiliary=false"),
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: segment\n")
    first = train(recipe, options, "segment")
    again = evaluate(run)
    assert again["n"] == 2
    assert list(again["classes"]) == ["Sky", "Pole"]
    assert again["miou"] == pytest.approx(first["miou"], abs=1e-3)


def test_values_named_by_roboflow(tmp_path):
    write_masks(tmp_path / "train", tmp_path / "train", "_mask", values=(0, 2))
    (tmp_path / "train" / "_classes.csv").write_text("Pixel Value, Class\n0, ground\n1, tree\n2, car\n")
    found = labels_of(tmp_path, task="segment")
    assert found.classes == ["ground", "car"]


def test_labelme2voc(tmp_path):
    write_masks(tmp_path / "JPEGImages", tmp_path / "SegmentationClass")
    for name in ("SegmentationClassVisualization", "SegmentationObjectVisualization"):
        shutil.copytree(tmp_path / "JPEGImages", tmp_path / name)
    shutil.copytree(tmp_path / "SegmentationClass", tmp_path / "SegmentationObject")
    (tmp_path / "SegmentationClassNpy").mkdir()
    np.save(tmp_path / "SegmentationClassNpy" / "im 0.npy", np.zeros((HEIGHT, WIDTH), np.int32))
    (tmp_path / "class_names.txt").write_text("_background_\ncat\ndog\n")
    found = labels_of(tmp_path, task="segment")
    assert (found.classes, len(found.train), len(found.val)) == (["_background_", "cat", "dog"], 8, 2)


def test_shapes_are_drawn(tmp_path):
    labelme(tmp_path)
    found = labels_of(tmp_path, task="segment")
    assert found.classes == ["background", *CLASSES]
    dataset = SegmentationDataset(found.train, 3, None, 0)
    mask = torch.as_tensor(dataset.read(0)["mask"])
    ((label, (x1, y1, x2, y2)), _) = truth()[Path(found.train.name(0)).stem]
    assert mask[y1:y2, x1:x2].unique().tolist() == [label + 1]
    assert mask[0, 0] == 0
    Path(found.train.mask_name(0)).write_text("{")
    with pytest.raises(ValueError, match=r"\.json"):
        dataset.read(0)


def test_a_folder_without_annotations_says_what_it_has(tmp_path):
    write_images(tmp_path, truth())
    with pytest.raises(DataError, match=r"10 \.jpg"):
        read(tmp_path)


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_draws_by_class(count):
    names = [str(i) for i in range(count)]
    classes = [i % 3 for i in range(count)]
    held_out = draw(names, classes, 0.2, seed=3)
    assert abs(held_out.sum() - 0.2 * count) <= 1
    assert held_out.any()
    assert not held_out.all()
    assert (draw(names[::-1], classes[::-1], 0.2, seed=3)[::-1] == held_out).all()
    if count > 50:
        assert all(abs(held_out[k::3].mean() - 0.2) < 0.03 for k in range(3))
        assert (draw(names, classes, 0.2, seed=4) != held_out).any()


def test_splits_by_name():
    assert [split_of(text) for text in ("valid/a.jpg", "instances_train2017.json", "trainval/x", "a/Test", "b")] == [
        *("val", "train", "", "test", "")
    ]


def test_a_run_keeps_its_split(tmp_path):
    voc(tmp_path / "data")
    run = tmp_path / "run"
    options = [
        *("data.kind=auto", f"data.root={tmp_path / 'data'}", f"output={run}", "schedule.epochs=1", "data.workers=0"),
        *("model.name=test_foveal_dinat", "model.head=fcos", "train.batch_size=4", "train.threads=1"),
        *("data.min_size=32", "data.max_size=40", "augment.min_size=[32]", "augment.max_size=40", "log.trackers=[]"),
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: detect\n")
    first = train(recipe, options, "detect")
    with (run / "split.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows].count("val") == 2
    for i in range(10, 30):  # what comes later changes nothing
        write_images(tmp_path / "data" / "images", {f"im {i}": []})
    write_voc(tmp_path / "data" / "annotations", truth(20, 10))
    again = evaluate(run)
    assert again["n"] == 2
    assert again["box_ap"] == pytest.approx(first["box_ap"], abs=1e-3)


@pytest.mark.parametrize(
    ("task", "write"),
    [
        ("classify", flat_with_table),
        ("classify", one_hot),
        ("segment", labelme),
        ("segment", lambda root: write_masks(root / "a", root / "b")),
    ],
)
def test_damaged_tables_shapes_and_masks(task, write, tmp_path):
    """A DataError, fewer images, or an unreadable sample; never another exception."""
    for root in damaged_copies(write, tmp_path, 20):
        try:
            found = labels_of(root, task=task)
        except DataError:
            continue
        for number in range(len(found.train) if task == "segment" else 0):
            SegmentationDataset(found.train, 3, None, 0)[0, number]


def test_a_list_of_ones_own_divides(tmp_path):
    voc(tmp_path / "data")
    rows = [f"images/im {i}.jpg,{'val' if i < 3 else 'train'}" for i in range(9)]
    (tmp_path / "mine.csv").write_text("\n".join(["image,split", *rows, "images/gone.jpg,val"]))
    data = read(tmp_path / "data", f"data.split={tmp_path / 'mine.csv'}")
    held_out = data.val.dataset.index
    assert sorted(Path(held_out.name(i)).name for i in range(len(held_out))) == ["im 0.jpg", "im 1.jpg", "im 2.jpg"]
    assert data.train.samples == 6
    assert any("im 9.jpg" in note for note in data.notes)  # in no part
    assert any("gone.jpg" in note for note in data.notes)
    with pytest.raises(DataError, match=r"no\.csv"):
        read(tmp_path / "data", "data.split=no.csv")


# what is said before anyone trains


def test_files_of_one_content_stay_together_when_a_split_is_drawn(tmp_path):
    voc(tmp_path)
    images = sorted((tmp_path / "images").iterdir())
    for path in images[1:6]:
        shutil.copyfile(images[0], path)
    found = survey(tmp_path)
    assert not found.wrong
    assert any(f"{images[1].name} = images/{images[0].name}" in note for note in found.data.division.notes)


def test_survey_counts_and_names(tmp_path):
    yolo(tmp_path)
    (tmp_path / "clip.mov").write_bytes(b"")
    (tmp_path / "images" / "._im 0.jpg").write_bytes(b"")
    (tmp_path / "images" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "more").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "more" / "extra.png")
    found = survey(tmp_path)
    text = "\n".join(found.lines)
    assert "1 image files are not used: more/extra.png" in text
    assert "2 hidden files and folders are ignored: images/._im 0.jpg, images/.ipynb_checkpoints" in text
    assert not found.wrong
    assert (found.data.task, found.data.found.format) == ("detect", "YOLO")
    assert re.search(r"cat +3 +2\n +dog +9 +6", text)
    assert "40x32" in text
    assert "clip.mov" in text
    assert all(name in found.data.lines()[2] for name in ("clip.mov", "extra.png", "._im 0.jpg"))
    assert draw_sheet(found.data, tmp_path / "sheet.png") == 6
    assert Image.open(tmp_path / "sheet.png").size == (4 * 240, 2 * 240)


def test_survey_finds_what_would_be_wrong(tmp_path):
    yolo(tmp_path)
    shutil.copyfile(tmp_path / "images" / "train" / "im 0.jpg", tmp_path / "images" / "val" / "im 6.jpg")
    for path in (tmp_path / "labels" / "train").iterdir():
        path.write_text("1 0.5 0.5 0.2 0.2")
    (tmp_path / "images" / "train" / "im 3.jpg").write_bytes(b"")
    wrong = " ".join(survey(tmp_path).wrong)
    assert "im 6.jpg" in wrong
    assert "cat" in wrong
    assert "max_bad_fraction" in wrong
    assert CliRunner().invoke(app, ["data", str(tmp_path)]).exit_code == 1


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_survey_finds_the_task(task, tmp_path):
    if task == "classify":
        class_folders(tmp_path)
    else:
        write_masks(tmp_path / "a", tmp_path / "b")
    result = CliRunner().invoke(app, ["data", str(tmp_path), "--draw", str(tmp_path / "sheet.png")])
    assert (result.exit_code, f"for {task}" in result.output) == (0, True)
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize("settings", ["names: [no, 1.10]", "names: {0: no, 1: 1.10}"])
def test_names_of_a_yaml_file_are_taken_as_their_text(tmp_path, settings):
    yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(f"train: images/train\nval: images/val\ntest: null\n{settings}\n")
    found = read_yolo_files(Files(tmp_path))
    assert found.names == {0: "no", 1: "1.10"}
    assert found.notes == []


@pytest.mark.parametrize("crumb", [[], [[1, 1, 2, 2]], {"size": [9, 9], "counts": [81]}], ids=str)
def test_survey_counts_masks_that_cannot_be_used(crumb, tmp_path):
    write_images(tmp_path / "images", truth())
    write_coco(tmp_path / "objects.json", truth())
    content = json.loads((tmp_path / "objects.json").read_text())
    for entry in content["annotations"][:4]:
        entry["segmentation"] = crumb
    (tmp_path / "objects.json").write_text(json.dumps(content))
    counts = re.findall(r"(\d+) (?:x (?:no )?mask|of 20 objects)", "\n".join(survey(tmp_path).lines))
    assert sum(map(int, counts)) == 4
