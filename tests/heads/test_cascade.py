"""Cascade Mask R-CNN: every stage has mmdetection's losses, it learns, and is as large as the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import clip_boxes_to_image

from foveal.heads.build import build_detector
from foveal.heads.checkpoint import load_dense, reparameterize, save_dense
from foveal.heads.detection.published import from_published
from foveal.train import detect, evaluate, predict
from foveal.train import train as foveal_train

from ..train.conftest import DETECT, write_rectangles
from ..weights import filler
from .test_detection import LIGHT, SMALL, steps_and_finds

SLOW = pytest.mark.slow
REASON = "needs mmdet 3.3 with mmengine and mmcv"


def small(box_head: str = "4conv1fc", **kwargs) -> nn.Module:
    settings = LIGHT | {"mask_width": 32, "box_head": box_head} | kwargs
    torch.manual_seed(0)
    return build_detector("test_foveal_dinat", "cascade_mask_rcnn", num_classes=3, head_kwargs=settings, **SMALL)


def mmdets(name: str, box_head: str | None) -> nn.Module:
    """mmdetection's detector, small, with a value for every parameter and statistic that makes it count: our
    configuration of it, or with the heads of its own one; without a cascade for none."""
    for module in ("mmengine", "mmcv", "mmdet"):
        pytest.importorskip(module, reason=REASON, exc_type=ImportError)
    from mmengine import Config

    from .test_mmdet import MODELS, build, shrink

    model = build("cascade_mask_rcnn" if box_head else "mask_rcnn", name)
    if box_head == "2fc":
        own = Config.fromstring('_base_ = "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"', ".py")
        heads = shrink(own.model.roi_head.bbox_head)
        model.roi_head.bbox_head = nn.ModuleList(MODELS.build(head) for head in heads)
    model.load_state_dict(filler.of(model))
    return model.eval()


@pytest.mark.parametrize("box_head", ["4conv1fc", pytest.param("2fc", marks=SLOW), None])
def test_losses_are_those_of_mmdetection(box_head):
    """Of all three stages, from the same maps, proposals and objects: so the boxes between the stages, too. Of Mask
    R-CNN, without a cascade, those of classes and masks: torchvision's boxes have another loss there."""
    theirs = mmdets("test_foveal_nat", box_head)
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    sizes = dict(box_width=32, mask_width=16, convention="mmdet") | ({"box_head": box_head} if box_head else {})
    head = "cascade_mask_rcnn" if box_head else "mask_rcnn"
    ours = build_detector("test_foveal_nat", head, num_classes=3, head_kwargs=sizes, neck_kwargs={"out_channels": 16})
    heads = {key: x for key, x in theirs.state_dict().items() if not key.startswith("backbone.")}
    ours.load_state_dict(ours.state_dict() | from_published(heads))

    generator = torch.Generator().manual_seed(0)
    shape = (96, 128)
    maps = [torch.randn(2, 16, -(-96 // s), -(-128 // s), generator=generator) for s in (4, 8, 16, 32, 64)]
    boxes = torch.tensor([[10.0, 10, 50, 40], [60, 20, 120, 90], [5.0, 50, 45, 95]])
    objects, names = [boxes, boxes[:0]], [torch.tensor([2, 0, 1]), torch.zeros(0, dtype=torch.int64)]
    around = boxes.repeat(12, 1) + 4 * torch.randn(36, 4, generator=generator)
    far = torch.rand(30, 4, generator=generator) * 40
    far = torch.cat([far[:, :2], far[:, :2] + far[:, 2:] + 8], 1)
    proposals = [clip_boxes_to_image(each, shape) for each in (torch.cat([around, far]), far + 5)]

    rows, columns = torch.arange(96)[:, None], torch.arange(128)
    discs = [
        ((rows - (top + bottom) / 2) / (bottom - top)) ** 2 + ((columns - (left + right) / 2) / (right - left)) ** 2
        < 0.2
        for left, top, right, bottom in boxes.tolist()
    ]
    outlines = [torch.stack(discs).byte(), torch.zeros(0, *shape, dtype=torch.uint8)]

    samples = []
    for own, labels, masks in zip(objects, names, outlines, strict=True):
        sample = DetDataSample(metainfo=dict(img_shape=shape))
        sample.gt_instances = InstanceData(bboxes=own, labels=labels, masks=BitmapMasks(masks.numpy(), *shape))
        samples.append(sample)
    theirs.train()
    for sampler in theirs.roi_head.bbox_sampler if box_head else [theirs.roi_head.bbox_sampler]:
        sampler.num = 512  # all of them
    want = theirs.roi_head.loss(maps, [InstanceData(bboxes=each.clone()) for each in proposals], samples)

    targets = [
        {"boxes": own, "labels": labels + 1, "masks": masks}
        for own, labels, masks in zip(objects, names, outlines, strict=True)
    ]
    heads = ours.detector.roi_heads.train()
    positive = []
    heads.mask_roi_pool.register_forward_pre_hook(lambda _, inputs: positive.append(sum(map(len, inputs[1]))))
    _, got = heads({str(i): m for i, m in enumerate(maps)}, proposals, [shape, shape], targets)
    assert min(positive) > 3  # the objects' own boxes
    pairs = [("classifier", "cls"), ("mask", "mask")]
    names = {f"loss_{own}": f"loss_{other}" for own, other in pairs}
    if box_head:
        assert positive[0] > positive[2]
        pairs.append(("box_reg", "bbox"))
        names = {f"loss_{own}_{stage}": f"s{stage}.loss_{other}" for own, other in pairs for stage in range(3)}
    for own, other in names.items():
        assert want[other] > 1e-3
        torch.testing.assert_close(got[own], want[other].reshape(()), rtol=1e-5, atol=0)


def test_one_box_for_all_classes_steps_and_finds():
    """The other box head has the tests of all detectors."""
    steps_and_finds(small("2fc"))


def test_a_stage_without_a_region_has_no_loss():
    """No proposal, no object: the mean over none."""
    heads = small().detector.roi_heads.train()
    maps = {str(i): torch.rand(1, 32, 64 // s, 64 // s) for i, s in enumerate((4, 8, 16, 32))}
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "masks": torch.zeros(0, 64, 64).byte()}
    _, losses = heads(maps, [torch.zeros(0, 4)], [(64, 64)], [target])
    assert set(losses) == {f"loss_{name}_{stage}" for name in ("classifier", "box_reg", "mask") for stage in range(3)}
    assert all(loss == 0 for loss in losses.values())


def test_half_precision_moves_boxes_in_full():
    """Deltas of bfloat16 on boxes that are not: that type has no numbers between 256 and 258."""
    model = small(convention="mmdet").eval()
    heads = model.detector.roi_heads
    maps = {str(i): torch.rand(1, 32, 512 // s, 512 // s) for i, s in enumerate((4, 8, 16, 32))}
    regions = [torch.tensor([[257.1, 259.3, 401.7, 480.9]])]
    with torch.no_grad():
        for predictor in heads.box_predictor:
            nn.init.zeros_(predictor.bbox_pred.weight)
            nn.init.zeros_(predictor.bbox_pred.bias)
            nn.init.constant_(predictor.cls_score.bias, 5.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (found,), _ = heads(maps, regions, [(512, 512)])
    assert len(found["boxes"]) > 0
    torch.testing.assert_close(found["boxes"], regions[0].expand_as(found["boxes"]), rtol=1e-6, atol=0)


@torch.no_grad()
def test_folded_norms_change_nothing(tmp_path):
    """And what is saved with them is loaded with them."""
    model = small(box_score_thresh=0.0)
    model.load_state_dict(filler.of(model))
    image = torch.rand(3, 64, 96)
    (before,) = model.eval()([image])
    reparameterize(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.detector.roi_heads.modules())
    (after,) = model([image])
    assert len(before["scores"]) == len(after["scores"]) > 0
    torch.testing.assert_close(after["scores"], before["scores"], rtol=1e-4, atol=0)
    torch.testing.assert_close(after["boxes"], before["boxes"], rtol=0, atol=1e-2)
    save_dense(tmp_path, model, ["a", "b", "c"], {})
    (loaded,) = load_dense(tmp_path)([image])
    assert all(torch.equal(loaded[key], after[key]) for key in after)


PUBLISHED = {"nat_mini": 77, "nat_tiny": 85, "nat_small": 108, "nat_base": 147, "dinat_large": 258}
PUBLISHED |= {"dinat_s_tiny": 86, "dinat_s_small": 107, "dinat_s_base": 145, "dinat_s_large": 253}


@pytest.mark.parametrize("name", ["nat_mini", *(pytest.param(n, marks=SLOW) for n in PUBLISHED if n != "nat_mini")])
def test_sizes_are_those_of_the_authors(name):
    """Parameters in millions (github.com/SHI-Labs, NAT.md and DiNAT.md); with the other box heads there are 5 fewer."""
    with torch.device("meta"):
        model = build_detector(name, "cascade_mask_rcnn", num_classes=80)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"box_head": "3fc"}, "box_head.*4conv1fc, 2fc.*3fc"),
        ({"box_fg_iou_thresh": 0.5}, "CascadeMaskRCNN.*box_fg_iou_thresh"),
        ({"coders": []}, "coders"),
    ],
)
def test_mistakes_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        small(**settings)


def train(folder: Path, images: int, *options: str) -> Path:
    """A run of a recipe on rectangles, measured on those that it learns from."""
    root = write_rectangles(folder / "rectangles", {"train": images})
    recipe = folder / "recipe.yaml"
    recipe.write_text(DETECT.replace("data:\n", f"data:\n  root: {root}\n"))
    settings = "{box_width: 32, mask_width: 32, rpn_post_nms_top_n_train: 50, rpn_post_nms_top_n_test: 50, "
    settings += "box_batch_size_per_image: 32, box_detections_per_img: 20}"
    given = ["model.head=cascade_mask_rcnn", f"model.head_kwargs={settings}", "model.neck_kwargs.out_channels=32"]
    given += [f"data.val_{what}" for what in ("annotations=annotations/instances_train.json", "images=train")]
    run = folder / "run"
    foveal_train(recipe, [f"output={run}", f"train.batch_size={images}", "seed=0", *given, *options], "detect")
    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Runs without figures, which take longer than these runs."""
    monkeypatch.setattr(detect.Task, "draw", lambda *_: None)
    monkeypatch.setattr(detect.plots, "curves", lambda *_: None)


def test_a_recipe_names_it(tmp_path, undrawn):
    run = train(tmp_path, 2, "schedule.epochs=1")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["head"] == "cascade_mask_rcnn"
    assert {"box_ap", "mask_ap"} <= set(summary)
    model = load_dense(run)
    assert model.masks
    assert model.arguments["head"] == "cascade_mask_rcnn"


@SLOW
def test_it_learns_two_images_by_heart(tmp_path, undrawn):
    """As `foveal train`, `foveal evaluate` and `foveal predict` do it."""
    learn = ["schedule.epochs=80", "optim.lr=3e-3", "optim.clip_grad=1", "model.drop_path_rate=0", "augment.hflip=0"]
    run = train(tmp_path, 2, *learn, "train.eval_interval=80", "augment.min_size=[64]")
    result = evaluate(run)
    assert result["box_ap"] > 50
    assert result["mask_ap"] > 50
    image = tmp_path / "rectangles" / "train" / "000.png"
    (found,) = predict(run, [image], threshold=0.1, output=tmp_path / "drawn")
    content = json.loads((tmp_path / "rectangles" / "annotations" / "instances_train.json").read_text())
    assert found.results[0].category_id == content["annotations"][0]["category_id"]
