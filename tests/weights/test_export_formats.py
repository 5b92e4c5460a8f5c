"""Every format, run by its own library, has the outputs of the original; unsupported models are rejected."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import foveal.weights.export as exporting
import foveal.weights.formats as formats
from foveal.backbones.loading import load
from foveal.weights.export import HALF_TOLERANCE, export
from foveal.weights.folder import TOLERANCE
from foveal.weights.formats import FORMATS, ExportError, ExportSpec, Format
from foveal.zoo import CORE_ML, FAMILIES

SIZE = 32


def _save(folder: Path, name: str, size: int = SIZE, classes: int = 5, **arguments) -> Path:
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=classes, **arguments)
    with torch.no_grad():  # branches that do not vanish, norms that are not the identity
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    model.pretrained_cfg |= {"input_size": (3, size, size), "mean": (0.5,) * 3, "std": (0.3,) * 3, "crop_pct": 1.0}
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with windows, dilation and padding."""
    arguments = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), dilations=((1,), (2,)))
    return _save(tmp_path_factory.mktemp("models") / "dinat", "test_foveal_dinat", **arguments)


@pytest.fixture(scope="module")
def care(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("models") / "care", "test_foveal_care")


def _reference(source: Path, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    with torch.no_grad():
        return x, load(source)(x)


def _apart(got, expected: torch.Tensor) -> float:
    return ((torch.as_tensor(got) - expected).abs().max() / expected.abs().max()).item()


def _pt2(folder: Path, x: torch.Tensor):
    return torch.export.load(folder / "model.pt2").module()(x).detach()


def _aoti(folder: Path, x: torch.Tensor):
    return torch._inductor.aoti_load_package(str(folder / "model.pt2"))(x)


def _onnx(folder: Path, x: torch.Tensor):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra foveal[export] is not installed")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": x.numpy()})[0]


def _openvino(folder: Path, x: torch.Tensor):
    openvino = pytest.importorskip("openvino", reason="the extra foveal[openvino] is not installed")
    core = openvino.Core()
    model = core.read_model(folder / "model.xml")
    model.reshape({"image": list(x.shape)})
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())["logits"]


def _safetensors(folder: Path, x: torch.Tensor):
    with torch.no_grad():
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x)


FILES = {
    "safetensors": ["model.safetensors"],
    "onnx": ["model.onnx"],
    "pt2": ["model.pt2"],
    "aoti": ["model.pt2"],
    "openvino": ["model.bin", "model.xml"],
}
RUNNERS = {"safetensors": _safetensors, "onnx": _onnx, "pt2": _pt2, "aoti": _aoti, "openvino": _openvino}


@pytest.mark.parametrize(
    ("to", "half"),
    [
        ("safetensors", True),
        pytest.param("onnx", True, marks=pytest.mark.slow),
        ("pt2", False),
        ("openvino", False),
        pytest.param("pt2", True, marks=pytest.mark.slow),
        pytest.param("openvino", True, marks=pytest.mark.slow),
        pytest.param("aoti", False, marks=pytest.mark.slow),
        pytest.param("aoti", True, marks=pytest.mark.slow),
    ],
)
def test_any_batch_in_its_own_runtime(to: str, half: bool, folder: Path, tmp_path: Path) -> None:
    for module in FORMATS[to].needs:
        pytest.importorskip(module, reason=f"the extra foveal[{FORMATS[to].extra}] is not installed")
    done = export(folder, to, tmp_path / "out", half=half)
    assert done.files == ["README.md", "config.json", *FILES[to]]
    assert done.checked == ["random, batch 1", "random, batch 3", "china.jpg", "flower.jpg"]
    limit = HALF_TOLERANCE if half else TOLERANCE
    assert (1e-5 if half else 0) <= done.difference <= limit  # float16 shows
    for batch in (1, 2, 5):
        x, expected = _reference(folder, (batch, 3, SIZE, SIZE))
        assert _apart(RUNNERS[to](done.folder, x), expected) < limit
    card = (done.folder / "README.md").read_text()
    assert f"--to {to}{' --half' * half} --output" in card
    assert ("float16" in card) == half
    assert f" {done.difference:.1e} " in card
    assert json.loads((done.folder / "config.json").read_text())["architecture"] == "test_foveal_dinat"


