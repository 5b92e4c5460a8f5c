"""Upsamplers, and backbones that lack the strides of a head. The published outputs are in tests/goldens."""

import io
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import interpolate

import foveal
from foveal.heads import body
from foveal.heads.backbone import ShapeSpec
from foveal.heads.build import build_backbone, build_detector, build_segmenter
from foveal.heads.checkpoint import load_dense, save_dense
from foveal.heads.registry import HEADS
from foveal.heads.upsamplers import NAF, PUBLISHED, UPSAMPLERS, create_upsampler, load_upsampler
from foveal.heads.upsamplers.uplift import OFFSETS

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
OWN = {"name": "uplift", "channels": 32, "patch": 16}
BUILDERS = {"detect": build_detector, "segment": build_segmenter}


def made(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_upsampler(**OWN) if kind == "uplift" else UPSAMPLERS[kind]()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", UPSAMPLERS)
@pytest.mark.parametrize("size", [(9, 11), (18, 33), (25, 30)])
def test_outputs_are_means_of_the_map(kind, size):
    """So a constant map stays, and no output leaves the range of a channel; also by a half in which it computes."""
    upsampler, image, features = made(kind).eval(), images(2, 3, 144, 176), images(2, 32, 9, 11)
    with torch.no_grad():
        out = upsampler(image, features, size)
        constant = upsampler(image, torch.full_like(features, 3.0), size)
    assert out.shape == (2, 32, *size)
    assert out.dtype == features.dtype
    torch.testing.assert_close(constant, torch.full_like(constant, 3.0))
    least, most = features.amin((2, 3)), features.amax((2, 3))
    assert (out.amin((2, 3)) > least - 1e-4).all()
    assert (out.amax((2, 3)) < most + 1e-4).all()
    alone = upsampler(image[1:], features[1:], size)
    torch.testing.assert_close(alone, out[1:], atol=1e-5, rtol=1e-5)


def test_uplift_is_a_gather_of_seventeen_neighbours():
    """By the definition: a loop over offsets, with coordinates clamped to the map."""
    assert len(OFFSETS) == 17
    upsampler, values, guide = made("uplift").eval(), images(1, 32, 5, 7), images(1, 64, 10, 14)
    weights = (upsampler.attender.conv1(guide) + guide[:, :17]).softmax(1)
    rows, columns = torch.arange(10) // 2, torch.arange(14) // 2
    want = torch.zeros(1, 32, 10, 14)
    for k, (y, x) in enumerate(OFFSETS):
        shifted = values[:, :, (rows + y).clamp(0, 4)][:, :, :, (columns + x).clamp(0, 6)]
        want = want + weights[:, k : k + 1] * shifted
    with torch.no_grad():  # in bands of rows
        got = upsampler.attender(upsampler.attender.weights(guide), values)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(upsampler.attender(upsampler.attender.weights(guide), values), want)


def test_both_paths_of_naf_agree():
    """A whole ratio by heads of a cell, and by enlarged keys and values with a dilation."""
    naf, image, features = made("naf").eval(), images(1, 3, 72, 80), images(1, 8, 9, 10)
    queries = naf.queries(image, (18, 30))
    cells = naf._attend(queries, features)
    q, k, v = (
        x.unflatten(1, (4, -1)).permute(0, 3, 4, 1, 2)
        for x in (
            queries,
            interpolate(torch.nn.functional.adaptive_avg_pool2d(queries, (9, 10)), (18, 30), mode="nearest-exact"),
            interpolate(features, (18, 30), mode="nearest-exact"),
        )
    )
    want = foveal.kernels.neighborhood_attention(q, k, v, kernel_size=9, dilation=(2, 3))
    torch.testing.assert_close(cells, want.permute(0, 3, 4, 1, 2).flatten(1, 2))


@pytest.mark.parametrize("kind", ["uplift", "naf"])
def test_gradients(kind):
    upsampler = made(kind).double().train()
    image, features = (images(*shape).double().requires_grad_() for shape in ((1, 3, 36, 36), (1, 32, 9, 9)))
    upsampler(image, features, (18, 18)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in upsampler.parameters())
    step = images(1, 32, 9, 9).double()
    with torch.no_grad():
        a, b = (upsampler(image, features + e * step, (18, 18)).square().sum() for e in (1e-5, -1e-5))
    torch.testing.assert_close((features.grad * step).sum(), (a - b) / 2e-5, rtol=1e-5, atol=1e-5)


# ---- wrong input


@pytest.mark.parametrize("kind", ["uplift", "naf"])
def test_wrong_input(kind):
    upsampler = made(kind).eval()
    image, features = images(1, 3, 144, 144), images(1, 32, 9, 9)
    with pytest.raises(ValueError, match=r"\(1, 197, 32\)"):
        upsampler(image, images(1, 197, 32), (18, 18))
    with pytest.raises(ValueError, match=r"9 x 9.*8 x 18"):
        upsampler(image, features, (8, 18))
    with pytest.raises(ValueError, match=r"\(1, 1, 144, 144\)"):
        upsampler(image[:, :1], features, (18, 18))
    with pytest.raises(ValueError, match=r"\(2, 32, 9, 9\).*\(1, 3, 144, 144\)"):
        upsampler(image, features.expand(2, -1, -1, -1), (18, 18))
    with pytest.raises(ValueError, match=r"\b30\b"):
        upsampler(image, features[:, :30], (18, 18))


def test_a_map_smaller_than_the_window():
    with pytest.raises(ValueError, match=r"9 x 9.*8 x 9"):
        made("naf")(images(1, 3, 128, 144), images(1, 32, 8, 9), (16, 18))
    naf = {"name": "naf", "dim": 64}
    model = build_segmenter("vit_tiny_patch16_224", "linear", num_classes=2, upsample=naf, **SMALL).eval()
    with pytest.raises(ValueError, match=r"9 x 9.*8 x 10"):  # padded to multiples of 32
        model(torch.rand(1, 3, 128, 144))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("vit_tiny_patch16_224", {"upsample": None}, r"\b16\b.*upsample"),
        ("vit_tiny_patch16_224", {"upsample": {"name": "uplift"}}, "384.*192"),
        ("vit_tiny_patch16_224", {"upsample": OWN | {"channels": 192, "patch": 14}}, r"stride 14\b.*stride 16\b"),
        ("test_foveal_dinat", {"upsample": OWN | {"channels": 128}, "out_indices": (3,)}, r"stride 16\b.*stride 32\b"),
        ("vit_tiny_patch16_224", {"upsample": "naf", "in_chans": 4}, "4 channels"),
        ("vit_tiny_patch16_224", {"upsample": OWN | {"size": 3}}, "size"),
        ("vit_tiny_patch16_224", {"upsample": {"name": "jafar"}}, "jafar.*uplift, naf, bilinear"),
        ("vit_tiny_patch16_224", {"upsample": "no/such/folder"}, "no/such/folder.*naf"),
        ("vit_tiny_patch16_224", {"upsample": "bilinear", "strides": (16, 32)}, r"\[16, 32\].*\(16,\)"),
        ("vit_tiny_patch16_224", {"upsample": "bilinear", "out_indices": (0, 1)}, r"\(16, 16\)"),
        ("test_foveal_dinat", {"upsample": "bilinear"}, r"\(4, 8, 16, 32\).*out_indices"),
        ("test_foveal_dinat", {"upsample": "bilinear", "strides": (2, 8, 16), "out_indices": (1, 3)}, r"\(8, 32\)"),
    ],
)
def test_what_a_backbone_cannot_give(name, options, match, monkeypatch):
    monkeypatch.setattr("foveal.heads.build.load_upsampler", lambda s: NAF() if s == "naf" else load_upsampler(s))
    with torch.device("meta"), pytest.raises(ValueError, match=match):
        build_backbone(name, **options)


