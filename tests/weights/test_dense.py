"""Detectors and segmenters of mmdetection and mmsegmentation have the same outputs after conversion."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import foveal
from foveal.heads.build import build_detector, build_segmenter
from foveal.heads.detection import published as published_names
from foveal.heads.names import translate
from foveal.heads.necks.published import load_published
from foveal.heads.segmentation import probabilities
from foveal.heads.segmentation.published import SEMANTIC_FPN
from foveal.weights import dense
from foveal.weights.convert import ConversionError, convert, restore
from foveal.weights.manifest import checkpoints, of_model
from foveal.weights.verify import verify

from ..backbones.test_agent import published as pvt_published
from ..backbones.test_swin import authors as swin_authors
from ..backbones.test_transnext import authors as transnext_authors
from ..backbones.test_van import authors as van_authors
from ..heads.published_names import to_mmseg
from . import filler

REASON = "needs mmdet 3.3 with mmengine and mmcv"
NAMES = ("square", "disc", "star")
AGENTS = {"test_foveal_agent_pvt": {"agent_shapes": [2, 2, 3, 3]}}  # which a file does not show


def theirs(config: str, name: str, neck: dict[str, Any] | None = None) -> nn.Module:
    """mmdetection's detector, small, with a value for every parameter and statistic that makes it count."""
    for module in ("mmengine", "mmcv", "mmdet"):
        pytest.importorskip(module, reason=REASON, exc_type=ImportError)
    from ..heads.test_mmdet import build

    model = build(config, name, neck)
    model.load_state_dict(filler.of(model))
    return model.eval()


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    """With the authors' names of the backbone, as they stand in their files."""
    return {name.replace("backbone.body.model.", "backbone."): x for name, x in model.state_dict().items()}


def converted(original: nn.Module, what: str, tmp_path: Path, name: str) -> Path:
    """The folder that its file becomes: every tensor used, the file given back bit for bit, verified."""
    state = published(original)
    file = write(tmp_path / "x", state, CLASSES=NAMES)
    done = convert(file, tmp_path / "ours", model=name, arguments=AGENTS.get(name))
    unread = [key for key in state if key.startswith("backbone.norm0.")] if what.startswith("retinanet") else []
    assert done.record["dropped"] == unread
    state = {key: x for key, x in state.items() if key not in unread}
    assert done.record["tensors"] == len(state)
    assert done.model == what
    back = restore(done.folder)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())
    assert all(check.passed for check in verify(done.folder))
    return done.folder


def write(folder: Path, state: dict[str, torch.Tensor], **meta: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": state, "meta": {"epoch": 36, **meta}}, folder / "dense.pth")
    return folder / "dense.pth"


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize(
    "name",
    [
        "test_foveal_nat",
        *(pytest.param(f"test_foveal_{n}", marks=pytest.mark.slow) for n in ("dinat", "overlock", "rmt", "transnext")),
    ],
)
@torch.no_grad()
def test_mask_rcnn(name: str, tmp_path: Path) -> None:
    """Maps, logits, anchors, regions' classes, boxes and masks, and the detections themselves."""
    original = theirs("mask_rcnn", name)
    folder = converted(original, f"mask_rcnn on {name} with fpn, 3 classes", tmp_path, name)

    model = foveal.load(folder)
    assert model.classes == list(NAMES)
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.arguments[key])[:, None, None] for key in ("mean", "std"))
    x = ((image - mean) / std)[None]
    maps, expected = list(model.backbone(x).values()), original.extract_feat(x)
    for got, want in zip(maps, expected, strict=True):
        close(got, want)
    logits, deltas = model.detector.rpn.head(maps)
    for got, want in zip([*logits, *deltas], [y for kind in original.rpn_head(expected) for y in kind], strict=True):
        close(got, want)
    from torchvision.models.detection.image_list import ImageList

    (anchors,) = model.detector.rpn.anchor_generator(ImageList(x, [(96, 128)]), maps)
    close(anchors, torch.cat(original.rpn_head.prior_generator.grid_priors([m.shape[-2:] for m in maps], device="cpu")))

    # of every level: sides from 10 to more than the image
    regions = torch.tensor([[4.2, 8.7, 14.9, 21.0], [0, 0, 127, 95], [30.3, 5, 99.1, 90.6], [-60, -50, 400, 500.0]])
    heads, indexed = model.detector.roi_heads, torch.cat([torch.zeros(4, 1), regions], 1)
    named = {str(i): m for i, m in enumerate(maps)}
    scores, boxes = heads.box_predictor(heads.box_head(heads.box_roi_pool(named, [regions], [(96, 128)])))
    want = original.roi_head._bbox_forward(expected, indexed)
    close(torch.cat([scores[:, 1:], scores[:, :1]], 1), want["cls_score"])  # the background is their last
    close(boxes[:, 4:], want["bbox_pred"])
    masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(named, [regions], [(96, 128)])))
    close(masks[:, 1:], original.roi_head._mask_forward(expected, indexed)["mask_preds"])

    from mmdet.structures import DetDataSample

    shapes = dict(img_shape=(96, 128), ori_shape=(96, 128), scale_factor=(1.0, 1.0), batch_input_shape=(96, 128))
    original.roi_head.test_cfg.update(score_thr=0.05, max_per_img=100)
    original.rpn_head.test_cfg.update(nms_pre=1000, max_per_img=1000)
    want = original.predict(x, [DetDataSample(metainfo=shapes)], rescale=False)[0].pred_instances
    transform = model.detector.transform
    transform.min_size, transform.max_size = (96,), 128
    (got,) = model([image])
    assert len(want.scores) > 5
    close(got["scores"], want.scores)
    assert torch.equal(got["labels"], want.labels)
    assert (got["boxes"] - want.bboxes).abs().max() < 1e-2  # pixels


