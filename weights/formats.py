"""The formats that models are exported to: how each is written, what it cannot hold, and how it is run again.

A model here takes one tensor, images ``[B, C, H, W]`` in float32, and gives a tensor or a tuple of them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config

from ..backbones.loading import WEIGHT_FILES, WEIGHTS

Run = Callable[[Tensor], tuple[Tensor, ...]]

INPUT = "image"
LEAST_SIZE = 32  # pixels of a free height or width: the stride of the last map, which is of one row then
# The model files of each format, beside config.json and the card.
MODEL_FILES = {
    "safetensors": (WEIGHTS,),
    "onnx": ("model.onnx", "model.onnx.data"),  # the weights of a large model are beside it
    "pt2": ("model.pt2",),
    "aoti": ("model.pt2",),
    "openvino": ("model.xml", "model.bin"),
    "coreml": ("model.mlpackage",),
}
_ONNX_SINGLE_FILE = 1_800_000_000  # bytes of weights; protobuf ends at 2 GiB, so larger models keep them beside it


class ExportError(RuntimeError):
    """A model cannot be converted, or what was exported does not answer as the original does."""


@dataclass
class Job:
    """A model to write, and how.

    Args:
        model: in evaluation mode, in the form that is deployed.
        example: images to trace with; more than one if ``any_batch``, since one would be taken for a constant.
        outputs: names of what the model gives.
        any_batch: the file takes any number of images, else as many as ``example`` has.
        any_size: it takes any height and width as well, from `LEAST_SIZE` on.
        half: weights, and what the runtime can compute so, in float16; images and answers stay float32.
        translations: operators that the model has of its own, and what writes each to ONNX (in onnxscript).
    """

    model: nn.Module
    example: Tensor
    outputs: tuple[str, ...] = ("logits",)
    any_batch: bool = True
    any_size: bool = False
    half: bool = False
    translations: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)

    @functools.cached_property
    def program(self) -> ExportedProgram:
        """The model traced, in float16 between images and answers in float32 if half."""
        return self._trace(_Half(self.model) if self.half else self.model)

    @functools.cached_property
    def onnx(self) -> torch.onnx.ONNXProgram:
        """The same in ONNX's operators."""
        names = dict(input_names=[INPUT], output_names=list(self.outputs))
        table = dict(self.translations) or None
        return torch.onnx.export(self.program, dynamo=True, verbose=False, custom_translation_table=table, **names)

    @functools.cached_property
    def in_float(self) -> Job:
        """The job in float32, for formats that make float16 of it themselves."""
        return dataclasses.replace(self, half=False) if self.half else self

    def _trace(self, model: nn.Module) -> ExportedProgram:
        free = {0: Dim("batch", min=1)} if self.any_batch else {}
        if self.any_size:
            free |= {2: Dim("height", min=LEAST_SIZE), 3: Dim("width", min=LEAST_SIZE)}
        # PyTorch asks of every length whether it is 1 and takes down the answer: without this a graph of free sizes
        # would be for last maps of more than one row and column.
        with torch.no_grad(), _config.patch(backed_size_oblivious=self.any_size):
            return torch.export.export(model, (self.example,), dynamic_shapes=(free or None,))


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        write: puts the files of a job into a folder.
        open: gives what runs a folder: images -> the outputs, in order.
        use: Python that does so, for the card; ``SHAPE`` stands for the images'.
        needs: modules, with the extra of this package that brings them.
        no_size, no_half: why it cannot have a free height and width, or float16; None: it can.
        not_here: gives why this machine cannot run it; None: it can.
    """

    write: Callable[[Job, Path], None]
    open: Callable[[Path], Run]
    use: str
    needs: tuple[str, ...] = ()
    extra: str = ""
    no_size: str | None = None
    no_half: str | None = None
    not_here: Callable[[], str | None] = lambda: None

    def check(self, name: str, any_size: bool = False, half: bool = False) -> None:
        """Refuse what the format cannot hold, and say what is not installed.

        Raises:
            ValueError: if it cannot hold what is asked for.
            ImportError: if a module is missing.
        """
        for asked, option, reason in ((any_size, "--dynamic", self.no_size), (half, "--half", self.no_half)):
            if asked and reason:
                raise ValueError(f"{name} does not go with {option}: {reason}")
        missing = [module for module in self.needs if importlib.util.find_spec(module) is None]
        if missing:
            raise ImportError(f"export to {name} needs {', '.join(missing)}: pip install 'foveal[{self.extra}]'")


@contextmanager
def library(to: str, attempt: str) -> Iterator[None]:
    """Around a call of a format's own library: what that raises of its own becomes an `ExportError` with its reason.

    Args:
        attempt: in words, such as ``"convert this model"``.
    """
    try:
        yield
    except (ExportError, OSError, ValueError, ImportError):  # they say what is wrong, most are ours
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch.onnx wraps the reason in advice on reporting it
            cause = cause.__cause__
        reason = next(filter(None, map(str.strip, str(cause).splitlines())), "no reason given")
        raise ExportError(f"{to} cannot {attempt}: {type(cause).__name__}: {reason}") from error


def run_of(to: str, folder: Path) -> Run:
    """What runs the files of a format.

    Raises:
        ExportError: here or when it runs, if the format's own library fails; with its reason.
    """
    with library(to, "open what was written"):
        run = FORMATS[to].open(folder)

    def guarded(images: Tensor) -> tuple[Tensor, ...]:
        with library(to, f"run what was written on images {list(images.shape)}"):
            return run(images)

    return guarded


def stale(folder: Path, to: str) -> list[str]:
    """Model files in a folder that an export to a format would leave beside its own, of another model."""
    names = dict.fromkeys([*WEIGHT_FILES, *(name for files in MODEL_FILES.values() for name in files)])
    return [name for name in names if name not in MODEL_FILES.get(to, ()) and (folder / name).exists()]


class _Half(nn.Module):
    """A model in float16 between images and answers in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = self.model(image.half())
        if isinstance(outputs, Tensor):
            return outputs.float()
        return tuple(each.float() if each.is_floating_point() else each for each in outputs)


