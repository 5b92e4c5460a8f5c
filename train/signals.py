"""Stop a run by Ctrl-C or SIGTERM between two updates."""

from __future__ import annotations

import signal
import threading
from typing import Any

from ..errors import Interrupted


class StopSignals:
    """Records Ctrl-C and SIGTERM so that the loop can stop after an update; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python only delivers signals there
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.number != 0

    def _remember(self, number: int, _: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def stop(self) -> Interrupted:
        """What to raise; where only another process was signalled, as after SIGTERM."""
        return Interrupted(130 if self.number == signal.SIGINT else 0)
