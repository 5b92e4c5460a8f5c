"""Detection runs from beginning to end: what they leave, that they can be stopped, gone on with, measured and used."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import ExifTags, Image
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from typer.testing import CliRunner

from foveal.cli import app
from foveal.configs.schema import ConfigError, DetectConfig, load_config
from foveal.heads.checkpoint import load_dense, save_dense
from foveal.train import detect, evaluate, predict, tasks, train
from foveal.train.checkpoint import CheckpointError
from foveal.train.data import DataError, build_detection_data
from foveal.train.detect import mask_polygon

from .conftest import DETECT, stopped, write_rectangles

MASKS = [
    "model.head=mask_rcnn",
    "model.neck_kwargs.out_channels=32",
    "model.head_kwargs={box_width: 32, mask_width: 32, rpn_post_nms_top_n_train: 50, rpn_post_nms_top_n_test: 50, "
    "box_batch_size_per_image: 16, box_detections_per_img: 20}",
]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> list[tuple[str, ...]]:
    return [(r["epoch"], r["lr"], r["train_loss"], r["val_loss"], r["box_ap"]) for r in rows(run)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of Mask R-CNN with averaged weights that learned the rectangles; its data are beside it."""
    folder = tmp_path_factory.mktemp("finished")
    root = write_rectangles(folder / "rectangles", {"train": 16, "val": 6})
    recipe = folder / "quick.yaml"
    recipe.write_text(DETECT.replace("data:\n", f"data:\n  root: {root}\n"))
    more = ["schedule.epochs=6", "train.eval_interval=3", "train.ema_decay=0.8", "optim.lr=3e-3", "optim.clip_grad=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect.Task, "pictures", 2)
        train(recipe, [f"output={folder / 'run'}", "seed=1", *MASKS, *more], "detect")
    return folder / "run"


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Runs without figures, which take longer than these runs."""
    monkeypatch.setattr(detect.Task, "draw", lambda *_: None)
    monkeypatch.setattr(detect.plots, "curves", lambda *_: None)


def test_what_a_run_leaves(finished):
    names = {p.name for p in finished.iterdir()}
    assert names == {
        *("config.yaml", "metrics.csv", "curves.png", "predictions.png", "pictures", "tensorboard", "environment.json"),
        *("summary.json", "classes.csv", "best", "last", "last.old", "report.html"),
    }
    assert {p.name for p in (finished / "best").iterdir()} == {"config.json", "model.safetensors"}
    assert {p.name for p in (finished / "pictures").iterdir()} == {"epoch_003.png", "epoch_006.png"}
    with Image.open(finished / "pictures" / "epoch_006.png") as picture:
        assert picture.width > 1000  # two images, each twice
    found = rows(finished)
    assert [r["box_ap"] != "" for r in found] == [False, False, True] * 2
    assert found[-1]["mask_ap_large"] == ""  # no object is that large
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["box_ap"] == max(float(r["box_ap"]) for r in found if r["box_ap"])
    assert (summary["head"], summary["epochs"]) == ("mask_rcnn", 6)
    config = json.loads((finished / "best" / "config.json").read_text())
    assert (config["classes"], config["category_ids"]) == (["red", "green"], [3, 7])
    assert load_config(finished / "config.yaml", [], DetectConfig).train.ema_decay == 0.8


def test_it_learns(finished):
    """A little, in its 24 updates: an untrained detector finds next to nothing."""
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["box_ap50"] > 8
    assert summary["mask_ap50"] > 8
    assert float(rows(finished)[-1]["train_loss"]) < 0.8 * float(rows(finished)[0]["train_loss"])
    assert [row["val_loss"] == "" for row in rows(finished)] == [True, True, False] * 2
    assert "held-out loss" in (finished / "report.html").read_text()


def test_masks_that_cannot_be_used_leave_no_held_out_loss_which_is_said(finished, tmp_path):
    file = finished.parent / "rectangles" / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    for entry in content["annotations"]:
        entry["segmentation"] = [[1, 1, 2, 2]]
    (tmp_path / "crumbs.json").write_text(json.dumps(content))
    with (tmp_path / "printed").open("w") as printed:
        result = evaluate(finished, [f"data.val_annotations={tmp_path / 'crumbs.json'}"], Console(file=printed))
    assert result["loss"] is None
    text = (tmp_path / "printed").read_text()
    assert text.count("held-out loss") == 1
    assert f"{len(content['annotations'])} held-out objects" in text


def test_evaluate_gives_the_recorded_figures_and_pycocotools_too(finished, tmp_path):
    """From the run, its best/ and a copy elsewhere; and the predictions, in the ids of the file, by COCO's own tool."""
    root = finished.parent / "rectangles"
    shutil.copytree(finished / "best", tmp_path / "model")
    data = ["data.val_annotations=annotations/instances_val.json", "data.val_images=val", "data.workers=0"]
    summary = json.loads((finished / "summary.json").read_text())
    for source, overrides in (
        (finished, [f"predictions={tmp_path / 'found.json'}"]),
        (finished / "best", ["train.val_batch_size=1"]),
        (tmp_path / "model", [f"data.root={root}", *data]),
    ):
        result = evaluate(source, [f"output={tmp_path / 'result.json'}", *overrides])
        assert json.loads((tmp_path / "result.json").read_text()) == result
        assert result["n"] == 6
        for name in ("box_ap", "mask_ap", "box_ap_small"):
            assert result[name] == pytest.approx(summary[name], abs=1e-6 if source == finished else 0.5)
        assert result["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)  # of each image by itself
    known = COCO(str(root / "annotations" / "instances_val.json"))
    for kind, name in (("bbox", "box_ap"), ("segm", "mask_ap")):
        evaluator = COCOeval(known, known.loadRes(str(tmp_path / "found.json")), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        assert 100 * evaluator.stats[0] == pytest.approx(summary[name], abs=1e-6)


def test_evaluate_says_what_is_missing(finished, tmp_path):
    for source, overrides, error, names in (
        (finished, ["data.root=/none/such"], DataError, "/none/such"),
        (finished, ["data.rooot=1"], ConfigError, "data.rooot"),
        (finished / "best", ["data.val_images=train2"], DataError, "6 images"),
    ):
        with pytest.raises(error, match=names):
            evaluate(source, overrides)
    shutil.copy(finished / "config.yaml", tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        evaluate(tmp_path)


def test_other_categories_are_refused(finished, tmp_path):
    root = shutil.copytree(finished.parent / "rectangles", tmp_path / "other")
    file = root / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace('"red"', '"blue"'))
    with pytest.raises(DataError, match=r"\{3: 'blue'\}"):
        evaluate(finished, [f"data.root={root}"])


def test_predict_outputs_in_the_pixels_of_the_file(finished, tmp_path):
    """An image twice as large has the same objects at twice the places."""
    original = finished.parent / "rectangles" / "val" / "001.png"
    with Image.open(original) as image:
        image.resize((160, 128), Image.Resampling.NEAREST).save(tmp_path / "double.png")
    files = [original, tmp_path / "none.png", tmp_path / "double.png"]
    one, missing, two = predict(finished, files, threshold=0.1, output=tmp_path / "drawn")
    assert (one.path, one.error) == (str(original), None)
    assert isinstance(missing.error, OSError)
    assert missing.results == []
    assert {p.name for p in (tmp_path / "drawn").iterdir()} == {"001.png", "double.png"}
    assert len(one.results) == len(two.results) > 0
    for a, b in zip(one.results, two.results, strict=True):
        assert (a.label, a.category_id) == (b.label, b.category_id)
        assert a.category_id == {"red": 3, "green": 7}[a.label]
        assert b.score == pytest.approx(a.score, abs=1e-4)
        assert b.box == pytest.approx([2 * v for v in a.box], abs=0.05)
        assert 0 <= b.box[0] < b.box[2] <= 160
    assert [each.score for each in one.results] == sorted((each.score for each in one.results), reverse=True)


def test_photographs_are_turned_upright(finished, tmp_path):
    """Stored lying on its side with a tag that says so, an image has the objects of the same image standing up."""
    with Image.open(finished.parent / "rectangles" / "val" / "001.png") as image:
        image.save(tmp_path / "upright.png")
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees to the right
        image.rotate(90, expand=True).save(tmp_path / "lying.png", exif=exif)
    upright, lying = predict(finished, [tmp_path / "upright.png", tmp_path / "lying.png"], threshold=0.1)
    assert upright.results == lying.results
    assert upright.results


def test_drawings_replace_no_image_and_not_each_other(finished, tmp_path):
    original = finished.parent / "rectangles" / "val" / "001.png"
    mine = shutil.copy(original, tmp_path / "001.png")
    with pytest.raises(ValueError, match=re.escape(str(mine))):
        next(predict(finished, [mine], output=tmp_path))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "drawn" / "001.png"))):
        next(predict(finished, [original, mine], output=tmp_path / "drawn"))
    assert mine.read_bytes() == original.read_bytes()
    named = mine.rename(tmp_path / "$x_{$.png")  # no formula
    assert len(list(predict(finished, [named], threshold=0.1, output=tmp_path / "drawn"))) == 1
    assert (tmp_path / "drawn" / named.name).is_file()


