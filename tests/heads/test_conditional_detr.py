"""Conditional DETR: beside transformers' network and post-processing, and what it owes the rest as one of the
detectors. Its losses, gradients and the outputs of every layer are compared with the authors' in tests/goldens."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveal.heads.build import build_detector
from foveal.heads.checkpoint import load_dense, save_dense
from foveal.heads.detection.conditional_detr import ConditionalDETRHead, criterion, detections, match, valid_cells
from foveal.heads.detection.published import from_conditional_detr
from foveal.heads.detection.traceable import OneImage
from foveal.train.data import DetectionBatch
from foveal.train.data.coco import read_coco
from foveal.train.detection_metrics import CocoScorer

from ..variants import HIERARCHICAL

SMALL = dict(width=32, num_heads=2, ffn_width=48, encoder_layers=2, decoder_layers=3, num_queries=7)
SIZES = {"min_size": 64, "max_size": 96}


def detector(backbone: str = "test_foveal_dinat", settings: dict | None = None, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    settings = SMALL | (settings or {})
    return build_detector(backbone, "conditional_detr", **{"num_classes": 3, "head_kwargs": settings} | SIZES | kwargs)


def shaken(model: nn.Module) -> nn.Module:
    """Boxes and scores that differ: the last layers begin with equal ones for all queries."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.4)
            nn.init.normal_(module.bias, std=0.4)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    return model.eval()


def batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two images of different sizes, one with two objects and one without."""
    torch.manual_seed(1)
    boxes = torch.tensor([[10.0, 10, 50, 40], [60, 20, 90, 60]])
    full = {"boxes": boxes, "labels": torch.tensor([2, 0])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    return [torch.rand(3, 64, 96), torch.rand(3, 70, 50)], [full, empty]


# ---- beside transformers


@pytest.fixture(scope="module")
def theirs():
    """transformers' model on a timm backbone; padding counts in its norms, which are frozen."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    backbone = transformers.TimmBackboneConfig(backbone="test_resnet", out_indices=[4], freeze_batch_norm_2d=True)
    config = transformers.ConditionalDetrConfig(
        backbone_config=backbone,
        d_model=32,
        num_labels=3,
        num_queries=7,
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
        encoder_layers=2,
        decoder_layers=3,
    )
    torch.manual_seed(0)
    return shaken(transformers.ConditionalDetrForObjectDetection(config))


def test_equals_transformers(theirs):
    """Logits and boxes of a batch of images of different sizes, and the detections in their pixels."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    ours = detector("test_resnet").eval()
    state = {name.removeprefix("model."): x for name, x in theirs.state_dict().items()}
    head = {name: x for name, x in state.items() if not name.startswith("backbone.")}
    ours.detector.head.load_state_dict(from_conditional_detr(head, ""))
    images = [torch.rand(3, 64, 96), torch.rand(3, 70, 50)]
    sizes, padded = [(64, 96), (70, 50)], (96, 96)
    pixels, mask = torch.zeros(2, 3, *padded), torch.zeros(2, *padded, dtype=torch.long)
    mean, std = (torch.tensor(ours.arguments[key]).view(-1, 1, 1) for key in ("mean", "std"))
    for i, (image, (rows, columns)) in enumerate(zip(images, sizes, strict=True)):
        pixels[i, :, :rows, :columns], mask[i, :rows, :columns] = (image - mean) / std, 1
    with torch.no_grad():
        (x,) = theirs.model.backbone.model(pixels)
        want = theirs(pixels, mask)
        logits, boxes = ours.detector.head(x, valid_cells(sizes, padded, x.shape[-2:]))
    torch.testing.assert_close(logits[-1], want.logits)
    torch.testing.assert_close(boxes[-1], want.pred_boxes)
    processor = transformers.ConditionalDetrImageProcessor()
    selected = processor.post_process_object_detection(want, threshold=0.02, target_sizes=sizes, top_k=12)
    for one, other, size, expected in zip(logits[-1], boxes[-1], sizes, selected, strict=True):
        found = detections(one, other, size, 12, 0.02)
        assert len(found["scores"]) > 5
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


# ---- padding


def test_padding_has_no_influence():
    head = shaken(ConditionalDETRHead(8, 3, **SMALL))
    torch.manual_seed(2)
    x = torch.randn(2, 8, 4, 6)
    valid = torch.ones(2, 4, 6, dtype=torch.bool)
    valid[1, 3:], valid[1, :, 4:] = False, False
    with torch.no_grad():
        logits, boxes = head(x, valid)
        other, moved = head(torch.where(valid[:, None], x, 1e3), valid)
        alone, alone_boxes = head(x[1:, :, :3, :4])
        whole, _ = head(x[:1])
    torch.testing.assert_close(other, logits)
    torch.testing.assert_close(moved, boxes)
    torch.testing.assert_close(logits[:, 1:], alone)
    torch.testing.assert_close(boxes[:, 1:], alone_boxes)
    torch.testing.assert_close(logits[:, :1], whole)
    assert (alone[-1] - whole[-1]).abs().max() > 0.1


@pytest.mark.parametrize("padded", [(96, 128), (70, 101), (800, 1333)])
def test_valid_cells_are_those_of_a_nearest_mask(padded):
    sizes = [padded, (padded[0] - 31, padded[1] - 40), (33, 64)]
    cells = tuple(-(-side // 32) for side in padded)
    masks = torch.zeros(3, *padded)
    for mask, (rows, columns) in zip(masks, sizes, strict=True):
        mask[:rows, :columns] = 1
    assert torch.equal(valid_cells(sizes, padded, cells), F.interpolate(masks[None], cells)[0] > 0)
    assert valid_cells(sizes[:1] * 2, padded, cells) is None


class Means(nn.Module):
    """A backbone whose cells see their own pixels alone."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"0": F.avg_pool2d(images, 32)}


