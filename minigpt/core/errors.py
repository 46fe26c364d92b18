"""What can go wrong by a user's hand, and the exit code each kind ends with.

An error reads: what happened with file:line or flag · what was found · what to do.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class Exit(IntEnum):
    """Process exit codes. Documented in docs/reference/exit-codes.md; scripts rely on them."""

    OK = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    MISSING = 4
    OUT_OF_MEMORY = 5
    DIVERGED = 6
    CHECK_FAILED = 7
    STOPPED = 75
    ABORTED = 130


class MinigptError(Exception):
    """A fault that a user can cause and mend.

    message: one plain sentence that names the file and line, or the flag.
    found: the thing itself (a row, a value), cut to one line by the console.
    fix: what to do next.
    data: further fields of the --json object, such as all that a check found.
    """

    code = Exit.BUG
    kind = "bug"
    local = False  # of one process of several, which has to tell it itself

    def __init__(
        self, message: str, *, found: str | None = None, fix: str | None = None, data: dict[str, Any] | None = None
    ):
        super().__init__(message)
        self.message = message
        self.found = found
        self.fix = fix
        self.data = data or {}


class UsageError(MinigptError):
    """A flag, a configuration value or a locked run directory."""

    code = Exit.USAGE
    kind = "usage"


class DataError(MinigptError):
    """Data, a checkpoint or the disk."""

    code = Exit.DATA
    kind = "data"


class MissingError(MinigptError):
    """A package or hardware that is not here."""

    code = Exit.MISSING
    kind = "missing"


class OutOfMemory(MinigptError):
    code = Exit.OUT_OF_MEMORY
    kind = "oom"


class Diverged(MinigptError):
    """The loss, its gradient or a model's logits are not numbers."""

    code = Exit.DIVERGED
    kind = "diverged"


class CheckFailed(MinigptError):
    """`data check`, `eval --min` or `convert --check` found something."""

    code = Exit.CHECK_FAILED
    kind = "check"


class Stopped(MinigptError):
    """Stopped early by a signal or `--max-time`; a checkpoint is saved and the run can be resumed."""

    code = Exit.STOPPED
    kind = "stopped"


class Aborted(MinigptError):
    """A second Ctrl-C: stopped at once, the newest saved step stands."""

    code = Exit.ABORTED
    kind = "aborted"


class RankLost(MinigptError):
    """Another process of the run has gone, or does not answer within --rank-timeout."""

    code = Exit.MISSING
    kind = "lost"


class Elsewhere(MinigptError):
    """A fault of another process of the run, with its exit code. Rank 0 tells it, the others end silently."""

    kind = "elsewhere"

    def __init__(self, message: str, *, found: str | None = None, fix: str | None = None, code: Exit = Exit.BUG):
        super().__init__(message, found=found, fix=fix)
        self.code = code


def is_out_of_memory(e: BaseException) -> bool:
    """Whether a fault of Python's or torch's means that memory ran out. Imports nothing."""
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
        return True
    told = ("can't allocate memory", "std::bad_alloc", "could not create a memory object")
    return isinstance(e, RuntimeError) and any(words in str(e) for words in told)  # on a CPU torch has no own class
