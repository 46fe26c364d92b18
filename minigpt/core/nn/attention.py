"""Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245), with Qwen3's per-head norm of queries and keys.

Shapes: B rows · T tokens · C hidden_size · H query heads · K key/value heads · S cached keys · D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minigpt.core.nn.attend import attend
from minigpt.core.nn.cache import KV, LayerCache
from minigpt.core.nn.layers import RMSNorm
from minigpt.core.nn.linear import Linear
from minigpt.core.nn.seqinfo import SeqInfo


class Attention(nn.Module):
    """One attention mixer. Names and layout are Hugging Face's, so weights need no renaming."""

    def __init__(self, hidden_size: int, heads: int, kv_heads: int, head_dim: int, *, qk_norm_eps: float | None = None):
        """qk_norm_eps: epsilon of the per-head norm of queries and keys; None = no such norm."""
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.kv_heads = kv_heads
        self.fused: Callable[[Tensor], Tensor] | None = None  # q_proj, k_proj and v_proj as one product, for inference
        self.q_proj = Linear(hidden_size, heads * head_dim)
        self.k_proj = Linear(hidden_size, kv_heads * head_dim)
        self.v_proj = Linear(hidden_size, kv_heads * head_dim)
        self.o_proj = Linear(heads * head_dim, hidden_size)
        self.q_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None

    def cache_spec(self) -> KV:
        return KV(self.kv_heads, self.head_dim)

    def forward(self, x: Tensor, seq: SeqInfo, cache: LayerCache | None = None) -> Tensor:
        """x: (B, T, C). seq: positions and document borders. cache: None in training. Returns (B, T, C)."""
        if cache is not None or self.fused is not None:
            q, k, v = self._together(x, seq)
        else:
            q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)  # norm, then rotate: Qwen3's order
            q, k, v = (x.transpose(1, 2) for x in (seq.rope(q), seq.rope(k), v))  # (B, H|K, T, D)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, K, S, D)
        return self.o_proj(attend(q, k, v, seq).transpose(1, 2).flatten(2))

    def _together(self, x: Tensor, seq: SeqInfo) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H|K, T, D), turned. With few tokens the number of operations is the time, so
        queries and keys go through them side by side.
        """
        both = self.heads + self.kv_heads
        if self.fused is not None:
            flat = self.fused(x)
        else:
            flat = torch.cat([proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)], -1)
        heads = flat.view(*x.shape[:-1], both + self.kv_heads, self.head_dim)  # (B, T, H + 2K, D)
        turned, v = heads.split_with_sizes((both, self.kv_heads), 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = turned.split_with_sizes((self.heads, self.kv_heads), 2)
            turned = torch.cat((self.q_norm(q), self.k_norm(k)), 2)
        q, k = seq.rope(turned).transpose(1, 2).split_with_sizes((self.heads, self.kv_heads), 1)
        return q, k, v.transpose(1, 2)
