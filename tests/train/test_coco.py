"""COCO annotations: what is read, what is refused and named, what augmentation does to it, and average precision."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as oracle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import tv_tensors

from foveal.configs.schema import DetectAugmentConfig, DetectConfig, load_config
from foveal.train.data import BadSamples, Data, DataError, DetectionBatch, build_detection_data
from foveal.train.data.coco import read_coco
from foveal.train.data.dataset import DetectionDataset
from foveal.train.data.dense_transforms import LazyMasks, detection_transform
from foveal.train.data.guard import Report
from foveal.train.data.index import DetectionIndex
from foveal.train.data.validate import CLIPPED, MEASURED, REPAIRED, sum_runs
from foveal.train.detection_metrics import CocoScorer, average_precision

HEIGHT, WIDTH = 40, 60
SQUARE = [[5, 5, 25, 5, 25, 25, 5, 25]]


def content(annotations: list[dict], images: int = 1) -> dict:
    return {
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(images)],
        "annotations": [
            {"id": 1 + i, "image_id": 10, "category_id": 4, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0} | entry
            for i, entry in enumerate(annotations)
        ],
        "categories": [{"id": 90, "name": "kite"}, {"id": 4, "name": "dog"}, {"id": 17, "name": "cup"}],
    }


def write(folder: Path, what: dict) -> Path:
    for image in what["images"]:
        if not (folder / image["file_name"]).exists():
            Image.new("RGB", (image["width"], image["height"]), (90, 120, 150)).save(folder / image["file_name"])
    file = folder / "instances.json"
    file.write_text(json.dumps(what))
    return file


def read(folder: Path, what: dict, masks: bool = True) -> tuple[DetectionIndex, Report]:
    index = read_coco(write(folder, what), folder, masks=masks)
    return index, index.report


def build(folder: Path, *, training: bool = True, **data) -> Data:
    """The loaders of one annotation file for training and evaluation."""
    config = load_config(None, [], DetectConfig, {"output": "-", "model": {"name": "-"}})
    for split in ("train", "val"):
        setattr(config.data, f"{split}_annotations", "instances.json")
        setattr(config.data, f"{split}_images", "")
    for key, value in ({"root": str(folder), "workers": 0} | data).items():
        setattr(config.data, key, value)
    config.train.batch_size = 1
    return build_detection_data(config, masks=False, device=torch.device("cpu"), train=training)


def packed(mask: np.ndarray) -> dict:
    code = oracle.encode(np.asfortranarray(mask))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def unpacked(mask: np.ndarray) -> dict:
    flat = np.concatenate([[0], mask.T.ravel(), [2]])
    runs = np.diff(np.flatnonzero(np.diff(flat) != 0), prepend=0)
    return {"size": list(mask.shape), "counts": runs.tolist()}


def test_categories_with_gaps_are_numbered_by_id(tmp_path):
    index, bad = read(tmp_path, content([{"category_id": c, "segmentation": SQUARE} for c in (90, 4, 17)]))
    assert index.categories == {4: "dog", 17: "cup", 90: "kite"}
    assert index.target(0)["labels"].tolist() == [2, 0, 1]
    assert [a["category_id"] for a in index.truth([0])["annotations"]] == [90, 4, 17]
    assert not bad.rows


@pytest.mark.parametrize(("box", "named"), [([0.1, 0.2, 0.5, 0.6], "fractions"), ([20, 10, 50, 35], "corners")])
def test_boxes_that_are_not_cocos_stop_the_run(tmp_path, box, named):
    what = content([{"bbox": box}, {"bbox": [5, 5, 20, 20]}])
    assert len(read(tmp_path, what, masks=False)[0].boxes) == 2  # one of them alone is no convention
    what["annotations"][1]["bbox"] = box
    with pytest.raises(DataError, match=rf"{named}.*0\.png.*{re.escape(str(float(box[0])))}"):
        read(tmp_path, what, masks=False)


@pytest.mark.parametrize("area", [None, 1050])
def test_corners_are_known_by_their_areas(tmp_path, area):
    """Small ones near the origin look like boxes; COCO's areas say what they are."""
    what = content([{"bbox": [2, 2, 37, 32], "area": area}, {"bbox": [1, 2, 8, 9], "area": area and 49}])
    if area is None:
        assert len(read(tmp_path, what, masks=False)[0].boxes) == 2
        return
    with pytest.raises(DataError, match=r"corners.*0\.png"):
        read(tmp_path, what, masks=False)


def test_boxes_without_area_stop_the_run(tmp_path):
    what = content([{"bbox": [30, 20, -10, -5]}, {"bbox": [30, 20, 0, 5]}, {"bbox": [5, 5, 20, 20]}])
    with pytest.raises(DataError, match=r"no area.*0\.png.*-10"):
        read(tmp_path, what, masks=False)


NAMES = [".\\a\\x.png", "./a/x.png", "a/x.png", "C:\\photos\\a\\x.png", "/data/photos/a/x.png", "../../up/a/x.png"]


