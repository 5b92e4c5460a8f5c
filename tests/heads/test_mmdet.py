"""Backbones inside MMDetection, through its registry and our configurations of it."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import SyncBatchNormAct

import foveal.backbones
import foveal.configs

REASON = "needs mmdet 3.3 with mmengine and mmcv"
mmengine = pytest.importorskip("mmengine", reason=REASON, exc_type=ImportError)
pytest.importorskip("mmcv", reason=REASON, exc_type=ImportError)
pytest.importorskip("mmdet", reason=REASON, exc_type=ImportError)

from .mmcv_ext import install  # noqa: E402

install()

import mmdet.models  # noqa: E402, F401  (fills the registry)
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmengine.optim import OptimWrapper, build_optim_wrapper  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

import foveal.heads.mmdet  # noqa: E402

from ..variants import PYRAMIDS  # noqa: E402

CONFIGS = Path(foveal.configs.__path__[0]) / "mmdet"
NAMES = ("square", "disc", "star")
CLASSES = len(NAMES)
WIDTHS = {"in_channels": 16, "out_channels": 16, "feat_channels": 16, "conv_out_channels": 16, "fc_out_channels": 32}


def shrink(node):
    """Narrow heads for few classes and few proposals, none too unlikely, all through a part of a configuration."""
    if isinstance(node, list | tuple):
        return [shrink(item) for item in node]
    if not isinstance(node, dict):
        return node
    small = {key: shrink(value) for key, value in node.items()}
    small |= {key: value for key, value in WIDTHS.items() if isinstance(small.get(key), int)}
    small |= {"out_channels": 16} if small.get("type") == "A3FPN" else {}
    small |= {key: CLASSES for key in small if key == "num_classes"}
    small |= {key: 20 for key in ("max_per_img", "nms_pre", "num") if key in small}
    return small | {key: 0.0 for key in small if key == "score_thr"}  # untrained scores are low


@functools.cache
def read(config: str) -> mmengine.Config:
    return mmengine.Config.fromfile(CONFIGS / f"{config}.py")


def build(config: str, name: str, neck: dict | None = None, **backbone):
    """The detector of a configuration file, small, on another backbone."""
    model = read(config).model.to_dict()
    model["backbone"] = dict(type="FovealBackbone", name=name, **backbone)
    model["neck"] = neck or model["neck"]
    torch.manual_seed(0)
    detector = MODELS.build(mmengine.ConfigDict(foveal.heads.mmdet.completed(shrink(model))))
    detector.init_weights()
    return detector


def data():
    """Two images of different size with two objects each, as mmdet's loaders give them."""
    generator = torch.Generator().manual_seed(1)
    batch = dict(inputs=[], data_samples=[])
    for height, width in ((64, 96), (60, 70)):
        boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 56.0]])
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        sample = DetDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1, 1)))
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.tensor([0, 2]), masks=BitmapMasks(masks.numpy(), height, width)
        )
        batch["inputs"].append(torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator))
        batch["data_samples"].append(sample)
    return batch


def check(detector):
    """Train a step, and predict."""
    first = next(detector.backbone.parameters())
    seen = []
    first.register_hook(lambda grad: seen.append(grad.abs().max()))
    optimizer = OptimWrapper(torch.optim.SGD(detector.parameters(), lr=0.01))
    before = first.detach().clone()
    losses = detector.train().train_step(data(), optimizer)
    assert all(torch.isfinite(value).all() for value in losses.values())
    assert losses["loss"] > 0
    assert seen[0] > 0
    assert not torch.equal(first, before)

    detector.eval()
    with torch.no_grad():
        results = detector.test_step(data())
    for result, (height, width) in zip(results, ((64, 96), (60, 70)), strict=True):
        found = result.pred_instances
        assert 0 < len(found) <= 20
        assert torch.isfinite(found.scores).all()
        assert (found.bboxes >= 0).all()
        assert (found.bboxes[:, 2::2] <= width).all()
        assert (found.bboxes[:, 3::2] <= height).all()
        if detector.with_mask:
            assert found.masks.shape == (len(found), height, width)
    return results


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("mask_rcnn", "test_foveal_overlock"),
        ("retinanet", "test_foveal_dinat"),
        *(pytest.param("retinanet", n, marks=pytest.mark.slow) for n in PYRAMIDS if n != "test_foveal_dinat"),
        *(pytest.param("mask_rcnn", n, marks=pytest.mark.slow) for n in PYRAMIDS if n != "test_foveal_overlock"),
    ],
)
def test_trains_and_predicts(config, name):
    check(build(config, name))