def test_a_detector_that_was_saved_without_a_run(finished, tmp_path):
    """It predicts by what it is; to be measured it needs the ids of its classes."""
    model = load_dense(finished)
    save_dense(tmp_path, model, model.classes, {})
    image = finished.parent / "rectangles" / "val" / "001.png"
    found, same = (next(predict(source, [image], threshold=0.1)).results for source in (tmp_path, finished))
    assert [each.box for each in found] == [each.box for each in same]
    assert {each.category_id for each in found} <= {0, 1}
    with pytest.raises(ConfigError, match="category_ids"):
        evaluate(tmp_path, [f"data.root={image.parent.parent}"])


def test_what_a_folder_is_of(finished, tmp_path):
    assert [tasks.task_of(p) for p in (finished, finished / "best", "dinat_mini")] == ["detect", "detect", "classify"]
    for name, text, value in (
        ("config.yaml", "[a, b]", ""),
        ("config.yaml", "a: [", ""),
        ("config.yaml", "task: dance", ".*'dance'"),
        ("config.json", '{"format": "foveal-dense"}', ".*None"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name)) + value):
            tasks.task_of(tmp_path)


def test_the_commands(finished, tmp_path):
    image = finished.parent / "rectangles" / "val" / "001.png"
    result = CliRunner().invoke(
        app, ["predict", str(image), "none.png", "--model", str(finished), "--threshold", "0.2"]
    )
    assert result.exit_code == 1  # for the missing one
    assert " from (" in result.output
    assert "none.png" in result.output
    result = CliRunner().invoke(app, ["evaluate", str(finished), f"output={tmp_path / 'r.json'}"])
    assert result.exit_code == 0
    assert json.loads((tmp_path / "r.json").read_text())["model"] == "test_foveal_dinat"