@pytest.mark.parametrize("name", [*NAMES, "..\\..\\media\\4\\a\\x.png"])
@pytest.mark.parametrize("kind", ["coco", "auto"])
def test_names_of_files_as_others_write_them(tmp_path, name, kind):
    """The same name occurs in two folders: the longest end of the path decides."""
    what = content([{"image_id": 10 + i} for i in range(4)], images=4)
    write(tmp_path, what)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (WIDTH, HEIGHT), (len(folder), 0, 0)).save(tmp_path / folder / "x.png")
    what["images"][0]["file_name"] = name
    (tmp_path / "instances.json").write_text(json.dumps(what))
    data = build(tmp_path, kind=kind, training=False)
    index = data.val.dataset.index
    assert Path(index.name(0)).resolve() == (tmp_path / "a" / "x.png").resolve()
    if not name.startswith((".\\", "./", "a/")):
        assert any(name in note and "another path" in note for note in data.notes)


@pytest.mark.parametrize("kind", ["coco", "auto"])
def test_ambiguous_names_are_an_error_with_the_candidates(tmp_path, kind):
    what = content([{}], images=2)
    write(tmp_path, what)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / folder / "x.png")
    what["images"][0]["file_name"] = "elsewhere/x.png"
    (tmp_path / "instances.json").write_text(json.dumps(what))
    with pytest.raises(DataError, match=r"elsewhere/x\.png.*a/x\.png.*b/x\.png"):
        build(tmp_path, kind=kind, training=False)


@pytest.mark.parametrize("kind", ["coco", "auto"])
def test_an_image_stands_for_one_name_alone(tmp_path, kind):
    what = content([{}, {"image_id": 11}], images=3)
    write(tmp_path, what)
    (tmp_path / "a").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "a" / "x.png")
    (tmp_path / "1.png").unlink()
    for number, name in enumerate(("a/x.png", "b/x.png")):
        what["images"][number]["file_name"] = name
    (tmp_path / "instances.json").write_text(json.dumps(what))
    data = build(tmp_path, kind=kind, training=False, max_bad_fraction=0.5)
    assert [Path(name).parent.name for name in data.bad.names] == ["b"]
    assert len(data.val.dataset.index) == 2


IDS = {
    "text": (["a", "b"], ["cat", "dog"]),
    "large": ([2**63, 2**64 + 1], [2**70, 5]),
    "digits": (["10", "9"], ["17", "4"]),
    "fractions": ([10.0, 9.0], [17.0, 4.0]),
    "mixed": ([10, "b"], [17, "4"]),
}


