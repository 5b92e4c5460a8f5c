"""`foveal bench served`: exported models on a CPU beside timm's peers exported the same way, in one process.

Weights are random, models reparameterized where they can be, and every runtime has as many threads as PyTorch. A
runtime is timed only if its outputs are the model's in eager mode; a missing or failing one has a ``note``.
``--exports FOLDER`` keeps what was exported, for a later run: exporting takes much longer than timing.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.utils import reparameterize_model
from torch import Tensor

from .measure import Bench, Row, difference, installed, reason
from .models import TOLERANCE

SETTLE = 0.2  # seconds until the threads of the previous runtime sleep
# of outputs, relative to the largest value; the last two are export's own
LIMITS = {"float32": TOLERANCE, "float16": 1e-2, "int8": 0.5}
CALIBRATION = 2, 4  # batches and images of each


@dataclass(frozen=True)
class ServedCase:
    """Models and timm's of similar cost, one image.

    Args:
        peer: of timm; in the tiny case of this package.
        threads: None: PyTorch's.
    """

    models: tuple[str, ...]
    peer: str
    threads: int | None = None

    @property
    def id(self) -> str:
        return ", ".join(self.models)


CASES = (
    ServedCase(("dinat_tiny", "dinat_mini"), "swin_tiny_patch4_window7_224"),
    ServedCase(("maxvit_tiny_224",), "maxvit_tiny_tf_224"),
    ServedCase(("overlock_t",), "convnext_tiny"),
    ServedCase(("care_s0",), "mobilenetv4_conv_medium", threads=1),  # one core, as on a phone
)
TINY = (ServedCase(("test_foveal_care",), "test_convnext"),)

Forms = dict[tuple[str, str], Callable[[], Callable[[Tensor], Any]]]  # functions by runtime and dtype, not yet made


def forms(model: Any, folder: Path, images: Tensor) -> Forms:
    """How a model in its deployed form is served. Each is written when it is made, unless ``folder`` has it.

    Args:
        images: for the ranges of int8, ``[batches, B, C, H, W]``.
    """
    from ..weights.export import classifier_spec
    from ..weights.folder import staged
    from ..weights.formats import FORMATS, openvino_from
    from ..weights.quantize import quantize

    shape = [1, *images.shape[2:]]

    def made(to: str, dtype: str, write: Callable[[Path], None]) -> Callable[[Tensor], Any]:
        FORMATS[to].check(to)
        where = folder / to / dtype
        if not where.is_dir():
            with staged(where) as new:
                write(new)
        run = FORMATS[to].open(where)
        return lambda x: run(x)[0]

    def exported(to: str) -> Callable[[Tensor], Any]:
        return made(to, "float32", lambda new: FORMATS[to].write(classifier_spec(model, to), new))

    def int8() -> Callable[[Tensor], Any]:
        source = folder / "onnx" / "float32" / "model.onnx"
        return made("onnx", "int8", lambda new: quantize(source, new / "model.onnx", list(images)))

    def openvino(dtype: str) -> Callable[[Tensor], Any]:
        source = folder / "onnx" / ("int8" if dtype == "int8" else "float32") / "model.onnx"
        return made("openvino", dtype, lambda new: openvino_from(source, new, shape, dtype == "float16"))

    return {
        ("eager", "float32"): lambda: model,
        ("AOTInductor", "float32"): partial(exported, "aoti"),
        ("onnxruntime", "float32"): partial(exported, "onnx"),
        ("onnxruntime", "int8"): int8,  # it has no float16 kernels on a CPU like this
        **{("openvino", dtype): partial(openvino, dtype) for dtype in LIMITS},
    }


def _versions() -> str:
    """Of what writes and runs the files, for the name of a folder of them; AOTInductor's code has the threads', too."""
    parts = [installed(name) for name in ("foveal", "torch", "timm", "onnxruntime", "openvino")]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


@torch.no_grad()
def served_rows(case: ServedCase, bench: Bench) -> Iterator[Row]:
    """A row for each model, dtype and runtime, all timed in turn, with ratios to eager mode and to the peer served by
    the same runtime in the same dtype."""
    found: dict[str, Row] = {}
    calls: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as scratch, _threads(case.threads) as threads:
        for name in (*case.models, case.peer):
            torch.manual_seed(0)
            size = get_pretrained_cfg(name).input_size
            model: Any = timm.create_model(name).eval()
            model = model.reparameterize() if hasattr(model, "reparameterize") else reparameterize_model(model)
            x, images = bench.normal(1, *size), bench.normal(*CALIBRATION, *size, seed=1)
            want = model(x)
            folder = (bench.exports or Path(scratch)) / f"{name}-{threads}-{_versions()}"
            for (runtime, dtype), make in forms(model, folder, images).items():
                label = f"{name} {dtype} {runtime}"
                row: Row = {"model": name, "input": f"1x{'x'.join(map(str, size))}"}
                row |= {"peer": "" if name == case.peer else case.peer, "runtime_threads": threads}
                found[label] = row | {"dtype": dtype, "by": runtime, "note": ""}
                try:
                    run = make()
                    apart = difference(run(x), want)
                    if not apart <= LIMITS[dtype]:  # NaN differs
                        raise ArithmeticError(f"differs from eager by {apart:.1e}: not timed")
                    calls[label] = partial(run, x)
                except Exception as error:  # noqa: BLE001 - of any library: it belongs in the table, and others follow
                    found[label]["note"] = reason(error)
        times = bench.median_ms(calls, settle=SETTLE)
    versions = {package: installed(package) for package in ("onnxruntime", "openvino")}
    for label, row in found.items():
        taken, note = times.get(label), row.pop("note")
        row["forward_ms"] = "" if taken is None else round(taken, 2)
        others = {"eager": f"{row['model']} float32 eager", "peer": f"{case.peer} {row['dtype']} {row['by']}"}
        for key, other in others.items():
            known = taken is not None and other in times
            row[f"forward_over_{key}"] = round(taken / times[other], 3) if known else ""
        yield row | {"note": note} | versions


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """PyTorch with ``count`` threads; yields their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
