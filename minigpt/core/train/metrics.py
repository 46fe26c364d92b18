"""What a run measures while it goes, and how the figures read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from minigpt.core.train.guard import History

FADING = 0.98  # what a step counts for the estimate of the time left, for each one that came after it


@dataclass
class Window:
    """Sums since the last log row. Saved with a checkpoint, so that a resumed run logs the same rows."""

    loss: float = 0.0  # summed over loss units
    units: float = 0.0
    skipped: int = 0

    @property
    def mean(self) -> float | None:
        return self.loss / self.units if self.units else None


@dataclass
class Counters:
    """Everything the loop counts. JSON, exact: Python's floats survive a round trip."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # loss units trained on
    skipped: int = 0  # steps left out because loss or gradient was not finite
    streak: int = 0  # of those, in a row
    best: float | None = None  # lowest validation loss at a saved step
    best_step: int | None = None
    last_val: dict[str, float] = field(default_factory=dict)
    val_step: int | None = None  # the step it was measured after
    loss_scale: float = 65536.0  # float16 only
    good_steps: int = 0  # since the loss scale last changed
    window: Window = field(default_factory=Window)
    history: History = field(default_factory=History)  # filled when spikes are watched for

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Counters:
        parts = {"window": Window(**state["window"]), "history": History(**state.get("history", {}))}
        return cls(**{**state, **parts})


class Rates(NamedTuple):
    """What was done in a second."""

    tokens: float  # by all processes
    flops: float  # by this one


class Clock:
    """What the training steps do in a second, evaluation and saving left out; and when a run ends, with them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self.flops = 0.0
        self._since: float | None = None
        self._recent = [0.0, 0.0]  # seconds and steps, older ones counting less
        self._pauses: dict[str, tuple[float, int]] = {}  # seconds and times of what is no step, such as saving

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self, tokens: int, flops: float = 0.0) -> None:
        assert self._since is not None
        spent = time.perf_counter() - self._since
        self.seconds += spent
        self.tokens += tokens
        self.flops += flops
        self._recent = [self._recent[0] * FADING + spent, self._recent[1] * FADING + 1]

    def rates(self) -> Rates:
        """Since the last call."""
        seconds = self.seconds or math.inf
        found = Rates(self.tokens / seconds, self.flops / seconds)
        self.seconds, self.tokens, self.flops = 0.0, 0, 0.0
        return found

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Time what is done between two steps."""
        began = time.perf_counter()
        yield
        seconds, times = self._pauses.get(kind, (0.0, 0))
        self._pauses[kind] = seconds + time.perf_counter() - began, times + 1

    def eta(self, steps_left: int, **pauses_left: int) -> float:
        """Seconds until the end: steps at the pace of the last hundred or so, and so many pauses of each kind.

        A kind that has not happened yet counts nothing.
        """
        seconds, steps = self._recent
        left = steps_left * seconds / steps if steps else 0.0
        for kind, count in pauses_left.items():
            spent, times = self._pauses.get(kind, (0.0, 1))
            left += count * spent / times
        return left


def short(value: float) -> str:
    """12900 → 12.9k: figures for people."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}" if abs(value) < 100 * size else f"{value / size:.0f}{letter}"
    return f"{value:.3g}"


def counted(number: float, noun: str) -> str:
    """1 epoch, 2.5 epochs, 1,200 steps."""
    figure = f"{number:,}" if isinstance(number, int) else f"{number:.3g}"
    return f"{figure} {noun}{'s' * (figure != '1')}"


def spell_time(seconds: float) -> str:
    """207 → 3:27, 4000 → 1:06:40."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def figures(row: dict[str, Any], eta: float | None, last: Counters | None = None) -> str:
    """A log row as text.

    eta: seconds left, None where a bar tells them. last: where the newest validation loss stands, which a bar goes on
    showing, with its step; a line has it only when it is new.
    """
    parts = []
    val, since = row, ""
    if last is not None and "val_loss" not in row and last.val_step is not None:
        val, since = last.last_val, f" at step {last.val_step:,}"
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.3f}")
    if "val_loss" in val:
        bits = f" ({val['val_bpb']:.2f} bits/byte)" if "val_bpb" in val else ""
        parts.append(f"val {val['val_loss']:.3f}{bits}{since}")
    parts += [f"{short(row['tok_s'])} tok/s", f"{row['mem_gb']:.1f} GB"]
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.0%}")
    if eta is not None:
        parts.append(f"ETA {spell_time(eta)}")
    if row.get("skipped"):
        parts.insert(0, f"{row['skipped']} skipped")
    return "  ".join(parts)
