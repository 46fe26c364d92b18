"""What every layer must know about the rows it sees: positions, document borders, rotary angles. Passed explicitly.

Shapes: B rows · T tokens · H query heads · K key/value heads · D head_dim · N documents · L padded document length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from minigpt.core.nn.rope import RotaryEmbedding


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length: a (count, length) block of the gathered tokens, beginning at slot `start`."""

    start: int
    count: int
    length: int


@dataclass
class DocumentPlan:
    """How to lay the documents of a packed batch side by side. Made once a forward, used by every layer.

    buckets: blocks of equal padded length, one after the other: S slots in all.
    token: (S,) the flat token b * T + t in each slot; a padded slot names token 0.
    slot: (B * T,) the slot of each token; the inverse of `token`.
    holes: padded slots.
    """

    buckets: tuple[Bucket, ...]
    token: Tensor
    slot: Tensor
    holes: Tensor
    _heads: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def heads(self, groups: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same plan for rows of single heads, H = heads * groups of them a token.

        The slots of a block are ordered (count, heads, groups, length), so it views as (count * heads, groups * length, D).
        Returns gather (S * H,) the flat row (b * T + t) * H + h of each slot, scatter (B * T * H,), holes.
        """
        key = (groups, heads)
        if key not in self._heads:
            self._heads[key] = self._expand(groups * heads)
        return self._heads[key]

    def _expand(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        head = torch.arange(width, device=self.token.device)
        gather, scatter = [], torch.empty_like(self.slot)
        scatter = self.slot.new_empty(self.slot.numel(), width)
        hole = torch.zeros(self.token.numel(), dtype=torch.bool, device=self.token.device)
        hole[self.holes] = True
        holes = []
        for block in self.buckets:
            slots = slice(block.start, block.start + block.count * block.length)
            token = self.token[slots].view(block.count, 1, block.length)
            gather.append((token * width + head[:, None]).flatten())
            place = torch.arange(block.count * width * block.length, device=token.device) + block.start * width
            place = place.view(block.count, width, block.length).transpose(1, 2).reshape(-1, width)
            real = ~hole[slots]
            scatter[self.token[slots][real]] = place[real]
            holes.append(place[~real].flatten())
        return torch.cat(gather), scatter.flatten(), torch.cat(holes)


def document_starts(position_ids: np.ndarray) -> np.ndarray:
    """Flat index b * T + t of every token that begins a document: position 0, or the first of its row."""
    first = position_ids == 0
    first[:, 0] = True
    return np.flatnonzero(first)


def plan_documents(position_ids: Tensor) -> DocumentPlan:
    """Group the documents of (B, T) position_ids into blocks of similar length."""
    starts = document_starts(position_ids.cpu().numpy().copy())
    lengths = np.diff(np.append(starts, position_ids.numel()))
    order = np.argsort(lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    buckets, tokens, real = [], [], []
    begin = slots = 0
    for end in _cuts(lengths):
        size = int(lengths[end - 1])
        within = np.arange(size)
        inside = within < lengths[begin:end, None]  # (N, L)
        tokens.append(np.where(inside, starts[begin:end, None] + within, 0).ravel())
        real.append(inside.ravel())
        buckets.append(Bucket(slots, end - begin, size))
        slots += (end - begin) * size
        begin = end
    token, filled = np.concatenate(tokens), np.concatenate(real)
    slot = np.empty(position_ids.numel(), dtype=np.int64)
    slot[token[filled]] = np.flatnonzero(filled)
    device = position_ids.device
    as_tensor = [torch.from_numpy(a).to(device) for a in (token, slot, np.flatnonzero(~filled))]
    return DocumentPlan(tuple(buckets), *as_tensor)


def _cuts(lengths: np.ndarray) -> list[int]:
    """Where to end each block of the ascending document lengths: at a length 1.25 times the block's first."""
    cuts, begin = [], 0
    while begin < len(lengths):
        end = int(np.searchsorted(lengths, max(lengths[begin] * 1.25, lengths[begin] + 8), side="right"))
        cuts.append(end)
        begin = end
    return cuts


@dataclass(frozen=True)
class SeqInfo:
    """One forward's rows.

    position_ids: (B, T). In training every 0 begins a document that sees nothing before it.
    cos, sin: (B, T, D) of these positions, in the model's dtype.
    documents: the packing plan; None when `mask` or a cache is used.
    mask: (B, 1, T, T) True where a query may look; the reference path.
    """

    position_ids: Tensor
    cos: Tensor
    sin: Tensor
    documents: DocumentPlan | None = None
    mask: Tensor | None = None

    @classmethod
    def packed(
        cls, position_ids: Tensor, rope: RotaryEmbedding, dtype: torch.dtype, path: str = "documents"
    ) -> SeqInfo:
        """Rows of whole documents, no cache. path: `documents`, or `mask` for the reference."""
        cos, sin = rope(position_ids, dtype)
        if path == "mask":
            return cls(position_ids, cos, sin, mask=block_diagonal(position_ids))
        return cls(position_ids, cos, sin, documents=plan_documents(position_ids))

    @classmethod
    def cached(cls, position_ids: Tensor, rope: RotaryEmbedding, dtype: torch.dtype) -> SeqInfo:
        """New tokens of sequences whose past is in a cache: a query sees the keys up to its own position."""
        return cls(position_ids, *rope(position_ids, dtype))

    def rope(self, x: Tensor) -> Tensor:
        """Rotate queries or keys by their positions. x: (B, heads, T, D)."""
        cos, sin = self.cos[:, None], self.sin[:, None]
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin


def block_diagonal(position_ids: Tensor) -> Tensor:
    """Causal attention inside each document. position_ids: (B, T). Returns (B, 1, T, T) bool."""
    document = (position_ids == 0).cumsum(dim=1)
    same = document[:, :, None] == document[:, None, :]
    return (same & torch.ones_like(same[0]).tril()).unsqueeze(1)
