"""From training to another runtime, by the commands alone: what a run left is exported, and finds the same there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.heads.checkpoint import load_dense
from foveal.train import predict
from foveal.weights.compare import detections_differ

pytestmark = pytest.mark.slow
SHORT = ["data.digits_train=160", "data.digits_val=4", "schedule.epochs=1", "log.trackers=[]"]


def foveal(folder: Path, *arguments: str) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "foveal", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def trained_and_exported(task: str, folder: Path) -> tuple[Path, np.ndarray, list[np.ndarray]]:
    """A photograph with digits, its pixels ``[1, 3, 128, 128]``, and what onnxruntime makes of them."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra foveal[export] is not installed")
    foveal(folder, "train", task, "digits", "output=run", *SHORT)
    image = folder / "data" / "digits-composites" / "val" / "000000.jpg"
    arguments = ["--to", "onnx", "--size", "128x128", "--image", str(image), "--output", "onnx"]
    printed = foveal(folder, "export", "run", *arguments)
    assert "onnx: README.md, config.json, model.onnx" in printed
    assert "largest difference " in printed
    assert str(image) in printed
    pixels = np.asarray(Image.open(image), np.float32).transpose(2, 0, 1)[None] / 255
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    return image, pixels, session.run(None, {"image": pixels})


def test_a_detector(tmp_path: Path) -> None:
    image, pixels, found = trained_and_exported("detect", tmp_path)
    model = load_dense(tmp_path / "run")
    (prediction,) = predict(tmp_path / "run", [image], threshold=0.0)
    assert len(prediction.results) > 5
    expected = (
        torch.tensor([each.box for each in prediction.results]),
        torch.tensor([model.classes.index(each.label) for each in prediction.results]),
        torch.tensor([each.score for each in prediction.results]),
    )
    got = [torch.from_numpy(each) for each in found]
    limits = model.detector.roi_heads.score_thresh, model.detector.roi_heads.detections_per_img
    assert detections_differ(expected, got[:3], (128, 128), *limits) < 1e-4
    with torch.no_grad():
        (eager,) = model(list(torch.from_numpy(pixels)))
    eager = [eager[name] for name in ("boxes", "labels", "scores", "masks")]
    assert detections_differ(eager, got, (128, 128), *limits) < 1e-4


def test_a_segmenter(tmp_path: Path) -> None:
    image, pixels, (logits,) = trained_and_exported("segment", tmp_path)
    model = load_dense(tmp_path / "run")
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels))
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-4 * expected.abs().max()
    (prediction,) = predict(tmp_path / "run", [image])
    counted = np.bincount(logits.argmax(1).ravel(), minlength=len(model.classes)) / logits[0, 0].size
    for each in prediction.results:
        assert (
            abs(counted[model.classes.index(each.label)] - each.score) <= 2e-3
        )  # ties of two classes, on another processor
