"""What a mixer says about the past it needs, and what an engine's cache answers. No layout is fixed here.

Shapes: B rows · T new tokens · S keys held · K key/value heads · D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class KV:
    """An attention mixer's cache: one key and one value of D numbers a head and token."""

    heads: int
    head_dim: int


class LayerCache(Protocol):
    """One layer's past, whatever its layout: slots, pages, ..."""

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) of the forward's new tokens. Returns keys, values (B, K, S, D), position j at j."""
        ...


class Cache(Protocol):
    """The past of every layer, for the rows and positions of one forward. end: no position is this or beyond."""

    end: int

    def layer(self, index: int) -> LayerCache: ...
