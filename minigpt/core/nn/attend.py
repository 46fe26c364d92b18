"""The one door to attention kernels.

Shapes: B rows · T queries · S keys · H query heads · K key/value heads · G = H / K · D head_dim · N documents.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.core.nn.seqinfo import QUERIES, DocumentPlan, HeadPlan, Piece, SeqInfo

FEW_QUERIES = 16  # below this a CPU multiplies faster in float32, conversion included
KEYS = 256  # summed at once by a CPU, which splits longer sums by their length: reading more would show
GRAIN = 16  # of the sums that `summed_at_once` tries
TILE_BYTES = 1 << 20  # attention weights computed at once: they stay in a core's cache between the operations


def attend(q: Tensor, k: Tensor, v: Tensor, seq: SeqInfo) -> Tensor:
    """Grouped-query attention, scaled by D^-0.5.

    q: (B, H, T, D). k, v: (B, K, S, D), S = T without a cache. Returns (B, H, T, D).
    """
    if seq.cached:
        return _cached(q, k, v, seq)
    if seq.documents is not None:
        return _documents(q, k, v, seq.documents)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seq.mask, is_causal=seq.mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )


# ---------------------------------------------------------------------------------------------- packed rows on a CPU


def _documents(q: Tensor, k: Tensor, v: Tensor, documents: DocumentPlan) -> Tensor:
    """Gather documents of similar length, run plain causal attention on them, put the results back."""
    rows, heads, length, dim = q.shape
    plan = documents.heads(heads // k.shape[1], k.shape[1])
    flat = (x.transpose(1, 2).reshape(-1, dim) for x in (q, k, v))  # (B * T * heads, D), as a projection leaves them
    out = _DocumentAttention.apply(*flat, plan, torch.is_grad_enabled() and q.requires_grad)
    return out.view(rows, length, heads, dim).transpose(1, 2)


class _DocumentAttention(torch.autograd.Function):
    """Causal attention by batched matrix products, in tiles, with the gathering of documents.

    The weights P = softmax(Q K' / sqrt(D)) are kept for backward. Padded keys come after every real query of their
    document, so causality hides them; padded queries get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, learns: bool) -> Tensor:
        q = q.index_select(0, plan.gather_q)
        k, v = k.index_select(0, plan.gather_kv), v.index_select(0, plan.gather_kv)
        out, kept = torch.empty_like(q), []
        future = q.new_full((QUERIES, QUERIES), float("-inf")).triu_(1)
        for piece in plan.pieces:
            x = _Views(piece, q, k, v, out)
            weights = q.new_empty(x.shape) if learns else None
            for rows, (scores, scratch) in x.tiles():
                p = scratch if weights is None else weights[rows]
                scores.baddbmm_(x.q[rows], x.k[rows].transpose(1, 2), beta=0, alpha=x.scale)
                diagonal = scores.view(-1, piece.groups, piece.queries, x.shape[2])[..., piece.begin :]
                diagonal += future[: piece.queries, : piece.queries]
                torch.softmax(scores, -1, out=p)
                torch.bmm(p, x.v[rows], out=x.out[rows])
            kept.append(weights)
        if learns:
            ctx.save_for_backward(q, k, v, *kept)
            ctx.plan = plan
        return out.index_select(0, plan.scatter_q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        plan: HeadPlan = ctx.plan
        grad = grad.index_select(0, plan.gather_q)
        grad[plan.holes] = 0
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for piece, weights in zip(reversed(plan.pieces), reversed(kept), strict=True):
            x, dx = _Views(piece, q, k, v, grad), _Views(piece, dq, dk, dv, grad)
            last = piece.begin + piece.queries == piece.length  # these queries see all keys, so they write; others add
            for rows, (dp, ds) in x.tiles():
                p, g = weights[rows], x.out[rows]
                torch.bmm(g, x.v[rows].transpose(1, 2), out=dp)
                torch._softmax_backward_data(dp, p, -1, dp.dtype, grad_input=ds)
                dx.q[rows].baddbmm_(ds, x.k[rows], beta=0, alpha=x.scale)
                dx.k[rows].baddbmm_(ds.transpose(1, 2), x.q[rows], beta=float(not last), alpha=x.scale)
                dx.v[rows].baddbmm_(p.transpose(1, 2), g, beta=float(not last))
        dq, dk, dv = dq.index_select(0, plan.scatter_q), *(d.index_select(0, plan.scatter_kv) for d in (dk, dv))
        return dq, dk, dv, None, None


class _Views:
    """One piece's part of gathered queries, keys, values and results.

    q, out: (N * K, G * queries, D). k, v: (N * K, begin + queries, D). shape: of the attention weights.
    """

    def __init__(self, piece: Piece, q: Tensor, k: Tensor, v: Tensor, out: Tensor):
        dim, seen = q.shape[-1], piece.begin + piece.queries
        inner = piece.groups * piece.queries
        self.q, self.out = (
            x.narrow(0, piece.q_start, piece.batch * inner).view(piece.batch, inner, dim) for x in (q, out)
        )
        self.k, self.v = (
            x.narrow(0, piece.kv_start, piece.batch * piece.length).view(piece.batch, piece.length, dim)[:, :seen]
            for x in (k, v)
        )
        self.shape = (piece.batch, inner, seen)
        self.scale = dim**-0.5

    def tiles(self) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
        """Slices of the batch with two scratch tensors for their weights; the next tile uses them again."""
        batch, inner, seen = self.shape
        size = min(batch, max(1, TILE_BYTES // (inner * seen * self.q.element_size())))
        a, b = self.q.new_empty(size, inner, seen), self.q.new_empty(size, inner, seen)
        for begin in range(0, batch, size):
            n = min(size, batch - begin)
            yield slice(begin, begin + n), (a[:n], b[:n])


# ---------------------------------------------------------------------------------------------- with a cache


def _cached(q: Tensor, k: Tensor, v: Tensor, seq: SeqInfo) -> Tensor:
    """Plain products: no row depends on its neighbours, nor on how many keys beyond its own are read.

    k, v: may be of a wider type than q, which is then rounded once, at the end.
    """
    rows, heads, length, dim = q.shape
    kv, keys, dtype = k.shape[1], k.shape[2], q.dtype
    exact = torch.float32 if length < FEW_QUERIES and q.device.type == "cpu" else dtype
    if k.dtype != exact or dtype != exact:
        q, k, v = (x.to(exact) for x in (q, k, v))
    q = q.reshape(rows * kv, heads // kv * length, dim)
    k, v = k.reshape(rows * kv, keys, dim), v.reshape(rows * kv, keys, dim)
    hidden = seq.hidden(keys, kv, heads // kv, exact)
    weights = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=dim**-0.5).softmax(-1)  # (B * K, G * T, S)
    # A compiled program does not know the number of keys, and no bits are promised of it or of a GPU.
    if torch.compiler.is_compiling() or not q.is_cpu or keys <= GRAIN:
        out = torch.bmm(weights, v)
    else:
        most = summed_at_once(heads // kv, dim) if length == 1 else KEYS  # of a prompt no neighbour adds keys to read
        out = torch.bmm(weights[..., :most], v[:, :most])
        for begin in range(most, keys, most):
            out.baddbmm_(weights[..., begin : begin + most], v[:, begin : begin + most])
    return (out if exact == dtype else out.to(dtype)).view(rows, heads, length, dim)


@functools.cache
@torch.inference_mode()
def summed_at_once(groups: int, dim: int) -> int:
    """The most keys, up to KEYS, of which a sum has the same bits whatever unseen keys are read behind them.

    Libraries split long sums, from a length on that differs between processors, so it is measured, in a millisecond.
    """
    generator = torch.Generator().manual_seed(0)
    weights, v = torch.rand(8, groups, KEYS, generator=generator), torch.randn(8, KEYS, dim, generator=generator)

    def holds(most: int) -> bool:
        for seen in range(GRAIN, most, GRAIN):
            w = weights[..., :most].clone()
            w[..., seen:] = 0
            whole = torch.bmm(w, v[:, :most])
            if not all(torch.equal(torch.bmm(w[..., :n], v[:, :n]), whole) for n in range(seen, most, GRAIN)):
                return False
        return True

    return next((most for most in (KEYS, 192, 128, 96, 64, 48, 32) if holds(most)), GRAIN)