def test_resumed_equals_uninterrupted(detect_recipe, tmp_path, monkeypatch, undrawn):
    """Stopped in the middle of an epoch and at the end of one, the continuation is the same to the last bit, whatever
    the number of loading processes."""
    options = ["train.ema_decay=0.9", "augment.crop_prob=0.5", "augment.crop_size=[40,60]", *MASKS]
    options += ["augment.crop_min_size=[64]", "data.limit=12", "data.val_limit=2"]
    train(detect_recipe, [f"output={tmp_path / 'whole'}", *options], "detect")

    original, stops = detect.Task.train_step, {2, 3}  # batches: 3 an epoch
    calls = []

    def step(self, model, batch, epoch):
        calls.append(epoch)
        if len(calls) in stops:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, model, batch, epoch)

    monkeypatch.setattr(detect.Task, "train_step", step)
    parts = [f"output={tmp_path / 'parts'}", "resume=auto", *options]
    for workers in (0, 2):
        assert stopped(detect_recipe, [*parts, f"data.workers={workers}"], "detect") == 130
    train(detect_recipe, parts, "detect")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name in ("model", "raw"):
        whole, parts = (
            safetensors.torch.load_file(tmp_path / run / f"last/{name}.safetensors") for run in ("whole", "parts")
        )
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_resume_refuses_another_model(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    options = [f"output={run}", "resume=auto", "model.drop_path_rate=0.3"]
    with pytest.raises(CheckpointError, match=rf"{run}/last.*model\.drop_path_rate .*0\.1.*0\.3"):
        train(run / "config.yaml", options)


def test_what_was_left_out_is_printed_and_written(detect_recipe, rectangles, tmp_path, capsys, undrawn):
    file = rectangles / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] = 0
    content["annotations"][1]["category_id"] = 99
    file.write_text(json.dumps(content))
    (rectangles / "val" / "003.png").unlink()
    run = tmp_path / "run"
    options = [f"output={run}", "schedule.epochs=1", "data.max_bad_fraction=0.2", "data.keep_empty=true"]
    options += ["data.limit=4"]
    train(detect_recipe, options, "detect")
    said = " ".join(capsys.readouterr().out.split())
    with (run / "bad_annotations.csv").open() as table:
        reasons = {r["annotation"]: r["reason"].split(" (")[0] for r in csv.DictReader(table)}
    assert list(reasons) == ["1", "2"]
    assert "box" in reasons["1"] and "category" in reasons["2"]
    assert all(f"1 x {reason}" in said for reason in reasons.values())
    with (run / "bad_samples.csv").open() as table:
        assert [Path(r["sample"]).name for r in csv.DictReader(table)] == ["003.png"]
    assert str(rectangles / "val" / "003.png") in said


