"""How well a model predicts held-out documents: loss, perplexity, bits per byte, and the loss by document length.

Shapes: B rows · T tokens a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from minigpt.core.data.batch import IGNORED, Batch

BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass
class Sums:
    """Additive figures of a set of tokens."""

    nll: float = 0.0  # nats over all labelled tokens
    tokens: int = 0
    text_nll: float = 0.0  # nats over labelled tokens that stand for text (specials have no bytes)
    bytes: int = 0
    documents: int = 0

    @property
    def loss(self) -> float:
        """Mean nats a token; nan without tokens."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0)) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer, so models with different vocabularies compare. nan without bytes."""
        return self.text_nll / math.log(2) / self.bytes if self.bytes else math.nan

    def figures(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }


@dataclass
class Scores(Sums):
    """The whole, and its parts by document length: `by_length[128]` holds documents of 65 to 128 tokens."""

    by_length: dict[int, Sums] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], token_bytes: np.ndarray, device: torch.device | str = "cpu"
) -> Scores:
    """Score every labelled token of `batches`.

    token_bytes: (V,) bytes of text that each token stands for, 0 for specials.
    A document that was split over several pieces counts once a piece.
    """
    sizes = torch.from_numpy(np.asarray(token_bytes, dtype=np.int64))
    scores = Scores()
    for batch in batches:
        nll = model(batch.to(torch.device(device))).nll.double().cpu()  # (B, T)
        _add(scores, nll, batch, sizes)
    return scores


def _add(scores: Scores, nll: torch.Tensor, batch: Batch, sizes: torch.Tensor) -> None:
    labelled = batch.labels != IGNORED  # (B, T)
    length = sizes[batch.labels.clamp(min=0)] * labelled  # bytes of each label
    text = nll * (length > 0)
    inside = batch.segments >= 0
    _, pieces = torch.unique(batch.segments[inside], return_inverse=True)
    count = int(pieces.max()) + 1 if pieces.numel() else 0

    def by_piece(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64).index_add_(0, pieces, values[inside].double())

    columns = [by_piece(v) for v in (nll, labelled, text, length, torch.ones_like(nll))]
    for nats, tokens, text_nats, size, positions in zip(*(c.tolist() for c in columns), strict=True):
        if not tokens:
            continue
        edge = next((b for b in BUCKETS if positions <= b), BUCKETS[-1] * 2)
        for part in (scores, scores.by_length.setdefault(edge, Sums())):
            part.nll += nats
            part.tokens += int(tokens)
            part.text_nll += text_nats
            part.bytes += int(size)
            part.documents += 1


def length_label(edge: int, edges: Sequence[int] = BUCKETS) -> str:
    """128 → `65-128`."""
    if edge > edges[-1]:
        return f"over {edges[-1]}"
    i = edges.index(edge)
    return f"{edges[i - 1] + 1 if i else 1}-{edge}"
