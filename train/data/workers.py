"""The end of loaders' worker processes, which ignore the signals that a run is stopped with."""

import atexit
import gc
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any

from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ...errors import RunError

GRACE = 2.0  # seconds in which workers may end by themselves


class WorkerError(RunError):
    """A loader's worker process died; the message names its process id and signal."""


@contextmanager
def workers_end(*loaders: Any) -> Iterator[None]:
    """At the end of the block, however it comes, the workers of ``loaders`` end.

    Raises:
        WorkerError: one of them died inside the block.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        hint = "perhaps out of memory or of shared memory (/dev/shm): fewer data.workers or a smaller batch need less"
        raise WorkerError(f"{error}; {hint}") from error
    finally:
        end_workers(*loaders)


def end_workers(*loaders: Any) -> None:
    """Ends the workers of ``loaders``, and with none given of all that are still open. The frames of an error keep
    loaders alive, and garbage collection may end their queues before their workers."""
    datasets = [getattr(loader, "dataset", None) for loader in loaders]
    for each in gc.get_objects() if multiprocessing.active_children() else ():
        if type(each) is not _MultiProcessingDataLoaderIter:
            continue
        if not loaders or any(each._dataset is dataset for dataset in datasets):
            if each._worker_pids_set:  # one that is killed here is no error
                signal_handling._remove_worker_pids(id(each))
                each._worker_pids_set = False
            # PyTorch waits for each worker for 5 seconds, and then sends a SIGTERM that it ignores
            late = Timer(GRACE, lambda own: [worker.kill() for worker in own], [each._workers])
            late.daemon = True
            late.start()
            each._shutdown_workers()
            late.cancel()


@atexit.register  # runs before multiprocessing's own function, which was registered when torch was imported
def _at_exit() -> None:
    """multiprocessing would send the workers SIGTERM, which they ignore, and wait for them for ever."""
    end_workers()
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