@pytest.mark.parametrize(
    ("name", "box_head"),
    [
        ("test_foveal_nat", "4conv1fc"),
        ("test_foveal_nat", "2fc"),
        pytest.param("test_foveal_rmt", "4conv1fc", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_cascade_mask_rcnn(name: str, box_head: str, tmp_path: Path) -> None:
    """The detections after three stages and the mean of the stages' masks; the stages one by one are compared by their
    losses, in the tests of the head."""
    from ..heads.test_cascade import mmdets

    original = mmdets(name, box_head)
    folder = converted(original, f"cascade_mask_rcnn on {name} with fpn, 3 classes", tmp_path, name)

    from mmdet.structures import DetDataSample

    model = foveal.load(folder)
    assert model.arguments["head_kwargs"]["box_head"] == box_head
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.arguments[key])[:, None, None] for key in ("mean", "std"))
    x = ((image - mean) / std)[None]
    shapes = dict(img_shape=(96, 128), ori_shape=(96, 128), scale_factor=(1.0, 1.0), batch_input_shape=(96, 128))
    original.roi_head.test_cfg.update(score_thr=0.05, max_per_img=100)
    original.rpn_head.test_cfg.update(nms_pre=1000, max_per_img=1000)
    merged: list[torch.Tensor] = []  # of all stages, before they are put into the image
    last = original.roi_head.mask_head[-1]
    last.predict_by_feat = lambda mask_preds, results_list, **_: merged.extend(mask_preds) or results_list
    want = original.predict(x, [DetDataSample(metainfo=shapes)], rescale=False)[0].pred_instances
    transform, masks = model.detector.transform, []
    transform.min_size, transform.max_size = (96,), 128
    heads = model.detector.roi_heads
    compute = heads.mask_probabilities
    heads.mask_probabilities = lambda *given: masks.append(compute(*given)) or masks[0]
    (got,) = model([image])
    assert len(want.scores) > 5
    close(got["scores"], want.scores)
    assert torch.equal(got["labels"], want.labels)
    assert (got["boxes"] - want.bboxes).abs().max() < 1e-2  # pixels
    close(masks[0][:, 0], merged[0][range(len(want.labels)), want.labels])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"roi_head.bbox_head.3.fc_cls.weight": (4, 32)}, "4 stages"),
        ({"roi_head.bbox_head.0.fc_reg.weight": (4, 32)}, "4 convolutions, 1 .* 4 "),
        ({"roi_head.bbox_head.1.cls_fcs.0.weight": (4, 32)}, r"cls_fcs\.0\.weight"),
        ({"roi_head.mask_head.": None}, "Cascade Mask R-CNN"),
    ],
)
def test_cascades_that_are_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    small = dict(neck_kwargs={"out_channels": 16}, head_kwargs={"box_width": 32, "mask_width": 16})
    model = build_detector("test_foveal_nat", "cascade_mask_rcnn", num_classes=3, **small)
    state = {f"backbone.{key}": x for key, x in model.backbone.body.model.state_dict().items()}
    state |= to_mmdet(model.state_dict())
    for name, shape in change.items():
        state = {key: x for key, x in state.items() if not key.startswith(name)}
        state |= {} if shape is None else {name: torch.zeros(shape)}
    with pytest.raises(ConversionError, match=says):
        convert(write(tmp_path / "x", state), tmp_path / "ours", model="test_foveal_nat")


