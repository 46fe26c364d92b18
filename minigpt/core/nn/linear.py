"""A linear layer whose float32 products are those of the faster library while it learns.

Shapes: N rows · K inputs · M outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minigpt.core.runtime import onednn_float32


class Linear(nn.Linear):
    """x @ W.T, as `nn.Linear` without a bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K). Returns (..., M)."""
        if x.is_cpu and x.dtype == torch.float32 and torch.is_grad_enabled() and onednn_float32():
            out: Tensor = _OneDnnLinear.apply(x, self.weight)
            return out
        return super().forward(x)


class _OneDnnLinear(torch.autograd.Function):
    """oneDNN's products but for the gradient of W, where turning both sides costs it what it gains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        dw = torch.mm(grad.flatten(0, -2).t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return dx, dw


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x: (..., K). weight: (M, K) in any layout. Returns (..., M)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out
