"""Eight bits on real images: the shipped Fashion-MNIST recipe, shortened to an epoch, loses no more than a point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.backbones.loading import load
from foveal.configs.schema import load_config
from foveal.train import train
from foveal.train.data.factory import idx_root
from foveal.train.data.idx import read_split
from foveal.weights.export import export


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_int8_on_fashion_mnist(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra foveal[export] is not installed")
    root = idx_root(load_config("fashion_mnist").data).resolve()
    assert any(root.glob("train-images-idx3-ubyte*")), f"Fashion-MNIST is not in {root}: run `make fashion-mnist`"
    train("fashion_mnist", [f"output={tmp_path / 'run'}", f"data.root={root}", "schedule.epochs=1"])
    (tmp_path / "images").mkdir()
    for i, pixels in enumerate(read_split(root, "train")[0][:512]):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    done = export(tmp_path / "run", "onnx", tmp_path / "int8", int8=True, calibration=[tmp_path / "images"])

    model = load(tmp_path / "run")
    mean, std = model.pretrained_cfg["mean"][0], model.pretrained_cfg["std"][0]
    session = onnxruntime.InferenceSession(done.folder / "model.onnx", providers=["CPUExecutionProvider"])
    images, labels = read_split(root, "val")
    right = np.zeros(2, dtype=np.int64)
    for start in range(0, len(images), 500):
        batch = ((images[start : start + 500, None].astype(np.float32) / 255) - mean) / std
        with torch.inference_mode():
            outputs = model(torch.from_numpy(batch)), session.run(["logits"], {"image": batch})[0]
        right += [(np.asarray(each).argmax(1) == labels[start : start + 500]).sum() for each in outputs]
    float32, int8 = 100 * right / len(images)
    assert float32 > 80
    assert abs(int8 - float32) <= 1.0, f"top-1 {float32:.2f} % in float32, {int8:.2f} % in 8 bits"
