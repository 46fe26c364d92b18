"""Every attention path gives what plain masked attention gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.nn.attend import attend
from minigpt.core.nn.rope import RotaryEmbedding
from minigpt.core.nn.seqinfo import LONGEST, QUERIES, SeqInfo, documents_of, plan_documents

ROPE = RotaryEmbedding({"rope_type": "default", "rope_theta": 10_000.0}, 16)


def positions(*rows: list[int]) -> torch.Tensor:
    """Rows of document lengths → position_ids."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def plain(q, k, v, position_ids):
    """Softmax over the keys of one's own document up to oneself, in float64."""
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    t = torch.arange(q.shape[2])
    start = t - position_ids  # (B, T): where this token's document begins
    visible = (t[None, None, :] <= t[None, :, None]) & (start[:, :, None] == start[:, None, :])
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~visible[:, None], float("-inf"))
    return scores.softmax(-1) @ v


LAYOUTS = {
    "one document a row": positions([40], [40]),
    "packed": positions([5, 17, 3, 39], [64], [1] * 10 + [54], [32, 32]),
    "longer than a block of queries": positions([2 * QUERIES + 5, 20], [QUERIES, QUERIES + 25]),
    "single tokens": positions([1] * 6, [2, 1, 3]),
}


@pytest.mark.parametrize("path", ["documents", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_paths(layout, path):
    """Output to 1e-6 and gradients to 1e-5 relative of float64, with and without gradient recording."""
    position_ids = LAYOUTS[layout]
    torch.manual_seed(0)
    rows, length = position_ids.shape
    shapes = [(rows, length, heads, 16) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(s).transpose(1, 2).requires_grad_() for s in shapes)
    seq = SeqInfo.packed(position_ids, ROPE, torch.float32, path)
    got, want = attend(q, k, v, seq), plain(q, k, v, position_ids)
    assert (got - want).abs().max() <= 1e-6
    with torch.no_grad():
        assert (attend(q, k, v, seq) - want).abs().max() <= 1e-6
    grad = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, (q, k, v), grad),
        torch.autograd.grad(want, (q, k, v), grad.double()),
        strict=True,
    ):
        assert (ours - theirs).norm() / theirs.norm() <= 1e-5


def test_bfloat16_documents():
    """bfloat16 with float32 softmax stays within rounding, over several blocks of queries."""
    position_ids = positions([3 * QUERIES - 5, 5])
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, position_ids.shape[1], 16).bfloat16().requires_grad_() for h in (4, 2, 2))
    got = attend(q, k, v, SeqInfo.packed(position_ids, ROPE, torch.bfloat16, "documents"))
    want = plain(q, k, v, position_ids)
    assert (got - want).norm() / want.norm() < 0.01
    grad = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad.double()), strict=True
    ):
        assert (ours - theirs).norm() / theirs.norm() < 0.02


def test_cached_keys():
    """With a cache a query at position p sees the keys 0 … p, each row its own p; what lies behind is never read."""
    torch.manual_seed(0)
    k, v = torch.randn(3, 2, 12, 16), torch.randn(3, 2, 12, 16)
    q = torch.randn(3, 4, 2, 16)
    position_ids = torch.tensor([[0, 1], [4, 5], [10, 11]])
    seq = SeqInfo.continued(position_ids, ROPE, torch.float32, 12)
    got = attend(q, k, v, seq)
    for b in range(3):
        for t in range(2):
            seen = int(position_ids[b, t]) + 1
            keys, values = (x[b, :, :seen].repeat_interleave(2, 0) for x in (k, v))
            weights = (q[b, :, t, None] @ keys.transpose(1, 2) / 4).softmax(-1)
            assert ((weights @ values)[:, 0] - got[b, :, t]).abs().max() <= 1e-6
    k[0, :, 2:], v[0, :, 2:] = 1e4, 1e4
    assert torch.equal(attend(q, k, v, seq)[0], got[0])


def test_path_by_length_of_documents():
    """Short documents are gathered; one longer than LONGEST sends the batch through SDPA."""
    short = SeqInfo.packed(positions([LONGEST, 5]), ROPE, torch.float32)
    long = SeqInfo.packed(positions([LONGEST + 1, 4]), ROPE, torch.float32)
    assert short.documents is not None
    assert long.documents is None and long.mask is not None
    assert SeqInfo.packed(positions([LONGEST + 5]), ROPE, torch.float32).mask is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.sampled_from([(1, 1), (3, 2), (4, 1)]))
def test_plan_uses_every_token_once(lengths, heads):
    """Each token and head has exactly one slot, found again by the inverse; holes are slots without a token."""
    position_ids = positions(lengths).numpy()
    plan = plan_documents(*documents_of(position_ids), torch.device("cpu"))
    groups, kv = heads
    layout = plan.heads(groups, kv)
    for gather, scatter, width in (
        (layout.gather_q, layout.scatter_q, groups * kv),
        (layout.gather_kv, layout.scatter_kv, kv),
    ):
        assert len(scatter) == sum(lengths) * width
        assert torch.equal(gather[scatter], torch.arange(len(scatter)))
        assert len(set(scatter.tolist())) == len(scatter)
    assert len(layout.holes) == len(layout.gather_q) - len(layout.scatter_q)
    assert not set(layout.holes.tolist()) & set(layout.scatter_q.tolist())
    last = layout.pieces[-1]
    assert last.q_start + last.batch * last.groups * last.queries == len(layout.gather_q)
    assert plan.heads(groups, kv) is layout  # made once, shared by the layers


def test_documents_of_rows():
    """A row that does not begin at position 0 begins a document all the same."""
    starts, lengths = documents_of(np.array([[0, 1, 0, 1], [7, 8, 9, 0]]))
    assert starts.tolist() == [0, 2, 4, 7]
    assert lengths.tolist() == [2, 2, 3, 1]