@torch.no_grad()
def test_an_image_in_a_batch():
    """Positions and boxes are relative to the image, not to the batch."""
    model = detector(min_size=96, max_size=96)
    model.detector.backbone, model.detector.head = Means(), ConditionalDETRHead(3, 3, **SMALL)
    images = [torch.rand(3, 64, 96), torch.rand(3, 96, 96)]
    together, (alone,) = shaken(model)(images), model(images[:1])
    for key, value in alone.items():
        torch.testing.assert_close(together[0][key], value, rtol=1e-4, atol=1e-4)
    middle = (alone["boxes"][:, :2] + alone["boxes"][:, 2:]) / 2
    assert middle[:, 0].max() > 64 > middle[:, 1].max()


@torch.no_grad()
def test_the_form_for_export():
    """Of one size, which is resized and padded."""
    model = shaken(detector(settings={"detections_per_img": 9, "input_norm": True}, min_size=40, strides=(16,)))
    image = torch.rand(3, 64, 90)
    (want,), graph = model([image]), OneImage(model, (64, 90))
    assert graph.valid is not None
    assert not graph.valid.all()
    for key, got in zip(("boxes", "labels", "scores"), graph(image[None]), strict=True):
        torch.testing.assert_close(got, want[key], rtol=1e-4, atol=1e-4)


# ---- losses


def test_matches_have_the_least_cost():
    """Beside all assignments of three queries to two objects; layers and images are matched on their own."""
    torch.manual_seed(0)
    logits, boxes = 2 * torch.randn(2, 2, 3, 4), torch.rand(2, 2, 3, 4) * 0.4 + 0.3
    labels, truth = [torch.tensor([1, 3]), torch.tensor([0])], [torch.rand(2, 4) * 0.4 + 0.3, torch.rand(1, 4) / 2]
    layer, image, query, number = match(logits, boxes, labels, truth)
    assert layer.tolist() == [0, 0, 0, 1, 1, 1]
    assert [sorted(number[layer == i].tolist()) for i in (0, 1)] == [[0, 1, 2]] * 2
    assert image.tolist() == [0, 0, 1] * 2
    for i in (0, 1):
        chosen = query[(layer == i) & (image == 0)][number[(layer == i) & (image == 0)].argsort()].tolist()

        def cost(order, i=i):
            own = 0.0
            for q, label, box in zip(order, labels[0], truth[0], strict=True):
                p = logits[i, 0, q, label].sigmoid().double()
                own += 2 * (0.25 * (1 - p) ** 2 * -p.log() + 0.75 * p**2 * (1 - p).log())
                own += 5 * (boxes[i, 0, q] - box).abs().sum()
                (a, b), (c, d) = ((e[:2] - e[2:] / 2, e[:2] + e[2:] / 2) for e in (boxes[i, 0, q], box))
                inner = (torch.minimum(b, d) - torch.maximum(a, c)).clamp(min=0).prod()
                outer = (torch.maximum(b, d) - torch.minimum(a, c)).prod()
                union = boxes[i, 0, q, 2:].prod() + box[2:].prod() - inner
                own -= 2 * (inner / union - (outer - union) / outer)
            return float(own)

        orders = [[a, b] for a in range(3) for b in range(3) if a != b]
        assert chosen == min(orders, key=cost)