def test_an_annotation_file_cut_short(detect_recipe, rectangles, tmp_path):
    file = rectangles / "annotations" / "instances_train.json"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"instances_train\.json.*JSON"):
        train(detect_recipe, [f"output={tmp_path / 'run'}"], "detect")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.name=dinat_minni", "dinat_minni"),
        ("model.head=yolo", r"model\.head.*'yolo'"),
        ("model.head_kwargs.score_tresh=1", "'score_tresh'.*score_thresh"),
        ("model.kwargs.colour=red", "colour"),
        ("model.neck_kwargs.out_channels=20", "fpn.*fcos"),
        ("model.checkpoint=none.safetensors", r"none\.safetensors"),
        ("model.frozen_stages=9", "frozen_stages=9"),
        ("data.root=null", r"data\.root"),
        ("data.val_annotations=none.json", r"none\.json"),
        ("augment.min_size=[]", r"augment\.min_size"),
        ("augment.crop_size=[10]", r"augment\.crop_size.*\[10\]"),
        ("train.batch_size=17", r"\b16\b.*\b17\b"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(detect_recipe, tmp_path, override, says):
    with pytest.raises((ConfigError, DataError), match=says):
        train(detect_recipe, [f"output={tmp_path / 'run'}", override], "detect")
    assert not (tmp_path / "run" / "last").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["train.amp=bf16", "model.head=retinanet", "optim.backbone_lr_ratio=0.1", "optim.layer_decay=0.7"],
        ["schedule.name=multistep", "schedule.milestones=[0.5]", "model.frozen_stages=1", "optim.name=sgd"],
        ["train.steps_per_epoch=2", "train.grad_accum_steps=2", "model.grad_checkpointing=true", "data.in_chans=1"],
    ],
    ids=lambda options: options[0],
)
def test_options_train(detect_recipe, tmp_path, options, undrawn):
    run = tmp_path / "run"
    few = ["schedule.epochs=1", "data.limit=8", "data.val_limit=2"]
    train(detect_recipe, [f"output={run}", *few, *options], "detect")
    assert float(rows(run)[0]["train_loss"]) > 0
    assert load_dense(run).config["preprocessing"]["in_chans"] == (1 if "data.in_chans=1" in options else 3)


@pytest.mark.slow
def test_two_processes_measure_every_image_once(detect_recipe, tmp_path):
    """Through accelerate and gloo, on the CPU, with batch norms over both: 5 held-out images, the figures of one."""
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "foveal"]
    options = [f"output={run}", "schedule.epochs=1", "data.val_limit=5", *MASKS]
    for command in (
        ("train", "detect", str(detect_recipe), *options),
        ("evaluate", str(run), f"output={tmp_path / 'two.json'}"),
    ):
        done = subprocess.run(
            [*launch, *command],
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    evaluate(run, [f"output={tmp_path / 'one.json'}"])
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert [two[name] for name in ("n", "box_ap", "mask_ap")] == [one[name] for name in ("n", "box_ap", "mask_ap")]
    best = json.loads((run / "summary.json").read_text())
    assert one["n"] == 5
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5) == pytest.approx(best["val_loss"], rel=1e-5)
    assert all(one[name] == pytest.approx(best[name], abs=1e-4) for name in ("box_ap", "mask_ap"))


