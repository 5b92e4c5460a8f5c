"""Mask2Former as a detector: its network and losses against transformers' own, its outputs against transformers' and
an independent computation, and what it owes the rest as one of the detectors."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from foveal.heads import mask2former
from foveal.heads.build import build_detector, build_segmenter
from foveal.heads.checkpoint import load_dense, save_dense
from foveal.heads.detection import Detector
from foveal.heads.detection.mask2former import around, instances
from foveal.train import detect, evaluate, predict, train
from foveal.train.data import DetectionBatch
from foveal.train.data.coco import read_coco
from foveal.train.detection_metrics import CocoScorer
from foveal.weights.export import export

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("scipy", reason="needs scipy")

SMALL = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2, encoder_layers=1)
SMALL |= dict(encoder_feedforward_dim=32, decoder_layers=2, dim_feedforward=32, num_queries=5, train_num_points=64)
NAME = "test_foveal_dinat"
DETECTOR, SEGMENTER = "detector.head.", "head."


def detector(neck: str = "fpn", num_classes: int = 3, settings=None, **kwargs) -> Detector:
    torch.manual_seed(0)
    sizes = {"min_size": 64, "max_size": 96} | kwargs
    return build_detector(
        NAME, "mask2former", neck, num_classes=num_classes, head_kwargs=SMALL | (settings or {}), **sizes
    )


def target(*objects: tuple[int, tuple[int, int, int, int]], size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Rectangles: (label, corners)."""
    masks = torch.zeros(len(objects), *size, dtype=torch.uint8)
    for mask, (_, (x1, y1, x2, y2)) in zip(masks, objects, strict=True):
        mask[y1:y2, x1:x2] = 1
    boxes = torch.tensor([corners for _, corners in objects], dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor([label for label, _ in objects]).long(), "masks": masks}


def batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two images of different sizes, one with two objects and one without."""
    torch.manual_seed(1)
    full = target((2, (10, 10, 50, 40)), (0, (60, 20, 90, 60)), size=(64, 96))
    return [torch.rand(3, 64, 96), torch.rand(3, 70, 50)], [full, target(size=(70, 50))]


# ---- the network and its losses


@pytest.fixture
def theirs():
    """transformers' model with the backbone that it makes of a timm name."""
    backbone = transformers.TimmBackboneConfig(backbone=NAME, out_indices=[0, 1, 2, 3])
    config = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=3, **SMALL)
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


