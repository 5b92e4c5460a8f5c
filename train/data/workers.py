"""The end of loaders' worker processes, which ignore the signals that a run is stopped with."""

import atexit
import gc
import multiprocessing
from typing import Any

from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter


def end_workers(*loaders: Any) -> None:
    """Ends the workers of ``loaders``, and with none given of all that are still open. The frames of an error keep
    loaders alive, and garbage collection may end their queues before their workers."""
    datasets = [getattr(loader, "dataset", None) for loader in loaders]
    for each in gc.get_objects() if multiprocessing.active_children() else ():
        if type(each) is not _MultiProcessingDataLoaderIter:
            continue
        if not loaders or any(each._dataset is dataset for dataset in datasets):
            each._shutdown_workers()


@atexit.register  # runs before multiprocessing's own function, which was registered when torch was imported
def _at_exit() -> None:
    """multiprocessing would send the workers SIGTERM, which they ignore, and wait for them for ever."""
    end_workers()
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
