"""Stopping well: the first SIGINT or SIGTERM asks the loop to save and end, the second ends at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from minigpt.core.errors import Aborted


class StopRequest:
    """Set by a signal or by the clock; the training loop reads it between steps.

    max_seconds: None = no limit.
    """

    def __init__(self, max_seconds: float | None = None):
        self.reason: str | None = None
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._max_seconds = max_seconds
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.reason is not None:
            raise Aborted(f"stopped at once by a second {name}", fix="the newest saved step stands: use --resume")
        self.reason = name

    def __bool__(self) -> bool:
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = f"--max-time {self._max_seconds:g}s"
        return self.reason is not None
