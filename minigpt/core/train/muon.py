"""Muon: momentum, orthogonalised by Newton–Schulz (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).

Updates are scaled to AdamW's usual size (Liu et al., 2025, arXiv:2502.16982), so one learning rate serves both.
Matrices of one shape are stacked and orthogonalised together: a few large batched products instead of many small ones.

Shapes: S matrices of one shape · M rows · N columns.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from minigpt.core.runtime import tolerant_dtype
from minigpt.core.train.sharded import is_sharded, part, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the Muon post: fast at the price of 0.7..1.2 singular values


def orthogonalise(g: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Nearest semi-orthogonal matrix of each matrix in the stack, approximately.

    g: (S, M, N). Computed in bfloat16 as in the original, which the iteration tolerates, where that is native.
    Returns (S, M, N) of that type.
    """
    a, b, c = COEFFICIENTS
    x = g.to(tolerant_dtype(g.device))
    wide = x.size(-2) > x.size(-1)
    if wide:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if wide else x


class Muon:
    """Muon for 2-D parameters, with Nesterov momentum and decoupled decay. State per parameter: `momentum_buffer`."""

    def __init__(self, params: list[Tensor], weight_decay: float = 0.1, momentum: float = 0.95):
        self.params, self.weight_decay, self.momentum = params, weight_decay, momentum
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every parameter that has a gradient."""
        stacks: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for i, p in enumerate(self.params):
            if p.grad is not None:  # sharded matrices are gathered one by one: the whole model fits nowhere
                stacks[(*p.shape, i) if is_sharded(p) else tuple(p.shape)].append(p)
        for (rows, columns, *_), params in stacks.items():
            update = orthogonalise(torch.stack([whole(self._momentum(p)) for p in params]))
            scale = 0.2 * max(rows, columns) ** 0.5  # root mean square of AdamW's update is about 0.2
            for p, u in zip(params, update, strict=True):
                p.mul_(1 - lr * self.weight_decay)
                p.add_(part(u.to(p.dtype), p), alpha=-lr * scale)

    def _momentum(self, p: Tensor) -> Tensor:
        """Nesterov momentum of one matrix, (M, N)."""
        assert p.grad is not None
        if p not in self.state:
            self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        buffer = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - self.momentum)
        return p.grad.lerp(buffer, self.momentum)
