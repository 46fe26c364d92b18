"""What every layer must know about the rows it sees: positions, document borders, rotary angles. Passed explicitly.

Shapes: B rows · T tokens · H query heads · K key/value heads · G = H / K · D head_dim · N documents · L padded length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from minigpt.core.nn.rope import RotaryEmbedding, rotate

LONGEST = 1024  # documents up to here are cheaper as batched matmuls than in SDPA (measured on CPU, both dtypes)
QUERIES = 128  # a block of queries sees the keys up to its own end: less to compute and throw away
GRANULE = 16  # padded lengths are multiples of this


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length, padded to `length`, whose slots begin at `start`."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class Piece:
    """One bucket's queries begin … begin + queries of every document, all heads; batch = N * K.

    They are rows q_start … of the gathered queries, viewed as (batch, groups * queries, D); the bucket's keys are rows
    kv_start … of the gathered keys, viewed as (batch, length, D), of which they see the first `begin + queries`.
    """

    q_start: int
    kv_start: int
    batch: int
    groups: int
    begin: int
    queries: int
    length: int


@dataclass(frozen=True)
class HeadPlan:
    """A document plan for single heads: row (b * T + t) * H + h is head h of token (b, t).

    gather_q, gather_kv: the row in each slot, row 0 in a padded one. scatter_q, scatter_kv: the slot of each row.
    holes: padded query slots.
    """

    gather_q: Tensor
    scatter_q: Tensor
    holes: Tensor
    gather_kv: Tensor
    scatter_kv: Tensor
    pieces: tuple[Piece, ...]


@dataclass
class DocumentPlan:
    """How to lay the documents of packed rows side by side. Made once a forward, used by every layer.

    token: the flat token b * T + t in each slot of the buckets; -1 in a padded slot.
    """

    buckets: tuple[Bucket, ...]
    token: np.ndarray
    device: torch.device
    _heads: dict[tuple[int, int], HeadPlan] = field(default_factory=dict)

    def heads(self, groups: int, kv_heads: int) -> HeadPlan:
        """The plan of an attention with H = groups * kv_heads query heads; layers of the same shape share it."""
        key = (groups, kv_heads)
        if key not in self._heads:
            self._heads[key] = self._expand(groups, kv_heads)
        return self._heads[key]

    def _expand(self, groups: int, kv_heads: int) -> HeadPlan:
        queries, keys, pieces = [], [], []
        q_start = 0
        for bucket in self.buckets:
            shape = (bucket.count, 1, bucket.length)
            token = self.token[bucket.start : bucket.start + bucket.count * bucket.length].reshape(shape)
            keys.append(_heads(token, kv_heads).ravel())
            heads = _heads(token, groups * kv_heads)  # (N, H, L)
            for begin in range(0, bucket.length, QUERIES):
                block = heads[:, :, begin : begin + QUERIES]
                size, batch = block.shape[2], bucket.count * kv_heads
                pieces.append(Piece(q_start, bucket.start * kv_heads, batch, groups, begin, size, bucket.length))
                queries.append(block.ravel())
                q_start += block.size
        q, kv = np.concatenate(queries), np.concatenate(keys)

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        return HeadPlan(
            gather_q=tensor(np.maximum(q, 0)),
            scatter_q=tensor(_inverse(q)),
            holes=tensor(np.flatnonzero(q < 0)),
            gather_kv=tensor(np.maximum(kv, 0)),
            scatter_kv=tensor(_inverse(kv)),
            pieces=tuple(pieces),
        )


def _heads(token: np.ndarray, width: int) -> np.ndarray:
    """Rows token * width + head of flat tokens (N, 1, L); holes stay -1. Returns (N, width, L)."""
    return np.where(token < 0, -1, token * width + np.arange(width)[:, None])


def _inverse(row: np.ndarray) -> np.ndarray:
    """The slot of every row, from the row in every slot (-1 = hole)."""
    slots = np.flatnonzero(row >= 0)
    inverse = np.empty(len(slots), dtype=np.int64)
    inverse[row[slots]] = slots
    return inverse


def documents_of(position_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat index b * T + t of the first token of every document, and its length. position_ids: (B, T)."""
    first = position_ids == 0
    first[:, 0] = True
    starts = np.flatnonzero(first)
    return starts, np.diff(np.append(starts, position_ids.size))


