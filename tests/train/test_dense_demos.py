"""The demos of detection and segmentation from end to end, as make runs them, with the figures that they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from foveal.demo import demo as run_demo


def demo(task: str, folder: Path) -> tuple[str, dict, dict]:
    """Runs the demo in ``folder``; what it printed, the run's summary and what its evaluation wrote."""
    command = [sys.executable, "-m", "foveal", "demo", task]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    output = folder / "runs" / f"demo-{task}"
    assert (output / "prediction" / "000000.png").is_file()
    for name in ("run/predictions.png", "run/curves.png", "run/best/model.safetensors"):
        assert (output / name).stat().st_size > 1000, name
    manifest = json.loads((folder / "data" / "digits-composites" / "manifest.json").read_text())
    assert manifest["images"] == {"train": 4000, "val": 300}
    summary, result = ((output / name).read_text() for name in ("run/summary.json", "result.json"))
    return done.stdout, json.loads(summary), json.loads(result)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_demo_detect(tmp_path: Path):
    printed, summary, result = demo("detect", tmp_path)
    assert summary["last_box_ap50"] >= 80  # at the last epoch: the best was chosen on the images that it is scored on
    assert summary["last_mask_ap50"] >= 75
    assert result["n"] == 300
    for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap50"):
        assert result[name] == pytest.approx(summary[name], abs=1e-9)  # what was kept is what was measured
    assert summary["seconds"] < 900  # ten minutes where two cores have nothing else to do
    truth = json.loads((tmp_path / "data" / "digits-composites" / "annotations" / "instances_val.json").read_text())
    there = {str(a["category_id"] - 1) for a in truth["annotations"] if a["image_id"] == 1}
    lines = printed.split("val/000000.jpg\n", 1)[1].splitlines()
    found = {line.split()[2] for line in lines if " %  " in line}
    assert found & there


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_demo_segment(tmp_path: Path):
    printed, summary, result = demo("segment", tmp_path)
    assert summary["last_miou"] >= 70  # the mean over the ten digits and the background
    assert result["n"] == 300
    assert result["miou"] == pytest.approx(summary["miou"], abs=1e-9)
    assert len(result["iou"]) == 11
    assert summary["seconds"] < 900
    assert " %  background" in printed


def test_an_unknown_demo_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"'segments'.*classify, detect.* segment"):
        run_demo("segments", tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []
