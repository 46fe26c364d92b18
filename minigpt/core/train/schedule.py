"""Learning-rate shapes as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Warm up linearly, then follow `shape` over `total` steps.

    cosine  SGDR without restarts (Loshchilov & Hutter, 2017, arXiv:1608.03983)
    wsd     warm-up, stable, linear decay (Hu et al., 2024, MiniCPM, arXiv:2404.06395; Hägele et al., 2024,
            arXiv:2405.18392): a longer run shares its flat part with a shorter one, step for step
    linear  straight to the end (Bergsma et al., 2025, arXiv:2502.15938)
    """

    peak: float
    total: int
    shape: str = "wsd"
    warmup: float = 0.0  # below 1: share of the steps; else steps
    decay: float = 0.4  # share of the steps that wsd spends going down
    floor: float = 0.0  # share of the peak at the end

    @property
    def asked_warmup(self) -> int:
        """Steps of warm-up that the run may be too short for."""
        return round(self.warmup * self.total if self.warmup < 1 else self.warmup)

    @property
    def warmup_steps(self) -> int:
        return min(self.asked_warmup, max(self.total - 1, 0))

    @property
    def asked_decay(self) -> int:
        """First step of wsd's way down, where the warm-up leaves room for it."""
        return self.total - round(self.decay * self.total)

    @property
    def decay_start(self) -> int:
        """First step of the way down; `total` for a rate that never falls."""
        if self.shape == "constant":
            return self.total
        return max(self.warmup_steps, self.asked_decay) if self.shape == "wsd" else self.warmup_steps

    @property
    def bent(self) -> str | None:
        """What of the wish the run is too short for, as a sentence; None when all of it fits."""
        if self.asked_warmup > self.warmup_steps:
            never = "" if self.shape == "constant" else ", and the rate never falls"
            return (
                f"a warm-up of {self.asked_warmup:,} steps does not fit into {self.total:,}: "
                f"it takes {self.warmup_steps:,}{never}"
            )
        if self.shape == "wsd" and self.asked_decay < self.warmup_steps:
            return (
                f"warm-up and decay do not both fit into {self.total:,} steps: the decay begins at step "
                f"{self.warmup_steps:,}, not at {self.asked_decay:,}"
            )
        return None

    def leap(self, before: Schedule, step: int) -> tuple[float, float] | None:
        """The rates of the steps before and after a run of schedule `before` goes on with this one at `step`.

        None when the rate goes on as it would have done, give or take a tenth.
        """
        then = before(step - 1) if step >= before.total else before(step)
        now = self(step)
        return None if step == 0 or abs(now - then) <= 0.1 * then else (before(step - 1), now)

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step `step` (0-based)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.shape == "constant":
            return self.peak
        start = self.decay_start
        if step < start:
            return self.peak
        # the last step (total - 1) still moves: the floor itself lies one step beyond
        done = min(1.0, (step - start) / max(self.total - start, 1))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
        return self.peak * (self.floor + (1 - self.floor) * left)
