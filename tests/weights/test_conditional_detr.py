"""Conditional DETR of its authors and of transformers after conversion, beside torchvision and transformers."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

import foveal
from foveal.heads.detection.conditional_detr import ConditionalDETRHead
from foveal.heads.detection.published import from_conditional_detr
from foveal.weights.convert import ConversionError, convert, restore
from foveal.weights.manifest import checkpoints
from foveal.weights.verify import verify

from ..heads.test_conditional_detr import theirs as theirs  # a fixture
from . import filler

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image of the fingerprints: those of the models' own sizes are for files that somebody will use."""
    monkeypatch.setattr("foveal.weights.convert._fingerprint_size", lambda *_: (3, 64, 64))


def of_authors(body: torch.nn.Module, channels: int) -> State:
    """A file of theirs with the golden's transformer: frozen norms, which do not count batches."""
    own = {name: x.shape for name, x in body.state_dict().items() if not name.startswith("fc.")}
    spec = {f"backbone.0.body.{name}": shape for name, shape in own.items() if "num_batches" not in name}
    golden = json.loads((filler.GOLDENS / "conditional_detr.json").read_text())["spec"]
    return filler.state_dict(spec | golden | {"input_proj.weight": [256, channels, 1, 1]})


def head_outputs(state: State, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the last layer, by the head that the golden checks."""
    sizes = dict(ffn_width=512, encoder_layers=2, decoder_layers=3, num_queries=30)
    head = ConditionalDETRHead(x.shape[1], 11, **sizes).eval()
    own = {name: value for name, value in state.items() if not name.startswith("backbone.")}
    head.load_state_dict(from_conditional_detr(own, ""))
    logits, boxes = head(x)
    return logits[-1], boxes[-1]


def torchvision_map(body: torch.nn.Module, state: State, x: Tensor) -> Tensor:
    prefix = "backbone.0.body."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    missing, unexpected = body.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(name.startswith("fc.") or "num_batches" in name for name in missing)
    for name, layer in body.eval().named_children():
        x = layer(x) if name not in ("avgpool", "fc") else x
    return x


def normalized(model: torch.nn.Module, image: Tensor) -> Tensor:
    mean, std = (torch.tensor(model.arguments[key])[:, None, None] for key in ("mean", "std"))
    return ((image - mean) / std)[None]


def checked(folder: Path, state: State) -> None:
    back = restore(folder)
    assert list(back) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in back.items())
    assert all(check.passed for check in verify(folder))


@torch.no_grad()
@pytest.mark.parametrize("stride", [32, pytest.param(16, marks=pytest.mark.slow)])
def test_a_file_of_the_authors(stride: int, tmp_path: Path) -> None:
    """With torchvision's ResNets, dilated (DC5) or not; images are not padded to multiples of 32."""
    name, channels = ("resnet18", 512) if stride == 32 else ("resnet50", 2048)
    dilated = {} if stride == 32 else {"replace_stride_with_dilation": [False, False, True]}
    body = getattr(torchvision.models, name)(**dilated)
    state, file = of_authors(body, channels), tmp_path / "checkpoint.pth"
    torch.save({"model": state, "epoch": 49, "args": Namespace(lr=1e-4)}, file)
    with pytest.raises(ConversionError, match=r"output_stride=32.*16"):
        convert(file, tmp_path / "ours", model=name)
    done = convert(file, tmp_path / "ours", model=name, arguments={"output_stride": stride})
    assert done.model == f"conditional_detr on {name}, 11 classes"
    assert (done.record["keys"], done.record["dropped"]) == ("authors", [])
    checked(done.folder, state)

    model = foveal.load(done.folder)
    assert model.config["category_ids"] == list(range(11))
    model.detector.transform.min_size = (70,)
    image = torch.rand(3, 70, 100)
    x = torchvision_map(body, state, normalized(model, image))
    assert x.shape[-2:] == (-(-70 // stride), -(-100 // stride))
    logits, boxes = head_outputs(state, x)
    scores, place = logits.sigmoid().flatten().topk(100)
    (found,) = model([image])
    torch.testing.assert_close(found["scores"], scores, rtol=1e-4, atol=1e-5)
    certain = scores.diff().abs() > 1e-4  # of the order
    assert torch.equal(found["labels"][1:][certain], place[1:][certain] % 11)
    x, y, width, height = boxes[0, place[0] // 11] * torch.tensor([100, 70, 100, 70])
    corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    torch.testing.assert_close(found["boxes"][0], corners, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", ["folder", "names of version 5"])
@torch.no_grad()
def test_a_folder_of_transformers(theirs: torch.nn.Module, form: str, tmp_path: Path) -> None:
    """As it saves them, which is as on the hub, and with its own names."""
    folder = tmp_path / "theirs"
    theirs.config.id2label = {0: "N/A", 1: "cat", 2: "dog"}
    theirs.save_pretrained(folder)
    if form == "folder":
        from safetensors.torch import load_file

        state = load_file(folder / "model.safetensors")
        assert {"model.backbone.conv_encoder.model.", "model.decoder.layers.1.sa_qcontent_proj.weight"} <= {
            *state,
            *(name[:34] for name in state),
        }
    else:
        state = {name: x.contiguous() for name, x in theirs.state_dict().items()}
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
        assert "model.decoder.layers.1.encoder_attn.q_pos_sine_proj.weight" in state
    done = convert(folder, tmp_path / "ours")
    assert done.model == "conditional_detr on test_resnet, 3 classes"
    assert done.record["keys"] == "transformers"
    checked(done.folder, state)
    model = foveal.load(done.folder)
    assert model.classes == ["class 0", "cat", "dog"]
    assert model.detector.head.transformer.encoder.layers[0].self_attn.num_heads == 2
    image = torch.rand(3, 70, 100)
    model.detector.transform.min_size = (70,)
    want = theirs(normalized(model, image))
    (found,) = model([image])
    scores, place = want.logits[0].sigmoid().flatten().sort(descending=True)
    torch.testing.assert_close(found["scores"], scores)
    torch.testing.assert_close(found["boxes"][:, 2] - found["boxes"][:, 0], want.pred_boxes[0, place // 3, 2] * 100)
    settings = json.loads((folder / "config.json").read_text()) | {"position_embedding_type": "learned"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="learned"):
        convert(folder, tmp_path / "other")


@pytest.mark.slow
def test_a_published_file(tmp_path: Path) -> None:
    """By its name: DC5, COCO's ids, the size of its score."""
    known = checkpoints()["resnet50.conditional_detr_dc5_coco"]
    body = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    with torch.device("meta"):
        published = ConditionalDETRHead(2048, 91).state_dict()
    state = of_authors(body, 2048)
    state = {name: x for name, x in state.items() if name.startswith("backbone.")}
    for name, x in published.items():
        if ".self_attn." in name and ".encoder." in name and "_proj." in name and "out_proj" not in name:
            name = name.replace(".self_attn.q_proj.", ".self_attn.in_proj_")
            shape = (3 * x.shape[0], *x.shape[1:])
            if "in_proj_" not in name:
                continue
        else:
            shape = x.shape
        state[name] = filler.parameter(name, shape)
    file = tmp_path / known.address.rpartition("/")[2]
    torch.save({"model": state}, file)
    done = convert(file, tmp_path / "ours")
    assert done.record["checkpoint"] == known.name
    model = foveal.load(done.folder)
    assert (len(model.classes), model.classes[90], model.classes[12]) == (91, "toothbrush", "class 12")
    assert model.config["category_ids"] == list(range(91))
    assert model.backbone.spec.strides == (16,)
    transform = model.detector.transform
    assert (transform.min_size, transform.max_size, transform.size_divisible) == ((800,), 1333, 1)