def test_a_file_is_of_what_it_is_called(tmp_path: Path) -> None:
    """Else it would carry another's licence and score."""
    small = dict(embed_dim=16, num_heads=[1, 2, 4, 8], depths=[1] * 4, kernel_size=3, dilations=[[1]] * 4)
    heads = dict(neck_kwargs={"out_channels": 16}, head_kwargs={"box_width": 32, "mask_width": 16})
    files = {}
    for count in (3, 80):
        model = build_detector("nat_mini", "mask_rcnn", num_classes=count, **heads, **small)
        state = {f"backbone.{key}": x for key, x in model.backbone.body.model.state_dict().items()}
        files[count] = write(tmp_path / f"{count}", state | to_mmdet(model.state_dict()))
    file = files[80]

    def refused(message: str, name: str, **kwargs: Any) -> None:
        arguments = small | kwargs.pop("arguments", {})
        with pytest.raises(ConversionError, match=message):
            convert(file, tmp_path / "ours", model=name, arguments=arguments, **kwargs)

    for backbone in (False, True):
        refused("nat_mini.in1k", "nat_mini.in1k", backbone=backbone)
    refused("detect.*segment", "nat_mini.upernet_ade20k")
    refused("detect.*segment", "nat_mini", arguments={"task": "segment"})
    refused("head mask_rcnn.*nat_mini.cascade_coco.*head cascade_mask_rcnn", "nat_mini.cascade_coco")
    file = files[3]
    refused("num_classes 3.*nat_mini.maskrcnn_coco.*num_classes 80", "nat_mini.maskrcnn_coco")
    for key in ("task", "num_classes"):
        arguments = {"task": "detect", "num_classes": 3}
        refused(key, "nat_mini", arguments={key: arguments[key]}, backbone=True)
    done = convert(files[80], tmp_path / "ours", model="nat_mini.maskrcnn_coco", arguments=small)
    with pytest.raises(ValueError, match=str(done.folder)):
        convert(done.folder, tmp_path / "again")


def test_a_published_cascade_is_known_by_its_name(tmp_path: Path) -> None:
    """With the dilations that its file does not tell."""
    checkpoint = checkpoints()["dinat_s_tiny.cascade_coco"]
    small = dict(embed_dim=16, num_heads=[1, 2, 4, 8])
    model = build_detector(
        "dinat_s_tiny", "cascade_mask_rcnn", num_classes=80, neck_kwargs={"out_channels": 16},
        head_kwargs={"box_width": 32, "mask_width": 16, "convention": "mmdet"}, **small, **checkpoint.arguments,
    )  # fmt: skip
    model.load_state_dict(filler.of(model))
    state = {f"backbone.{key}": x for key, x in model.backbone.body.model.state_dict().items()}
    state |= to_mmdet(model.state_dict())
    file = write(tmp_path / "x", state).rename(tmp_path / "x" / "cascadedmaskrcnn_dinat_s_tiny.pth")
    done = convert(file, tmp_path / "ours", model="dinat_s_tiny", arguments=small)
    assert done.record["checkpoint"] == checkpoint.name
    loaded = foveal.load(done.folder)
    assert loaded.arguments["head"] == "cascade_mask_rcnn"
    assert loaded.arguments["dilations"] == checkpoint.arguments["dilations"]
    assert loaded.config["category_ids"][-1] == 90
    own, expected = loaded.state_dict(), model.state_dict()
    heads = [key for key in own if key.startswith("detector.roi_heads.")]
    foreground = [key for key in heads if not re.search(r"(bbox_pred|mask_fcn_logits)\.", key)]
    assert len(foreground) > 70
    assert all(torch.equal(own[key], expected[key]) for key in foreground)


