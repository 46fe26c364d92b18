"""AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101), through torch's functional form and its fused kernel.

`torch.optim.AdamW` would do the same, but making any torch optimizer imports torch's compiler: two seconds a start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW:
    """groups: parameters and their weight decay. State per parameter: `step`, `exp_avg`, `exp_avg_sq`."""

    def __init__(
        self, groups: Sequence[tuple[list[Tensor], float]], betas: tuple[float, float], eps: float, fused: bool
    ):
        self.groups, self.betas, self.eps, self.fused = groups, betas, eps, fused
        self.params = [p for params, _ in groups for p in params]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every parameter that has a gradient."""
        for params, decay in self.groups:
            moved = [p for p in params if p.grad is not None]
            states = [self._state(p) for p in moved]
            options: dict[str, Any] = {"fused": True} if self.fused else {"foreach": True}
            adamw(
                moved,
                [p.grad for p in moved if p.grad is not None],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                **options,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=decay,
                eps=self.eps,
                maximize=False,
            )

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        if p not in self.state:
            # The count is a tensor beside the weight for the fused kernel, which raises it itself.
            step = torch.zeros((), device=p.device if self.fused else "cpu")
            self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return self.state[p]