def test_more_objects_than_queries_are_said():
    logits, boxes = torch.zeros(1, 1, 2, 3), torch.rand(1, 1, 2, 4)
    truth = [torch.rand(3, 4) + 0.1]
    with pytest.warns(UserWarning, match=r"3 .*num_queries=2"):
        losses = criterion(logits, boxes, [torch.tensor([0, 1, 2])], truth)
    assert losses.isfinite().all()


def test_numbers_that_are_not_finite_reach_the_loss():
    logits, boxes = torch.full((1, 1, 2, 3), torch.nan), torch.rand(1, 1, 2, 4)
    assert criterion(logits, boxes, [torch.tensor([1])], [torch.rand(1, 4) + 0.1]).isnan().any()


def test_groups_of_queries():
    """Their losses are the mean of those of models that have one group each; evaluation sees the first alone."""
    images, targets = batch()
    model = detector(settings={"num_groups": 3, "dropout": 0.0}, drop_path_rate=0.0)
    losses, held_out, state = model(images, targets), model.eval().held_out_losses(images, targets), model.state_dict()
    groups = []
    for queries in state["detector.head.query_embed.weight"].split(7):
        alone = detector(settings={"dropout": 0.0}, drop_path_rate=0.0)
        alone.load_state_dict(state | {"detector.head.query_embed.weight": queries})
        groups.append((alone(images, targets), alone.eval()))
    for name, loss in losses.items():
        torch.testing.assert_close(loss, sum(each[name] for each, _ in groups) / 3)
    assert groups[0][0]["loss_box"] != groups[1][0]["loss_box"]
    first = groups[0][1]
    assert all(torch.equal(x, held_out[name]) for name, x in first.held_out_losses(images, targets).items())
    with torch.no_grad():
        for got, want in zip(model(images), first(images), strict=True):
            assert all(torch.equal(got[name], x) for name, x in want.items())


@torch.no_grad()
@pytest.mark.parametrize("focus", [0.0, 8.0])
def test_queries_begin_with_the_cells_around_their_reference_points(focus):
    """In every layer, the mean distance to where they attend is less than that to all cells."""
    torch.manual_seed(0)
    head = ConditionalDETRHead(8, 3, **SMALL | {"width": 64}, temperature=20.0, focus=focus).eval()
    seen = []
    for layer in head.transformer.decoder.layers:
        layer.cross_attn.register_forward_pre_hook(lambda _, given: seen.append(given[:2]))
    memory, places, cells = head.encode(torch.randn(1, 8, 12, 12))
    _, reference = head.transformer.decoder(head.positions(memory), memory, places, cells, 7)
    grid = (torch.cartesian_prod(torch.arange(12), torch.arange(12)).flip(1) + 1) / 12
    distance = torch.cdist(reference, grid)  # [1, 7, 144]
    for q, k in seen:
        q, k = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k))
        share = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        near = ((share * distance[:, None]).sum(-1) / distance.mean(-1)[:, None]).mean()
        assert (near < 0.6) == bool(focus), near


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_trains_and_finds(dtype):
    """All parameters have gradients, with an image without objects in the batch, too."""
    model = detector(settings={"input_norm": True, "num_groups": 2, "focus": 4.0})
    images, targets = batch()
    if dtype is torch.float64:
        model, images = model.double(), [image.double() for image in images]
        targets = [target | {"boxes": target["boxes"].double()} for target in targets]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        losses = model(images, targets)
        found = model.eval()(images)
    assert list(losses) == ["loss_class", "loss_box", "loss_giou"]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.normalizers(images, targets).tolist() == [2]
    for each in found:
        assert each["boxes"].dtype == each["scores"].dtype == (dtype if dtype is torch.float64 else torch.float32)
        assert len(each["scores"]) == 7 * 3
        assert each["scores"].diff().le(0).all()
        assert set(each["labels"].tolist()) == {0, 1, 2}
    model.max_detections = 5
    assert [len(each["boxes"]) for each in model(images)] == [5, 5]
    model.train()
    alone = model(images[1:], targets[1:])  # no object at all
    assert alone["loss_box"] == alone["loss_giou"] == 0
    assert alone["loss_class"] > 0


