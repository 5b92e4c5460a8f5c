"""Post-training static quantisation of an ONNX file with onnxruntime: 8-bit weights and activations."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from .formats import INPUT

# What is computed in 8 bits: products with weights. Those of attention, of activations alone, stay in float as softmax,
# norms and activation functions do: in 8 bits they make the file no smaller. Measured, with the ways to find ranges, in
# benchmarks/results/int8-fashion-mnist.csv.
QUANTIZED = ("Conv", "Gemm", "MatMul")


def quantize(file: Path, target: Path, batches: Sequence[Tensor]) -> None:
    """Write ``target``, the model of ``file`` with convolutions and linear layers in 8 bits.

    Weights get a scale for each output channel, activations one for each tensor, from the least and the largest value
    that they take on ``batches`` (Q and DQ nodes, uint8 activations, int8 weights).

    Args:
        batches: images as the model takes them, ``[B, C, H, W]``.
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
        # its symbolic shapes are not needed, and its checks fail on a dynamic batch
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
    """Without the advice on preparing models that is followed here."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