@pytest.mark.parametrize("kind", ["coco", "auto"])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_ids_of_any_kind(tmp_path, ids, kind):
    """They are read, said, and kept in results; objects may name them as numbers or text."""
    images, categories = ids
    what = content([], images=2)
    for entry, key in zip(what["images"], images, strict=True):
        entry["id"] = key
    what["categories"] = [{"id": key, "name": name} for key, name in zip(categories, ("kite", "dog"), strict=True)]
    for i in range(4):
        entry = {"id": i, "image_id": images[i % 2], "category_id": categories[i // 2], "area": 400, "iscrowd": 0}
        entry["image_id"] = str(entry["image_id"]).removesuffix(".0") if i == 3 else entry["image_id"]
        what["annotations"].append(entry | {"bbox": [5 + 10 * (i // 2), 5, 20, 20]})
    write(tmp_path, what)
    data = build(tmp_path, kind=kind, training=False)
    index = data.val.dataset.index
    assert {"dog", "kite"} == set(index.categories.values())
    assert all(type(key) is int for key in index.categories)
    assert any(repr(images[0]) in note or repr(images[1]) in note for note in data.notes)
    scorer = CocoScorer(index, masks=False)
    boxes = np.array([[5.0, 5, 25, 25], [15, 5, 35, 25]])
    order = [list(index.categories.values()).index(name) for name in ("kite", "dog")]
    scorer.found = [(number, boxes, np.array([0.9, 0.8]), np.array(order), None) for number in range(2)]
    results = scorer.results()
    assert [entry["image_id"] for entry in results] == [images[0], images[0], images[1], images[1]]
    if kind == "coco":
        assert [entry["category_id"] for entry in results[:2]] == categories
    metrics = scorer.compute()
    assert metrics["box_ap"] == 100
    assert [figures["objects"] for figures in scorer.by_class] == [2, 2]
    json.dumps(results)


def test_ids_that_are_none_are_named(tmp_path):
    for wrong in (None, "", True, 1.5, [1]):
        what = content([{}])
        what["images"][0]["id"] = wrong
        with pytest.raises(DataError, match=r"images\.0\.id"):
            read(tmp_path, what)
    what = content([{}], images=2)
    what["images"][1]["id"] = "10"
    with pytest.raises(DataError, match="id: 10"):
        read(tmp_path, what)


@pytest.mark.parametrize("kind", ["coco", "auto"])
def test_classes_are_named_ordered_and_left_out(tmp_path, kind):
    write(tmp_path, content([{"category_id": c} for c in (90, 4, 4, 17)], images=2))
    data = build(tmp_path, kind=kind, training=kind == "coco", classes=["kite", "dog"])
    assert data.categories == {90: "kite", 4: "dog"}
    index = data.val.dataset.index
    assert index.labels.tolist() == [0, 1, 1]
    assert [entry["category_id"] for entry in index.truth([0])["annotations"]] == [90, 4, 4]
    assert any("1 objects of other classes" in note and "cup" in note for note in data.notes)
    with pytest.raises(DataError, match=r"'kit'.*kite"):
        build(tmp_path, kind=kind, classes=["kit", "dog"])
    if kind == "coco":  # a trained model's order
        index = read_coco(tmp_path / "instances.json", tmp_path, masks=False, categories={4: "dog"}, classes=["dog"])
        assert (index.categories, index.labels.tolist()) == ({4: "dog"}, [0, 0])


@pytest.mark.parametrize("kind", ["coco", "auto"])
def test_nothing_but_crowds_stops_with_the_first(tmp_path, kind):
    """To learn and to score; with images without objects kept, too."""
    entries = [{"image_id": 10 + i % 3, "iscrowd": 1} for i in range(6)]
    for i in range(3):
        Image.new("RGB", (WIDTH, HEIGHT), (i, 0, 0)).save(tmp_path / f"{i}.png")
    write(tmp_path, content(entries, images=3))
    for training, word in ((True, "learned"), (False, "scored")):
        with pytest.raises(DataError, match=rf"[46] objects.*{word}.*0\.png: dog at \[5\.0.*crowd.*1\.png"):
            build(tmp_path, kind=kind, training=training, keep_empty=True, val_fraction=0.4)
    entries[0]["iscrowd"] = 0
    write(tmp_path, content(entries, images=3))
    assert build(tmp_path, kind=kind, training=False).val.samples == 3


def test_the_three_forms_of_masks(tmp_path):
    """Polygons, of one and of several parts, and both kinds of run lengths, against pycocotools."""
    blob = np.zeros((HEIGHT, WIDTH), np.uint8)
    blob[3:30, 10:41] = np.random.default_rng(0).random((27, 31)) < 0.7
    blob[0, 0] = 1  # begins with a one: the first run is empty
    parts = [[5.5, 5.2, 25.1, 7, 20, 30.7], [30, 5, 50, 5, 50.4, 22.6, 31, 20]]
    index, bad = read(tmp_path, content([{"segmentation": s} for s in (parts, unpacked(blob), packed(blob))]))
    masks = index.target(0)["masks"]
    assert masks.shape == (3, HEIGHT, WIDTH)
    assert masks.dtype == torch.uint8
    expected = oracle.decode(oracle.merge(oracle.frPyObjects(parts, HEIGHT, WIDTH)))
    for mask, other in zip(masks, (expected, blob, blob), strict=True):
        assert np.array_equal(mask.numpy(), other)
    assert not bad.rows


def test_run_lengths_are_checked_before_they_are_decoded():
    draw = np.random.default_rng(1)
    for density in (0.01, 0.3, 0.9, 1.0, 0.0):
        mask = (draw.random((97, 131)) < density).astype(np.uint8)
        text = packed(mask)["counts"]
        assert sum_runs(text) == 97 * 131
        assert sum_runs(text + "1") != 97 * 131
    long = np.zeros((3000, 2000), np.uint8)
    long[1234:, 1000:1500] = 1
    assert sum_runs(packed(long)["counts"]) == long.size
    for damaged in ("", "P", "\x00", "hello world", "ü", "oooooooooooo0"):
        assert sum_runs(damaged) == -1


def test_crowds_are_not_learned_and_are_ignored_by_the_evaluation(tmp_path):
    crowd = np.zeros((HEIGHT, WIDTH), np.uint8)
    crowd[:20] = 1
    entries = [{"segmentation": SQUARE}, {"segmentation": unpacked(crowd), "iscrowd": 1, "bbox": [0, 0, 60, 20]}]
    index, bad = read(tmp_path, content(entries))
    assert len(index.target(0)["labels"]) == 1
    truth = index.truth([0])
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 1]
    assert not bad.rows
    # a detection on the crowd costs nothing, the same one elsewhere does
    sure = {"image_id": 10, "category_id": 4}
    right = sure | {"bbox": [5, 5, 20, 20], "score": 0.5}
    assert average_precision(truth, [right, sure | {"bbox": [30, 2, 20, 15], "score": 0.9}], "box")[0]["box_ap"] == 100
    assert average_precision(truth, [right, sure | {"bbox": [30, 22, 20, 15], "score": 0.9}], "box")[0]["box_ap"] < 60


ENTIRE = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
BAD = {
    "image is not in the file": {"image_id": 99},
    "category is not in the file": {"category_id": 5},
    "box is not four numbers": {"bbox": [1, 2, 3]},
    "box has no area": {"bbox": [5, 5, 0, 20]},
    "box lies outside the image": {"bbox": [61, 5, 10, 10]},
    "no mask": {"segmentation": []},
    "mask size differs from the image": {"segmentation": {"size": [20, 60], "counts": [1200]}},
    "mask's run lengths don't fill the image": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "PPYo0"}},
    "mask is neither polygons nor run lengths": {"segmentation": "square"},
    "mask is empty": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}},
    "iscrowd is neither 0 nor 1": {"iscrowd": "0"},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_annotations_are_named_and_counted(tmp_path, reason):
    index, bad = read(tmp_path, content([{"segmentation": SQUARE}, {"segmentation": SQUARE} | BAD[reason]]))
    assert bad.counts() == {reason: 1}
    assert bad.rows[0][1] == 2
    assert len(index.target(0)["labels"]) == 1
    samples = BadSamples(0.0)
    samples.reports.append(bad)
    samples.write(tmp_path / "bad_samples.csv")
    with (tmp_path / "bad_annotations.csv").open() as file:
        row = next(csv.DictReader(file))
    assert row["image"] == ("99" if "image_id" in BAD[reason] else "0.png")
    assert row["reason"] == reason
    assert not (tmp_path / "bad_samples.csv").exists()  # no image is unreadable


@pytest.mark.parametrize(
    "entry",
    [
        *({"bbox": b} for b in (None, "5555", [5, 5, "20", 20], [5, 5, float("nan"), 20], [5, 5, 10**400, 20])),
        *({"image_id": i} for i in (None, [10], "11", True)),
        {"category_id": {}},
        *({"segmentation": s} for s in (7, [[]], [["a"] * 6], {}, {"size": [HEIGHT, WIDTH]}, [SQUARE])),
        *({"segmentation": s} for s in ([], None, [[1, 2, 3, 4]], [[1, 2, 3, 1e7, 5, 6]])),
        *({"segmentation": {"size": [HEIGHT, WIDTH], "counts": c}} for c in ([-1, 2401], [2401])),
        {"segmentation": {"size": [20, 60], "counts": [0, 1200]}},
    ],
    ids=lambda entry: str(entry)[:40],
)
def test_nonsense_is_dropped_with_a_reason(tmp_path, entry):
    index, bad = read(tmp_path, content([{"segmentation": SQUARE}, {"segmentation": SQUARE} | entry]))
    assert len(bad.rows) == 1
    assert len(index.target(0)["labels"]) == 1
    truth = index.truth([0])
    assert len(truth["annotations"]) == 1 + ("segmentation" in entry)  # without a mask it keeps its box
    if "segmentation" in entry:  # as COCO's tools count an object of an empty mask
        found = [{"image_id": 10, "category_id": 4, "score": 0.9, "segmentation": packed(polygon(SQUARE))}]
        known = COCO()
        known.dataset = json.loads(json.dumps(truth))
        known.dataset["annotations"][1]["segmentation"] = packed(np.zeros((HEIGHT, WIDTH), np.uint8))
        known.createIndex()
        assert average_precision(truth, found, "mask")[0]["mask_ap"] == pytest.approx(theirs(known, found, "segm"))


def theirs(known: COCO, results: list[dict], kind: str) -> float:
    """pycocotools' AP, in percent."""
    evaluation = COCOeval(known, known.loadRes(results), kind)
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return 100 * evaluation.stats[0]


def polygon(segment: list) -> np.ndarray:
    return oracle.decode(oracle.merge(oracle.frPyObjects(segment, HEIGHT, WIDTH)))


@pytest.mark.parametrize("crumb", [[1, 2, 3, 4], [], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 1e7, 5, 6]], ids=str)
def test_a_crumb_of_a_polygon_leaves_the_object(tmp_path, crumb):
    index, bad = read(tmp_path, content([{"segmentation": [*SQUARE, crumb]}, {"segmentation": SQUARE}]))
    assert bad.counts() == {REPAIRED: 1}
    assert torch.equal(index.target(0)["masks"][0], torch.from_numpy(polygon(SQUARE)))
    assert index.target(0)["masks"][0].equal(index.target(0)["masks"][1])


def test_objects_with_damaged_masks_count_as_cocos_tools_count_them(tmp_path, capsys):
    """pycocotools' own figure of the same file."""
    draw = np.random.default_rng(0)
    what = content([])
    for i in range(12):
        x, y = (float(value) for value in draw.uniform(0, 15, 2))
        box = [x, y, 20.0, 20.0]
        corners = [x, y, x + 20, y, x + 20, y + 20, x, y + 20]
        segment = ([corners, [1, 2, 3, 4]], [], {"size": [20, 60], "counts": [1200]}, [corners])[i % 4]
        entry = {"id": i + 1, "image_id": 10 + i % 6, "category_id": 4, "bbox": box, "area": 400.0, "iscrowd": 0}
        what["annotations"].append(entry | {"segmentation": segment})
    what["images"] = content([], 6)["images"]
    results = [
        {"image_id": e["image_id"], "category_id": 4, "score": float(draw.random())}
        | {"bbox": [e["bbox"][0] + float(draw.uniform(0, 5)), *e["bbox"][1:]]}
        for e in what["annotations"]
    ]
    index, _ = read(tmp_path, what)
    ours = average_precision(index.truth(range(6)), results, "box")[0]["box_ap"]
    known = COCO(str(tmp_path / "instances.json"))
    assert 10 < ours < 100
    assert ours == pytest.approx(theirs(known, results, "bbox"))
    # masks: an empty list of polygons is more than pycocotools reads
    for entry in known.dataset["annotations"]:
        entry["segmentation"] = entry["segmentation"] or packed(np.zeros((HEIGHT, WIDTH), np.uint8))
    for result in results:
        x, y, w, h = result.pop("bbox")
        result["segmentation"] = packed(polygon([[x, y, x + w, y, x + w, y + h, x, y + h]]))
    masks = average_precision(index.truth(range(6)), results, "mask")[0]["mask_ap"]
    assert 5 < masks < ours
    assert masks == pytest.approx(theirs(known, results, "segm"))


def test_areas_that_are_not_given_or_make_no_sense_are_measured(tmp_path):
    """Of the mask, or where there is none of the box; only what the file gives wrongly is reported."""
    triangle = [[5, 5, 25, 5, 25, 25]]
    pixels = int(oracle.area(oracle.merge(oracle.frPyObjects(triangle, HEIGHT, WIDTH))))
    assert pixels < 250
    entries = [{"segmentation": triangle, "area": area} for area in (7, None, -1, "400")]
    for masks, measured in ((True, pixels), (False, 400)):
        index, bad = read(tmp_path, content(entries), masks=masks)
        assert index.areas.tolist() == [7, measured, measured, measured]
        assert index.usable.all()
        assert bad.counts() == {MEASURED: 2}


def test_masks_are_not_needed_for_boxes(tmp_path):
    index, bad = read(tmp_path, content([{"segmentation": []}, {}]), masks=False)
    assert len(index.target(0)["labels"]) == 2
    assert "masks" not in index.target(0)
    assert not bad.rows


def test_boxes_beyond_the_image_are_clipped_for_training_and_reported(tmp_path):
    boxes = [[-10, -5, 30, 20], [50, 30, 10.4, 10], [20, 10, 100, 100]]
    index, bad = read(tmp_path, content([{"bbox": b, "segmentation": SQUARE} for b in boxes]))
    assert index.target(0)["boxes"].tolist() == [[0, 0, 20, 15], [50, 30, 60, 40], [20, 10, 60, 40]]
    assert bad.counts() == {CLIPPED: 2}  # not the one that is off by rounding
    assert [a["bbox"] for a in index.truth([0])["annotations"]] == boxes  # measured as COCO's own tool would


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (json.dumps(content([{}]))[:150], "JSON"),
        ("", "JSON"),
        ("[1, 2]", r"\[1, 2\]"),
        (json.dumps({**content([]), "annotations": [1]}), "annotations.*1"),
        (json.dumps(content([]) | {"images": [], "licenses": []}), "images"),
        ('{"images": []}', "annotations|categories|images"),
        (json.dumps(content([]) | {"categories": []}), "categories"),
        (json.dumps(content([]) | {"categories": [{"id": 1, "name": "a"}] * 2}), "categories .*id: 1"),
        (json.dumps(content([]) | {"images": [{"id": 1, "file_name": "a"}]}), r"images\.0\.height.*'a'"),
        (json.dumps(content([]) | {"images": content([])["images"] * 2}), "images .*id: 10"),
    ],
)
def test_files_that_are_not_coco(tmp_path, text, names):
    file = tmp_path / "instances.json"
    file.write_text(text)
    with pytest.raises(DataError, match=names) as caught:
        read_coco(file, tmp_path, masks=True)
    assert str(file) in str(caught.value)


