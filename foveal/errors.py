"""Errors that the `foveal` command reports without a traceback. A leaf: every folder may import it.

What a user gave is refused with a ``ValueError`` (exit status 2); what was attempted and failed for a reason that the
message gives in full is a `RunError` (exit status 1). Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class RunError(RuntimeError):
    """Something that was attempted failed; the message is meant for the user."""


class Interrupted(Exception):
    """A signal asked a run to stop, and it did, with everything saved.

    Args:
        code: exit status: 130 after Ctrl-C; 0 after SIGTERM, by which schedulers take machines away.
        message: where the state is, and how to go on.
    """

    def __init__(self, code: int, message: str = ""):
        super().__init__(code, message)
        self.code, self.message = code, message