def test_published_defaults():
    """19,963,489 parameters beside a backbone of 2048 channels; the initial score is 0.01, boxes lie around their
    reference points."""
    head = ConditionalDETRHead(2048, 91).eval()
    assert sum(p.numel() for p in head.parameters()) == 19_963_489
    with torch.no_grad():
        logits, boxes = head(torch.randn(1, 2048, 2, 3))
        memory = head.encode(torch.zeros(1, 2048, 2, 3))
        *_, reference = head.transformer.decoder(head.positions(boxes), *memory, 300)
    assert logits.shape[:3] == (6, 1, 300)
    assert logits.sigmoid().median() == pytest.approx(0.01, abs=0.005)
    torch.testing.assert_close(boxes[..., :2], reference.expand(6, 1, 300, 2))
    assert boxes[..., 2:].eq(0.5).all()


# ---- as one of the detectors


def test_round_trip_and_groups(tmp_path):
    """Backbones with other maps, too; queries are not decayed."""
    model = detector("test_resnet", strides=(4, 8, 16), num_classes=2).eval()
    save_dense(tmp_path, model, list("ab"), {"in_chans": 3}, category_ids=[1, 2])
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        (want,), (got,) = model([image]), load_dense(tmp_path)([image])
    assert all(torch.equal(want[name], x) for name, x in got.items())
    groups = model.parameter_groups(0.05, None, 0.1)
    kept = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    decayed = {name for name, p in model.detector.head.named_parameters() if id(p) not in kept}
    assert "transformer.decoder.query_scale.layers.0.weight" in decayed
    assert not {"query_embed.weight", "class_embed.bias", "transformer.decoder.norm.weight"} & decayed


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"neck": "a3fpn"}, "conditional_detr.*a3fpn"),
        ({"neck_kwargs": {"out_channels": 32}}, "conditional_detr.*out_channels"),
        ({"strides": (64,)}, "test_foveal_dinat.*4, 8, 16, 32.* 64"),
        ({"settings": {"width": 30}}, "width=30.*num_heads=2"),
        ({"settings": {"num_queries": 0}}, "num_queries=0"),
        ({"settings": {"num_groups": 0}}, "num_groups=0"),
        ({"settings": {"temperature": 1.0}}, "temperature=1.0"),
        ({"settings": {"focus": -1.0}}, "focus=-1.0"),
        ({"settings": {"decoder_layers": 0}}, "decoder_layers=0"),
        ({"settings": {"detections_per_img": 0}}, "detections_per_img=0"),
        ({"settings": {"size_divisor": 0}}, "size_divisor=0"),
        ({"settings": {"querys": 5}}, "querys"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        detector(**kwargs)


def test_targets_are_needed_in_training():
    with pytest.raises(ValueError, match="conditional_detr"):
        detector()([torch.rand(3, 64, 64)])


@pytest.mark.parametrize(
    "backbone",
    ["test_resnet", *(pytest.param(n, marks=[pytest.mark.slow, pytest.mark.long]) for n in HIERARCHICAL)],
)
def test_every_backbone(backbone):
    model = detector(backbone)
    images, targets = batch()
    sum(model(images, targets).values()).backward()
    assert all(p.grad is not None for p in model.detector.head.parameters())
    assert len(model.eval()(images)) == 2


@pytest.mark.slow
def test_learns_two_images(tmp_path):
    from .test_mask2former_detector import write_data

    images, targets = write_data(tmp_path, "train", 2)
    settings = {"width": 64, "ffn_width": 128, "num_queries": 12, "dropout": 0.0}
    model = detector(settings=settings, num_classes=2, drop_path_rate=0.0, strides=(8,))
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-4), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(images)
    file = tmp_path / "annotations" / "instances_train.json"
    scorer = CocoScorer(read_coco(file, tmp_path / "train", masks=False), False)
    scorer.add(DetectionBatch([], [], [0, 1]), found)
    assert scorer.compute()["box_ap"] > 50
