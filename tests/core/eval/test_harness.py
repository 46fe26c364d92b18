"""Scores against a plain computation."""

import math

import numpy as np
import pytest
import torch

from minigpt.core.data.batch import Batch
from minigpt.core.eval.harness import evaluate, length_label


class Fixed(torch.nn.Module):
    """A model whose loss is known: position t of row b costs b + t / 10 where there is a label."""

    def forward(self, batch):
        from types import SimpleNamespace

        b, t = batch.labels.shape
        nll = torch.arange(b)[:, None] + torch.arange(t)[None] / 10
        return SimpleNamespace(nll=nll.float() * (batch.labels != -100))


def test_sums_bytes_and_length_buckets():
    """Two documents in row 0 (3 and 2 positions), one of 70 in row 1; token 0 is a special without bytes."""
    labels = torch.full((2, 70), -100)
    labels[0, :5] = torch.tensor([2, 3, 0, -100, 4])
    labels[1] = 1
    segments = torch.full((2, 70), -1)
    segments[0, :3], segments[0, 3:5], segments[1] = 10, 11, 12
    batch = Batch(labels, labels, labels, segments, units=74.0)
    sizes = np.array([0, 1, 2, 3, 4])
    scores = evaluate(Fixed(), [batch], sizes)
    row0 = [0.0, 0.1, 0.2, 0.4]
    row1 = [1 + t / 10 for t in range(70)]
    assert scores.tokens == 74 and scores.documents == 3
    assert scores.loss == pytest.approx((sum(row0) + sum(row1)) / 74)
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))
    assert scores.bytes == 2 + 3 + 4 + 70
    text = sum(row0) - 0.2 + sum(row1)
    assert scores.bits_per_byte == pytest.approx(text / math.log(2) / 79)
    assert {e: p.documents for e, p in scores.by_length.items()} == {64: 2, 128: 1}
    assert scores.by_length[128].loss == pytest.approx(sum(row1) / 70)


def test_nothing_scored_is_nan_not_zero():
    scores = evaluate(Fixed(), [], np.array([0]))
    assert math.isnan(scores.loss) and math.isnan(scores.perplexity) and math.isnan(scores.bits_per_byte)


def test_labels():
    assert [length_label(e) for e in (64, 128, 8192, 16384)] == ["1-64", "65-128", "4097-8192", "over 8192"]