# ---- backbones

BACKBONES = {
    "vit_tiny_patch16_224": (SMALL, 16),
    "vit_small_patch14_dinov2": (SMALL, 14),
    "vit_small_patch16_dinov3": (SMALL, 16),
    "test_foveal_dinat": ({"out_indices": (3,)}, 32),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_of_any_backbone(name):
    kwargs, stride = BACKBONES[name]
    torch.manual_seed(0)
    bilinear = build_backbone(name, upsample="bilinear", **kwargs).eval()
    assert bilinear.spec == ShapeSpec((bilinear.body_spec.channels[0],) * 4, (4, 8, 16, 32))
    assert bilinear.body_spec.strides == (stride,)
    x = images(1, 3, 64, 96)
    maps = list(bilinear(x).values())
    assert [m.shape[2:] for m in maps] == [(64 // s, 96 // s) for s in (4, 8, 16, 32)]
    small = x if stride != 14 else interpolate(x, (56, 84), mode="bilinear")
    own = bilinear.body(small)[0]
    torch.testing.assert_close(maps[{14: 2, 16: 2, 32: 3}[stride]], own)
    torch.testing.assert_close(maps[0], interpolate(own, (16, 24), mode="bilinear"))
    if stride != 32:  # of the last block, with the final norm
        model = bilinear.body.model
        torch.testing.assert_close(own.flatten(2).mT, model.forward_features(small)[:, model.num_prefix_tokens :])


def test_all_of_a_transformer_freezes():
    backbone = build_backbone("vit_tiny_patch16_224", upsample=OWN, frozen_stages=2, **SMALL).train()
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(m.training for m in backbone.pyramid.upsampler.modules())
    assert not backbone.body.model.norm.training
    some = build_backbone("vit_tiny_patch16_224", upsample=OWN, frozen_stages=1, **SMALL)
    learning = {n.removeprefix("body.model.") for n, p in some.named_parameters() if p.requires_grad}
    assert {n for n in learning if not n.startswith("blocks.1.")} == {"norm.weight", "norm.bias"}


def test_a_backbone_learns_through_a_fixed_upsampler():
    backbone = build_backbone("vit_tiny_patch16_224", upsample=OWN, strides=(4,), **SMALL).train()
    before = {n: x.clone() for n, x in backbone.pyramid.state_dict().items()}
    backbone(images(2, 3, 64, 64))["0"].square().mean().backward()
    assert all(p.grad is not None for n, p in backbone.body.named_parameters() if "cls_token" not in n)
    assert all(torch.equal(x, before[n]) for n, x in backbone.pyramid.state_dict().items())


def test_naf_gets_imagenet_s_normalization():
    """Whatever that of the backbone, here 0.5."""
    naf, x = NAF(), torch.rand(1, 3, 160, 160)
    backbone = build_backbone("vit_tiny_patch16_224", upsample=naf, strides=(8,), **SMALL).eval()
    assert backbone.mean == (0.5, 0.5, 0.5)
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in NAF.statistics)
    want = naf((x - mean) / std, backbone.body((x - 0.5) / 0.5)[0], (20, 20))
    torch.testing.assert_close(backbone((x - 0.5) / 0.5)["0"], want)
    model = build_segmenter(
        "vit_tiny_patch16_224", "semantic_fpn", num_classes=2, upsample=naf, mean=mean.flatten().tolist(), **SMALL
    )
    assert model.backbone.pyramid._shift == pytest.approx([0, 0, 0], abs=1e-6)


LARGE = ("mask_rcnn", "cascade_mask_rcnn", "faster_rcnn", "mask2former", "conditional_detr")
EVERY_HEAD = [
    pytest.param(task, head, marks=[pytest.mark.slow] if task == "detect" and head in LARGE else [])
    for task in HEADS
    for head in HEADS[task]
]


@pytest.mark.parametrize(("task", "head"), EVERY_HEAD)
def test_every_head_on_a_plain_transformer(task, head, tmp_path):
    """Forward, and the same outputs after saving and loading."""
    if head == "mask2former":
        pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    sizes: dict = {"min_size": 64, "max_size": 64} if task == "detect" else {}
    sizes |= {"strides": (8,)} if HEADS[task][head].strides == (32,) else {}  # or it has no need of an upsampler
    model = BUILDERS[task]("vit_tiny_patch16_224", head, num_classes=2, upsample=OWN, **sizes, **SMALL).eval()
    assert model.arguments["upsample"] == OWN
    save_dense(tmp_path, model, ["a", "b"], {"in_chans": 3})
    again, image = load_dense(tmp_path), torch.rand(3, 64, 64)
    assert torch.equal(
        again.backbone.pyramid.upsampler.attender.conv1.weight, model.backbone.pyramid.upsampler.attender.conv1.weight
    )
    with torch.no_grad():
        got, want = (m([image])[0]["boxes"] if task == "detect" else m(image[None]) for m in (again, model))
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["uplift", pytest.param("naf", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_exports(kind):
    """Of a transformer with an upsampled map; those of every head are in tests/weights/test_export_dense.py."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra foveal[export] is not installed")

    class Finest(torch.nn.Module):
        def __init__(self):
            super().__init__()
            upsample = OWN if kind == "uplift" else {"name": "naf", "dim": 64}
            torch.manual_seed(0)
            options = SMALL | {"depth": 1}
            self.backbone = build_backbone("vit_tiny_patch16_224", upsample=upsample, strides=(8,), **options).eval()

        def forward(self, x):
            return self.backbone(x)["0"]

    model, x = Finest(), images(2, 3, *((32, 48) if kind == "uplift" else (144, 160)))
    program = torch.export.export(model, (x,))
    want = model(x)
    torch.testing.assert_close(program.module()(x), want, rtol=1e-4, atol=1e-5)
    file = io.BytesIO()
    torch.onnx.export(program, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)


# ---- weights


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_load_by_name(name, tmp_path, monkeypatch):
    """From files as training writes them: DataParallel's prefix, counters of batches as floats, RoPE's frequencies."""
    torch.manual_seed(0)
    source = create_upsampler(name)
    state = {f"module.{n}": x.float() for n, x in source.state_dict().items()}
    if name == "naf":
        state["module.image_encoder.rope.periods"] = 100 ** (torch.arange(16) / 16)
    save_file(state, tmp_path / "file.safetensors")
    asked = []
    monkeypatch.setattr(body.download, "fetch", lambda n, places: asked.extend(places) or tmp_path / "file.safetensors")
    loaded = load_upsampler(name)
    assert asked and not loaded.training
    assert all(torch.equal(x, loaded.state_dict()[n]) for n, x in source.state_dict().items())
    assert type(foveal.load(name)) is type(source)
    counted = sum(p.numel() for p in loaded.parameters())
    assert counted == {"uplift": 789_521, "naf": 662_528}[loaded.kind]


def test_published_upsamplers_take_no_arguments():
    with pytest.raises(ValueError, match=r"naf.*\bpatch\b"):
        foveal.load("naf", patch=14)


def test_other_weights_are_refused(tmp_path):
    torch.manual_seed(0)
    save_dense(tmp_path, create_upsampler(**OWN), [], {})
    assert load_upsampler(tmp_path).arguments == OWN
    save_file(NAF().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"uplift.*encoder\.block_0"):
        load_upsampler(tmp_path)


PEAK = """
import sys, torch
from foveal.heads.upsamplers import NAF, UPLiFT
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
torch.set_num_threads(1)
upsampler = {"uplift": UPLiFT, "naf": NAF}[sys.argv[1]]().eval()
image, features = torch.rand(1, 3, 448, 448), torch.rand(1, 384, 28, 28)
before = peak()
with torch.no_grad():
    assert upsampler(image, features, (448, 448)).shape == (1, 384, 448, 448)
print(peak() - before)
"""


@pytest.mark.slow  # a quarter of a minute each
@pytest.mark.parametrize("kind", ["uplift", "naf"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(kind):
    """Under a fifth of the gathered neighbours of 448x448 positions alone."""
    run = subprocess.run([sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True)
    gathered = 17 * 384 * 448 * 448 * 4
    assert int(run.stdout) < gathered / 5
