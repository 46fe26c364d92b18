"""The one door to attention kernels.

Shapes: B rows · T queries · S keys · H query heads · K key/value heads · G = H / K · D head_dim · N documents · L length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.core.nn.seqinfo import Bucket, DocumentPlan, SeqInfo


def attend(q: Tensor, k: Tensor, v: Tensor, seq: SeqInfo) -> Tensor:
    """Grouped-query attention, scaled by D^-0.5.

    q: (B, H, T, D). k, v: (B, K, S, D), S = T without a cache. Returns (B, H, T, D).
    """
    if seq.mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seq.mask, enable_gqa=q.shape[1] != k.shape[1])
    if seq.documents is not None:
        return _documents(q, k, v, seq.documents)
    return _cached(q, k, v, seq.position_ids)


def _documents(q: Tensor, k: Tensor, v: Tensor, plan: DocumentPlan) -> Tensor:
    """Gather each block of documents, run plain causal attention on it, put the results back."""
    rows, heads, length, dim = q.shape
    kv = k.shape[1]
    gather, scatter, holes = plan.heads(heads // kv, kv)
    gather_kv, scatter_kv, _ = plan.heads(1, kv)
    flat_q = _Take.apply(_by_token(q), gather, scatter, None)
    flat_k, flat_v = (_Take.apply(_by_token(x), gather_kv, scatter_kv, None) for x in (k, v))
    out = [_causal(block, heads // kv, flat_q, flat_k, flat_v, heads, kv) for block in plan.buckets]
    flat = torch.cat([o.reshape(-1, dim) for o in out]) if len(out) > 1 else out[0].reshape(-1, dim)
    return _Take.apply(flat, scatter, gather, holes).view(rows, length, heads, dim).transpose(1, 2)


def _by_token(x: Tensor) -> Tensor:
    """(B, H, T, D) → (B * T * H, D): the layout a projection leaves, so mostly no copy."""
    return x.transpose(1, 2).reshape(-1, x.shape[-1])


class _Take(torch.autograd.Function):
    """Rows by index whose backward is again rows by index: each row is used once, so nothing needs summing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Tensor, back: Tensor, holes: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, holes)
        return x.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        back, holes = ctx.saved_tensors
        result = grad.index_select(0, back)
        if holes is not None:
            result[holes] = 0
        return result, None, None, None


def _causal(block: Bucket, groups: int, q: Tensor, k: Tensor, v: Tensor, heads: int, kv: int) -> Tensor:
    """Causal attention of one block. Returns (N * K, G, L, D)."""
    n, length, dim = block.count, block.length, q.shape[-1]
    q = q.narrow(0, block.start * heads, n * heads * length).view(n * kv, groups * length, dim)
    k = k.narrow(0, block.start * kv, n * kv * length).view(n * kv, length, dim)
    v = v.narrow(0, block.start * kv, n * kv * length).view(n * kv, length, dim)
    future = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = torch.bmm(q * dim**-0.5, k.transpose(1, 2)).view(n * kv, groups, length, length) + future
    weights = scores.softmax(-1).view(n * kv, groups * length, length)
    return torch.bmm(weights, v)


def _cached(q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor) -> Tensor:
    """Key j is visible to a query at position p when j <= p. Plain bmm: a row's result does not depend on its neighbours."""
    rows, heads, length, dim = q.shape
    kv, keys = k.shape[1], k.shape[2]
    hidden = torch.arange(keys, device=q.device) > position_ids[:, None, None, :, None]  # (B, 1, 1, T, S)
    q = (q * dim**-0.5).reshape(rows, kv, heads // kv * length, dim)
    scores = torch.matmul(q, k.transpose(2, 3)).view(rows, kv, heads // kv, length, keys)
    weights = scores.float().masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype)
    return torch.matmul(weights.view(rows, kv, -1, keys), v).view(rows, heads, length, dim)
