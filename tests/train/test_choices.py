"""What the finetune recipes choose by the data, and that their short commands train."""

import re

import numpy as np
import pytest
import yaml
from rich.console import Console

from foveal.configs.schema import SCHEMAS, ConfigError, load_config
from foveal.train import evaluate, train
from foveal.train.choices import anchor_ratios, batch_size, choose

from .test_formats import class_folders, labelme, truth, voc, write_coco, write_images, write_masks, write_yolo

WRITE = {"classify": class_folders, "detect": voc, "segment": lambda root: write_masks(root / "a", root / "b")}
SMALL = ["model.name=test_foveal_dinat", "model.pretrained=false", "schedule.epochs=1", "log.trackers=[]"]


@pytest.mark.parametrize("task", ["classify", "segment", pytest.param("detect", marks=pytest.mark.slow)])
def test_the_short_command_trains(task, tmp_path):
    """Everything but the model and the number of epochs is the recipe's own choice; the run repeats them."""
    WRITE[task](tmp_path / "data")
    run = tmp_path / "run"
    given = [f"data.root={tmp_path / 'data'}", f"output={run}", *SMALL, "train.threads=1"]
    with (tmp_path / "out.txt").open("w") as out:
        summary = train("finetune", given, task, Console(file=out, width=2000))
    config = load_config(run / "config.yaml", (), SCHEMAS[task])
    assert (config.auto, config.schedule.epochs) == ([], 1)
    text = (tmp_path / "out.txt").read_text()
    names = load_config("finetune", given, SCHEMAS[task]).auto
    printed = re.search(r"chosen by the data.*", text).group()
    missing = [key for key in names if f"{key}=" not in printed]
    assert not missing
    assert "seed=" in text
    result = evaluate(run)
    monitor = {"classify": "top1", "detect": "box_ap", "segment": "miou"}[task]
    assert result[monitor] == pytest.approx(summary[monitor], abs=1e-3)


def test_a_run_that_goes_on_repeats_its_choices_and_its_split(tmp_path):
    class_folders(tmp_path / "data", counts=(60, 30))
    given = [f"data.root={tmp_path / 'data'}", f"output={tmp_path / 'run'}", *SMALL[:2], "log.trackers=[]"]
    train("finetune", [*given, "schedule.epochs=1"], "classify")
    earlier = load_config(tmp_path / "run" / "config.yaml")
    split = (tmp_path / "run" / "split.csv").read_text()
    class_folders(tmp_path / "data", counts=(200, 100))  # of which other batches and another split would be chosen
    train("finetune", [*given, "schedule.epochs=2", "resume=auto"], "classify")
    later = load_config(tmp_path / "run" / "config.yaml")
    assert later.train.batch_size == earlier.train.batch_size
    assert sorted((tmp_path / "run" / "split.csv").read_text().split("\n")) == sorted(split.split("\n"))


@pytest.mark.parametrize("task", WRITE)
def test_without_a_network_the_error_names_the_key(task, tmp_path, monkeypatch):
    def fetch(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("foveal.backbones.loading.download.fetch", fetch)
    WRITE[task](tmp_path / "data")
    with pytest.raises(ConfigError, match=r"model\.pretrained=false"):
        train("finetune", [f"data.root={tmp_path / 'data'}", f"output={tmp_path / 'run'}"], task)


def chosen(root, *overrides: str, task: str = "detect"):
    config = load_config("finetune", [f"data.root={root}", "model.pretrained=false", *overrides], SCHEMAS[task])
    choose(config, "finetune")
    return config


def test_what_is_given_is_not_chosen(tmp_path):
    voc(tmp_path)
    config = chosen(tmp_path, "data.min_size=77", "model.head=fcos", "schedule.epochs=9")
    assert (config.data.min_size, config.model.head, config.schedule.epochs) == (77, "fcos", 9)
    assert config.model.head_kwargs == {}  # fcos has no anchors
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"base": "detect/finetune", "optim": {"lr": 0.5}}))
    config = load_config(recipe, [f"data.root={tmp_path}", "model.pretrained=false"], SCHEMAS["detect"])
    choose(config, "mine")
    assert (config.optim.lr, config.model.head) == (0.5, "faster_rcnn")