def a3fpn_state(channels: tuple[int, ...], prefix: str, direction: str = "top_down", **kwargs: Any):
    """A neck under the authors' names, with the settings of their models for these widths, 16 channels to a map."""
    from ..heads.test_a3fpn import published_spec

    widths = [c // s for c, s in zip(channels, (1, 2, 4, 4), strict=True)]
    groups = [width // 16 for width in widths]
    compress = [max(each, 8) for each in groups]
    config = dict(in_channels=channels, out_channels=16, squeeze=[1, 2, 4, 4], num_repblocks=1, expansion=4)
    config |= dict(compress_channel=compress, group_num=groups, dcn_groups=groups, using_resampling=[True] * 3)
    config |= dict(dcn_config={"dcn_output_bias": True, "offset_scale": 2.0})
    spec = published_spec(config, direction, **kwargs)
    return filler.state_dict({f"{prefix}{name}": shape for name, shape in spec.items()})


@pytest.mark.slow
@torch.no_grad()
def test_retinanet_on_a3fpn(tmp_path: Path) -> None:
    """As the released one: maps from stride 8 to 128; the parts of the neck that it computes and drops are named."""
    name = "test_foveal_nat"
    original = theirs("retinanet", name, neck=dict(type="A3FPN", start_level=1, extra_levels="p6p7"))
    neck = a3fpn_state((16, 32, 64, 128), "neck.", convs=6)
    load_published(original.neck, neck)
    state = {key: x for key, x in published(original).items() if not key.startswith("neck.")} | neck
    done = convert(write(tmp_path / "x", state, dataset_meta={"classes": NAMES}), tmp_path / "ours", model=name)
    dropped = done.record["dropped"]
    assert {key.split(".")[2 if "body" in key else 1] for key in dropped} == {"a3fpn_4_level0", "conv00"}
    assert any(dropped[0] in line for line in done.lines())
    assert done.record["tensors"] == len(state) - len(dropped)
    back = restore(done.folder)
    assert list(back) == [key for key in state if key not in dropped]
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    assert all(check.passed for check in verify(done.folder))
    same_detections(done.folder, original)


def same_detections(folder: Path, original: nn.Module) -> None:
    """Of a converted RetinaNet and mmdetection's: the maps and what is found."""
    from mmdet.structures import DetDataSample

    model = foveal.load(folder)
    assert model.classes == list(NAMES)
    image = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.arguments[key])[:, None, None] for key in ("mean", "std"))
    x = ((image - mean) / std)[None]
    for got, want in zip(model.backbone(x).values(), original.extract_feat(x), strict=True):
        close(got, want)
    shapes = dict(img_shape=(128, 128), ori_shape=(128, 128), scale_factor=(1.0, 1.0))
    # torchvision's RetinaNet keeps boxes that clipping leaves without a width; mmdetection's does not unless told
    original.bbox_head.test_cfg.update(nms_pre=1000, score_thr=0.05, max_per_img=100, min_bbox_size=-1)
    want = original.predict(x, [DetDataSample(metainfo=shapes)], rescale=False)[0].pred_instances
    transform = model.detector.transform
    transform.min_size, transform.max_size = (128,), 128
    (got,) = model([image])
    assert len(want.scores) > 5
    close(got["scores"], want.scores)
    assert torch.equal(got["labels"], want.labels)
    assert (got["boxes"] - want.bboxes).abs().max() < 1e-2


@torch.no_grad()
def test_the_published_cascade_of_rmt(tmp_path: Path) -> None:
    """The authors' file: norms of the maps, constants, and mmdetection's cascade with convolutions."""
    small = dict(embed_dims=[16, 32, 48, 64], depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4])
    head = {"box_width": 32, "mask_width": 16, "convention": "mmdet"}
    neck = {"out_channels": 16}
    model = build_detector("rmt_s", "cascade_mask_rcnn", num_classes=80, neck_kwargs=neck, head_kwargs=head, **small)
    model.load_state_dict(filler.of(model))
    state = rmt_authors(model.backbone.body.model.state_dict()) | to_mmdet(model.state_dict())
    assert "backbone.extra_norms.3.weight" in state
    done = convert(write(tmp_path / "x", state), tmp_path / "ours", model="rmt_s.cascade_3x_coco", arguments=small)
    assert done.model == "cascade_mask_rcnn on rmt_s with fpn, 80 classes"
    assert done.record["checkpoint"] == "rmt_s.cascade_3x_coco"
    assert done.record["dropped"] == [key for key in state if ".Relpos." in key]
    back = restore(done.folder)
    assert list(back) == [key for key in state if ".Relpos." not in key]
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    assert all(check.passed for check in verify(done.folder))
    loaded = foveal.load(done.folder)
    image = torch.rand(1, 3, 75, 101, generator=torch.Generator().manual_seed(0))
    for got, want in zip(loaded.backbone(image).values(), model.eval().backbone(image).values(), strict=True):
        close(got, want)


@pytest.mark.parametrize(
    "tag",
    [
        "cascade_3x_coco",
        pytest.param("maskrcnn_1x_coco", marks=pytest.mark.slow),
        pytest.param("upernet_ade20k", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_published_dense_models_of_agent_swin(tag: str, tmp_path: Path) -> None:
    """With the agents of the manifest's entry, without which the file is refused."""
    small = dict(embed_dim=16, depths=[1, 1, 2, 2], num_heads=[1, 2, 2, 4], global_depths=[1, 1, 1, 0], mlp_ratio=2.0)
    if tag == "upernet_ade20k":
        sizes: dict[str, Any] = dict(head_kwargs={"channels": 16}, auxiliary_kwargs={"channels": 8}, auxiliary=True)
        build, head, classes = build_segmenter, "upernet", 150
    else:
        head = {"cascade_3x_coco": "cascade_mask_rcnn", "maskrcnn_1x_coco": "mask_rcnn"}[tag]
        widths = {"box_width": 32, "mask_width": 16, "convention": "mmdet"}
        sizes, build, classes = dict(neck_kwargs={"out_channels": 16}, head_kwargs=widths), build_detector, 80
    name = "agent_swin_t"
    model = build(name, head, num_classes=classes, **sizes, **small, agent_shapes=[9, 12, 14, 7]).eval()
    model.load_state_dict(filler.of(model))
    body = swin_authors(model.backbone.body.model.state_dict())
    state = {f"backbone.{key}": x for key, x in body.items()}
    state |= to_mmseg(model.state_dict()) if head == "upernet" else to_mmdet(model.state_dict())
    file = write(tmp_path / "x", state)
    with pytest.raises(ConversionError, match="agent_shapes"):
        convert(file, tmp_path / "ours", model=name, arguments=small)
    done = convert(file, tmp_path / "ours", model=f"{name}.{tag}", arguments=small)
    assert done.model == f"{head} on {name} with fpn, {classes} classes"
    assert done.record["dropped"] == [key for key in state if key.endswith("attn_mask")] != []
    back = restore(done.folder)
    assert list(back) == [key for key in state if not key.endswith("attn_mask")]
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    assert all(check.passed for check in verify(done.folder))
    loaded, image = foveal.load(done.folder), torch.rand(1, 3, 75, 101, generator=torch.Generator().manual_seed(0))
    for got, want in zip(loaded.backbone(image).values(), model.backbone(image).values(), strict=True):
        close(got, want)


@pytest.mark.parametrize("name", ["test_foveal_rmt", pytest.param("test_foveal_agent_pvt", marks=pytest.mark.slow)])
@torch.no_grad()
def test_retinanet_on_fpn(name: str, tmp_path: Path) -> None:
    """P6 from the backbone's last map and P7 without a ReLU; P6 from the pyramid looks the same in one width alone."""
    neck = dict(type="FPN", in_channels=[16, 32, 48, 64], out_channels=16, start_level=1, num_outs=5)
    original = theirs("retinanet", name, neck=neck | dict(add_extra_convs="on_input"))
    same_detections(converted(original, f"retinanet on {name} with fpn, 3 classes", tmp_path, name), original)
    state = published(theirs("retinanet", name, neck=neck | dict(add_extra_convs="on_output")))
    with pytest.raises(ConversionError, match=r"fpn_convs\.3\.conv\.weight .*16 .*on_input"):
        convert(write(tmp_path / "y", state), tmp_path / "other", model=name, arguments=AGENTS.get(name))


@torch.no_grad()
def test_agents_of_a_published_detector(tmp_path: Path) -> None:
    """Their number is known from the manifest; a file of unknown origin is refused without it."""
    small = dict(embed_dims=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4], mlp_ratios=[2, 2, 2, 2])
    sizes = {"box_width": 32, "mask_width": 16, "convention": "mmdet"}
    kwargs: dict[str, Any] = dict(num_classes=80, neck_kwargs={"out_channels": 16}, head_kwargs=sizes)
    known = checkpoints()["agent_pvt_t.maskrcnn_1x_coco"]
    model = build_detector("agent_pvt_t", "mask_rcnn", **kwargs, **small, **known.arguments).eval()
    model.load_state_dict(filler.of(model))
    state = {f"backbone.{key}": x for key, x in pvt_published(model.backbone.body.model).items()}
    state |= to_mmdet(model.state_dict())
    file = write(tmp_path / "x", state)
    for backbone in (False, True):
        with pytest.raises(ConversionError, match="agent_shapes"):
            convert(file, tmp_path / "refused", model="agent_pvt_t", arguments=small, backbone=backbone)
    done = convert(file, tmp_path / "ours", model=known.name, arguments=small)
    assert done.model == "mask_rcnn on agent_pvt_t with fpn, 80 classes"
    assert done.record["dropped"] == []
    back = restore(done.folder)
    assert list(back) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    assert all(check.passed for check in verify(done.folder))
    image = torch.rand(1, 3, 75, 101, generator=torch.Generator().manual_seed(0))
    for got, want in zip(
        foveal.load(done.folder).backbone(image).values(), model.backbone(image).values(), strict=True
    ):
        close(got, want)


def rmt_authors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The backbone of a dense RMT under the authors' names, with their constants."""
    kept = {key: x for key, x in state.items() if not key.startswith(("proj.", "norm.", "head."))}
    named = {f"backbone.{re.sub('^norm', 'extra_norms.', key)}": x for key, x in kept.items()}
    return named | {f"backbone.layers.{i}.Relpos.angle": torch.rand(16) for i in range(4)}


def mmsegs_fpn(state: dict[str, torch.Tensor], maps: list[torch.Tensor]) -> torch.Tensor:
    """Its FPN and FPNHead, in evaluation mode, from the weights of a file."""

    def conv(x: torch.Tensor, name: str, **kwargs: Any) -> torch.Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **kwargs)

    levels = [conv(x, f"neck.lateral_convs.{i}.conv") for i, x in enumerate(maps)]
    for i in (3, 2, 1):
        levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], levels[i - 1].shape[2:], mode="nearest")
    total: Any = 0
    for i, x in enumerate(levels):
        x = conv(x, f"neck.fpn_convs.{i}.conv", padding=1)
        for j in range(max(i, 1)):
            step = f"decode_head.scale_heads.{i}.{2 * j}"
            x = conv(x, f"{step}.conv", padding=1)
            bn = (state[f"{step}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
            x = F.batch_norm(x, *bn).relu()
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) if i else x
        total = total + F.interpolate(x, maps[0].shape[2:], mode="bilinear", align_corners=False)
    return conv(total, "decode_head.conv_seg")


@pytest.mark.parametrize("name", ["test_foveal_rmt", "test_foveal_agent_pvt"])
@torch.no_grad()
def test_semantic_fpn(name: str, tmp_path: Path) -> None:
    """At an odd size, where mmsegmentation enlarges a level beyond the next one."""
    kwargs: dict[str, Any] = dict(neck_kwargs={"out_channels": 16}, head_kwargs={"channels": 8, "convention": "mmseg"})
    model = build_segmenter(name, "semantic_fpn", num_classes=5, auxiliary=False, **kwargs).eval()
    model.load_state_dict(filler.of(model))
    inverse = tuple((own, published) for published, own in SEMANTIC_FPN)
    heads = {translate(key.replace(".norm.", ".bn."), inverse): x for key, x in model.state_dict().items()}
    double = lambda m: f"{m[1]}.{2 * int(m[2])}."  # noqa: E731
    state = {re.sub(r"(scale_heads\.\d+)\.(\d+)\.", double, key): x for key, x in heads.items() if key}
    body: Any = model.backbone.body.model
    if name == "test_foveal_rmt":
        state |= rmt_authors(body.state_dict())
    else:
        state |= {f"backbone.{key}": x for key, x in pvt_published(body).items()}
    done = convert(write(tmp_path / "x", state), tmp_path / "ours", model=name, arguments=AGENTS.get(name))
    assert done.model == f"semantic_fpn on {name} with fpn, 5 classes"
    assert done.record["dropped"] == [key for key in state if ".Relpos." in key]
    back = restore(done.folder)
    assert list(back) == [key for key in state if ".Relpos." not in key]
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    assert all(check.passed for check in verify(done.folder))
    loaded = foveal.load(done.folder)
    images = torch.rand(2, 3, 74, 100, generator=torch.Generator().manual_seed(0))
    maps = list(loaded.backbone(images).values())
    close(loaded.head(maps), mmsegs_fpn(state, maps))


UPERNETS = {
    "nat": ("test_foveal_nat", "fpn"),
    "overlock, without the auxiliary head": ("test_foveal_overlock", "fpn"),
    "nat, a3fpn": ("test_foveal_nat", "a3fpn"),
    "van, the authors' names": ("test_foveal_van", "fpn"),
    "rmt": ("test_foveal_rmt", "fpn"),
    "transnext, the authors' names": ("test_foveal_transnext", "fpn"),
}


@pytest.mark.parametrize("form", UPERNETS)
@torch.no_grad()
def test_upernet(form: str, tmp_path: Path) -> None:
    """mmsegmentation's names; the tests of the head compare its outputs with mmsegmentation's UPerNet."""
    name, neck = UPERNETS[form]
    sizes = dict(head_kwargs={"channels": 64 if neck == "a3fpn" else 16}, auxiliary_kwargs={"channels": 8})
    auxiliary = "without" not in form
    model = build_segmenter(name, "upernet", neck, num_classes=5, auxiliary=auxiliary, **sizes).eval()
    model.load_state_dict(filler.of(model))
    state = to_mmseg({key: x for key, x in model.state_dict().items() if not key.startswith("head.neck.columns")})
    named = {"test_foveal_van": van_authors, "test_foveal_transnext": transnext_authors}.get(name, str)
    state |= {f"backbone.{named(key)}": x for key, x in model.backbone.body.model.state_dict().items()}
    if neck == "a3fpn":
        channels = (*model.backbone.spec.channels[:3], 64)
        own = a3fpn_of_segmenter(channels, 64)
        load_published(model.head.neck, own)
        state = {key: x for key, x in state.items() if "decode_head.lateral" not in key} | own
    done = convert(write(tmp_path / "x", state), tmp_path / "ours", model=name)
    assert done.model == f"upernet on {name} with {neck}, 5 classes"
    assert done.record["dropped"] == []
    back = restore(done.folder)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())
    assert all(check.passed for check in verify(done.folder))
    converted = foveal.load(done.folder)
    assert converted.classes == [f"class {i}" for i in range(5)]
    images = torch.rand(2, 3, 70, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(converted(images), model(images))


def a3fpn_of_segmenter(channels: tuple[int, ...], out: int) -> dict[str, torch.Tensor]:
    """The released segmentor's settings, whose last map comes narrow from the pooling."""
    from ..heads.test_a3fpn import published_spec

    widths = [c // s for c, s in zip(channels, (1, 2, 4, 1), strict=True)]
    groups = [width // 16 for width in widths]
    config = dict(in_channels=channels, out_channels=out, squeeze=[1, 2, 4, 1], num_repblocks=1, expansion=4)
    config |= dict(compress_channel=[max(each, 8) for each in groups], group_num=groups, dcn_groups=groups)
    config |= dict(using_resampling=[True] * 3, dcn_config={"dcn_output_bias": True, "offset_scale": 2.0})
    spec = published_spec(config, "bottom_up")
    return filler.state_dict({f"decode_head.a3fpn.{name}": shape for name, shape in spec.items()})


def test_a_resnet_of_three_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-C, as segmentors have it: mmdetection's own with that stem against timm's."""
    pytest.importorskip("mmcv", reason=REASON, exc_type=ImportError)
    from ..heads.mmcv_ext import install

    install()
    from mmdet.models.backbones import ResNet

    monkeypatch.setitem(ResNet.arch_settings, 50, (ResNet.arch_settings[50][0], (1, 1, 1, 1)))
    original = ResNet(50, deep_stem=True)
    original.load_state_dict(filler.of(original))
    original.eval()
    small = {"layers": [1, 1, 1, 1]}
    state = {f"backbone.{key}": x for key, x in original.state_dict().items()}
    file = write(tmp_path / "x", state | {"neck.x": torch.ones(1)})
    with pytest.raises(ConversionError, match=r"resnet50.*resnet50c"):
        convert(file, tmp_path / "ours", model="resnet50", backbone=True, arguments=small)
    small["out_indices"] = (1, 2, 3, 4)
    done = convert(file, tmp_path / "ours", model="resnet50c", backbone=True, arguments=small)
    assert done.record["heads"] == {"neck": 1}
    back = restore(done.folder)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for got, want in zip(foveal.load(done.folder)(x), original(x), strict=True):
            close(got, want)


def test_what_is_refused_whole(tmp_path: Path) -> None:
    """With the reason, what is in the file, and the way out."""
    model = build_segmenter("test_foveal_nat", "upernet", num_classes=5, head_kwargs={"channels": 16})
    inner = {f"backbone.{key}": x for key, x in model.backbone.body.model.state_dict().items()}
    one = torch.ones(1)
    for heads, reason in (
        ({"roi_head.bbox_head.0.fc_cls.weight": one, "rpn_head.rpn_conv.weight": one}, "1 stages"),
        (
            {"sem_seg_head.p2.0.weight": one, "criterion.x": one},
            "criterion, sem_seg_head",
        ),
        ({"roi_heads.res5.0.conv1.weight": one, "proposal_generator.x": one}, "proposal_generator, roi_heads"),
        ({"sem_seg_head.predictor.class_embed.weight": one}, "sem_seg_head.pixel_decoder.transformer.level_"),
        ({"decode_head.scale_heads.0.0.conv.weight": one}, "decode_head.conv_seg.weight"),
        ({"bbox_head.retina_cls.weight": one}, "bbox_head.retina_reg.weight"),
        ({"bbox_head.conv_centerness.weight": one}, "bbox_head"),
        ({"decode_head.psp_modules.0.1.conv.weight": one}, "decode_head.conv_seg.weight"),
    ):
        with pytest.raises(ConversionError) as caught:
            told = {"task": "segment", "channel_order": "rgb", "mean": [0.5] * 3, "std": [0.5] * 3}
            convert(write(tmp_path / "x", inner | heads), tmp_path / "ours", model="test_foveal_nat", arguments=told)
        message = str(caught.value)
        count = len(inner) + len(heads)
        assert re.search(rf" {count} .* {len(inner)} .*{re.escape(reason)}.*--backbone", message)
    # and a whole one, of which something is missing, or left over
    state = to_mmseg(model.state_dict()) | inner
    gone = {key: x for key, x in state.items() if key != "decode_head.fpn_bottleneck.bn.bias"}
    with pytest.raises(ConversionError, match=r"1 \(head\.fuse\.norm\.bias\)"):
        convert(write(tmp_path / "x", gone), tmp_path / "ours", model="test_foveal_nat")
    more = state | {"decode_head.extra.weight": one}
    with pytest.raises(ConversionError, match=r"decode_head\.extra\.weight"):
        convert(write(tmp_path / "x", more), tmp_path / "ours", model="test_foveal_nat")
    more = state | {"backbone.extra.weight": one}
    with pytest.raises(ConversionError, match=r"1 \(extra\.weight\)"):
        convert(write(tmp_path / "x", more), tmp_path / "ours", model="test_foveal_nat")
    assert not (tmp_path / "ours").exists()


def test_what_the_manifest_knows_of_it(tmp_path: Path) -> None:
    """Dilations, statistics, ids of the classes, score and licence; found by the name of the published file."""
    checkpoint = checkpoints()["dinat_mini.maskrcnn_coco"]
    small = dict(embed_dim=16, num_heads=[1, 2, 4, 8])
    sizes = dict(box_width=32, mask_width=16, convention="mmdet")
    model = build_detector(
        "dinat_mini", "mask_rcnn", num_classes=80, neck_kwargs={"out_channels": 16}, head_kwargs=sizes, **small,
        **checkpoint.arguments,
    )  # fmt: skip
    model.load_state_dict(filler.of(model))
    state = {f"backbone.{key}": x for key, x in model.backbone.body.model.state_dict().items()}
    state |= to_mmdet(model.state_dict())
    file = write(tmp_path / "x", state).rename(tmp_path / "x" / "maskrcnn_dinat_mini.pth")
    done = convert(file, tmp_path / "ours", model="dinat_mini", arguments=small)
    loaded = foveal.load(done.folder)
    assert loaded.config["category_ids"][-3:] == [88, 89, 90]
    assert len(loaded.config["category_ids"]) == 80
    dilations = [m.dilation for m in loaded.modules() if hasattr(m, "dilation") and hasattr(m, "rpb")]
    assert dilations == [d for level in checkpoint.arguments["dilations"] for d in level]
    card = (done.folder / "README.md").read_text()
    for part in ("box AP 47.2, mask AP 42.5 |", "| licence of the weights | mit |", checkpoint.address, "foveal.load("):
        assert part in card
    checks = {check.name: check for check in verify(done.folder)}
    assert all(check.passed for check in checks.values())
    assert checks["manifest"].detail == "mean, std, dilations"
    with pytest.raises(ValueError, match=r"detect.*foveal evaluate"):
        list(verify(done.folder, tmp_path))
    weights = done.folder / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["detector.roi_heads.mask_predictor.mask_fcn_logits.bias"][1] += 1
    safetensors.torch.save_file(tensors, weights)
    assert {check.name for check in verify(done.folder) if not check.passed} == {"file", "outputs for the fixed image"}
    # its backbone alone
    body = convert(file, tmp_path / "body", model="dinat_mini", arguments=small, backbone=True)
    assert body.record["heads"] == {"neck": 16, "rpn_head": 6, "roi_head": 20}


def to_mmdet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The heads of a detector under mmdetection's names, with the background last and without its boxes and masks."""
    result = {}
    for name, tensor in state.items():
        for theirs, ours in (*published_names._CASCADE, *published_names._FPN, *published_names._RCNN):
            match = re.match(re.escape(ours).replace(r"\{\}", r"(\d+)"), name)
            if match:
                skip = 4 if ".bbox_pred." in name and "rpn" not in name else 1 if "mask_fcn_logits" in name else 0
                tensor = tensor.roll(-1, 0) if ".cls_score." in name else tensor[skip:] if skip else tensor
                result[theirs.format(*match.groups()) + name[match.end() :]] = tensor
                break
    return result


def test_published_segmenters_see_the_size_of_their_score() -> None:
    model = build_segmenter("test_foveal_dinat", "upernet", num_classes=3, head_kwargs={"channels": 16}).eval()
    found = {}
    for architecture, tag in (
        ("nat_mini", "upernet_ade20k"),
        ("dinat_large", "upernet_ade20k"),
        ("dinat_large_384_11x11", "mask2former_ade20k_semantic"),
        ("dinat_large_384_11x11", "mask2former_cityscapes_semantic"),
    ):
        found[architecture, tag] = dense.preprocessing(model, of_model(architecture)[tag]).get("inference")
    assert [*found.values()] == [
        {"scale": [2048, 512], "antialias": False},
        {"scale": [2560, 640], "antialias": False},
        {"scale": [2560, 640], "antialias": True},
        None,  # whole images
    ]
    assert "inference" not in dense.preprocessing(model)
    image = torch.rand(1, 3, 30, 40)
    seen = []

    def output_of(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return x

    probabilities(output_of, image, **found["nat_mini", "upernet_ade20k"])
    assert seen == [(1, 3, 512, 683)]
