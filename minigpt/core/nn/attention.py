"""Grouped-query attention (Ainslie et al., 2023, arXiv:2305.13245), with Qwen3's per-head norm of queries and keys.

Shapes: B rows · T tokens · C hidden_size · H query heads · K key/value heads · S cached keys · D head_dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from minigpt.core.nn.attend import attend
from minigpt.core.nn.cache import KV, LayerCache
from minigpt.core.nn.layers import RMSNorm
from minigpt.core.nn.seqinfo import SeqInfo


class Attention(nn.Module):
    """One attention mixer. Names and layout are Hugging Face's, so weights need no renaming."""

    def __init__(self, hidden_size: int, heads: int, kv_heads: int, head_dim: int, *, qk_norm_eps: float | None = None):
        """qk_norm_eps: epsilon of the per-head norm of queries and keys; None = no such norm."""
        super().__init__()
        self.head_dim = head_dim
        self.kv_heads = kv_heads
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None

    def cache_spec(self) -> KV:
        return KV(self.kv_heads, self.head_dim)

    def forward(self, x: Tensor, seq: SeqInfo, cache: LayerCache | None = None) -> Tensor:
        """x: (B, T, C). seq: positions and document borders. cache: None in training. Returns (B, T, C)."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # norm, then rotate: Qwen3's order
        q, k, v = (x.transpose(1, 2) for x in (seq.rope(q), seq.rope(k), v))  # (B, H|K, T, D)
        if cache is not None:
            k, v = cache.update(k, v, seq.position_ids)  # (B, K, S, D)
        return self.o_proj(attend(q, k, v, seq).transpose(1, 2).flatten(2))
