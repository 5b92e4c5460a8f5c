"""One process of a run of several, for the tests: forked by multiprocessing (`JOB` given) or started by torchrun.

A job: recipe, overrides, environment; and where asked for: `task`; `stop` or `kill`, this process's rank and the batch
before which it signals itself (killed only the first time that torchrun starts it); `record`, a folder for the order of
the training images that this process read; `said`, a file for what it says.
"""

import json
import os
import signal
import sys
from pathlib import Path

job = globals().get("JOB") or json.loads(Path(sys.argv[1]).read_text())
os.environ.update(job.get("environment", {}))
if "said" in job:
    said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, sys.stdout.fileno())
    os.dup2(said, sys.stderr.fileno())

from foveal.cli import app  # noqa: E402
from foveal.train import classify  # noqa: E402
from foveal.train.data.order import EpochOrder  # noqa: E402

rank, batches = int(os.environ["RANK"]), 0
step, order = classify.Task.train_step, EpochOrder.__iter__


def counted(self, model, batch, epoch):
    global batches
    batches += 1
    if job.get("stop") == [rank, batches]:
        os.kill(os.getpid(), signal.SIGTERM)
    if job.get("kill") == [rank, batches] and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, model, batch, epoch)


def recorded(self):
    for position, indices in enumerate(order(self), self.start):
        if self.train:
            with (Path(job["record"]) / f"{self.world}_{self.rank}.txt").open("a") as file:
                file.write(json.dumps([self.number, position, indices]) + "\n")
        yield indices


classify.Task.train_step = counted
if "record" in job:
    EpochOrder.__iter__ = recorded
app(["train", job.get("task", "classify"), job["recipe"], *job["overrides"]])
