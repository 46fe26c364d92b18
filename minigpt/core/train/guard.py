"""Which steps are taken: none whose loss or gradient is not a number, and, when asked for, none that leaps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_BAD_STEPS = 3  # in a row, before the run ends
REMEMBERED = 128  # steps that a leap is measured against
FEWEST = 32  # of them, before anything counts as a leap


@dataclass
class History:
    """Loss and gradient norm of the last steps, those left out included: a new level is accepted in the end."""

    loss: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)

    def add(self, loss: float, norm: float) -> None:
        for values, value in ((self.loss, loss), (self.norm, norm)):
            values.append(value)
            del values[:-REMEMBERED]


def finite(loss: float, norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)


def leaps(history: History, loss: float, norm: float, sigmas: float) -> bool:
    """Whether a step's loss or gradient norm lies `sigmas` standard deviations above those of the last 128 steps.

    As OLMo's SkipStepOptimizer (Team OLMo, 2024, arXiv:2501.00656) leaves spikes out. sigmas: 0 = never.
    """
    if not sigmas or len(history.loss) < FEWEST:
        return False
    return loss > _bound(history.loss, sigmas) or norm > _bound(history.norm, sigmas)


def _bound(values: Sequence[float], sigmas: float) -> float:
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
    return mean + sigmas * math.sqrt(variance)