def as_tuple(outputs: Tensor | tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# ---- safetensors: a folder for timm, with the config.json that stands there


def _write_safetensors(job: Job, folder: Path) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in job.model.state_dict().items()}
    if job.half:
        state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _open_safetensors(folder: Path) -> Run:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return lambda images: as_tuple(model(images))


# ---- ONNX


def _write_onnx(job: Job, folder: Path) -> None:
    size = sum(p.numel() * p.element_size() for p in job.program.parameters())
    job.onnx.save(folder / "model.onnx", external_data=size > _ONNX_SINGLE_FILE)


def _open_onnx(folder: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {INPUT: images.numpy()})))


# ---- torch.export's own archive, and one with compiled code


def _write_pt2(job: Job, folder: Path) -> None:
    torch.export.save(job.program, folder / "model.pt2")


def _open_pt2(folder: Path) -> Run:
    module = torch.export.load(folder / "model.pt2").module()
    return lambda images: as_tuple(module(images))


def _write_aoti(job: Job, folder: Path) -> None:
    from torch._inductor import aoti_compile_and_package, config

    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ExportError(f"export to aoti compiles C++ and finds no {compiler!r}; install one, or name yours in CXX")
    with config.patch({"cpp.cxx": (None, compiler)}):
        aoti_compile_and_package(job.program, package_path=str(folder / "model.pt2"))


def _open_aoti(folder: Path) -> Run:
    from torch._inductor import aoti_load_package

    package = aoti_load_package(str(folder / "model.pt2"))
    return lambda images: as_tuple(package(images))


# ---- OpenVINO


def _write_openvino(job: Job, folder: Path) -> None:
    """From ONNX: OpenVINO's own reader of PyTorch's programs gets some of these models wrong (2026.4)."""
    import openvino

    with tempfile.TemporaryDirectory() as scratch:
        _write_onnx(job.in_float, Path(scratch))
        model = openvino.convert_model(Path(scratch) / "model.onnx")
        # With free dimensions its CPU runtime reads uninitialised memory (2026.4). The file has one shape, and what
        # was free when it was traced can be given another with `reshape`.
        model.reshape([1 if job.any_batch else len(job.example), *job.example.shape[1:]])
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=job.half)


