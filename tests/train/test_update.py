"""An update over several forward passes, or several processes, is that of one large batch with the same images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from foveal.train import train

from .conftest import write_rectangles
from .test_distributed import launch

ONE = ["optim.name=momentum", "optim.momentum=0", "optim.weight_decay=0", "optim.lr=0.05", "schedule.name=constant"]
ONE += ["schedule.epochs=1", "schedule.warmup_fraction=0", "train.steps_per_epoch=1", "train.threads=1", "seed=3"]
ONE += ["data.workers=0", "log.trackers=[]", "model.drop_path_rate=0"]
SMALL = "{num_queries: 12, feature_size: 32, mask_feature_size: 32, hidden_dim: 32, num_attention_heads: 2, "
SMALL += "encoder_layers: 1, decoder_layers: 2, dim_feedforward: 64, encoder_feedforward_dim: 64, train_num_points: 64}"
DETR = "{width: 32, num_heads: 2, ffn_width: 32, encoder_layers: 1, decoder_layers: 2, num_queries: 12, dropout: 0.0}"
SEGMENT = """\
model: {name: test_foveal_dinat, head: HEAD, head_kwargs: KWARGS, auxiliary: false}
augment: {crop_size: [32, 64], ratio_range: [1, 1], cat_max_ratio: 1, photometric: false}
"""
DETECT = """\
model: {name: test_foveal_dinat, head: HEAD, head_kwargs: KWARGS}
data: {train_annotations: annotations/instances_train.json, train_images: train, keep_empty: true, min_size: 64,
  val_annotations: annotations/instances_val.json, val_images: val, max_size: 96}
augment: {min_size: [64], max_size: 96}
"""
HEADS = [
    ("classify", "", "{}"),
    ("segment", "semantic_fpn", "{channels: 32}"),
    ("segment", "mask2former", SMALL),
    ("detect", "retinanet", "{}"),
    ("detect", "fcos", "{}"),
    ("detect", "mask2former", SMALL),
    pytest.param(("detect", "conditional_detr", DETR), id="detect-conditional_detr", marks=pytest.mark.slow),
]


def write_masks(root: Path) -> list[str]:
    """Images of which ever more pixels have no class, the last none at all."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(8):
            mask = draw.integers(0, 3, (4, 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            mask[: 4 * number + 4 * (number == 7)] = 255
            Image.fromarray(draw.integers(0, 255, (32, 64, 3), dtype=np.uint8)).save(
                root / f"images/{split}/{number}.png"
            )
            Image.fromarray(mask).save(root / f"masks/{split}/{number}.png")
    return [f"data.root={root}", "data.classes=[a, b, c]"]


def write_boxes(root: Path) -> list[str]:
    """Images with one object, two, or none."""
    write_rectangles(root, {"train": 8, "val": 2})
    file = root / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (101, 104)]
    file.write_text(json.dumps(content))
    return [f"data.root={root}"]


@pytest.fixture(params=HEADS, ids=lambda each: "-".join(filter(None, each[:2])))
def job(request, tmp_path, quick, monkeypatch) -> tuple[str, Path, list[str]]:
    task, head, kwargs = request.param
    if head == "mask2former":  # draws the points at which masks are compared
        modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
        points = torch.rand(1, 64, 2, generator=torch.Generator().manual_seed(0))

        def fixed(self, logits, *_):
            return points.expand(len(logits), -1, -1)

        monkeypatch.setattr(modeling.Mask2FormerLoss, "sample_points_using_uncertainty", fixed)
        rand = torch.rand
        monkeypatch.setattr(torch, "rand", lambda *size, **more: points if size == (1, 64, 2) else rand(*size, **more))
    if task == "classify":
        return task, quick, ["augment.erase=0", "augment.shift=0", "data.limit=8", "data.val_limit=8"]
    recipe = tmp_path / f"{task}.yaml"
    recipe.write_text((SEGMENT if task == "segment" else DETECT).replace("HEAD", head).replace("KWARGS", kwargs))
    return task, recipe, (write_masks if task == "segment" else write_boxes)(tmp_path / "data")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "model.safetensors")


def compare(run: Path, large: Path) -> None:
    """To rounding, which is small beside what an update changes: a mean of means differs by a tenth of it and more."""
    ours, theirs = weights(run), weights(large)
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_forward_passes(job, tmp_path):
    task, recipe, options = job
    for name, size in (("large", 8), ("small", 2)):
        sizes = [f"train.batch_size={size}", f"train.grad_accum_steps={8 // size}", f"output={tmp_path / name}"]
        train(recipe, [*ONE, *options, *sizes], task)
    compare(tmp_path / "small", tmp_path / "large")
    losses = [
        (tmp_path / name / "metrics.csv").read_text().splitlines()[1].split(",")[2] for name in ("small", "large")
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


@pytest.mark.parametrize("job", HEADS[1:2], indirect=True, ids=["segment"])
def test_processes(job, tmp_path):
    task, recipe, options = job
    train(recipe, [*ONE, *options, "train.batch_size=8", f"output={tmp_path / 'large'}"], task)
    sizes = ["train.batch_size=2", "train.grad_accum_steps=2", f"output={tmp_path / 'small'}"]
    assert launch(recipe, [*ONE, *options, *sizes], 2, task=task) == [0, 0]
    compare(tmp_path / "small", tmp_path / "large")
