"""Export formats: how each is written, what it does not support, and how it is run.

A model takes one tensor, images ``[B, C, H, W]`` in float32, and returns a tensor or a tuple of tensors.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from ..backbones.loading import WEIGHTS
from ..errors import RunError
from ..heads.checkpoint import load_dense, read_dense_config
from ..heads.detection import Detector
from ..kernels.tracing import for_other_runtimes

Run = Callable[[Tensor], tuple[Tensor, ...]]

INPUT = "image"
LEAST_SIZE = 32  # minimum dynamic height or width: the stride of the last feature map
_ONNX_SINGLE_FILE = 1_800_000_000  # bytes; protobuf is limited to 2 GiB, larger models store weights in a second file


class ExportError(RunError):
    """A model cannot be converted, or the outputs of the exported model differ from the original's."""


@dataclass
class ExportSpec:
    """A model to write, and how.

    Args:
        model: in evaluation mode, in its deployed form.
        example: images to trace with; more than one if ``any_batch``, since a batch of one becomes a constant.
        outputs: names of the model's outputs.
        any_batch: the batch size is dynamic, else that of ``example``.
        any_size: height and width are dynamic as well, from `LEAST_SIZE` on.
        half: weights, and computation where the runtime supports it, in float16; inputs and outputs stay float32.
        translations: onnxscript functions for the model's custom operators.
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
        """The traced model; if half, in float16 between inputs and outputs in float32."""
        dynamic = {0: Dim("batch", min=1)} if self.any_batch else {}
        if self.any_size:
            dynamic |= {2: Dim("height", min=LEAST_SIZE), 3: Dim("width", min=LEAST_SIZE)}
        config: Any = _config  # its `patch` is added at runtime
        # By default PyTorch specializes on sizes of 1: the graph would reject images whose last feature map has one row
        with torch.no_grad(), config.patch(backed_size_oblivious=self.any_size):
            model = _Half(self.model) if self.half else self.model
            return torch.export.export(model, (self.example,), dynamic_shapes=(dynamic or None,))

    def in_float(self) -> ExportSpec:
        """The same in float32, for formats that convert to float16 themselves."""
        return dataclasses.replace(self, half=False)


@dataclass(frozen=True)
class Format:
    """An export format.

    Args:
        file: the model's main file, beside config.json and the card.
        write: writes the model's files into a folder.
        open: returns a function that runs them: images -> outputs, in order.
        needs: modules, installed by this package's ``extra``.
        no_size: why height and width cannot be dynamic; None if they can.
        not_here: returns why this machine cannot run the format; None if it can.
    """

    file: str
    write: Callable[[ExportSpec, Path], None]
    open: Callable[[Path], Run]
    needs: tuple[str, ...] = ()
    extra: str = ""
    no_size: str | None = None
    not_here: Callable[[], str | None] = lambda: None

    def check(self, name: str, any_size: bool = False) -> None:
        """Raise ValueError if height and width cannot be dynamic, ImportError if a module is missing."""
        if any_size and self.no_size:
            raise ValueError(f"{name} does not support --dynamic: {self.no_size}")
        if missing := [module for module in self.needs if importlib.util.find_spec(module) is None]:
            raise ImportError(f"export to {name} needs {', '.join(missing)}: pip install 'foveal[{self.extra}]'")


@contextmanager
def library(to: str, attempt: str) -> Iterator[None]:
    """Turn the errors of a format's own library into an `ExportError` with the root cause.

    Args:
        attempt: for the message, such as ``"convert this model"``.
    """
    try:
        yield
    except (ExportError, OSError, ValueError, ImportError):  # most are ours
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch.onnx wraps it in advice on reporting a bug
            cause = cause.__cause__
        reason = next(filter(None, map(str.strip, str(cause).splitlines())), "no reason given")
        raise ExportError(f"{to} cannot {attempt}: {type(cause).__name__}: {reason}") from error


def run_of(to: str, folder: Path) -> Run:
    """A function that runs the files of a format. It, and opening the files, raise `ExportError` if the format's
    library fails."""
    with library(to, "open what was written"):
        run = FORMATS[to].open(folder)

    def guarded(images: Tensor) -> tuple[Tensor, ...]:
        with library(to, f"run what was written on images {list(images.shape)}"):
            return run(images)

    return guarded


class _Half(nn.Module):
    """A classifier in float16 between inputs and outputs in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image.half()).float()


def output_names(model: Any) -> tuple[str, ...]:
    """The names of a model's outputs, in the order of an export."""
    return ("boxes", "labels", "scores", "masks")[: 3 + model.masks] if isinstance(model, Detector) else ("logits",)


@torch.no_grad()
def outputs_of(model: Any, images: Tensor) -> tuple[Tensor, ...]:
    """A model's outputs for ``[B, C, H, W]`` (a detector's: for one image), in the order of an export."""
    if isinstance(model, Detector):
        (found,) = model(list(images))
        return tuple(found[name] for name in output_names(model))
    outputs = model(images)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# ---- safetensors: a folder that `foveal.load` reads


def _write_safetensors(spec: ExportSpec, folder: Path) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in spec.model.state_dict().items()}
    if spec.half:
        state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _open_safetensors(folder: Path) -> Run:
    dense = read_dense_config(folder) is not None
    model = load_dense(folder) if dense else timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return functools.partial(outputs_of, model)


# ---- ONNX


