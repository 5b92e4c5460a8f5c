"""`foveal bench export`: exported models on a CPU against eager and torch.compile, in one process.

All use the same weights, reparameterized if the model supports it, and every runtime as many threads as PyTorch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from .measure import Bench, Row
from .models import TOLERANCE

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}  # package name by format
SETTLE = 0.2  # seconds until the threads of the previous runtime sleep


@dataclass(frozen=True)
class ExportCase:
    """A model and its batch sizes."""

    model: str
    batches: tuple[int, ...] = (1,)

    @property
    def id(self) -> str:
        return self.model


# One model of each of the main families, at its default input size.
CASES = tuple(map(ExportCase, ("dinat_mini", "overlock_xt", "care_s0", "maxvit_tiny_224")))
TINY = (ExportCase("test_foveal_care", (1, 2)),)


def exported(model: nn.Module, folder: Path) -> tuple[nn.Module, dict[str, Callable[..., Any]]]:
    """The model as exported, and its exports as functions, by runtime."""
    from ..weights.export import classifier_spec
    from ..weights.formats import FORMATS

    spec = classifier_spec(model, "onnx")
    runs = {}
    for to, runtime in RUNTIMES.items():
        FORMATS[to].check(to)
        FORMATS[to].write(spec, folder)
        runs[runtime] = FORMATS[to].open(folder)
    return spec.model, runs


@torch.no_grad()
def export_rows(case: ExportCase, bench: Bench) -> Iterator[Row]:
    """A row for each batch and runtime, with the time relative to eager."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model, runs = exported(timm.create_model(case.model).eval(), Path(folder))
        size = get_pretrained_cfg(case.model).input_size
        for batch in case.batches:
            x = bench.normal(batch, *size, seed=batch)
            torch.compiler.reset()  # otherwise the second batch size is compiled with a dynamic shape
            calls = {"eager": partial(model, x), "torch.compile": partial(torch.compile(model), x)}
            calls |= {name: lambda x=x, run=run: run(x)[0] for name, run in runs.items()}
            labels = {"model": case.model, "input": f"{batch}x{'x'.join(map(str, size))}"}
            check = {"reference": "eager", "peer": "eager", "tolerance": TOLERANCE}
            only_forward = {name: (call, None) for name, call in calls.items()}
            for row in bench.compare(labels, "by", only_forward, **check, memory=False, settle=SETTLE):
                yield {key: value for key, value in row.items() if "backward" not in key} | {
                    package: version(package) for package in RUNTIMES.values()
                }
