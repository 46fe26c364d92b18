"""The small layers around attention.

Shapes: B rows · T tokens · C hidden_size · F intermediate_size · M rows of a norm · N numbers in each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.core.nn.linear import Linear

SMALL = 1 << 18  # numbers; torch's own norm has less overhead, and below this size that decides


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich, 2019, arXiv:1910.07467), computed in float32 whatever the input."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self._eps = torch.tensor(eps, dtype=torch.float32, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size). Same shape and dtype back."""
        weight: Tensor = self.weight
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        if x.is_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled():
            # A third of the operations of torch's own: with few rows they are the time, not the numbers.
            norm = torch.linalg.vector_norm(x, 2, -1, True)
            scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
            return (x * scale).mul_(weight)
        if x.is_cpu and (torch.is_grad_enabled() or x.numel() > SMALL):
            return _RMSNorm.apply(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """The norm in few passes over memory, which is what it costs on a CPU: four times faster than its formula in ops.

    With u = x / rms(x) and y = u * w:  dx = (g w - u mean(g w u)) / rms,  dw = sum over rows of g u.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (M, N)
        square = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float32).square_().div_(flat.shape[-1])  # (M,)
        # Batch norm of given mean 0 and variance, with rows as its channels: scales each row in one pass.
        y = torch.native_batch_norm(flat[None], None, None, torch.zeros_like(square), square, False, 0.0, eps)[0][0]
        ctx.save_for_backward(flat, weight, square.add_(eps).rsqrt_()[:, None])
        return y.mul_(weight).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors  # scale: 1 / rms, (M, 1) float32
        g = grad.reshape(x.shape)
        # Layer norm's backward with mean 0 subtracts mean(g w) / rms from each row besides; that is added back.
        dx = torch.ops.aten.native_layer_norm_backward(
            g, x, x.shape[-1:], torch.zeros_like(scale), scale, weight.float(), None, [True, False, False]
        )[0]
        dx += (torch.mv(g, weight).float()[:, None] * scale / x.shape[-1]).to(x.dtype)
        dw = torch.mm(scale.to(x.dtype).t(), g * x)[0] if ctx.needs_input_grad[1] else None
        return dx.view(grad.shape), dw, None


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer, 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.fused: Callable[[Tensor], Tensor] | None = None  # gate_proj and up_proj as one product, for inference

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        if self.fused is not None:
            gate, up = self.fused(x).chunk(2, -1)
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
