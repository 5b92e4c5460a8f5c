"""How a run ends when something breaks while its worker processes run: within seconds, with all of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import write_rectangles

pytestmark = pytest.mark.slow
TASKS = ("classify", "detect", "segment")
LIMIT = 10  # seconds
BROKEN = """
import sys
from {module} import {name}
def broken(*_, **__):
    raise AssertionError("broken on purpose")
{name}.{method} = broken
from foveal.cli import main
main()
"""


@pytest.fixture(params=TASKS)
def command(request, tmp_path: Path, folder_recipe: Path, make_images) -> list[str]:
    """Arguments of `foveal` that train for ever, with two workers."""
    options = [f"output={tmp_path / 'run'}", "data.workers=2", "schedule.epochs=100000"]
    if request.param == "classify":
        options.append(f"data.root={make_images()}")
        return ["train", "classify", str(folder_recipe), *options]
    options += [f"data.root={tmp_path / 'digits'}", "data.digits_train=64", "data.digits_val=16"]
    return ["train", request.param, "digits", *options]


def start(arguments: list[str], code: str | None = None) -> subprocess.Popen:
    program = ["-m", "foveal"] if code is None else ["-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *program, *arguments], text=True, start_new_session=True, **pipes)


def children(pid: int) -> list[int]:
    """The processes that ``pid`` started, and theirs."""
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, tasks.read_text().split()):
            found += [child, *children(child)]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers_of(process: subprocess.Popen, run: Path) -> list[int]:
    """Those of a run that has finished an epoch."""
    while process.poll() is None and not (run / "metrics.csv").exists():
        time.sleep(0.1)
    found = children(process.pid)
    assert len(found) >= 2, process.communicate()[0]
    return found


def ends(process: subprocess.Popen, started: list[int]) -> tuple[int, str]:
    """Exit status and output of a process that is to end within `LIMIT` and to leave none of ``started``."""
    before = time.perf_counter()
    try:
        output, _ = process.communicate(timeout=60)  # the pipe is closed when the last child is gone
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    seconds = time.perf_counter() - before
    assert seconds < LIMIT, (seconds, output)
    assert not [pid for pid in started if alive(pid)]
    return process.returncode, output


def test_a_killed_worker_ends_the_run(command, tmp_path):
    process = start(command)
    started = workers_of(process, tmp_path / "run")
    os.kill(started[0], signal.SIGKILL)
    status, output = ends(process, started)
    assert status == 1, output
    assert str(started[0]) in output
    assert "Traceback" not in output


@pytest.mark.parametrize("method", ["_clip_gradients", "_row"])
def test_an_error_with_a_traceback_ends_the_run(command, method):
    process = start(command, BROKEN.format(module="foveal.train.trainer", name="Trainer", method=method))
    status, output = ends_after_start(process)
    assert status == 1, output
    assert "broken on purpose" in output


def ends_after_start(process: subprocess.Popen) -> tuple[int, str]:
    """As `ends`, of a process that breaks by itself; the time counts from its message."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "broken on purpose" in line:
            break
    status, output = ends(process, [])
    return status, "".join(lines) + output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_ends_the_run(command, tmp_path, number):
    process = start(command)
    started = workers_of(process, tmp_path / "run")
    os.killpg(process.pid, number)
    status, output = ends(process, started)
    assert status == (0 if number == signal.SIGTERM else 130), output
    assert "resume=auto" in output


def test_workers_of_a_killed_process_end(command, tmp_path):
    process = start(command)
    started = workers_of(process, tmp_path / "run")
    os.kill(process.pid, signal.SIGKILL)
    assert ends(process, started)[0] == -signal.SIGKILL
