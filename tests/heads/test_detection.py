"""Detectors: every head on every neck and family; strides, classes and sizes that they are told; saving and loading."""

import json
import re

import pytest
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from foveal.heads.build import build_detector
from foveal.heads.checkpoint import load_dense, save_dense
from foveal.heads.detection.parts import Anchors
from foveal.heads.registry import HEADS

from ..variants import HIERARCHICAL

SMALL = {"min_size": 64, "max_size": 96, "neck_kwargs": {"out_channels": 32}}
SLOW = pytest.mark.slow
PYRAMIDS = [
    name for name, spec in HEADS["detect"].items() if spec.neck == "before"
]  # the others have tests of their own
LIGHT = {"box_width": 32, "rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 16}


def small(backbone: str = "test_foveal_dinat", head: str = "mask_rcnn", neck: str = "fpn", **kwargs) -> nn.Module:
    head_kwargs = (
        {} if head in ("retinanet", "fcos") else LIGHT | ({"mask_width": 32} if head.endswith("mask_rcnn") else {})
    )
    if head == "fcos":  # its norms have 32 groups
        kwargs = {"neck_kwargs": {"out_channels": 64}} | kwargs
    torch.manual_seed(0)
    return build_detector(backbone, head, neck, **{"num_classes": 3, "head_kwargs": head_kwargs} | SMALL | kwargs)


def batch(channels: int = 3) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two images of different sizes, one with two objects and one without."""
    torch.manual_seed(1)
    masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
    masks[0, 10:40, 10:50] = 1
    masks[1, 20:60, 60:90] = 1
    boxes = torch.tensor([[10.0, 10, 50, 40], [60, 20, 90, 60]])
    full = {"boxes": boxes, "labels": torch.tensor([2, 0]), "masks": masks}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    empty["masks"] = torch.zeros(0, 70, 50, dtype=torch.uint8)
    return [torch.rand(channels, 64, 96), torch.rand(channels, 70, 50)], [full, empty]


def steps_and_finds(model: nn.Module, channels: int = 3) -> None:
    images, targets = batch(channels)
    copies = [{key: value.clone() for key, value in target.items()} for target in targets]
    losses = model(images, targets)
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    for target, copy in zip(targets, copies, strict=True):
        assert all(torch.equal(target[key], copy[key]) for key in target)  # the caller's labels are left alone
    found = model.eval()(images)
    for image, each in zip(images, found, strict=True):
        height, width = image.shape[-2:]
        assert each["boxes"][:, 0::2].ge(0).all()
        assert each["boxes"][:, 0::2].le(width).all()
        assert each["boxes"][:, 1::2].le(height).all()
        assert each["labels"].ge(0).all()
        assert each["labels"].lt(model.num_classes).all()
        assert ("masks" in each) == model.masks
        if model.masks:
            assert each["masks"].shape == (len(each["boxes"]), 1, height, width)


@pytest.mark.parametrize(
    ("head", "neck"),
    [
        *((head, "fpn") for head in PYRAMIDS),
        *(("mask_rcnn", "a3fpn"), ("retinanet", "a3fpn")),
        *(pytest.param(head, "a3fpn", marks=SLOW) for head in ("faster_rcnn", "fcos")),  # the maps of those two
    ],
)
def test_every_head_on_every_neck(head, neck):
    steps_and_finds(small(head=head, neck=neck))


@pytest.mark.parametrize("head", PYRAMIDS)
def test_a_batch_without_objects_still_trains_every_part(head):
    """Processes that train together need a gradient for every parameter, whatever is in their images."""
    images, (_, empty) = batch()
    model = small(head=head)
    loss = sum(model(images[1:], [empty]).values())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", HIERARCHICAL)
def test_every_family(family):
    model = small(family, "faster_rcnn", drop_path_rate=0.1)
    assert model.backbone.spec.strides == (4, 8, 16, 32, 64)
    steps_and_finds(model)


@pytest.mark.parametrize(
    "backbone", ["resnet18", "swin_tiny_patch4_window7_224", pytest.param("convnext_atto", marks=SLOW)]
)
def test_backbones_of_timm(backbone):
    kwargs = {"depths": (1, 1, 1, 1)} if "resnet" not in backbone else {}
    steps_and_finds(small(backbone, "retinanet", **kwargs))


def test_grey_images():
    model = small(head="fcos", in_chans=1)
    assert len(model.detector.transform.image_mean) == 1
    steps_and_finds(model, channels=1)


@pytest.mark.parametrize(("head", "strides"), [("faster_rcnn", (4, 8, 16, 32, 64)), ("fcos", (8, 16, 32, 64, 128))])
def test_levels(head, strides):
    model = small(head=head)
    assert model.backbone.spec.strides == strides
    maps = model.backbone(torch.zeros(1, 3, 128, 256))
    assert [tuple(x.shape[-2:]) for x in maps.values()] == [(128 // s, 256 // s) for s in strides]
    generator = model.detector.rpn.anchor_generator if head == "faster_rcnn" else model.detector.anchor_generator
    assert generator.strides == strides


def test_anchors_stand_at_the_strides():
    """At (column, row) * stride, also where maps are rounded up: 3 rows of stride 64 cover an image of 160 pixels."""
    anchors = Anchors((32, 64), [8.0], [0.5, 1.0, 2.0])
    maps = [torch.zeros(1, 1, 5, 7), torch.zeros(1, 1, 3, 4)]
    found = anchors(ImageList(torch.zeros(1, 3, 160, 224), [(160, 224)]), maps)[0]
    assert found.shape == (3 * (5 * 7 + 3 * 4), 4)
    centres = (found[:, :2] + found[:, 2:]) / 2
    last = centres[3 * 35 :].view(3, 4, 3, 2)
    assert torch.equal(last[2, 3, 0], torch.tensor([3 * 64.0, 2 * 64.0]))
    squares = found[3 * 35 + 1 :: 3]
    assert torch.equal(squares[0], torch.tensor([-256.0, -256, 256, 256]))


def test_regions_are_pooled_at_the_strides():
    """Also from an image so small that torchvision's guess from the sizes (66 pixels, a map of 24) is another one."""
    model = small(head="faster_rcnn").eval()
    pool = model.detector.roi_heads.box_roi_pool
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    maps = {str(i): torch.rand(1, 8, 96 // s, 96 // s) for i, s in enumerate((4, 8, 16, 32))}
    box = torch.tensor([[4.0, 8, 40, 52]])
    expected = roi_align(maps["0"], [box], 7, spatial_scale=0.25, sampling_ratio=2)
    assert torch.equal(pool(maps, [box], [(66, 66)]), expected)
    large = torch.tensor([[0.0, 0, 230, 230]])  # 224 and more: the third level
    expected = roi_align(maps["2"], [large], 7, spatial_scale=1 / 16, sampling_ratio=2)
    assert torch.equal(pool(maps, [large], [(66, 66)]), expected)


def test_training_takes_images_as_they_come_and_evaluation_resizes():
    model = small(head="fcos")
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    images, targets = batch()
    model(images, targets)
    model.eval()([torch.rand(3, 100, 130)])
    assert seen[0] == (2, 3, 96, 96)  # 64x96 and 70x50, to a multiple of 32
    assert seen[1] == (1, 3, 64, 96)  # 64x83, padded
    model([torch.rand(3, 40, 200)])
    assert seen[2] == (1, 3, 32, 96)  # the long side is limited to 96


@pytest.mark.parametrize("head", ["mask_rcnn", "retinanet", "fcos", pytest.param("faster_rcnn", marks=SLOW)])
def test_classes_are_numbered_from_zero(head):
    """Trained on one image until it is found: the label that comes out is the one that went in."""
    model = small(head=head, num_classes=2, drop_path_rate=0.0)
    image = torch.full((3, 64, 64), 0.1)
    image[0, 16:48, 16:48] = 0.9
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 16:48, 16:48] = 1
    target = {"boxes": torch.tensor([[16.0, 16, 48, 48]]), "labels": torch.tensor([1]), "masks": masks}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(25):
        optimizer.zero_grad()
        sum(model([image], [target]).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    found = model.eval()([image])[0]
    assert found["labels"][0] == 1
    assert found["scores"][0] > 0.2


def test_detections_are_in_the_image_s_own_pixels():
    """An image twice as large gives the same boxes twice as large: both are brought to the same size inside."""
    model = small(head="retinanet", head_kwargs={"score_thresh": 0.0}).eval()
    image = torch.rand(3, 64, 64).repeat_interleave(2, 1).repeat_interleave(2, 2)
    with torch.no_grad():
        found = model([image, image.repeat_interleave(2, 1).repeat_interleave(2, 2)])
    one, two = (each["boxes"][:20] for each in found)
    assert len(one) == 20
    assert one[:, 2].max() > 64
    assert torch.allclose(2 * one, two, atol=1e-3)


@pytest.mark.parametrize("head", ["mask_rcnn", "retinanet", "fcos", pytest.param("faster_rcnn", marks=SLOW)])
def test_saved_and_loaded_it_outputs_the_same(head, tmp_path):
    model = small(head=head, frozen_stages=1, drop_path_rate=0.1, strides=(8, 16, 32)).eval()
    save_dense(tmp_path, model, ["a", "b", "c"], {"in_chans": 3}, category_ids=[3, 7, 90])
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format"], config["task"], config["category_ids"]) == ("foveal-dense", "detect", [3, 7, 90])
    other = load_dense(tmp_path)
    assert not other.training
    assert (other.classes, other.config["preprocessing"]) == (["a", "b", "c"], {"in_chans": 3})
    images, _ = batch()
    with torch.no_grad():
        for a, b in zip(model(images), other(images), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_what_cannot_be_loaded_says_why(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_dense(tmp_path)
    model = small(head="fcos")
    save_dense(tmp_path, model, ["a", "b", "c"], {})
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_dense(tmp_path)
    file.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, says in (
        ("arguments", config["arguments"] | {"num_classes": 5}, "size mismatch"),
        ("arguments", config["arguments"] | {"colour": 1}, "colour"),
        ("task", "dance", "dance.*detect, segment"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=says):
            load_dense(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_dense(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"head": "yolo"}, "yolo.*mask_rcnn"),
        ({"neck": "pan"}, "pan.*fpn"),
        ({"num_classes": 0}, "num_classes.* 0"),
        ({"head_kwargs": {"score_tresh": 0.1}, "head": "fcos"}, "score_tresh.*score_thresh"),
        ({"head_kwargs": {"box_nms_tresh": 0.1}}, "box_nms_tresh.*box_nms_thresh"),
        ({"head_kwargs": {"mask_width": 3}, "head": "faster_rcnn"}, "mask_width"),
        ({"head_kwargs": {"min_size": 3}}, "min_size"),
        ({"strides": (3, 9)}, "3, 9"),
        ({"strides": (4, 16, 32)}, r"\(4, 16, 32\)"),
        ({"neck_kwargs": {"colour": 1}}, "fpn.*colour"),
        ({"mean": [0.5, 0.5]}, r"mean.*2.*3.*0\.5, 0\.5"),
        ({"std": [1.0] * 3, "in_chans": 1}, r"std.*3.*1.*1\.0, 1\.0"),
        ({"name": "test_foveal_dinatt"}, "test_foveal_dinatt"),
    ],
)
def test_mistakes_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        build_detector(**{"name": "test_foveal_dinat", "num_classes": 3} | arguments)


def test_parameter_groups():
    """All parameters that learn, once; the backbone's rate lower and falling with depth; frozen ones left out."""
    model = small(head="faster_rcnn", frozen_stages=1)
    groups = model.parameter_groups(0.05, layer_decay=0.5, backbone_lr_ratio=0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert any(not p.requires_grad for p in model.parameters())
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    head = {name: p for name, p in named.items() if ".backbone.body." not in name}
    assert {scales[id(p)] for p in head.values()} == {1.0}
    assert {decays[id(p)] for p in head.values() if p.ndim > 1} == {0.05}
    assert {decays[id(p)] for p in head.values() if p.ndim == 1} == {0.0}
    body = [p for name, p in named.items() if ".backbone.body." in name and p.requires_grad]
    assert max(scales[id(p)] for p in body) <= 0.1
    assert len({scales[id(p)] for p in body}) > 2


def test_sizes_are_those_of_the_paper():
    """DiNAT-Tiny with Mask R-CNN: 48 M parameters (github.com/SHI-Labs, DiNAT.md)."""
    with torch.device("meta"):
        model = build_detector("dinat_tiny", num_classes=80)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(48, abs=0.5)


@pytest.mark.parametrize("head", [head for head in PYRAMIDS if not head.startswith("cascade")])  # has its own test
@torch.no_grad()
def test_half_precision_tells_pixels_apart(head):
    """bfloat16 has only multiples of 4 between 512 and 1024."""
    settings = {"score_thresh": 0.0} if head in ("retinanet", "fcos") else {"box_score_thresh": 0.0, "box_width": 32}
    settings |= {"mask_width": 32} if head == "mask_rcnn" else {}
    model = small(head=head, head_kwargs=settings, min_size=96, max_size=768).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = model([torch.rand(3, 96, 768)])
    right = found["boxes"][:, 2]
    inside = right[(right > 520) & (right < 760)]
    assert len(inside) > 5
    assert (inside % 4 != 0).any()


@pytest.mark.parametrize("head", PYRAMIDS)
@torch.no_grad()
def test_double_precision_stays(head):
    settings = {"score_thresh": 0.0} if head in ("retinanet", "fcos") else {"box_score_thresh": 0.0, "box_width": 32}
    settings |= {"mask_width": 32, "box_detections_per_img": 5} if head.endswith("mask_rcnn") else {}
    (found,) = small(head=head, head_kwargs=settings).double().eval()([torch.rand(3, 64, 64).double()])
    assert len(found["boxes"]) > 0
    assert found["boxes"].dtype == found["scores"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=SLOW)])
@pytest.mark.parametrize(("head", "neck"), [("mask_rcnn", "fpn"), ("retinanet", "a3fpn")])
def test_half_precision(head, neck, dtype):
    model = small(head=head, neck=neck)
    images, targets = batch()
    with torch.autocast("cpu", dtype=dtype):
        loss = sum(model(images, targets).values())
        loss.backward()
        found = model.eval()(images)
    assert loss.isfinite()
    assert all(each["boxes"].isfinite().all() for each in found)


TINY_QUERIES = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2, encoder_layers=1)
TINY_QUERIES |= dict(encoder_feedforward_dim=32, decoder_layers=2, dim_feedforward=32, num_queries=5)
TINY_QUERIES = {
    "mask2former": TINY_QUERIES | {"train_num_points": 64},
    "conditional_detr": dict(width=32, num_heads=2, ffn_width=32, encoder_layers=1, num_queries=5, dropout=0.0),
}


@pytest.mark.parametrize("head", HEADS["detect"])
def test_held_out_losses_are_those_of_training_and_change_nothing(head):
    """Training's, with the same draws, of images that are resized before; without dropout and batch statistics."""
    if head in TINY_QUERIES:
        if head == "mask2former":
            pytest.importorskip("transformers", reason="needs transformers")
        torch.manual_seed(0)
        kwargs = dict(min_size=64, max_size=96, drop_path_rate=0.5, head_kwargs=TINY_QUERIES[head])
        model = build_detector("test_foveal_dinat", head, num_classes=3, **kwargs)
    else:
        model = small(head=head, drop_path_rate=0.5)
    model.detector.transform.size_divisible, model.detector.transform.min_size = 1, (48,)
    images, targets = batch()
    for key, value in (("boxes", [[7.0, 7, 8, 8]]), ("labels", [1]), ("masks", torch.zeros(1, 64, 96).tolist())):
        targets[0][key] = torch.cat([targets[0][key], torch.tensor(value).to(targets[0][key])])
    targets[0]["masks"][2, 7, 7] = 1  # a pixel that is gone at three quarters of the size
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found, randoms = model(images), torch.get_rng_state()
    held_out = model.held_out_losses(images, targets)
    for before, after in zip(found, model(images), strict=True):
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(torch.get_rng_state(), randoms)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    again = model.held_out_losses(images, targets)
    assert all(torch.equal(held_out[name], value) for name, value in again.items())
    assert not any(value.requires_grad for value in held_out.values())

    counts, transform = model.normalizers(images, targets), model.detector.transform
    resized, targets = transform(images, targets)
    images = [image[:, :h, :w] for image, (h, w) in zip(resized.tensors, resized.image_sizes, strict=True)]
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.image_mean, transform.image_std))
    images = [image * std + mean for image in images]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or type(module).__name__ in ("DropPath", "Dropout"):
            module.eval()
    torch.manual_seed(0)
    trained = model(images, targets)
    assert trained.keys() == held_out.keys()
    for name, value in trained.items():
        torch.testing.assert_close(held_out[name], value.detach(), rtol=1e-3, atol=1e-4, msg=name)
    if counts is not None:
        assert torch.equal(counts, model.normalizers(images, targets))
