"""Plans: no position lost or doubled, rows never too long, full, deterministic."""

import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.data.packing import plan
from minigpt.core.errors import DataError

LENGTHS = st.lists(st.integers(0, 150), max_size=120).map(lambda x: np.array(x, dtype=np.int64))


def pieces_of(p):
    found = {}
    for doc, start, length in zip(p.doc.tolist(), p.start.tolist(), p.length.tolist(), strict=True):
        found.setdefault(doc, []).append((start, length))
    return {doc: sorted(x) for doc, x in found.items()}


def row_sizes(p):
    return [int(p.length[a:b].sum()) for a, b in zip(p.ptr[:-1], p.ptr[1:], strict=True)]


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 80), st.sampled_from(["pack", "pad"]))
def test_split_loses_and_doubles_nothing(lengths, max_len, mode):
    p = plan(lengths, max_len, mode=mode)
    found = pieces_of(p)
    for doc, n in enumerate(lengths.tolist()):
        at = 0
        for start, length in found.get(doc, []):
            assert start == at and length > 0
            at += length
        assert at == n
    assert all(0 < size <= max_len for size in row_sizes(p))
    if mode == "pad":
        assert len(p) == len(p.doc)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 80))
def test_as_full_as_a_plain_best_fit(lengths, max_len):
    """At most one row more than the textbook loop, piece by piece."""
    room: list[int] = []
    for length in sorted(plan(lengths, max_len, mode="pad").length.tolist(), reverse=True):
        i = bisect.bisect_left(room, length)
        left = (room.pop(i) if i < len(room) else max_len) - length
        bisect.insort(room, left)
    assert len(plan(lengths, max_len)) <= len(room) + 1


@given(LENGTHS, st.integers(1, 80))
@settings(max_examples=40, deadline=None)
def test_groups_never_share_a_row(lengths, max_len):
    groups = np.arange(len(lengths)) % 3
    p = plan(lengths, max_len, groups=groups)
    for r, (a, b) in enumerate(zip(p.ptr[:-1], p.ptr[1:], strict=True)):
        assert set(groups[p.doc[a:b]].tolist()) == {int(p.group[r])}
    assert p.positions == lengths.sum()


def test_deterministic():
    lengths = np.random.default_rng(0).integers(1, 300, 5000)
    a, b = plan(lengths, 256), plan(lengths, 256)
    assert all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("ptr", "doc", "start", "length", "group"))


@pytest.mark.parametrize("max_len", [512, 1024])
def test_a_million_short_documents_fill_their_rows(max_len):
    lengths = np.random.default_rng(0).lognormal(4.3, 0.6, 1_000_000).astype(np.int64) + 2
    assert plan(lengths, max_len).fill > 0.99


def test_long_documents():
    lengths = np.array([5, 25, 10, 11])
    cut = plan(lengths, 10, long="truncate")
    assert pieces_of(cut) == {0: [(0, 5)], 1: [(0, 10)], 2: [(0, 10)], 3: [(0, 10)]}
    assert cut.truncated == 2 and "16 tokens left out" in cut.notes[0]
    dropped = plan(lengths, 10, long="drop")
    assert set(pieces_of(dropped)) == {0, 2} and dropped.dropped == 2 and "2 documents" in dropped.notes[0]
    with pytest.raises(DataError, match="document 2 has 26 tokens"):
        plan(lengths, 10, long="error")
    assert plan(lengths, 10).notes == ()


def test_nothing_to_pack():
    p = plan(np.array([0, 0]), 8)
    assert len(p) == 0 and p.fill == 0.0 and p.positions == 0
