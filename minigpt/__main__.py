"""`minigpt` and `python -m minigpt`. Ctrl-C ends the program well from its first moment on.

Everything else is imported once that is so. An exception that strikes in the middle of an import leaves half a module
behind, or passes through C++ code that answers by aborting; so an interrupt waits until no import is under way.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import time
from types import FrameType

IMPORT = "<frozen importlib._bootstrap>"
ABORTED = 130  # as core.errors.Exit has it, which is not imported yet
PATIENCE = 0.02  # seconds between two looks at whether an import has ended


class Interrupts:
    """The answer to Ctrl-C wherever no stage has its own: KeyboardInterrupt, as soon as that does no harm."""

    def __init__(self) -> None:
        self.begun = False  # the program is there; until then nothing has to be put back
        self.waiting = False  # for an import to end
        self.own = False  # the next signal is sent by ourselves

    def __call__(self, number: int, frame: FrameType | None) -> None:
        own, self.own = self.own, False
        if self.begun and not importing(frame):
            self.waiting = False
            raise KeyboardInterrupt
        again = self.waiting and not own and "RANK" not in os.environ  # a launcher hands on what reached all processes
        if again or not self.begun:
            tell()
            os._exit(ABORTED)
        if own or not self.waiting:
            _thread.start_new_thread(self._retry, (number,))
        self.waiting = True

    def _retry(self, number: int) -> None:
        time.sleep(PATIENCE)
        self.own = True
        if os.name == "nt":
            _thread.interrupt_main()
        else:
            os.kill(os.getpid(), number)  # also wakes a call that waits


def importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORT:
            return True
        frame = frame.f_back
    return False


def tell() -> None:
    with contextlib.suppress(OSError):  # nobody listens
        os.write(2, b"stopped: interrupted\n")


def main() -> int:
    """Run the command line. Returns its exit code."""
    answer = Interrupts()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, and stays so
        signal.signal(signal.SIGINT, answer)
    try:
        from minigpt.cli.app import main as run

        answer.begun = True
        code = run()
    except KeyboardInterrupt:  # before or after the place where faults are told
        tell()
        code = ABORTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is Python's own end
    if code == ABORTED:  # which threads that were left in the middle of something may not survive
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or nobody listens
                stream.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
