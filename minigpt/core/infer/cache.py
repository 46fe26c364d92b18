"""Keys and values of the past, a contiguous slot a sequence.

Shapes: B slots · T new tokens · S positions held · K key/value heads · D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.core.nn.cache import KV


class SlotCache:
    """One layer: position p of slot b is stored at [b, :, p].

    Positions are written before they are read, so what an earlier owner of a slot left behind is never seen.
    """

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v  # (B, K, capacity, D)

    def update(self, k: Tensor, v: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) at position_ids (B, T); returns all keys and values up to the furthest, (B, K, S, D)."""
        slots = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[slots, :, position_ids] = k.transpose(1, 2)
        self.v[slots, :, position_ids] = v.transpose(1, 2)
        held = int(position_ids.max()) + 1
        return self.k[:, :, :held], self.v[:, :, :held]


class ContiguousCache:
    """Every layer's slots, allocated once.

    specs: what each layer wants to remember. slots: sequences at once. capacity: most positions of one sequence.
    """

    def __init__(
        self, specs: Sequence[KV], slots: int, capacity: int, device: torch.device | str, dtype: torch.dtype
    ):
        self.layers = [
            SlotCache(
                *(torch.zeros(slots, s.heads, capacity, s.head_dim, device=device, dtype=dtype) for _ in range(2))
            )
            for s in specs
        ]

    def layer(self, index: int) -> SlotCache:
        return self.layers[index]

    def slot(self, index: int) -> ContiguousCache:
        """One slot as a cache of its own, sharing memory."""
        part = object.__new__(ContiguousCache)
        part.layers = [SlotCache(c.k[index : index + 1], c.v[index : index + 1]) for c in self.layers]
        return part

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` positions of slot `source`."""
        for c in self.layers:
            c.k[target, :, :length] = c.k[source, :, :length]
            c.v[target, :, :length] = c.v[source, :, :length]

    def keep(self, slots: Tensor) -> None:
        """Go on with these slots alone, renumbered in this order."""
        for c in self.layers:
            c.k, c.v = c.k.index_select(0, slots), c.v.index_select(0, slots)