def plan_documents(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> DocumentPlan:
    """Group documents into buckets of similar length."""
    order = np.argsort(lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    buckets, tokens = [], []
    begin = slots = 0
    for end, size in _cuts(lengths):
        within = np.arange(size)
        inside = within < lengths[begin:end, None]  # (N, L)
        tokens.append(np.where(inside, starts[begin:end, None] + within, -1).ravel())
        buckets.append(Bucket(slots, end - begin, size))
        slots += (end - begin) * size
        begin = end
    return DocumentPlan(tuple(buckets), np.concatenate(tokens), device)


def _cuts(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(end, padded length) of each bucket of ascending document lengths."""
    cuts, begin = [], 0
    while begin < len(lengths):
        shortest = int(lengths[begin])
        size = -(-max(shortest * 5 // 4, shortest + 8) // GRANULE) * GRANULE
        end = int(np.searchsorted(lengths, size, side="right"))
        cuts.append((end, min(size, -(-int(lengths[end - 1]) // GRANULE) * GRANULE)))
        begin = end
    return cuts


@dataclass(frozen=True)
class SeqInfo:
    """One forward's rows.

    position_ids: (B, T). Without a cache every 0 begins a document that sees nothing before it.
    cos, sin: (B, T, 1, D) of these positions in the model's dtype, as `rotate` takes them.
    cached: keys and values come from a cache; a query sees the keys up to its own position.
    documents: the plan of packed rows; None when SDPA computes them.
    mask: (B, 1, T, T) True where a query may look; None when every row is one document.
    """

    position_ids: Tensor
    cos: Tensor
    sin: Tensor
    cached: bool = False
    documents: DocumentPlan | None = None
    mask: Tensor | None = None
    _hidden: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def packed(
        cls, position_ids: Tensor, rope: RotaryEmbedding, dtype: torch.dtype, path: str | None = None
    ) -> SeqInfo:
        """Rows of whole documents, no cache.

        path: `documents` or `sdpa`; None = documents side by side on a CPU while none is longer than LONGEST.
        """
        cos, sin = rope(position_ids, dtype)
        starts, lengths = documents_of(position_ids.cpu().numpy().copy())
        if path is None:
            path = "documents" if position_ids.device.type == "cpu" and lengths.max() <= LONGEST else "sdpa"
        if path == "documents":
            return cls(position_ids, cos, sin, documents=plan_documents(starts, lengths, position_ids.device))
        whole_rows = len(starts) == len(position_ids)
        return cls(position_ids, cos, sin, mask=None if whole_rows else block_diagonal(position_ids))

    @classmethod
    def continued(cls, position_ids: Tensor, rope: RotaryEmbedding, dtype: torch.dtype, end: int) -> SeqInfo:
        """New tokens of sequences whose past is in a cache. end: a bound of their positions, exclusive."""
        return cls(position_ids, *rope.looked_up(position_ids, dtype, end), cached=True)

    def hidden(self, keys: int, kv_heads: int, groups: int, dtype: torch.dtype) -> Tensor:
        """-inf where a query must not look among S cached keys, else 0: (B * K, G * T or 1, S). Made once a forward,
        in which S is the same for all layers.
        """
        key = (kv_heads, groups, dtype)
        if key not in self._hidden:
            rows, length = self.position_ids.shape
            at = torch.arange(keys, device=self.position_ids.device)
            mask = torch.zeros(rows, 1, 1, length, keys, device=at.device, dtype=dtype)
            mask.masked_fill_(at > self.position_ids[:, None, None, :, None], -torch.inf)
            mask = mask.expand(-1, kv_heads, groups if length > 1 else 1, -1, -1)
            self._hidden[key] = mask.reshape(rows * kv_heads, -1, keys)
        return self._hidden[key]

    def rope(self, x: Tensor) -> Tensor:
        """Rotate queries or keys by their positions. x: (B, T, heads, D)."""
        return rotate(x, self.cos, self.sin)


def block_diagonal(position_ids: Tensor) -> Tensor:
    """Causal attention inside each document. position_ids: (B, T). Returns (B, 1, T, T) bool."""
    document = (position_ids == 0).cumsum(dim=1)
    same = document[:, :, None] == document[:, None, :]
    return (same & torch.ones_like(same[0]).tril()).unsqueeze(1)
