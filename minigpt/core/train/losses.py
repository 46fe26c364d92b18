"""Training steps: a model and a batch in, a **sum** of losses out. The trainer divides once, by the global count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from minigpt.core.data.batch import Batch


@dataclass
class StepOutput:
    """sum_loss: scalar, summed over the batch's loss units. metrics: detached scalars, summed likewise."""

    sum_loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


Step = Callable[[nn.Module, Batch], StepOutput]


def next_token(model: nn.Module, batch: Batch) -> StepOutput:
    """Cross-entropy of the next token, nats, summed over labelled tokens (times their weights)."""
    nll = model(batch).nll  # (B, T)
    if batch.weights is not None:
        nll = nll * batch.weights
    return StepOutput(nll.sum())
