"""Keys and values of the past, a contiguous slot a sequence.

Shapes: B slots · T new tokens · S positions read · K key/value heads · D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.core.nn.cache import KV


class SlotCache:
    """One layer for one forward: position p of slot b is stored at [b, :, p]."""

    def __init__(self, k: Tensor, v: Tensor, held: int):
        self.k, self.v = k, v  # (B, K, capacity, D)
        self.held = held

    def update(self, k: Tensor, v: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) of the first B slots at position_ids (B, T). Returns keys, values (B, K, S, D)."""
        rows = k.shape[0]
        slots = torch.arange(rows, device=k.device)[:, None]
        self.k[slots, :, position_ids] = k.transpose(1, 2)
        self.v[slots, :, position_ids] = v.transpose(1, 2)
        return self.k[:rows, :, : self.held], self.v[:rows, :, : self.held]


class ContiguousCache:
    """Every layer's slots, allocated once. A forward of B rows uses the first B slots.

    Positions are written before a query may see them, so what an earlier owner of a slot left behind is never used.

    specs: what each layer wants to remember. slots: sequences at once. capacity: most positions of one sequence.
    """

    def __init__(self, specs: Sequence[KV], slots: int, capacity: int, device: torch.device | str, dtype: torch.dtype):
        self.capacity = capacity
        self.held = capacity
        shapes = [(slots, spec.heads, capacity, spec.head_dim) for spec in specs]
        self._layers = [tuple(torch.zeros(s, device=device, dtype=dtype) for _ in range(2)) for s in shapes]

    def layer(self, index: int) -> SlotCache:
        k, v = self._layers[index]
        return SlotCache(k, v, self.held)

    def read(self, positions: int) -> None:
        """From now on no query stands at `positions` or beyond, so that fewer keys are read.

        Rounded up to 64: kernels are prepared for each new shape, and a decode step would always bring one.
        """
        self.held = min(self.capacity, -(-positions // 64) * 64)

    def slot(self, index: int) -> ContiguousCache:
        """One slot as a cache of its own, sharing memory."""
        part = object.__new__(ContiguousCache)
        part.capacity, part.held = self.capacity, self.held
        part._layers = [tuple(x[index : index + 1] for x in layer) for layer in self._layers]
        return part

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` positions of slot `source`."""
        for layer in self._layers:
            for x in layer:
                x[target, :, :length] = x[source, :, :length]