SMALLEST = {
    "NAT": "test_foveal_nat",
    "DiNAT": "test_foveal_dinat",
    "DiNAT_s": "dinat_s_tiny",
    "isotropic": "nat_isotropic_small",
    "HaloNet": "test_foveal_halonet",
    "HaloNet hybrid": "haloregz_b",
    "MaxViT": "test_foveal_maxvit",
    "OverLoCK": "test_foveal_overlock",
    "CARE": "test_foveal_care",
    "RMT": "test_foveal_rmt",
    "AsCAN": "test_foveal_ascan",
    "VAN": "test_foveal_van",
    "ShiftViT": "test_foveal_shiftvit",
    "TransNeXt": "test_foveal_transnext",
    "MoH-ViT": "test_foveal_moh_vit",
    "Triplet": "triplet_mobilenetv2_100",
    "FAN": "test_foveal_fan",
    "TAP-FAN": "test_foveal_tap_fan",
    "Agent Attention": "test_foveal_agent_pvt",
    "InLine": "test_foveal_inline_pvt",
    "RaftMLP": "test_foveal_raftmlp",
    "STViT": "test_foveal_stvit",
    "SG-Former": "test_foveal_sgformer",
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("to", ["onnx", "pt2", "openvino", "aoti"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, to: str, tmp_path: Path) -> None:
    """What the table of models promises by "all"."""
    for module in FORMATS[to].needs:
        pytest.importorskip(module, reason=f"the extra foveal[{FORMATS[to].extra}] is not installed")
    model = timm.create_model(SMALLEST[family], num_classes=5).eval()
    save_for_hf(model, str(tmp_path / "x"), safe_serialization=True)
    assert export(tmp_path / "x", to, tmp_path / "out").difference <= TOLERANCE


@pytest.mark.slow
def test_signals_after_openvino(tmp_path: Path) -> None:
    """Two plugins that go leave the process's signal stack at freed memory."""
    pytest.importorskip("openvino", reason="the extra foveal[openvino] is not installed")
    code = """
import gc, signal, subprocess
from pathlib import Path
import openvino, openvino.opset13 as ops, torch
from foveal.weights.formats import FORMATS
x = ops.parameter([1, 4])
openvino.save_model(openvino.Model([ops.relu(x)], [x], "relu"), "model.xml")
runs = [FORMATS["openvino"].open(Path()) for _ in range(2)]
assert all(run(torch.ones(1, 4))[0].sum() == 4 for run in runs)
while runs:
    del runs[0]
    gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: None)
subprocess.run(["true"], check=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_half_is_half_as_large(folder: Path, tmp_path: Path) -> None:
    sizes = [
        (export(folder, "safetensors", tmp_path / str(half), half=half).folder / "model.safetensors").stat().st_size
        for half in (False, True)
    ]
    assert sizes[1] < 0.6 * sizes[0]


def test_the_branches_are_folded(care: Path) -> None:
    """What is written is the deployed form; what it is compared with is the trained one."""
    model = load(care)
    spec = exporting.classifier_spec(model, "pt2")
    count = [sum(p.numel() for p in each.parameters()) for each in (model, spec.model)]
    assert count[1] < count[0]
    assert exporting.classifier_spec(model, "safetensors").model is model
    assert sum(p.numel() for p in model.parameters()) == count[0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (65, 97), (128, 33), (200, 71), (96, 160)])
def test_one_onnx_file_for_any_size(any_size: tuple[Path, Path], size: tuple[int, int]) -> None:
    source, folder = any_size
    x, expected = _reference(source, (2, 3, *size))
    assert _apart(_onnx(folder, x), expected) < TOLERANCE


@pytest.fixture(scope="module")
def any_size(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("onnxscript", reason="the extra foveal[export] is not installed")
    place = tmp_path_factory.mktemp("any")
    arguments = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), dilations=((1,), (2,)))
    source = _save(place / "dinat", "test_foveal_dinat", **arguments)
    done = export(source, "onnx", place / "onnx", dynamic=True)
    card = (done.folder / "README.md").read_text()
    assert re.search(r"\| size \| any .*\b32\b", card)
    assert "| input | 3 x height x width, " in card
    return source, done.folder


def test_the_axes_of_an_onnx_file_have_names(any_size: tuple[Path, Path]) -> None:
    session = pytest.importorskip("onnxruntime").InferenceSession(any_size[1] / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[0].shape[0] == "batch"


@pytest.mark.slow
@pytest.mark.parametrize("family", CORE_ML)
def test_coreml_is_converted(family: str, tmp_path: Path) -> None:
    coremltools = pytest.importorskip("coremltools", reason="the extra foveal[coreml] is not installed")
    done = export(_save(tmp_path / "model", SMALLEST[family]), "coreml", tmp_path / "out")
    spec = coremltools.models.MLModel(str(done.folder / "model.mlpackage"), skip_model_load=True).get_spec()
    assert [(each.name, list(each.type.multiArrayType.shape)) for each in spec.description.input] == [
        ("image", [1, 3, SIZE, SIZE])
    ]
    assert [each.name for each in spec.description.output] == ["logits"]
    assert done.files == ["README.md", "config.json", "model.mlpackage"]
    if formats.sys.platform != "darwin":
        assert done.difference is None
        assert not done.checked
        assert f"not run: {formats.FORMATS['coreml'].not_here()}" in (done.folder / "README.md").read_text()


@pytest.mark.slow
def test_coreml_says_what_it_cannot_convert(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="the extra foveal[coreml] is not installed")
    with pytest.raises(ExportError, match=r"coremltools .*(rank|Unsupported)"):
        export(folder, "coreml", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_aoti_without_a_compiler(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ExportError, match=r"no-such-compiler.*CXX"):
        export(folder, "aoti", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("to", "module", "extra"),
    [("onnx", "onnxscript", "export"), ("openvino", "openvino", "openvino"), ("coreml", "coremltools", "coreml")],
)
def test_a_missing_package(to: str, module: str, extra: str, folder: Path, tmp_path: Path, monkeypatch) -> None:
    find = formats.importlib.util.find_spec
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(ImportError, match=rf"{to}.*{module}.*foveal\[{extra}\]"):
        export(folder, to, tmp_path / "out")


def test_refusals(folder: Path, tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "out"
    for to in ("coreml", "safetensors"):
        with pytest.raises(ValueError, match=rf"{to}.*--dynamic"):
            export(folder, to, output, dynamic=True)
    fixed = _save(tmp_path / "maxvit", "test_foveal_maxvit")
    with pytest.raises(ValueError, match=r"test_foveal_maxvit.*--dynamic.*NAT, DiNAT, DiNAT_s, OverLoCK, CARE"):
        export(fixed, "pt2", output, dynamic=True)
    with pytest.raises(ValueError, match=r"test_foveal_dinat.*--dynamic.*AOTInductor"):
        export(folder, "aoti", output, dynamic=True)
    small = _save(tmp_path / "small", "test_foveal_care", size=28)
    with pytest.raises(ValueError, match=r"--dynamic.*32.*\(28, 28\)"):
        export(small, "pt2", output, dynamic=True)
    with pytest.raises(ValueError, match=r"--int8.*onnx"):
        export(folder, "pt2", output, int8=True, calibration=[tmp_path])
    with pytest.raises(ValueError, match=r"--int8.*--half"):
        export(folder, "onnx", output, int8=True, half=True, calibration=[tmp_path])
    with pytest.raises(ValueError, match=r"--int8.*--calibration"):
        export(folder, "onnx", output, int8=True)
    with pytest.raises(ValueError, match=r"--int8.*--calibration"):
        export(folder, "onnx", output, calibration=[tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        export(folder, "onnx", output, int8=True, calibration=[tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"--size \(64, 64\).*dinat"):
        export(folder, "onnx", output, size=(64, 64))
    headless = _save(tmp_path / "headless", "test_foveal_care", classes=0)
    with pytest.raises(ValueError, match=r"headless.* 0 classes.*pt2"):
        export(headless, "pt2", output)
    if formats.sys.platform != "darwin":
        monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: name)  # as if all were installed
        with pytest.raises(ValueError, match=r"--score.*coreml"):
            export(folder, "coreml", output, score=tmp_path)
    assert not output.exists()


def test_a_format_that_goes_wrong_is_not_written(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The check runs what is in the folder, whichever the format."""

    def write(spec: ExportSpec, target: Path) -> None:
        FORMATS["safetensors"].write(spec, target)

    def wrong(target: Path):
        run = FORMATS["safetensors"].open(target)
        return lambda images: tuple(1.001 * each for each in run(images))

    monkeypatch.setitem(exporting.FORMATS, "broken", Format("model.safetensors", write, wrong))
    with pytest.raises(ExportError, match=r"1\.0e-03.*0\.0001"):
        export(folder, "broken", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_library_cannot_do(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Its innermost reason in a line, whether it converts, opens or runs; messages of this package stay."""
    failures: dict[str, Exception] = {}

    def fail(what: str, *_) -> None:
        if what in failures:
            try:
                raise failures[what]
            except KeyError as error:
                raise RuntimeError("please report this") from error

    def start(target: Path):
        fail("open")
        return lambda images: fail("run")

    monkeypatch.setitem(exporting.FORMATS, "broken", Format("x", lambda *_: fail("write"), start))
    for what, message in (
        ("write", r"^broken.* test_foveal_dinat: KeyError: 'aten\.new'$"),
        ("open", "^broken.*: KeyError"),
        ("run", r"^broken.* \[1, 3, 32, 32\]: KeyError"),
    ):
        failures = {what: KeyError("aten.new")}
        with pytest.raises(ExportError, match=message):
            export(folder, "broken", tmp_path / "out")
    for error in (ExportError("no compiler"), ValueError("no size"), ImportError("no onnx")):
        failures = {"write": error}
        with pytest.raises(type(error), match=rf"^{error}$"):
            export(folder, "broken", tmp_path / "out")
    failures = {"write": OSError(28, "No space left on device")}
    with pytest.raises(OSError, match=r"out: No space left on device$"):
        export(folder, "broken", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_checks_of_free_sizes(tmp_path: Path) -> None:
    """No smaller than a file takes them, and of more than one."""
    model = load(_save(tmp_path / "x", "test_foveal_nat", size=64))
    for to in FORMATS:
        sizes = [tuple(x.shape[2:]) for x in exporting.classifier_inputs(model, (), to, True).values()]
        assert min(map(min, sizes)) == 32
        assert len(set(sizes)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", pytest.param("aoti", marks=pytest.mark.long)])
def test_free_sizes_of_pytorch(to: str, tmp_path: Path) -> None:
    arguments = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), dilations=((1,), (2,)))
    name, arguments = ("test_foveal_dinat", arguments) if to == "pt2" else ("test_foveal_care", {})
    source = _save(tmp_path / "x", name, **arguments)
    done = export(source, to, tmp_path / "out", dynamic=True)
    assert re.search(r"\| size \| any .*\b32\b", (done.folder / "README.md").read_text())
    for size in ((32, 32), (33, 64), (65, 131)):
        x, expected = _reference(source, (2, 3, *size))
        assert _apart(RUNNERS[to](done.folder, x), expected) < TOLERANCE


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of images for each of five classes."""
    random = np.random.default_rng(0)
    for i in range(10):
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        file = tmp_path / "pictures" / "abcde"[i % 5] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file)
    return tmp_path / "pictures"


def test_int8(folder: Path, pictures: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra foveal[export] is not installed")
    done = export(folder, "onnx", tmp_path / "out", int8=True, calibration=[pictures], score=pictures)
    assert done.files == ["README.md", "config.json", "model.onnx"]
    graph = onnx.load(done.folder / "model.onnx").graph
    weights = {each.name: each for each in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    quantised = [n for n in products if made_by.get(n.input[1]) and made_by[n.input[1]].op_type == "DequantizeLinear"]
    assert len(products) - len(quantised) == 2 * 2  # queries by keys, weights by values, in both blocks
    for node in quantised:
        dequantize = made_by[node.input[1]]
        assert weights[dequantize.input[0]].data_type == onnx.TensorProto.INT8
        assert weights[dequantize.input[1]].dims  # a scale for each channel
    x, expected = _reference(folder, (3, 3, SIZE, SIZE))
    assert 1e-4 < _apart(_onnx(done.folder, x), expected) < 0.2
    assert 1e-4 < done.difference < 0.5  # of the file in 8 bits, noise among the inputs
    card = (done.folder / "README.md").read_text()
    assert f" {done.difference:.1e} " in card
    assert "--to onnx --int8 --calibration" in card
    for note, text in zip(done.notes, (r"\b10 calibration", r"top-1 .*\b10 images"), strict=True):
        assert note in card
        assert re.search(text, note)


@pytest.mark.slow
def test_int8_that_goes_wrong(folder: Path, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(exporting, "INT8_TOLERANCE", 1e-6)
    with pytest.raises(ExportError, match="1e-06"):
        export(folder, "onnx", tmp_path / "out", int8=True, calibration=[pictures])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("difference", [1.01, float("nan"), float("inf")])
def test_int8_that_is_elsewhere(
    difference: float, folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Well on the images that it was fitted to, far away on those of the check."""
    differences = [0.0] * 4 + [difference]  # of the four inputs before, of the first one after
    monkeypatch.setattr(exporting, "_to_int8", lambda *_: "in 8 bits")
    monkeypatch.setattr(exporting, "relative_error", lambda *_: differences.pop(0))
    with pytest.raises(ExportError, match=rf"{re.escape(f'{difference:.1e}')} on random, batch 1.* 1;"):
        export(folder, "onnx", tmp_path / "out", int8=True, calibration=[pictures])
    assert not (tmp_path / "out").exists()


def test_the_score_of_what_was_written(folder: Path, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    done = export(folder, "safetensors", tmp_path / "out", score=pictures)
    before = done.notes[0].split("the original ")[1].split(" %")[0]
    assert done.notes == [f"top-1 {before} % on 10 images of {pictures}, the original {before} % (+0.00)"]
    shutil.rmtree(pictures / "a")
    # before anything is converted, and of the right folder
    monkeypatch.setattr(exporting, "staged", None)
    with pytest.raises(OSError, match="absent"):
        export(folder, "safetensors", tmp_path / "out2", score=tmp_path / "absent")
    with pytest.raises(ValueError, match=r"4 folders.* 5 classes"):
        export(folder, "safetensors", tmp_path / "out2", score=pictures)