def _write_onnx(spec: ExportSpec, folder: Path) -> None:
    with for_other_runtimes():
        program = spec.program
    size = sum(p.numel() * p.element_size() for p in program.parameters())
    model: Any = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=list(spec.outputs),
        custom_translation_table=dict(spec.translations) or None,
    )
    model.save(folder / "model.onnx", external_data=size > _ONNX_SINGLE_FILE)


def _open_onnx(folder: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {INPUT: images.numpy()})))


# ---- torch.export, as a program and compiled by AOTInductor


def _write_pt2(spec: ExportSpec, folder: Path) -> None:
    torch.export.save(spec.program, folder / "model.pt2")


def _open_pt2(folder: Path) -> Run:
    return functools.partial(outputs_of, torch.export.load(folder / "model.pt2").module())


def _write_aoti(spec: ExportSpec, folder: Path) -> None:
    from torch._inductor import aoti_compile_and_package, config

    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ExportError(f"export to aoti needs a C++ compiler, {compiler!r} not found; install it or set CXX")
    with config.patch({"cpp.cxx": (None, compiler)}):
        aoti_compile_and_package(spec.program, package_path=str(folder / "model.pt2"))


def _open_aoti(folder: Path) -> Run:
    from torch._inductor import aoti_load_package

    return functools.partial(outputs_of, aoti_load_package(str(folder / "model.pt2")))


# ---- OpenVINO


def _write_openvino(spec: ExportSpec, folder: Path) -> None:
    """Through ONNX: OpenVINO converts some of these models incorrectly from PyTorch programs (2026.4)."""
    with tempfile.TemporaryDirectory() as scratch:
        _write_onnx(spec.in_float(), Path(scratch))
        shape = [1 if spec.any_batch else len(spec.example), *spec.example.shape[1:]]
        openvino_from(Path(scratch) / "model.onnx", folder, shape, spec.half)


def openvino_from(file: Path, folder: Path, shape: Sequence[int], half: bool = False) -> None:
    """Convert an ONNX file for images of one ``shape``."""
    import openvino

    model = openvino.convert_model(file)
    # With dynamic dimensions the CPU runtime reads uninitialised memory (2026.4). The file has one shape; what was
    # dynamic when it was traced can be changed by `reshape`.
    model.reshape(list(shape))
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=half)


@functools.cache
def _openvino_core() -> Any:
    """One for the process, for ever: when several go, OpenVINO leaves the process's signal stack at freed memory, and
    the next signal ends it (2026.4)."""
    import openvino

    return openvino.Core()


def _open_openvino(folder: Path) -> Run:
    core = _openvino_core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}

    @functools.cache
    def compiled(shape: tuple[int, ...]) -> Any:
        model = core.read_model(folder / "model.xml")
        model.reshape(shape)
        return core.compile_model(model, "CPU", settings)

    def run(images: Tensor) -> tuple[Tensor, ...]:
        outputs = compiled(tuple(images.shape))(images.numpy())
        return tuple(torch.from_numpy(each.copy()) for each in outputs.values())

    return run


# ---- Core ML


def _write_coreml(spec: ExportSpec, folder: Path) -> None:
    import coremltools

    kind = coremltools.precision
    with for_other_runtimes():
        program = spec.in_float().program
    try:
        model: Any = coremltools.convert(
            program.run_decompositions(_FOR_COREML),
            inputs=[coremltools.TensorType(name=INPUT, shape=tuple(spec.example.shape))],
            outputs=[coremltools.TensorType(name=name) for name in spec.outputs],
            minimum_deployment_target=coremltools.target.iOS17,
            compute_precision=kind.FLOAT16 if spec.half else kind.FLOAT32,
            skip_model_load=True,
        )
    except (ValueError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)
        raise ExportError(f"coremltools {coremltools.__version__} cannot convert this model: {reason}") from error
    model.save(str(folder / "model.mlpackage"))


# Operators missing in coremltools 9, replaced by others.
_FOR_COREML: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.alias.default: lambda x: x,
    torch.ops.aten.addcmul.default: lambda x, a, b, value=1: x + value * a * b,
    torch.ops.aten.__and__.Tensor: torch.logical_and,
}


def _open_coreml(folder: Path) -> Run:
    import coremltools

    model = coremltools.models.MLModel(str(folder / "model.mlpackage"))
    names = [each.name for each in model.get_spec().description.output]

    def run(images: Tensor) -> tuple[Tensor, ...]:
        outputs = model.predict({INPUT: images.numpy()})
        return tuple(torch.from_numpy(outputs[name]) for name in names)

    return run


FORMATS = {
    "safetensors": Format(WEIGHTS, _write_safetensors, _open_safetensors, no_size="it stores weights, not a graph"),
    "onnx": Format("model.onnx", _write_onnx, _open_onnx, ("onnx", "onnxscript", "onnxruntime"), "export"),
    "pt2": Format("model.pt2", _write_pt2, _open_pt2),
    "aoti": Format("model.pt2", _write_aoti, _open_aoti),
    "openvino": Format("model.xml", _write_openvino, _open_openvino, ("openvino", "onnx", "onnxscript"), "openvino"),
    "coreml": Format(
        "model.mlpackage",
        _write_coreml,
        _open_coreml,
        ("coremltools",),
        "coreml",
        no_size="the file takes one image of one size",
        not_here=lambda: None if sys.platform == "darwin" else "Core ML models run on macOS and iOS only",
    ),
}
