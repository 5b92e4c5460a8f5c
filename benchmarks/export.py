"""`foveal bench export`: whole models as exported, on a CPU, beside eager and torch.compile, in one process.

All run the same weights, re-parameterised where the model can be. Nothing is timed before its answer has been compared
with eager's. Figures are medians of interleaved rounds, every runtime with as many threads as PyTorch.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from .run import MODEL_TOLERANCE, Section, median_ms

Run = Callable[[Tensor], tuple[Tensor, ...]]
# (model, folder for the files) -> the model as it is exported, and what runs it by name
Exporter = Callable[[nn.Module, Path], tuple[nn.Module, Mapping[str, Run]]]

PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino"}


SETTLE = 0.2  # seconds until the threads of the runtime before sleep


@dataclass(frozen=True)
class ExportCase:
    """A model, run on batches of these sizes."""

    model: str
    batches: tuple[int, ...] = (1,)  # what a file is asked for one at a time

    @property
    def id(self) -> str:
        return self.model


# One of each family that is exported most, at its own input size.
CASES = tuple(map(ExportCase, ("dinat_mini", "overlock_xt", "care_s0", "maxvit_tiny_224")))


def section(export: Exporter) -> Section:
    """What `foveal bench export` measures, by a function that exports, which is not of this package."""
    return Section(CASES, functools.partial(export_rows, export=export))


@torch.no_grad()
def export_rows(case: ExportCase, rounds: int, export: Exporter, compiled: bool = True) -> list[dict[str, object]]:
    """A row for each batch and runtime, with the time as a share of eager's."""
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model, runs = export(timm.create_model(case.model).eval(), Path(folder))
        size = model.pretrained_cfg["input_size"]
        for batch in case.batches:
            x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))
            torch.compiler.reset()  # else a second batch size is compiled for all sizes
            calls = {"eager": lambda x=x: model(x)}
            if compiled:
                calls["torch.compile"] = functools.partial(torch.compile(model), x)
            calls |= {name: lambda x=x, run=run: run(x)[0] for name, run in runs.items()}
            want = model(x)
            for name, call in calls.items():
                apart = ((call() - want).abs().max() / want.abs().max()).item()
                if not apart <= MODEL_TOLERANCE:
                    raise RuntimeError(f"{case.id}, batch {batch}: {name} differs from eager by {apart:.1e}; not timed")
            times = median_ms(calls, rounds, settle=SETTLE)
            for name, each in times.items():
                row = {"model": case.model, "input": f"{batch}x{'x'.join(map(str, size))}", "by": name}
                rows.append(row | {"ms": round(each, 2), "over_eager": round(each / times["eager"], 3)})
    versions = {package: version(package) for name, package in PACKAGES.items() if name in runs}
    return [row | versions for row in rows]
