"""Negative log-likelihood of the labels from hidden states, in chunks, so that (tokens, V) logits never exist at once.

Shapes: N tokens · C hidden_size · V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 32 << 20  # float32 logits alive at once


def chunked_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, *, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Each token's -log p(label), and the entropy of its distribution, both in nats.

    hidden: (N, C). weight: (V, C) of the head. labels: (N,) in 0 … V - 1.
    temperature: divides the logits first.
    Returns nll (N,) and entropy (N,) in float32; entropy is empty unless asked for. Both carry gradients.
    """
    size = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return _ChunkedNLL.apply(hidden, weight, labels, temperature, entropy, size)


class _ChunkedNLL(torch.autograd.Function):
    """Logits of a chunk are computed in forward, thrown away, and computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, entropy: bool, size: int
    ) -> tuple[Tensor, Tensor]:
        nll = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        spread = torch.zeros_like(nll) if entropy else nll.new_empty(0)
        norm = torch.empty_like(nll)
        for begin in range(0, hidden.shape[0], size):
            rows = slice(begin, begin + size)
            logits = F.linear(hidden[rows], weight).float() / temperature
            norm[rows] = logits.logsumexp(-1)
            nll[rows] = norm[rows] - logits.gather(1, labels[rows, None]).squeeze(1)
            if entropy:
                logp = logits - norm[rows, None]
                spread[rows] = -(logp.exp() * logp).sum(-1)
        ctx.save_for_backward(hidden, weight, labels, norm, spread)
        ctx.temperature, ctx.size = temperature, size
        return nll, spread

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, labels, norm, spread = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for begin in range(0, hidden.shape[0], ctx.size):
            rows = slice(begin, begin + ctx.size)
            logp = F.linear(hidden[rows], weight).float().div_(ctx.temperature).sub_(norm[rows, None])
            grad = logp.exp()  # d nll / d logits = p - onehot(label)
            if spread.numel():  # d entropy / d logits = -p (log p + entropy)
                scale = grad_nll[rows, None] - grad_entropy[rows, None] * (logp + spread[rows, None])
                grad = grad * scale
            else:
                grad *= grad_nll[rows, None]
            grad.scatter_add_(1, labels[rows, None], -grad_nll[rows, None])
            grad = (grad / ctx.temperature).to(weight.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])
            grad_weight += torch.mm(grad.t(), hidden[rows])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None
