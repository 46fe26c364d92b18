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
    def warmup_steps(self) -> int:
        steps = self.warmup * self.total if self.warmup < 1 else self.warmup
        return min(round(steps), max(self.total - 1, 0))

    @property
    def decay_start(self) -> int:
        """First step of wsd's way down."""
        return max(self.warmup_steps, self.total - round(self.decay * self.total))

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step `step` (0-based)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.shape == "constant":
            return self.peak
        start = self.decay_start if self.shape == "wsd" else self.warmup_steps
        if step < start:
            return self.peak
        # the last step (total - 1) still moves: the floor itself lies one step beyond
        done = min(1.0, (step - start) / max(self.total - start, 1))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
        return self.peak * (self.floor + (1 - self.floor) * left)