def test_a_missing_file_and_other_categories(tmp_path):
    with pytest.raises(DataError, match=r"none\.json"):
        read_coco(tmp_path / "none.json", tmp_path, masks=True)
    file = write(tmp_path, content([{}]))
    with pytest.raises(DataError, match=r"\{17: 'cup'\}"):
        read_coco(file, tmp_path, masks=False, categories={4: "dog", 90: "kite", 17: "mug"})


def test_images_without_objects_are_left_out_or_kept(tmp_path):
    entries = [{"segmentation": SQUARE}, {"image_id": 12, "segmentation": SQUARE, "iscrowd": 1}, {"image_id": 13}]
    write(tmp_path, content(entries, images=4))
    for keep, expected in ((False, [10, 13]), (True, [10, 11, 12, 13])):
        data = build(tmp_path, keep_empty=keep)
        assert data.train.dataset.index.image_ids.tolist() == expected
        assert data.val.dataset.index.image_ids.tolist() == [10, 11, 12, 13]  # the evaluation takes them all
        assert len(data.notes) == (0 if keep else 1)
    index, _ = read(tmp_path, content(entries, images=4))
    assert index.objects().tolist() == [1, 0, 0, 0]  # the last one has no mask
    index.select(np.array([1, 0]))
    assert index.target(0)["boxes"].shape == (0, 4)
    assert index.target(0)["masks"].shape == (0, HEIGHT, WIDTH)
    assert index.target(1)["masks"].sum() > 0
    write(tmp_path, content(entries[1:2], images=4))
    with pytest.raises(DataError, match=r"2\.png.*crowd"):
        build(tmp_path)


