"""The one batch that every stage trains from.

Shapes: B rows · T tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORED = -100  # label of a position that has no loss


@dataclass
class Batch:
    """Per-token columns. Packing is told by `position_ids` alone: every 0 begins a new document."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, already shifted, -100 = ignored; nobody else shifts
    position_ids: Tensor  # (B, T) int64
    segments: Tensor  # (B, T) int64 global sequence id, -1 = padding
    units: float  # loss units in this micro-batch (tokens, pairs, sequences), set by the source
    weights: Tensor | None = None  # (B, T) loss weight of each token; None = 1
    rows: tuple[int, ...] = ()  # global row numbers, to name a batch that broke the loss

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if hasattr(v, "to")})
