"""How a run ends when something breaks while its worker processes run: within seconds, with all of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from foveal.train.data import WorkerError, workers_end
from foveal.train.data.loader import leave_signals_to_the_trainer
from foveal.train.data.workers import Reader

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


class Stuck(Dataset):
    """Its second item takes a minute to read."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> int:
        time.sleep(60 * (number > 0))
        return number


def test_stuck_workers_are_not_waited_for():
    loader = Reader(Stuck(), num_workers=2, worker_init_fn=leave_signals_to_the_trainer)
    batches = iter(loader)
    with workers_end(loader):
        next(batches)
        before, workers = time.perf_counter(), batches._workers
    assert time.perf_counter() - before < LIMIT
    assert not any(worker.is_alive() for worker in workers)


def test_a_dead_worker_is_an_error_of_the_run():
    loader = Reader(Stuck(), num_workers=1, worker_init_fn=leave_signals_to_the_trainer)
    batches = iter(loader)
    with pytest.raises(WorkerError, match=str(batches._workers[0].pid)), workers_end(loader):
        next(batches)
        batches._workers[0].kill()
        next(batches)
    with pytest.raises(RuntimeError, match=r"^other$") as raised, workers_end(loader):
        raise RuntimeError("other")
    assert not isinstance(raised.value, WorkerError)


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


@pytest.mark.slow
def test_a_killed_worker_ends_the_run(command, tmp_path):
    process = start(command)
    started = workers_of(process, tmp_path / "run")
    os.kill(started[0], signal.SIGKILL)
    status, output = ends(process, started)
    assert status == 1, output
    assert str(started[0]) in output
    assert "Traceback" not in output


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_ends_the_run(command, tmp_path, number):
    process = start(command)
    started = workers_of(process, tmp_path / "run")
    os.killpg(process.pid, number)
    status, output = ends(process, started)
    assert status == (0 if number == signal.SIGTERM else 130), output
    assert "resume=auto" in output


@pytest.mark.slow
def test_workers_of_a_killed_process_end(command, tmp_path):
    process = start(command)
    started = workers_of(process, tmp_path / "run")
    os.kill(process.pid, signal.SIGKILL)
    assert ends(process, started)[0] == -signal.SIGKILL
