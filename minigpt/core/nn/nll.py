"""Negative log-likelihood of labels from hidden states, in chunks, so that (N, V) float32 logits never exist at once.

Shapes: N tokens · C hidden_size · V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_TOKENS = 512  # of a chunk, where the vocabulary is not known
CHUNK_BYTES = 12 << 20  # float32 logits of a chunk: small enough to stay in cache, large enough for full-speed matmuls


def chunked_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, *, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Each token's -log p(label), and the entropy of its distribution, both in nats.

    hidden: (N, C). weight: (V, C) of the head. labels: (N,) in 0 … V - 1.
    temperature: divides the logits first.
    Returns nll (N,) and entropy (N,) in float32; entropy is empty unless asked for. Both carry gradients.
    """
    size = max(64, CHUNK_BYTES // (4 * weight.shape[0]))
    return _ChunkedNLL.apply(hidden, weight, labels, temperature, entropy, size)


@torch.no_grad()
def head_nll(head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Each token's -log p(label) in nats where the head is no plain matrix, (N,) float32; without gradients.

    head: (n, C) → logits (n, V).
    """
    parts = [
        F.cross_entropy(head(rows).float() / temperature, wanted, reduction="none")
        for rows, wanted in zip(hidden.split(HEAD_TOKENS), labels.split(HEAD_TOKENS), strict=True)
    ]
    return torch.cat(parts)


def _chunks(hidden: Tensor, weight: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits (n, V) in the model's dtype; the buffer is used again by the next chunk."""
    buffer = hidden.new_empty(min(size, hidden.shape[0]), weight.shape[0])
    for begin in range(0, hidden.shape[0], size):
        part = hidden[begin : begin + size]
        yield slice(begin, begin + size), torch.mm(part, weight.t(), out=buffer[: part.shape[0]])


class _ChunkedNLL(torch.autograd.Function):
    """A chunk's logits are computed in forward, thrown away, and computed again in backward.

    d nll / d logits = p - onehot(label);  d entropy / d logits = -p (log p + entropy).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, entropy: bool, size: int
    ) -> tuple[Tensor, Tensor]:
        nll = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        spread = torch.zeros_like(nll) if entropy else nll.new_empty(0)
        wide = nll.new_empty(2, min(size, hidden.shape[0]), weight.shape[0])
        for rows, logits in _chunks(hidden, weight, size):
            logp = _log_softmax(logits, temperature, wide)
            nll[rows] = -logp.gather(1, labels[rows, None]).squeeze(1)
            if entropy:
                spread[rows] = -(logp.exp() * logp).sum(-1)
        ctx.save_for_backward(hidden, weight, labels, nll, spread)
        ctx.temperature, ctx.size = temperature, size
        return nll, spread

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, nll, spread = ctx.saved_tensors
        if spread.numel():
            return _backward_with_entropy(ctx, grad_nll, grad_entropy)
        scale = (grad_nll / ctx.temperature)[:, None]  # (N, 1); multiplies the narrow side of both products, not (n, V)
        scaled = (hidden * scale).to(hidden.dtype)
        below = torch.expm1(-nll).to(weight.dtype)  # p(label) - 1 without cancellation
        grad_hidden = torch.empty_like(hidden)
        grad_weight = weight.new_zeros(weight.shape[::-1], dtype=torch.float32)  # (C, V): the faster product's layout
        probability = hidden.new_empty(min(ctx.size, hidden.shape[0]), weight.shape[0])
        for rows, logits in _chunks(hidden, weight, ctx.size):
            p = probability[: logits.shape[0]]
            torch.softmax(logits if ctx.temperature == 1 else logits.float() / ctx.temperature, -1, out=p)
            p[torch.arange(len(p), device=p.device), labels[rows]] = below[rows]
            torch.mm(p, weight, out=grad_hidden[rows])
            _add_product(grad_weight, scaled[rows].t(), p)
        return (grad_hidden * scale).to(hidden.dtype), grad_weight.t().to(weight.dtype), None, None, None, None


def _backward_with_entropy(ctx: Any, grad_nll: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, labels, _, spread = ctx.saved_tensors
    grad_hidden = torch.empty_like(hidden)
    grad_weight = weight.new_zeros(weight.shape[::-1], dtype=torch.float32)
    wide = weight.new_empty(2, min(ctx.size, hidden.shape[0]), weight.shape[0], dtype=torch.float32)
    for rows, logits in _chunks(hidden, weight, ctx.size):
        logp = _log_softmax(logits, ctx.temperature, wide)
        scale = grad_nll[rows, None] - grad_entropy[rows, None] * (logp + spread[rows, None])
        grad = logp.exp_().mul_(scale)
        grad.scatter_add_(1, labels[rows, None], -grad_nll[rows, None])
        grad = grad.div_(ctx.temperature).to(weight.dtype)
        torch.mm(grad, weight, out=grad_hidden[rows])
        _add_product(grad_weight, hidden[rows].t(), grad)
    return grad_hidden, grad_weight.t().to(weight.dtype), None, None, None, None


def _log_softmax(logits: Tensor, temperature: float, wide: Tensor) -> Tensor:
    """(n, V) float32, in the second of the two buffers `wide`: fresh memory costs more than the arithmetic."""
    source, result = wide[0, : logits.shape[0]], wide[1, : logits.shape[0]]
    source.copy_(logits)
    if temperature != 1:
        source.div_(temperature)
    return torch.log_softmax(source, -1, out=result)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is float32 and a, b may be narrower."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)