def test_figures_of_classes_and_sets_without_annotations(detect_recipe, rectangles, tmp_path):
    run = tmp_path / "run"
    train(detect_recipe, [f"output={run}", "schedule.epochs=1", "eval.max_detections=7"], "detect")
    with (run / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    annotations = json.loads((rectangles / "annotations/instances_val.json").read_text())
    objects = Counter(each["category_id"] for each in annotations["annotations"])
    assert {row["class"]: int(row["objects"]) for row in rows} == {"red": objects[3], "green": objects[7]}
    assert "box_ap50" in rows[0]
    assert "red" in (run / "report.html").read_text()
    console = Console(record=True, width=200)
    result = evaluate(run, [f"predictions={tmp_path / 'found.json'}"], console)
    assert result["classes"]["red"]["objects"] == objects[3]
    assert result["box_ap"] == pytest.approx(
        np.mean([figures["box_ap"] for figures in result["classes"].values() if figures["box_ap"] is not None])
    )
    assert "green" in console.export_text()
    found = Counter(each["image_id"] for each in json.loads((tmp_path / "found.json").read_text()))
    assert found
    assert max(found.values()) <= 7
    more = evaluate(run, [f"predictions={tmp_path / 'found.json'}", "eval.max_detections=60"])
    assert more["n"] == 6
    assert max(Counter(each["image_id"] for each in json.loads((tmp_path / "found.json").read_text())).values()) > 7

    for content in (annotations | {"annotations": []}, {k: v for k, v in annotations.items() if k != "annotations"}):
        (rectangles / "annotations/instances_test.json").write_text(json.dumps(content))
        result = evaluate(run, ["data.val_annotations=annotations/instances_test.json"], console)
        assert result["box_ap"] is None
        text = console.export_text()
        assert "predictions.json" in text
        assert "box AP" not in text  # no table without a score
        assert len(json.loads((run / "predictions.json").read_text())) == sum(found.values())
        (run / "predictions.json").unlink()
    with pytest.raises(DataError, match="instances_test"):
        options = [f"output={tmp_path / 'other'}", "data.val_annotations=annotations/instances_test.json"]
        train(detect_recipe, options, "detect")


def test_predictions_of_a_folder_in_every_format(finished, rectangles, tmp_path):
    folder, out = rectangles / "val", tmp_path / "out"
    (folder / "more").mkdir()
    shutil.copy(folder / "000.png", folder / "more" / "000.png")
    (folder / "._000.png").write_bytes(b"hidden")
    found = list(predict(finished, [folder], threshold=0.1, output=out, formats=["drawn", "coco", "yolo", "masks"]))
    assert [Path(each.path).relative_to(folder).as_posix() for each in found] == [
        *(f"{i:03}.png" for i in range(6)),
        "more/000.png",
    ]
    assert sum(len(each.results) for each in found) > 0
    coco = COCO(str(out / "predictions.json"))
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == [each.path for each in found]
    assert {entry["id"]: entry["name"] for entry in coco.loadCats(coco.getCatIds())} == {3: "red", 7: "green"}
    for number, each in enumerate(found, 1):
        entries, place = coco.loadAnns(coco.getAnnIds(number)), Path(each.path).relative_to(folder).with_suffix("")
        assert [entry["category_id"] for entry in entries] == [result.category_id for result in each.results]
        lines = (out / "labels" / f"{place}.txt").read_text().split("\n")[:-1]
        for line, entry in zip(lines, entries, strict=True):
            label, *shape, score = map(float, line.split())
            mask = coco.annToMask(entry)
            if mask.any():
                polygon = (np.array(shape).reshape(-1, 2) * (80, 64)).ravel().tolist()
                code = run_lengths.merge(run_lengths.frPyObjects([polygon], 64, 80))
                assert run_lengths.iou([code], [entry["segmentation"]], [0])[0, 0] > 0.8
            else:
                (cx, cy, w, h), (x, y, width, height) = shape, entry["bbox"]
                assert (cx * 80, cy * 64, w * 80, h * 64) == pytest.approx(
                    (x + width / 2, y + height / 2, width, height), abs=1e-3
                )
            assert ((3, 7)[int(label)], score) == (entry["category_id"], pytest.approx(entry["score"], abs=1e-5))
        numbers = np.asarray(Image.open(out / "masks" / f"{place}.png"))
        assert set(np.unique(numbers)) <= set(range(len(entries) + 1))
        if entries:
            assert ((numbers == 1) == coco.annToMask(entries[0]).astype(bool)).all()
        assert (out / "drawn" / f"{place}.png").exists()
    assert (out / "classes.txt").read_text() == "red\ngreen\n"
    with pytest.raises(ValueError, match="'polygons'"):
        next(predict(finished, [folder], output=out, formats=["polygons"]))
    with pytest.raises(ValueError, match="nodevice"):
        next(predict(finished, [folder], device="nodevice"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        next(predict(finished, [tmp_path / "empty"]))
    result = CliRunner().invoke(
        app, ["predict", str(folder), "--model", str(finished), "--output", str(tmp_path / "cli"), "--format", "yolo"]
    )
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "cli" / "labels").rglob("*.txt"))) == 7


