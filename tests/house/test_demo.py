"""The demo from end to end, as `make demo` runs it after its set-up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    output.mkdir()  # taken, so the next name is used and nothing of this one is touched
    done = subprocess.run(
        [sys.executable, "-m", "foveal", "demo", "--output", output], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(output.iterdir()) == []
    output = tmp_path / "demo-2"
    for name in ("run/predictions.png", "run/curves.png", "safetensors/model.safetensors", "onnx/model.onnx"):
        assert (output / name).stat().st_size > 1000, name
        assert str((output / name).parent) in done.stdout
    assert json.loads((output / "run" / "summary.json").read_text())["top1"] >= 97
    (digit,) = (
        int(line.rpartition(" a ")[2].split()[0]) for line in done.stdout.splitlines() if "held-out digit," in line
    )
    first = done.stdout.split(f"{output / 'digit.png'}\n", 1)[1].split("\n", 1)[0]
    assert first.split()[-1] == str(digit)