def test_cascade_mask_rcnn():
    check(build("cascade_mask_rcnn", "test_foveal_dinat"))


def test_mask_rcnn_with_a3fpn():
    check(build("mask_rcnn", "test_foveal_care", neck=dict(type="A3FPN", extra_levels="pool", preset="lite")))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_norms_are_synchronized_and_keep_their_activations(process_group):
    model = build("retinanet", "test_foveal_maxvit", sync_bn=True)
    kinds = {type(module) for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)}
    assert kinds == {torch.nn.SyncBatchNorm, SyncBatchNormAct}
    plain = timm.create_model("test_foveal_maxvit")
    assert type(model.backbone.body.model.stem.norm1.act) is type(plain.stem.norm1.act)


@pytest.mark.parametrize(
    "name", ["retinanet", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mask_rcnn", "cascade_mask_rcnn"))]
)
def test_configuration(name, tmp_path):
    """A file builds as it is, and as mmengine writes it into a run's folder."""
    config = read(name).copy()
    assert config.custom_imports.imports == ["foveal.heads.mmdet"]
    with torch.device("meta"):
        backbone = timm.create_model(config.model.backbone.name, features_only=True)
    assert config.model.neck.in_channels == backbone.feature_info.channels()
    mean, std = (backbone.pretrained_cfg[key] for key in ("mean", "std"))
    assert config.model.data_preprocessor.mean == pytest.approx([255 * x for x in mean])
    assert config.model.data_preprocessor.std == pytest.approx([255 * x for x in std])
    config.dump(tmp_path / "written.py")
    written = mmengine.Config.fromfile(tmp_path / "written.py")
    assert written.model == config.model
    assert config.optim_wrapper.optimizer.type == "AdamW"
    assert "momentum" not in config.optim_wrapper.optimizer
    config.model.backbone.pretrained = False
    with torch.device("meta"):
        MODELS.build(config.model)


def test_norms_and_tables_do_not_decay():
    settings = read("mask_rcnn").optim_wrapper.to_dict() | {"type": "OptimWrapper"}  # the recipe's wants CUDA
    model = build("mask_rcnn", "test_foveal_dinat")
    groups = build_optim_wrapper(model, settings).optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {decay[id(p)] for name, p in model.named_parameters() if "norm" in name or "rpb" in name} == {0.0}
    assert decay[id(model.backbone.body.model.levels[0].blocks[0].attn.qkv.weight)] == 0.05


def write_coco(folder: Path) -> None:
    """Four images with a bright square each."""
    images, annotations = [], []
    for i in range(4):
        x, y, side = 8 + 4 * i, 12, 30
        picture = np.random.default_rng(i).integers(0, 80, (64, 96, 3), dtype=np.uint8)
        picture[y : y + side, x : x + side] = (255, 200, 0)
        Image.fromarray(picture).save(folder / f"{i}.png")
        images.append(dict(id=i, file_name=f"{i}.png", height=64, width=96))
        outline = [x, y, x + side, y, x + side, y + side, x, y + side]
        what = dict(id=i + 1, image_id=i, category_id=1, iscrowd=0)
        annotations.append(what | dict(bbox=[x, y, side, side], area=side**2, segmentation=[outline]))
    content = dict(
        images=images, annotations=annotations, categories=[dict(id=i + 1, name=n) for i, n in enumerate(NAMES)]
    )
    (folder / "coco.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_a_run_of_mmengine(tmp_path):
    """The configuration's loaders, augmentation, optimizer, schedule, evaluation and checkpoint, for two epochs."""
    write_coco(tmp_path)
    config = read("mask_rcnn").copy()
    model = shrink(config.model.to_dict())
    model["backbone"] = dict(type="FovealBackbone", name="test_foveal_dinat")
    config.model = foveal.heads.mmdet.completed(model)
    for part in ("train", "val", "test"):
        loader = config[f"{part}_dataloader"]
        loader.update(num_workers=0, persistent_workers=False)
        files = dict(data_root=str(tmp_path), ann_file="coco.json", data_prefix=dict(img=""))
        loader.dataset.update(files, metainfo=dict(classes=NAMES))
        for step in loader.dataset.pipeline:
            if step["type"] == "Resize":
                step["scale"] = (96, 64)
    config.val_evaluator.ann_file = config.test_evaluator.ann_file = str(tmp_path / "coco.json")
    config.optim_wrapper.type = "OptimWrapper"  # the recipe's wants CUDA
    config.train_cfg.max_epochs = 2
    config.work_dir = str(tmp_path / "run")
    runner = Runner.from_cfg(config)
    runner.train()
    assert runner.epoch == 2
    results = runner.val()
    assert 0 <= results["coco/bbox_mAP"] <= 1
    assert 0 <= results["coco/segm_mAP"] <= 1
    # written by mmengine, with its classes beside the tensors
    saved = torch.load(tmp_path / "run" / "epoch_2.pth", weights_only=False)["state_dict"]
    again = MODELS.build(config.model)
    again.load_state_dict(saved)
    torch.testing.assert_close(again.state_dict(), runner.model.state_dict())


def test_backbone_is_the_timm_model():
    """Weights survive mmengine's initialization; frozen stages and norms stay so in training."""
    torch.manual_seed(0)
    reference = timm.create_model("test_foveal_overlock", features_only=True, out_norm=True).eval()
    model = build("mask_rcnn", "test_foveal_overlock", frozen_stages=1, norm_eval=True)
    model.backbone.body.load_state_dict(reference.state_dict())
    model.init_weights()
    model.train()
    x = torch.randn(2, 3, 64, 64)
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    frozen = {name for name, p in model.backbone.named_parameters() if not p.requires_grad}
    assert frozen
    assert len(frozen) < len(list(model.backbone.parameters()))
    with torch.no_grad():
        for got, want in zip(model.eval().backbone(x), reference(x), strict=True):
            torch.testing.assert_close(got, want)


def test_completed_leaves_what_is_given():
    given = dict(
        backbone=dict(_delete_=True, type="FovealBackbone", name="test_foveal_maxvit", out_indices=(1, 3)),
        neck=dict(type="A3FPN", out_channels=8),
        data_preprocessor=dict(mean=[1.0, 2.0, 3.0]),
    )
    got = foveal.heads.mmdet.completed(given)
    assert got["backbone"] == given["backbone"]
    assert got["neck"] == dict(type="A3FPN", out_channels=8, in_channels=[32, 128], strides=[8, 32])
    assert got["data_preprocessor"]["mean"] == [1.0, 2.0, 3.0]
    assert len(got["data_preprocessor"]["std"]) == 3
    assert "in_channels" not in given["neck"]


def test_weights_by_init_cfg_are_refused():
    with pytest.raises(ValueError, match=r"init_cfg.*Pretrained"):
        MODELS.build(dict(type="FovealBackbone", name="test_foveal_nat", init_cfg=dict(type="Pretrained")))


@pytest.mark.parametrize("missing", ["mmdet", "mmdet.registry"])
def test_says_what_to_install(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "mmdet":
        monkeypatch.delitem(sys.modules, "mmdet.registry")
    spec = importlib.util.spec_from_file_location("foveal.heads.mmdet_again", foveal.heads.mmdet.__file__)
    with pytest.raises(ImportError, match=r"onedl-mmdetection.* mmdet 3\.3"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
