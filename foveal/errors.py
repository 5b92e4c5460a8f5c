"""Errors that the `foveal` command reports without a traceback. A leaf: every folder may import it.

Invalid user input is a ``ValueError`` (exit status 2); a run that failed for a reason that the message explains is a
`RunError` (exit status 1). Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message is meant for the user."""


class RunError(RuntimeError):
    """A run failed; the message is meant for the user."""


class Interrupted(Exception):
    """A run was stopped by a signal; its state is saved.

    Args:
        code: exit status: 130 after Ctrl-C; 0 after SIGTERM, which schedulers send before preemption.
        message: where the state is, and how to resume.
    """

    def __init__(self, code: int, message: str = ""):
        super().__init__(code, message)
        self.code, self.message = code, message