def test_predictions_of_a_video(finished, tmp_path):
    cv2 = pytest.importorskip("cv2", reason="reads videos")
    file = tmp_path / "film.avi"
    video = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 5, (80, 64))
    for number in range(3):
        video.write(np.full((64, 80, 3), (0, 0, 60 * number), np.uint8))  # blue, green, red
    video.release()
    found = list(predict(finished, [file], threshold=0, output=tmp_path / "out"))
    assert [each.path for each in found] == [f"{file}#{number}" for number in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"film_{i:06}.png" for i in range(3)]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        next(predict(finished, [tmp_path / "broken.mp4"]))


def test_balanced_sampling(detect_recipe, rectangles):
    """A class that one image of 16 has; the crowds of others are not learned."""
    path = rectangles / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    kept = next(each["image_id"] for each in content["annotations"] if each["category_id"] == 7)
    for each in content["annotations"]:
        each["iscrowd"] = int(each["category_id"] == 7 and each["image_id"] != kept)
    path.write_text(json.dumps(content))
    share = {}
    for sampling in ("uniform", "balanced"):
        config = load_config(detect_recipe, [f"data.sampling={sampling}", "data.keep_empty=true"], DetectConfig)
        data = build_detection_data(config, masks=False, device=torch.device("cpu"))
        seen = [target for epoch in range(10) for batch in data.train.epoch(epoch) for target in batch.targets]
        share[sampling] = sum(1 in target["labels"] for target in seen) / len(seen)
    assert share["uniform"] == 1 / 16
    assert share["balanced"] > 2 / 16


def test_polygons_of_masks_are_what_pycocotools_fills():
    """Parts and holes, too: by the even-odd rule."""
    rows, columns = np.mgrid[:60, :90]
    disc = (rows - 30) ** 2 + (columns - 40) ** 2 < 400
    ring = disc & ((rows - 30) ** 2 + (columns - 40) ** 2 > 100)
    parts = disc | (rows > 50) & (columns > 70) | (rows < 5) & (columns < 9)
    for mask in (disc, ring, parts, np.ones_like(disc), (rows == 3) & (columns == 5)):
        polygon = np.array(mask_polygon(mask)).reshape(-1, 2) * (90, 60)
        code = run_lengths.merge(run_lengths.frPyObjects([polygon.ravel().tolist()], 60, 90))
        filled = run_lengths.decode(code) > 0
        assert (filled & mask).sum() / (filled | mask).sum() > 0.95 or mask.sum() == 1
        assert len(polygon) < 200
    assert mask_polygon(np.zeros((4, 5), bool)) == []


def test_ids_as_text_and_classes_left_out_through_a_run(detect_recipe, rectangles, tmp_path):
    """Training and evaluation by the same recipe; results have the ids of the file."""
    for file in (rectangles / "annotations").iterdir():
        content = json.loads(file.read_text())
        for entry in content["images"]:
            entry["id"] = f"image {entry['id']}"
        for entry in content["annotations"]:
            entry |= {"image_id": f"image {entry['image_id']}", "category_id": {3: "r", 7: "g"}[entry["category_id"]]}
        for entry in content["categories"]:
            entry["id"] = entry["name"][0]
        file.write_text(json.dumps(content))
    run = tmp_path / "run"
    first = train(detect_recipe, [f"output={run}", "data.classes=[red]", "schedule.epochs=1"], "detect")
    again = evaluate(run, [f"predictions={tmp_path / 'found.json'}"])
    assert (again["n"], list(again["classes"])) == (6, ["red"])
    assert again["box_ap"] == pytest.approx(first["box_ap"], abs=1e-3)
    found = json.loads((tmp_path / "found.json").read_text())
    assert {entry["category_id"] for entry in found} == {"r"}
    assert {entry["image_id"] for entry in found} <= {f"image {number}" for number in range(100, 106)}