def test_missing_images_are_named_and_too_many_stop(tmp_path):
    write(tmp_path, content([{"image_id": 10 + i, "bbox": [i, 5, 20, 20]} for i in range(5)], images=5))
    (tmp_path / "1.png").unlink()
    data = build(tmp_path, max_bad_fraction=0.5, limit=3)
    index = data.train.dataset.index
    assert [Path(index.name(i)).name for i in range(3)] == ["0.png", "2.png", "3.png"]
    assert index.target(1)["boxes"][0, 0] == 2  # annotations moved with their images
    assert list(data.bad.names) == [str(tmp_path / "1.png")]
    assert "1.png" in " ".join(data.notes)
    with pytest.raises(DataError, match=r"1 of 5 .*1\.png"):
        build(tmp_path, max_bad_fraction=0.1)
    with pytest.raises(DataError, match=r" 5 .*elsewhere"):
        build(tmp_path, train_images="elsewhere")


def test_unreadable_images_are_replaced_in_training_and_left_out_in_evaluation(tmp_path):
    what = content([{"image_id": 10 + i, "bbox": [i, 5, 20, 20]} for i in range(3)], images=3)
    file = write(tmp_path, what)
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "1.png")  # of another size
    index = read_coco(file, tmp_path, masks=False)
    training = DetectionDataset(index, 3, detection_transform(DetectAugmentConfig()), seed=0)
    sample, found = training[0, 0]
    assert (sample["number"], len(sample["boxes"])) == (2, 1)
    assert [name for name, _ in found] == [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    assert "40x60" in found[1][1]
    assert "60x40" in found[1][1]
    sample, found = DetectionDataset(index, 3, None, seed=0)[0, 1]
    assert sample is None
    assert len(found) == 1


def test_what_is_left_out_is_said(rectangles):
    file = rectangles / "annotations" / "instances_train.json"
    what = json.loads(file.read_text())
    what["annotations"][0]["bbox"] = [0, 0, 0, 0]
    what["images"].append({"id": 1, "file_name": "gone.png", "height": 64, "width": 80})
    file.write_text(json.dumps(what))
    paths = {f"{split}_images": split for split in ("train", "val")}
    paths |= {f"{split}_annotations": f"annotations/instances_{split}.json" for split in ("train", "val")}
    data = build(rectangles, max_bad_fraction=0.1, **paths)
    faults, missing, empty = data.notes
    assert re.search(r"\b1 .*\(000\.png\)", faults)
    assert "gone.png" in missing
    assert "1 images" in empty
    assert data.train.samples == 15

    file = rectangles / "annotations" / "instances_val.json"
    what = json.loads(file.read_text())
    what["annotations"] = [entry | {"iscrowd": 1} for entry in what["annotations"]]
    file.write_text(json.dumps(what))
    with pytest.raises(DataError, match=r"instances_val\.json"):
        build(rectangles, max_bad_fraction=0.1, **paths)


def bounds(mask: torch.Tensor) -> torch.Tensor:
    rows, columns = (mask.any(1 - d).nonzero().flatten() for d in (0, 1))
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


@pytest.mark.parametrize(
    "changes",
    [
        {"min_size": [50, 64, 72], "max_size": 90},
        {"min_size": [40, 70], "sampling": "range", "vflip": 0.5},
        {"min_size": [60], "crop_prob": 1.0, "crop_min_size": [70, 90], "crop_size": [45, 65]},
        {"final_crop_size": [60, 72], "scale_jitter": [0.3, 2.0]},
    ],
    ids=["sizes", "range", "crop", "scale_jitter"],
)
def test_augmentation_keeps_boxes_masks_and_pixels_together(rectangles, changes):
    config = DetectAugmentConfig(**changes)
    folder = rectangles / "train"
    index = read_coco(rectangles / "annotations/instances_train.json", folder, masks=True)
    dataset = DetectionDataset(index, 3, detection_transform(config), seed=3)
    sizes, objects = set(), 0
    nearest = 2.5 if config.crop_prob else 1.5  # a mask's edge moves by up to a pixel each time it is resized
    for number in range(len(dataset)):
        target, _ = dataset[5, number]
        image = target["image"]
        sizes.add(tuple(image.shape[-2:]))
        assert image.dtype == torch.uint8
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            assert mask.shape == image.shape[-2:]
            x1, y1, x2, y2 = box.round().int().tolist()
            assert 0 <= x1 < x2 <= image.shape[-1]
            assert 0 <= y1 < y2 <= image.shape[-2]
            if mask.any() and min(x2 - x1, y2 - y1) > 4:
                assert (bounds(mask) - box).abs().max() <= nearest
                inside = image[:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].float().mean((1, 2))
                assert inside.argmax() == (0, 1)[label]  # red is 3, green is 7
                objects += 1
    assert objects > 8
    assert len(sizes) > 1
    if config.scale_jitter:
        assert all(rows <= 60 and columns <= 72 for rows, columns in sizes)
        assert (60, 72) in sizes  # larger than that, and cut
        assert min(min(size) for size in sizes) < 40
        return
    assert all(min(size) <= max(config.min_size) and max(size) <= config.max_size for size in sizes)
    if config.sampling == "choice" and not config.crop_prob:
        assert {min(size) for size in sizes} == {50, 64, 72}


def test_what_is_drawn_depends_on_seed_epoch_and_number_alone(detect_recipe):
    """The same batches from one process and from two, from the start or from the middle; others in other epochs."""
    config = load_config(detect_recipe, [], DetectConfig)

    def batches(workers: int, epoch: int, start: int = 0) -> list:
        config.data.workers = workers
        return list(build_detection_data(config, masks=True, device=torch.device("cpu")).train.epoch(epoch, start))

    alone, others = batches(0, 1), batches(2, 1)
    assert len(alone) == 4
    for a, b in zip(alone, others, strict=True):
        assert a.numbers == b.numbers
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
        for s, t in zip(a.targets, b.targets, strict=True):
            assert all(torch.equal(s[key], t[key]) for key in ("boxes", "labels", "masks"))
    later = batches(0, 1, start=2)
    assert [b.numbers for b in later] == [b.numbers for b in alone[2:]]
    assert torch.equal(later[0].images[0], alone[2].images[0])
    assert [b.numbers for b in batches(0, 2)] != [b.numbers for b in alone]


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(DataError, match=r"\[640, 700, 800\]"):
        detection_transform(DetectAugmentConfig(min_size=[640, 700, 800], sampling="range"))
    with pytest.raises(DataError, match=r"augment\.crop_size=\[600, 384\]"):
        detection_transform(DetectAugmentConfig(crop_size=[600, 384]))
    with pytest.raises(DataError, match=r"augment\.scale_jitter=\[0\.1, 2\.0\].*augment\.final_crop_size=None"):
        detection_transform(DetectAugmentConfig(scale_jitter=[0.1, 2.0]))


def test_colours_change_and_nothing_else(tmp_path):
    """Every image another way, no channel for another, and alike for the same draws."""
    grey = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    grey[..., 0] += 60
    Image.fromarray(grey).save(tmp_path / "0.png")
    index, _ = read(tmp_path, content([{}]), masks=False)
    config = DetectAugmentConfig(hflip=0, min_size=[40], max_size=60, photometric=True)
    dataset = DetectionDataset(index, 3, detection_transform(config), seed=0)
    seen = [dataset[epoch, 0][0] for epoch in range(20)]
    assert len({tuple(sample["image"][:, 0, 0].tolist()) for sample in seen}) > 10
    for sample in seen:
        image = sample["image"]
        assert image.dtype == torch.uint8
        assert (image == image[:, :1, :1]).all()
        assert image[0, 0, 0] > image[1:, 0, 0].max()
        assert sample["boxes"].tolist() == [[5, 5, 25, 25]]
    assert torch.equal(dataset[3, 0][0]["image"], seen[3]["image"])


def random_results(draw: np.random.Generator, truth: dict) -> list[dict]:
    """Detections near the truth and beside it, with masks, some of them of wrong classes and many with equal scores."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    ids = [c["id"] for c in truth["categories"]]
    results = []
    for entry in truth["annotations"] * 3:
        height, width = sizes[entry["image_id"]]
        x, y, w, h = np.array(entry["bbox"]) + draw.normal(0, 4, 4)
        w, h = max(w, 2), max(h, 2)
        mask = np.zeros((height, width), np.uint8)
        mask[max(int(y), 0) : int(y + h), max(int(x), 0) : int(x + w)] = draw.random() < 0.95
        category = entry["category_id"] if draw.random() < 0.8 else int(draw.choice(ids))
        results.append(
            {
                "image_id": entry["image_id"],
                "category_id": category,
                "score": float(draw.integers(1, 20)) / 20,
                "bbox": [float(v) for v in (x, y, w, h)],
                "segmentation": packed(mask),
            }
        )
    return results


def random_truth(draw: np.random.Generator, images: int = 12) -> dict:
    truth = content([], images=images)
    for image in truth["images"]:
        image["height"], image["width"] = 240, 320
        for _ in range(draw.integers(0, 9)):
            w, h = np.exp(draw.uniform(np.log(8), np.log(230), 2))
            x, y = draw.uniform(0, 320 - w), draw.uniform(0, 240 - h)
            mask = np.zeros((240, 320), np.uint8)
            mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image["id"],
                    "area": float(mask.sum()),
                    "category_id": int(draw.choice([4, 17, 90])),
                    "bbox": [float(v) for v in (x, y, w, h)],
                    "iscrowd": int(draw.random() < 0.15),
                    "segmentation": unpacked(mask),
                }
            )
    return truth


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_average_precision_is_cocos(kind, capsys):
    """Against pycocotools, on random detections with crowds, ties and three sizes."""
    draw = np.random.default_rng(7)
    truth = random_truth(draw)
    results = random_results(draw, truth)
    ours, _ = average_precision(json.loads(json.dumps(truth)), results, kind)
    known = COCO()
    known.dataset = json.loads(json.dumps(truth))
    known.createIndex()
    drop = {"box": "segmentation", "mask": "bbox"}[kind]
    found = known.loadRes([{k: v for k, v in r.items() if k != drop} for r in results])
    evaluator = COCOeval(known, found, {"box": "bbox", "mask": "segm"}[kind])
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    assert list(ours) == [f"{kind}_{name}" for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")]
    assert list(ours.values()) == pytest.approx([100 * v for v in evaluator.stats[:6]], abs=1e-6)
    assert 10 < ours[f"{kind}_ap"] < 90


def test_scorer_finds_what_was_annotated(tmp_path):
    """The annotations themselves as detections: 100, for boxes and masks, with categories that have gaps."""
    draw = np.random.default_rng(3)
    index, bad = read(tmp_path, random_truth(draw))
    assert not bad.rows
    scorer = CocoScorer(index, masks=True)
    for number in range(len(index)):
        target = index.target(number)
        found = target | {"scores": torch.ones(len(target["labels"])), "masks": target["masks"][:, None].float()}
        scorer.add(DetectionBatch([], [], [number]), [found])
    figures = scorer.compute()
    assert figures == pytest.approx(dict.fromkeys(figures, 100.0))


def test_nothing_found_is_zero_and_an_absent_size_is_none(tmp_path):
    index, _ = read(tmp_path, content([{"segmentation": SQUARE}]))
    scorer = CocoScorer(index, masks=True)
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    scorer.add(DetectionBatch([], [], [0]), [nothing | {"masks": torch.zeros(0, 1, HEIGHT, WIDTH)}])
    figures = scorer.compute()
    assert figures["box_ap"] == figures["mask_ap"] == figures["box_ap_small"] == 0
    assert figures["box_ap_large"] is None


def test_crowded_scenes_count_as_many_as_are_asked_for():
    """300 of 300 objects found: a third of them count by COCO's limit, all by one of 300."""
    boxes = [[10 * (i % 20), 10 * (i // 20), 8, 8] for i in range(300)]
    entries = [{"image_id": 1, "category_id": 3, "bbox": box, "area": 64, "iscrowd": 0} for box in boxes]
    truth = {
        "images": [{"id": 1, "height": 200, "width": 200}],
        "annotations": [entry | {"id": i + 1} for i, entry in enumerate(entries)],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
    }
    found = [entry | {"score": 0.9} for entry in entries]
    assert average_precision(truth, found, "box")[0]["box_ap"] == pytest.approx(33.66, abs=0.01)
    total, by_class = average_precision(truth, found, "box", 300)
    assert total["box_ap"] == 100
    assert [figures["box_ap50"] for figures in by_class] == [100, None]


def test_precision_by_class_is_that_of_each_class_alone():
    draw = np.random.default_rng(0)
    entries = [
        {"id": i + 1, "image_id": i % 4, "category_id": int(draw.integers(1, 4)), "iscrowd": 0, "area": 400.0}
        | {"bbox": [*draw.integers(0, 60, 2).tolist(), 20, 20]}
        for i in range(60)
    ]
    images = [{"id": i, "height": 100, "width": 100} for i in range(4)]
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    found = []
    for entry in entries[:50]:
        x, y, w, h = entry["bbox"]
        shift = draw.integers(-4, 5, 2).tolist()
        kept = {key: entry[key] for key in ("image_id", "category_id")}
        found.append(kept | {"bbox": [x + shift[0], y + shift[1], w, h], "score": float(draw.random())})
    truth = {"images": images, "annotations": entries, "categories": categories}
    total, by_class = average_precision(truth, found, "box")
    for number, figures in enumerate(by_class, 1):
        own = [entry for entry in entries if entry["category_id"] == number]
        alone = {"images": images, "annotations": own, "categories": [categories[number - 1]]}
        assert average_precision(alone, [e for e in found if e["category_id"] == number], "box")[0] == figures
    assert total["box_ap"] == pytest.approx(np.mean([figures["box_ap"] for figures in by_class]))


@pytest.mark.parametrize(
    "settings",
    [
        {"min_size": [70, 200], "max_size": 260},
        {"crop_prob": 1.0, "crop_min_size": [150, 90], "crop_size": [40, 90], "min_size": [64, 33]},
        {"scale_jitter": [0.3, 2.0], "final_crop_size": [60, 50], "photometric": True},
    ],
)
def test_masks_are_decoded_after_the_transforms_to_the_same_pixels(settings, tmp_path):
    draw = np.random.default_rng(0)
    height, width = 97, 131
    segments = [(draw.random((8, 2)) * (width, height)).ravel().tolist() for _ in range(6)]
    codes = [oracle.merge(oracle.frPyObjects([each], height, width)) for each in segments]
    masks = torch.from_numpy(np.stack([oracle.decode(code) for code in codes]))
    boxes = torch.tensor([[min(s[::2]), min(s[1::2]), max(s[::2]), max(s[1::2])] for s in segments])
    transform = detection_transform(DetectAugmentConfig(hflip=0.5, vflip=0.5, **settings))
    image = torch.from_numpy(draw.integers(0, 256, (3, height, width), dtype=np.uint8))
    for seed in range(20):
        found = []
        for own in (tv_tensors.Mask(masks), LazyMasks.of(codes, height, width)):
            torch.manual_seed(seed)
            sample = {
                "image": tv_tensors.Image(image),
                "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
                "labels": torch.arange(len(codes)),
                "masks": own,
            }
            found.append(transform(sample))
        eager, lazy = found
        assert torch.equal(eager["labels"], lazy["labels"])
        assert torch.equal(eager["masks"].as_subclass(torch.Tensor), lazy["masks"].decode())
        assert eager["masks"].shape[-2:] == lazy["image"].shape[-2:]
    no = torch.zeros(len(codes), dtype=torch.bool)
    assert lazy["masks"][no[: len(lazy["masks"])]].decode().shape == (0, *lazy["image"].shape[-2:])


MEMORY = """
import json, sys
import numpy as np
from foveal.configs.schema import DetectAugmentConfig
from foveal.train.data.coco import index_objects
from foveal.train.data.dataset import DetectionDataset
from foveal.train.data.dense_transforms import detection_transform
from pathlib import Path

draw = np.random.default_rng(0)
annotations = []
for number in range(100):
    x, y = draw.integers(0, 5000), draw.integers(0, 3000)
    corners = (draw.random((12, 2)) * 900 + (x, y)).ravel().tolist()
    box = {"bbox": [int(x), int(y), 900, 900], "area": 1, "iscrowd": 0}
    annotations.append({"id": number + 1, "image_id": 1, "category_id": 1, "segmentation": [corners], **box})
images = [{"id": 1, "file_name": "a.png", "height": 4000, "width": 6000}]
content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
index = index_objects("-", Path(sys.argv[1]), content, masks=True)
dataset = DetectionDataset(index, 3, detection_transform(DetectAugmentConfig()), 0)
# not ru_maxrss, which begins at that of the process that started this one
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
sample = dataset[0, 0][0]
assert len(sample["masks"]) > 90, sample["masks"].shape
print((peak() - before) / 2**10)
"""


@pytest.mark.slow
def test_masks_of_a_large_image_take_no_memory_of_its_size(tmp_path):
    """100 objects in an image of 6000x4000: all masks at once would be 2.3 GiB."""
    Image.new("RGB", (6000, 4000)).save(tmp_path / "a.png")
    run = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 800  # MiB
