"""Ends the worker processes of loaders, which ignore the signals that stop a run."""

import atexit
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ...errors import RunError

GRACE = 2.0  # seconds for workers to exit by themselves
_open: WeakSet[_MultiProcessingDataLoaderIter] = WeakSet()


class Reader(DataLoader):
    """A `DataLoader` whose workers `workers_end` ends, wherever its iterators are held."""

    def _get_iterator(self) -> Any:
        batches = super()._get_iterator()
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            _open.add(batches)
        return batches


class WorkerError(RunError):
    """A data worker died; the message gives its process id and signal."""


@contextmanager
def workers_end(*loaders: Any) -> Iterator[None]:
    """Ends the workers of ``loaders`` at the end of the block, also after an error.

    Raises:
        WorkerError: a worker died inside the block.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        hint = "perhaps out of memory or shared memory (/dev/shm); try fewer data.workers or a smaller batch"
        raise WorkerError(f"{error}; {hint}") from error
    finally:
        end_workers(*loaders)


def end_workers(*loaders: Any) -> None:
    """Ends the workers of ``loaders``, without arguments those of all open loaders. Tracebacks keep loaders alive, and
    garbage collection may close their queues before their workers end."""
    datasets = [getattr(loader, "dataset", None) for loader in loaders]
    for each in list(_open):
        if not loaders or any(each._dataset is dataset for dataset in datasets):
            if each._worker_pids_set:  # killing a worker here is not an error
                signal_handling._remove_worker_pids(id(each))
                each._worker_pids_set = False
            # PyTorch waits 5 seconds for each worker, then sends SIGTERM, which it ignores
            late = Timer(GRACE, lambda own: [worker.kill() for worker in own], [each._workers])
            late.daemon = True
            late.start()
            each._shutdown_workers()
            late.cancel()


@atexit.register  # runs before multiprocessing's handler, registered when torch was imported
def _at_exit() -> None:
    """multiprocessing would send the workers SIGTERM, which they ignore, and wait forever."""
    end_workers()
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