def _open_openvino(folder: Path) -> Run:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}

    @functools.cache
    def compiled(shape: tuple[int, ...]) -> openvino.CompiledModel:
        model = core.read_model(folder / "model.xml")
        model.reshape(shape)
        return core.compile_model(model, "CPU", settings)

    def run(images: Tensor) -> tuple[Tensor, ...]:
        answers = compiled(tuple(images.shape))(images.numpy())
        return tuple(torch.from_numpy(each.copy()) for each in answers.values())

    return run


# ---- Core ML


def _write_coreml(job: Job, folder: Path) -> None:
    import coremltools

    kind = coremltools.precision
    try:
        model = coremltools.convert(
            job.in_float.program.run_decompositions(_FOR_COREML),
            inputs=[coremltools.TensorType(name=INPUT, shape=tuple(job.example.shape))],
            outputs=[coremltools.TensorType(name=name) for name in job.outputs],
            minimum_deployment_target=coremltools.target.iOS17,
            compute_precision=kind.FLOAT16 if job.half else kind.FLOAT32,
            skip_model_load=True,
        )
    except (ValueError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise ExportError(f"coremltools {coremltools.__version__} cannot convert this model: {reason}") from error
    model.save(str(folder / "model.mlpackage"))


# Operators that coremltools 9 does not know, by ones that it knows.
_FOR_COREML = {
    torch.ops.aten.alias.default: lambda x: x,
    torch.ops.aten.addcmul.default: lambda x, a, b, value=1: x + value * a * b,
    torch.ops.aten.__and__.Tensor: torch.logical_and,
}


def _open_coreml(folder: Path) -> Run:
    import coremltools

    model = coremltools.models.MLModel(str(folder / "model.mlpackage"))
    names = [each.name for each in model.get_spec().description.output]

    def run(images: Tensor) -> tuple[Tensor, ...]:
        answers = model.predict({INPUT: images.numpy()})
        return tuple(torch.from_numpy(answers[name]) for name in names)

    return run


def _no_coreml() -> str | None:
    return None if sys.platform == "darwin" else "Core ML models run on macOS and iOS only"


FORMATS = {
    "safetensors": Format(
        _write_safetensors,
        _open_safetensors,
        "import foveal, timm, torch\n\n"
        'model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()\n'
        "outputs = model(images)  # float32 SHAPE",
        no_size="it holds weights, for any size that the model takes",
    ),
    "onnx": Format(
        _write_onnx,
        _open_onnx,
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
        'outputs = session.run(None, {"image": images})  # float32 SHAPE',
        ("onnx", "onnxscript", "onnxruntime"),
        "export",
    ),
    "pt2": Format(
        _write_pt2,
        _open_pt2,
        'import torch\n\nmodel = torch.export.load("model.pt2").module()\noutputs = model(images)  # float32 SHAPE',
    ),
    "aoti": Format(
        _write_aoti,
        _open_aoti,
        "import torch._inductor\n\n"
        'model = torch._inductor.aoti_load_package("model.pt2")\noutputs = model(images)  # float32 SHAPE',
    ),
    "openvino": Format(
        _write_openvino,
        _open_openvino,
        'import openvino\n\ncore = openvino.Core()\nmodel = core.read_model("model.xml")\n'
        "model.reshape(images.shape)  # the file is for one image; free dimensions go wrong on its CPU runtime\n"
        'outputs = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)  # float32 SHAPE',
        ("openvino", "onnx", "onnxscript"),
        "openvino",
    ),
    "coreml": Format(
        _write_coreml,
        _open_coreml,
        'import coremltools\n\nmodel = coremltools.models.MLModel("model.mlpackage")\n'
        'outputs = model.predict({"image": image})  # float32 SHAPE',
        ("coremltools",),
        "coreml",
        no_size="the file is for one image of one size",
        not_here=_no_coreml,
    ),
}
