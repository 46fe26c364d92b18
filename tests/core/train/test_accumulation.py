"""Invariant 1: how an optimizer step is cut into micro-batches changes neither its loss nor its gradient."""

import numpy as np
import pytest
import torch

from minigpt.core.data.source import PackedSource, plan_rows
from minigpt.core.train.losses import next_token
from minigpt.core.train.optim import Masters
from tests.conftest import tiny


class Documents:
    """Random documents of very different lengths, part of each untrained: rows differ in their loss units."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(3, 60, 40)
        self.tokens = [rng.integers(1, 320, n) for n in self.lengths]
        self.trained = [np.arange(n) >= rng.integers(0, n - 1) for n in self.lengths]
        self.docs = np.zeros(40, dtype=[("source", "u2")])

    def indices(self, split):
        return np.arange(40)

    def positions(self, docs):
        return self.lengths[docs] - 1

    def piece(self, doc, start, count):
        return self.tokens[doc][start : start + count], self.trained[doc][start : start + count]


def step(micro, dtype, mode):
    store = Documents()
    rows = plan_rows(store, "train", 48, mode=mode)
    source = PackedSource(store, rows, rows_per_step=8, micro_rows=micro, seed=1, pad_id=0)
    model = tiny("qwen3")
    masters = Masters(model, dtype)
    batches = source.next_step()
    units = sum(b.units for b in batches)
    loss = 0.0
    for batch in batches:
        out = next_token(model, batch)
        loss += out.sum_loss.item()
        (out.sum_loss / units).backward()
    return loss / units, {n: m.grad for n, m in masters.named.items()}, len({b.units for b in batches})


@pytest.mark.parametrize("mode", ["pack", "pad"])
@pytest.mark.parametrize("micro", [1, 2, 3, 4])
def test_one_micro_batch_of_8_equals_many(micro, mode):
    loss, gradients, _ = step(8, torch.float32, mode)
    other, others, ragged = step(micro, torch.float32, mode)
    assert ragged > 1  # the micro-batches do differ in units: a mean of means would be wrong
    assert other == pytest.approx(loss, abs=1e-6)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_bfloat16_adds_up_in_float32():
    """Eight bfloat16 micro-batches come as near to the float32 gradient as one does."""
    _, exact, _ = step(8, torch.float32, "pack")
    for micro in (8, 1):
        _, gradients, _ = step(micro, torch.bfloat16, "pack")
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert (gradient - exact[name]).norm() <= 0.06 * exact[name].norm(), (name, micro)
