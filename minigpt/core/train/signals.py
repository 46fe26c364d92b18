"""Stopping well: the first SIGINT, SIGTERM or SIGHUP asks the loop to save and end, the second ends at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any

from minigpt.core.errors import Aborted
from minigpt.core.world import STARTED_BY, is_follower

HANGUP = getattr(signal, "SIGHUP", None)  # a terminal was closed; Windows has no such signal
STOPPING = [number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number is not None]


def heeded(numbers: Iterable[int]) -> list[int]:
    """The signals of these to act upon: not the end of a terminal that a run was told to outlive, as by nohup."""
    return [n for n in numbers if n != HANGUP or signal.getsignal(n) is not signal.SIG_IGN]


class StopRequest:
    """Set by a signal, by the clock, or by the death of the process that started this one; the training loop reads it
    between steps.

    max_seconds: None = no limit. Of several processes rank 0 looks at the clock, so that it knows why they stop.
    """

    def __init__(self, max_seconds: float | None = None):
        self.reason: str | None = None
        self._deadline = None if max_seconds is None or is_follower() else time.monotonic() + max_seconds
        self._max_seconds = max_seconds
        self._previous: dict[int, Any] = {}
        self._first: int | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in heeded(STOPPING):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._first is None:
            self._first = number
        elif under_torchrun() and number != self._first:
            return  # torchrun answers any signal by SIGTERM to its processes, which may have had the signal as well
        elif number == HANGUP:
            return  # both the shell and the kernel say that a terminal has gone
        if self.reason is not None:
            raise Aborted(f"stopped at once by a second {name}", fix="the newest saved step stands: use --resume")
        self.reason = name

    def __bool__(self) -> bool:
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = f"--max-time {self._max_seconds:g}s"
        if self.reason is None and under_torchrun() and os.getppid() != STARTED_BY:
            self.reason = "the end of what started it"
        return self.reason is not None


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
