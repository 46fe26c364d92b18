"""Muon: momentum, orthogonalised by Newton–Schulz (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).

Updates are scaled to AdamW's usual size (Liu et al., 2025, arXiv:2502.16982), so one learning rate serves both.
Matrices of one shape are stacked and orthogonalised together: a few large batched products instead of many small ones.

Shapes: S matrices of one shape · M rows · N columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from minigpt.core.train.sharded import is_sharded, part, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the Muon post: fast at the price of 0.7..1.2 singular values


def orthogonalise(g: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Nearest semi-orthogonal matrix of each matrix in the stack, approximately.

    g: (S, M, N). Computed in bfloat16 as in the original, which the iteration tolerates. Returns (S, M, N) bfloat16.
    """
    a, b, c = COEFFICIENTS
    x = g.bfloat16()
    wide = x.size(-2) > x.size(-1)
    if wide:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if wide else x


class Muon(torch.optim.Optimizer):
    """Muon for 2-D parameters. State per parameter: `momentum_buffer`.

    lr, weight_decay (decoupled), momentum (Nesterov).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            stacks: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for i, p in enumerate(group["params"]):
                if p.grad is not None:  # sharded matrices are gathered one by one: the whole model fits nowhere
                    stacks[(*p.shape, i) if is_sharded(p) else tuple(p.shape)].append(p)
            for (rows, columns, *_), params in stacks.items():
                update = orthogonalise(torch.stack([whole(self._momentum(p, group["momentum"])) for p in params]))
                scale = 0.2 * max(rows, columns) ** 0.5  # root mean square of AdamW's update is about 0.2
                for p, u in zip(params, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(part(u.to(p.dtype), p), alpha=-group["lr"] * scale)

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum of one matrix, (M, N)."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)
