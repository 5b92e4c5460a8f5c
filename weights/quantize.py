"""Post-training static quantisation of an ONNX file with onnxruntime: 8-bit weights and activations."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from .formats import INPUT

# Operators in 8 bits: those with weights. Products of activations in attention stay in float, like softmax, norms and
# activation functions: in 8 bits they would not make the file smaller. Calibration methods are compared in
# benchmarks/results/int8-fashion-mnist.csv.
QUANTIZED = ("Conv", "Gemm", "MatMul")


def quantize(file: Path, target: Path, batches: Sequence[Tensor]) -> None:
    """Write ``target``, the model of ``file`` with convolutions and linear layers in 8 bits.

    Weights are scaled per output channel, activations per tensor, by their minimum and maximum on ``batches`` (Q and DQ
    nodes, uint8 activations, int8 weights).

    Args:
        batches: prepared images, ``[B, C, H, W]``.
    """
    import onnx
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(q.CalibrationDataReader):
        images = iter(batches)

        def get_next(self) -> dict[str, object] | None:
            return next(({INPUT: batch.numpy()} for batch in self.images), None)

    with tempfile.TemporaryDirectory() as scratch, _quiet():
        prepared = Path(scratch) / "prepared.onnx"
        # symbolic shape inference is not needed, and fails on a dynamic batch
        quant_pre_process(file, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        weights = {each.name for each in graph.initializer}
        activations_only = [n.name for n in graph.node if n.op_type == "MatMul" and not weights & set(n.input)]
        q.quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=q.QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            nodes_to_exclude=activations_only,
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            calibrate_method=q.CalibrationMethod.MinMax,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence onnxruntime's advice on preprocessing, which is followed here."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