def test_the_head_follows_the_annotations(tmp_path):
    voc(tmp_path / "boxes")
    labelme_root = tmp_path / "shapes"
    labelme_root.mkdir()
    labelme(labelme_root)
    assert chosen(tmp_path / "boxes").model.head == "faster_rcnn"
    assert chosen(labelme_root).model.head == "mask_rcnn"


def test_small_objects_need_large_inputs(tmp_path):
    for name, side in (("large", 0.5), ("small", 0.02)):
        root = tmp_path / name
        write_images(root / "images", truth())
        write_yolo(root / "labels", {})
        for stem in truth():
            (root / "labels" / f"{stem}.txt").write_text(f"0 0.5 0.5 {side} {side}")
    large, small = (chosen(tmp_path / name) for name in ("large", "small"))
    assert small.data.min_size >= large.data.min_size
    assert small.model.head_kwargs["anchor_scale"] < large.model.head_kwargs["anchor_scale"] or (
        small.model.head_kwargs["anchor_scale"] == 2
    )


def test_rules():
    assert anchor_ratios(np.array([1.0] * 10)) == [1.0]
    assert anchor_ratios(np.linspace(0.5, 2, 100)) == pytest.approx([0.65, 1.25, 1.85], abs=0.02)
    assert batch_size("detect", 800 * 1333, 100_000, 80 * 2**30) == 8
    assert batch_size("detect", 800 * 1333, 100_000, 8 * 2**30) == 1
    assert batch_size("classify", 224 * 224, 100_000, 80 * 2**30) == 64
    assert batch_size("classify", 224 * 224, 40, 80 * 2**30) == 4


def test_published_weights_freeze_the_stem_and_lower_the_rate(tmp_path):
    voc(tmp_path)
    random = chosen(tmp_path)
    published = chosen(tmp_path, "model.pretrained=true")
    assert (random.model.frozen_stages, published.model.frozen_stages) == (-1, 0)
    assert published.optim.lr < random.optim.lr
    assert published.schedule.epochs <= random.schedule.epochs


def test_choices_need_data_that_are_found_out(tmp_path):
    write_images(tmp_path / "val2017", truth())
    write_coco(tmp_path / "annotations" / "instances_val2017.json", truth())
    with pytest.raises(ConfigError, match=r"data\.kind"):
        chosen(tmp_path, "data.kind=coco")
    with pytest.raises(ConfigError, match=r"optim\.momentum"):
        chosen(tmp_path, "auto=[optim.momentum]")


@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_everything_that_is_missing_is_named_at_once(task, tmp_path):
    """Before a model is built, weights are fetched or anything is written."""
    given = {
        "model.checkpoint": "none.safetensors",
        "model.pretrained": "true",  # the model has no published weights
        "data.exclude": "none.csv",
        "data.split": "none.csv",
        "data.root": str(tmp_path / "none"),
        "optim.name": "no_optimizer",
    }
    given |= {"classify": {"distill.teacher": "test_foveal_nat"}, "segment": {"model.segmenter": "none"}}.get(task, {})
    kind = {"classify": "folder", "detect": "coco", "segment": "folder"}[task]
    options = [*(f"{key}={value}" for key, value in given.items()), f"data.kind={kind}", f"output={tmp_path / 'run'}"]
    with pytest.raises(ConfigError) as refused:
        train(f"{task}/digits", [*options, *(["data.classes=[a, b]"] if task == "segment" else [])])
    lines = str(refused.value).splitlines()
    for key in given:
        name = str(tmp_path / "none") if key == "data.root" else key
        assert any(name in line for line in lines), (key, lines)
    assert not (tmp_path / "run").exists()