def test_equals_transformers(theirs):
    """Logits, losses and detections."""
    ours = detector().eval()
    ours.backbone.body = timm.create_model(NAME, features_only=True).eval()  # as transformers makes it: no norms
    prefix = "model.pixel_level_module.encoder."
    ours.detector.head.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith(prefix)})
    ours.backbone.body.load_state_dict(theirs.model.pixel_level_module.encoder._backbone.state_dict())

    images = torch.rand(2, 3, 64, 96)
    mean, std = (torch.tensor(ours.arguments[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        output = theirs((images - mean) / std)
        found = ours(list(images))
        classes, masks = (each[-1] for each in mask2former.query_outputs(ours.detector.head, (images - mean) / std))
    torch.testing.assert_close(classes, output.class_queries_logits)
    torch.testing.assert_close(masks, output.masks_queries_logits)
    best = output.class_queries_logits.softmax(-1)[..., :-1].flatten(1).max(1)
    for each, (share, index) in zip(found, zip(*best, strict=True), strict=True):
        assert len(each["scores"]) <= 5 * 3
        assert index % 3 in each["labels"]
        assert each["scores"][0] <= share

    objects = [
        target((1, (8, 4, 40, 60)), (2, (50, 10, 90, 30)), size=(64, 96)),
        target((0, (0, 0, 96, 64)), size=(64, 96)),
    ]
    labels = [each["labels"] for each in objects]
    torch.manual_seed(1)  # the points where masks are compared are drawn
    want = theirs(
        (images - mean) / std, mask_labels=[each["masks"].float() for each in objects], class_labels=labels
    ).loss
    ours.train()
    ours.backbone.eval()  # it has stochastic depth
    torch.manual_seed(1)
    losses = ours(list(images), objects)
    assert set(losses) == {"loss_class", "loss_mask", "loss_dice"}
    torch.testing.assert_close(sum(losses.values()), want)


def test_published_settings():
    """Unless told otherwise; the losses are weighted by them."""
    settings = {"encoder_layers": 1, "decoder_layers": 2, "class_weight": 2}  # as YAML may have it
    model = build_detector(NAME, "mask2former", num_classes=80, head_kwargs=settings)
    config = model.detector.head.config
    assert (config.class_weight, config.mask_weight, config.dice_weight, config.no_object_weight) == (2, 5, 5, 0.1)
    assert (config.num_queries, config.train_num_points, model.detector.detections_per_img) == (100, 12_544, 100)
    assert (config.oversample_ratio, config.importance_sample_ratio, config.dropout) == (3, 0.75, 0)
    defaults = transformers.Mask2FormerConfig()
    assert (defaults.encoder_layers, defaults.decoder_layers, defaults.use_auxiliary_loss) == (6, 10, True)
    weights = model.detector.head.criterion.empty_weight
    assert len(weights) == 81
    assert weights[:80].eq(1).all()
    assert weights[80] == pytest.approx(0.1)  # none is the last class


@pytest.mark.parametrize("deep", [True, False])
def test_losses_of_every_layer(deep):
    """Deep supervision adds those of the layers before the last, the first being that of the queries themselves."""
    images, targets = batch()
    model = detector(settings={"use_auxiliary_loss": deep, "decoder_layers": 3}, drop_path_rate=0.0)
    torch.manual_seed(2)
    got = model(images, targets)
    torch.manual_seed(2)  # each layer draws its points, the last one first
    with torch.no_grad():
        normalized = model.detector.transform(images)[0].tensors
        assert normalized.shape == (2, 3, 96, 96)
        padded = torch.zeros(2, 96, 96)
        padded[:, :64] = targets[0]["masks"]
        masks, labels = [padded, torch.zeros(0, 96, 96)], [each["labels"] for each in targets]
        classes, logits = mask2former.query_outputs(model.detector.head, normalized)
        assert len(classes) == len(logits) == 3
        criterion = model.detector.head.criterion
        each = [criterion(logits[i], classes[i], masks, labels) for i in ((2, 0, 1) if deep else (2,))]
    for ours, theirs, weight in (("class", "cross_entropy", 2), ("mask", "mask", 5), ("dice", "dice", 5)):
        torch.testing.assert_close(got[f"loss_{ours}"], weight * sum(layer[f"loss_{theirs}"] for layer in each))


@pytest.mark.parametrize("neck", ["fpn", "a3fpn"])
def test_trains_every_part_whatever_the_images_hold(neck):
    model = detector(neck, settings={"decoder_layers": 4})  # one layer for each level
    images, targets = batch()
    copies = copy.deepcopy(targets)
    for chosen in (slice(0, 2), slice(1, 2)):  # with objects, and none at all
        model.zero_grad()
        losses = model(images[chosen], targets[chosen])
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    for ours, before in zip(targets, copies, strict=True):
        assert all(torch.equal(ours[key], before[key]) for key in before)  # the caller's labels are left alone


def test_labels_padding_and_empty_masks():
    """What the criterion is given: classes from 0, masks that do not reach into the padding, none without a pixel."""
    model, seen = detector(), []
    model.detector.head.criterion.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    full = target((2, (0, 0, 50, 70)), (1, (5, 5, 5, 5)), (0, (7, 8, 9, 10)), size=(70, 50))
    model([torch.rand(3, 70, 50)], [full])
    (labels,), (masks,) = seen[0]["class_labels"], seen[0]["mask_labels"]
    assert labels.tolist() == [2, 0]
    assert masks.shape == (2, 96, 64)
    assert masks[0, :70, :50].all()
    assert masks[0].sum() == 70 * 50
    assert masks[1].nonzero().tolist() == [[8, 7], [8, 8], [9, 7], [9, 8]]


def test_more_objects_than_queries():
    objects = [(i % 3, (4 * i, 4 * i, 4 * i + 8, 4 * i + 8)) for i in range(8)]
    losses = detector()([torch.rand(3, 64, 64)], [target(*objects, size=(64, 64))])
    assert sum(losses.values()).isfinite()


def test_half_precision():
    """Queries are matched in float32; the losses are near those of it."""
    images, targets = batch()
    model = detector(drop_path_rate=0.0)
    torch.manual_seed(2)
    want = model(images, targets)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(images, targets)
    for name in want:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name], want[name], rtol=0.05, atol=0)
    sum(got.values()).backward()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model.eval()(images)[0]["masks"].dtype == torch.float32


# ---- A3-FPN in the pixel decoder


def test_a3fpn_mixes_what_the_encoder_gives():
    """Its maps are those of transformers' encoder, and the backbone's finest; masks are made of its finest."""
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

    model = detector("a3fpn", neck_kwargs={"preset": "lite"}).eval()
    decoder = model.detector.head.model.pixel_level_module.decoder
    channels = model.backbone.spec.channels
    theirs = Mask2FormerPixelDecoder(model.detector.head.config, channels).eval()
    missing, extra = theirs.load_state_dict(decoder.state_dict(), strict=False)
    assert all(name.startswith(("adapter_1.", "layer_1.")) for name in missing)
    assert all(name.startswith("a3fpn.") for name in extra)
    maps = [torch.rand(2, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)]
    with torch.no_grad():
        encoded = theirs(maps).multi_scale_features
        finest, *coarser = decoder.a3fpn([maps[0], *reversed(encoded)])
        got = decoder(maps)
        torch.testing.assert_close(got.mask_features, decoder.mask_projection(finest))
    assert [tuple(each.shape[-2:]) for each in got.multi_scale_features] == [(2, 3), (4, 6), (8, 12)]
    for ours, want in zip(got.multi_scale_features, coarser[::-1], strict=True):
        torch.testing.assert_close(ours, want)


def test_segmenter_with_a3fpn(tmp_path):
    model = build_segmenter(NAME, "mask2former", "a3fpn", num_classes=4, head_kwargs=SMALL | {"decoder_layers": 4})
    images = torch.rand(2, 3, 50, 70)
    sum(model(images, torch.randint(0, 4, (2, 50, 70))).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    save_dense(tmp_path, model.eval(), list("abcd"), {})
    torch.testing.assert_close(load_dense(tmp_path)(images), model(images))


# ---- outputs


def test_instances_as_transformers_has_them():
    """On its own way through 384 x 384 both are the same."""
    torch.manual_seed(3)
    classes, masks = 2 * torch.randn(1, 20, 6), torch.randn(1, 20, 24, 24) - 0.5
    masks[0, 3] = -1  # no pixel
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    processor = transformers.Mask2FormerImageProcessor()
    (want,) = processor.post_process_instance_segmentation(outputs, threshold=0.0, return_binary_maps=True)
    got = instances(classes[0], masks[0], (384, 384), (384, 384), (384, 384), limit=20)
    segments = want["segments_info"]
    order = sorted(range(len(segments)), key=lambda i: -segments[i]["score"])
    assert 10 < len(order) == len(got["scores"]) <= 20
    assert got["labels"].tolist() == [segments[i]["label_id"] for i in order]
    scores = torch.tensor([segments[i]["score"] for i in order])  # rounded to six places
    torch.testing.assert_close(got["scores"], scores, rtol=1e-5, atol=1e-6)
    for mask, i in zip(got["masks"], order, strict=True):
        assert torch.equal(mask[0] > 0.5, want["segmentation"][i] == 1)


def interpolated(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, pixels are areas, no antialiasing: ``[H, W]`` to ``size``."""
    for axis, length in enumerate(size):
        at = ((np.arange(length) + 0.5) * x.shape[axis] / length - 0.5).clip(0, None)
        low = at.astype(int).clip(0, x.shape[axis] - 1)
        high = (low + 1).clip(0, x.shape[axis] - 1)
        share = (at - low)[:, None] if axis == 0 else (at - low)[None]
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    return x


@pytest.mark.parametrize("size", [(140, 100), (33, 47), (70, 50)])
def test_instances_by_hand(size):
    """Padding is cut off before masks are brought to the image's size; in float64."""
    torch.manual_seed(4)
    classes, masks = torch.randn(7, 4).double(), torch.randn(7, 24, 16).double() - 0.4
    masks[2, :, :] = -1
    masks[2, 20:, 14:] = 5  # only in the padding
    got = instances(classes, masks, (96, 64), (70, 50), size, limit=12, threshold=0.02)
    shares = np.exp(classes.numpy())
    shares = shares / shares.sum(1, keepdims=True)
    pairs = sorted(((share, q, c) for q, row in enumerate(shares[:, :3]) for c, share in enumerate(row)), reverse=True)
    want = []
    for share, query, label in pairs[:12]:
        mask = interpolated(interpolated(masks[query].numpy(), (96, 64))[:70, :50], size)
        mask = 1 / (1 + np.exp(-mask))
        rows, columns = np.nonzero(mask > 0.5)
        if len(rows) and (score := share * mask[rows, columns].mean()) > 0.02:
            want.append((score, label, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), mask))
    want.sort(key=lambda each: -each[0])
    assert 2 < len(want) < 12
    assert got["labels"].tolist() == [each[1] for each in want]
    np.testing.assert_allclose(got["scores"], [each[0] for each in want], rtol=1e-12)
    np.testing.assert_array_equal(got["boxes"], np.array([each[2] for each in want]))
    np.testing.assert_allclose(got["masks"][:, 0], np.stack([each[3] for each in want]), rtol=1e-9)
    assert got["masks"].shape[1:] == (1, *size)


def test_one_query_may_be_of_several_classes():
    """None takes no place among the best, however sure."""
    classes = torch.tensor([[3.0, 2.9, -9, 8], [0, 0, 1, 9]])
    got = instances(
        classes, torch.stack([torch.full((4, 4), 9.0), torch.full((4, 4), -9.0)]), (16,) * 2, (16,) * 2, (16,) * 2, 2
    )
    assert got["labels"].tolist() == [0, 1]
    assert got["masks"].shape == (2, 1, 16, 16)
    assert got["boxes"].tolist() == [[0, 0, 16, 16]] * 2
    none = instances(classes, torch.full((2, 4, 4), -9.0), (16, 16), (16, 16), (20, 30), 2)
    assert {name: tuple(x.shape) for name, x in none.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "scores": (0,),
        "masks": (0, 1, 20, 30),
    }


def test_around():
    masks = torch.zeros(3, 5, 7, dtype=torch.bool)
    masks[0, 2, 3] = True
    masks[1, 0, 6] = masks[1, 4, 1] = True
    assert around(masks)[:2].tolist() == [[3, 2, 4, 3], [1, 0, 7, 5]]


def test_outputs_in_the_images_own_pixels():
    """An image has the same outputs in a batch of different sizes and alone."""
    model = detector(settings={"detections_per_img": 4}).eval()
    images = [torch.rand(3, 64, 96), torch.rand(3, 140, 100)]
    with torch.no_grad():
        together = model(images)
        (alone,) = model(images[:1])
    assert [each["masks"].shape[1:] for each in together] == [(1, 64, 96), (1, 140, 100)]
    assert all(len(each["scores"]) == 4 for each in together)
    for each in together:
        assert each["scores"].diff().le(0).all()
        assert torch.equal(each["boxes"], around(each["masks"][:, 0] > 0.5))
    assert alone["masks"].shape == together[0]["masks"].shape


# ---- as one of the detectors


def test_round_trip_and_copies(tmp_path):
    model = detector("a3fpn", neck_kwargs={"preset": "lite"}).eval()
    save_dense(tmp_path, model, list("abc"), {"in_chans": 3}, category_ids=[3, 7, 90])
    assert json.loads((tmp_path / "config.json").read_text())["task"] == "detect"
    loaded, image = load_dense(tmp_path), torch.rand(3, 64, 64)
    assert loaded.masks
    with torch.no_grad():
        want = model([image])[0]
        assert all(torch.equal(x, want[name]) for name, x in loaded([image])[0].items())
        other = copy.deepcopy(model)  # as an average of the weights is made
        for p in other.backbone.parameters():
            p.zero_()
        assert not torch.equal(other([image])[0]["scores"], want["scores"])
        assert torch.equal(model([image])[0]["scores"], want["scores"])


def test_parameter_groups():
    """The backbone at a tenth of the rate; norms, biases and embeddings are not decayed."""
    model = detector()
    groups = model.parameter_groups(0.05, None, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    kept = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        inside = name.startswith("detector.backbone.")
        assert scale[id(parameter)] == (0.1 if inside else 1)
        if not inside:
            table = any(word in name for word in ("queries_embedder", "queries_features", "level_embed"))
            assert (id(parameter) in kept) == (table or parameter.ndim == 1), name


def test_names_of_the_network_are_those_of_the_segmenter():
    """And of transformers: a converter needs one mapping."""
    segmenter = build_segmenter(NAME, "mask2former", num_classes=3, head_kwargs=SMALL)
    ours = {name.removeprefix(DETECTOR) for name in detector().state_dict() if name.startswith(DETECTOR)}
    assert ours == {name.removeprefix(SEGMENTER) for name in segmenter.state_dict() if name.startswith(SEGMENTER)}
    assert "model.transformer_module.queries_features.weight" in ours


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"neck": "pan"}, "pan.*fpn"),
        ({"neck_kwargs": {"out_channels": 64}}, "'out_channels': 64"),
        ({"neck": "a3fpn", "neck_kwargs": {"depth": 2}}, "a3fpn.*'depth': 2"),
        ({"neck": "a3fpn", "neck_kwargs": {"out_channels": 64}}, r"\(64, 64, 64, 64\)"),
        ({"neck": "a3fpn", "neck_kwargs": {"extra_levels": 1}}, r"\(4, 8, 16, 32, 64\)"),
        ({"neck": "a3fpn", "head_kwargs": {"a3fpn": {"columns": 2}}}, r"a3fpn=\{'columns': 2\}"),
        ({"head_kwargs": {"num_queries": "many"}}, "num_queries.*int.*str"),
        ({"head_kwargs": {"num_query": 5}}, "num_query"),
        ({"head_kwargs": {"detections_per_img": 0}}, "detections_per_img.* 0"),
        ({"strides": (8, 16, 32)}, r"\(8, 16, 32\)"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_detector(NAME, "mask2former", **{"num_classes": 4, "head_kwargs": SMALL} | kwargs)


def test_learns_from_masks_alone():
    images, (full, _) = batch()
    del full["masks"]
    with pytest.raises(ValueError, match="masks"):
        detector()(images[:1], [full])


def test_export_keeps_weights_only(tmp_path):
    run = tmp_path / "run"
    model = detector(settings={"detections_per_img": 3})
    save_dense(run / "best", model, list("abc"), {"in_chans": 3}, category_ids=[1, 2, 3])
    with pytest.raises(ValueError, match=r"safetensors.*onnx"):
        export(run, "onnx", tmp_path / "onnx")
    done = export(run, "safetensors", tmp_path / "out")
    assert done.difference == 0
    assert "mask2former" in (done.folder / "README.md").read_text()


# ---- learning


def write_data(root: Path, split: str, count: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Images with two rectangles each, in COCO's format; and as a detector takes them."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir()
    draw = np.random.default_rng(0)
    images, annotations, tensors, targets = [], [], [], []
    for number in range(count):
        pixels = draw.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        objects = []
        for side in range(2):
            x, y, w, h = (
                32 * side + draw.integers(2, 8),
                draw.integers(2, 20),
                draw.integers(16, 22),
                draw.integers(18, 40),
            )
            kind = (number + side) % 2
            x, y, w, h = (int(v) for v in (x, y, w, h))
            pixels[y : y + h, x : x + w, kind] = 230
            objects.append((kind, (x, y, x + w, y + h)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": (3, 7)[kind],
                    "iscrowd": 0,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        Image.fromarray(pixels).save(root / split / f"{number}.png")
        images.append({"id": number + 1, "file_name": f"{number}.png", "height": 64, "width": 64})
        tensors.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
        targets.append(target(*objects, size=(64, 64)))
    categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tensors, targets


def average_precision(root: Path, split: str, found: list[dict[str, torch.Tensor]]) -> dict[str, float | None]:
    file = root / "annotations" / f"instances_{split}.json"
    scorer = CocoScorer(read_coco(file, root / split, masks=True), True)
    scorer.add(DetectionBatch([], [], list(range(len(found)))), found)
    return scorer.compute()


def test_evaluation_takes_its_outputs(tmp_path):
    """Queries with the ground truth have the maximum precision of boxes and masks."""
    images, targets = write_data(tmp_path, "val", 2)
    found = []
    for image, truth in zip(images, targets, strict=True):
        size = image.shape[-2:]
        classes = torch.full((3, 3), -5.0)
        classes[2, 2] = 5  # none
        classes[[0, 1], truth["labels"]] = 5
        masks = torch.cat([truth["masks"], truth["masks"][:1]]).float() * 20 - 10
        found.append(instances(classes, masks, size, size, size, limit=100))
    figures = average_precision(tmp_path, "val", found)
    assert figures["box_ap"] == figures["mask_ap"] == pytest.approx(100)


@pytest.mark.slow
def test_overfits_two_images(tmp_path):
    images, targets = write_data(tmp_path, "train", 2)
    settings = {"num_queries": 10, "train_num_points": 256, "decoder_layers": 4, "dim_feedforward": 64}
    model = detector(num_classes=2, settings=settings, drop_path_rate=0.0)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.05), lr=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        figures = average_precision(tmp_path, "train", model.eval()(images))
    assert figures["box_ap"] > 50
    assert figures["mask_ap"] > 50


RECIPE = """\
model: {{name: {name}, head: mask2former, head_kwargs: {settings}}}
data:
  root: {root}
  train_annotations: annotations/instances_train.json
  train_images: train
  val_annotations: annotations/instances_val.json
  val_images: val
  short_side: 64
  max_size: 64
  workers: 0
augment: {{min_size: [64], max_size: 64}}
optim: {{lr: 1.0e-4, backbone_lr_ratio: 0.1, clip_grad: 0.01}}
schedule: {{epochs: 1}}
train: {{batch_size: 2, threads: 1}}
"""


def test_a_run(tmp_path, monkeypatch):
    """Trained, evaluated and asked by foveal's commands."""
    for split in ("train", "val"):
        write_data(tmp_path, split, 2)
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(RECIPE.format(name=NAME, settings=json.dumps(SMALL), root=tmp_path))
    monkeypatch.setattr(detect.Task, "draw", lambda *_: None)
    monkeypatch.setattr(detect.plots, "curves", lambda *_: None)
    train(recipe, [f"output={run}", "log.trackers=[]"], "detect")
    summary = json.loads((run / "summary.json").read_text())
    assert {"box_ap", "mask_ap"} <= set(summary)
    assert summary["head"] == "mask2former"
    assert evaluate(run)["mask_ap"] == pytest.approx(summary["mask_ap"], abs=1e-6)
    (found,) = predict(run, [tmp_path / "val" / "0.png"], threshold=0.0)
    assert found.path.endswith("0.png")
    assert {each.label for each in found.results} <= {"red", "green"}
    assert {each.category_id for each in found.results} <= {3, 7}
