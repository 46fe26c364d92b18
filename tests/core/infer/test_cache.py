"""Tokens computed over a cache, of either kind, are the tokens of the full forward."""

from __future__ import annotations

import pytest
import torch

from minigpt.core.infer.batch_invariance import REFERENCE_ROWS, fewest_keys
from minigpt.core.infer.cache import PAGE, Pages, Pool, Slots
from minigpt.core.models import model_types
from tests.conftest import tiny

ARCHITECTURES = model_types()
KINDS = ("slots", "pages")


def full(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one sequence (T,) without a cache, (T, V)."""
    return model.head(model.hidden(ids[None], torch.arange(len(ids))[None]))[0]


def pool_for(model, kind: str, rows: int = 4, tokens: int = 100) -> Pool:
    specs, where = model.cache_specs(), (torch.device("cpu"), torch.float32)
    pool: Pool = Slots(specs, *where) if kind == "slots" else Pages(specs, *where, tokens=1024)
    for row in range(rows):
        assert pool.open(row, tokens, 1)
    return pool


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ragged_prefill_and_decode(arch, kind):
    """Right-padded rows of different lengths, then a token at a time: every logit within 2e-5 of the full forward."""
    model = tiny(arch)
    torch.manual_seed(0)
    lengths, more = [5, 30, 1, 70], 12
    sequences = [torch.randint(0, 320, (n + more,)) for n in lengths]
    pool, width = pool_for(model, kind), max(lengths)
    ids = torch.stack([torch.nn.functional.pad(s[:n], (0, width - n)) for s, n in zip(sequences, lengths, strict=True)])
    positions = torch.arange(width).expand(4, -1)
    with torch.inference_mode():
        logits = model.head(model.hidden(ids, positions, pool.window(0, positions, width)))
        wanted = [full(model, s) for s in sequences]
        for row, n in enumerate(lengths):
            assert (logits[row, :n] - wanted[row][:n]).abs().max() <= 2e-5
        for step in range(more):
            at = torch.tensor(lengths)[:, None] + step
            new = torch.stack([s[n + step] for s, n in zip(sequences, lengths, strict=True)])[:, None]
            logits = model.head(model.hidden(new, at, pool.window(0, at, int(at.max()) + 1)))[:, 0]
            for row, n in enumerate(lengths):
                assert (logits[row] - wanted[row][n + step]).abs().max() <= 2e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_prefill_in_chunks(arch, kind):
    """A prompt computed in uneven chunks, in a row that is not the first, gives the logits of the prompt at once."""
    model = tiny(arch)
    ids = torch.randint(0, 320, (61,), generator=torch.Generator().manual_seed(0))
    pool = pool_for(model, kind)
    with torch.inference_mode():
        parts = []
        for begin, end in ((0, 20), (20, 21), (21, 61)):
            positions = torch.arange(begin, end)[None]
            parts.append(model.head(model.hidden(ids[None, begin:end], positions, pool.window(2, positions, end)))[0])
        assert (torch.cat(parts) - full(model, ids)).abs().max() <= 2e-5


@pytest.mark.parametrize("length", [9, 600, 1100])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pages_are_slots_and_reading_further_changes_nothing(arch, length):
    """The same bits from both kinds, also when more keys are read than a query may see."""
    model = tiny(arch, max_position_embeddings=2048)
    rows = REFERENCE_ROWS  # as in a step of the engine
    ids = torch.randint(0, 320, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    found = []
    with torch.inference_mode():
        for kind in KINDS:
            for further in (0, 64, 400):
                specs, where = model.cache_specs(), (torch.device("cpu"), torch.float32)
                pool = Slots(specs, *where) if kind == "slots" else Pages(specs, *where, tokens=8192)
                for row in range(rows):
                    pool.open(row, 1800, 1)
                positions = torch.arange(length).expand(rows, -1)
                model.hidden(ids[:, :length], positions, pool.window(0, positions, length))
                at = torch.full((rows, 1), length)
                seen = max(length + 1, fewest_keys(model)) + further
                found.append(model.hidden(ids[:, length:], at, pool.window(0, at, seen)))
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_there_before_is_never_seen(kind):
    """A cache full of another sequence's numbers gives the bits of a fresh one."""
    model = tiny("llama")
    ids = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).expand(2, -1)
    fresh, used = pool_for(model, kind), pool_for(model, kind)
    for layer in used._layers:
        for x in layer:
            x.fill_(1e4)
    with torch.inference_mode():
        want, got = (model.hidden(ids, positions, pool.window(0, positions, 9)) for pool in (fresh, used))
    assert torch.equal(want, got)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [10, 64, 100, 130])
def test_taken_pieces_continue_alike(kind, length):
    """A piece put into another row answers as its source, and both go on independently; nothing leaks."""
    model = tiny("qwen3")
    pool = pool_for(model, kind, rows=2, tokens=200)
    prompt = torch.arange(length)[None]
    with torch.inference_mode():
        model.hidden(prompt, prompt, pool.window(0, prompt, length))
        piece = pool.take(0, 0, length)
        pool.put(1, 0, piece)
        at = torch.full((2, 1), length)
        same = model.hidden(torch.tensor([[7], [7]]), at, pool.window(0, at, length + 1))
        assert torch.equal(same[0], same[1])
        model.hidden(torch.tensor([[7], [9]]), at, pool.window(0, at, length + 1))
        after = model.hidden(torch.tensor([[3], [3]]), at + 1, pool.window(0, at + 1, length + 2))
        assert not torch.equal(after[0], after[1])
    pool.close(0)
    pool.close(1)
    if isinstance(pool, Pages):
        assert pool.free == pool.count - 1 - length // PAGE  # the piece still uses its pages
        pool.drop(piece)
        assert pool.free == pool.count - 1


def test_pages_are_shared_and_run_out():
    """Rows of one prompt hold its whole pages once. A pool says no, and yes again when a row is closed."""
    model = tiny("llama")
    pool = Pages(model.cache_specs(), torch.device("cpu"), torch.float32, tokens=6 * PAGE)
    assert pool.fits(6 * PAGE)
    assert not pool.fits(6 * PAGE + 1)
    assert pool.open(0, 3 * PAGE, 1)
    piece = pool.take(0, 0, 2 * PAGE)
    assert pool.open(1, 3 * PAGE, 1)
    assert not pool.open(2, 1, 1)
    pool.put(1, 0, piece)
    assert pool.free == 2
    pool.close(0)
    assert pool.free == 3
    pool.close(1)
    pool.drop(piece)
    assert pool.free == 6


def test_reserving_less():
    """With half reserved a row is opened with half of what it may need, and grows while there are pages."""
    model = tiny("llama")
    pool = Pages(model.cache_specs(), torch.device("cpu"), torch.float32, tokens=4 * PAGE, reserve=0.5)
    assert pool.open(0, 4 * PAGE, 1)
    assert pool.free == 2
    assert pool.open(1, 2 * PAGE, 2 * PAGE)  # what is needed at once comes first
    assert not pool.extend(0, 3 * PAGE)
    pool.close(1)
    assert pool.extend(0, 4 * PAGE)


def test_slots_grow_as_needed():
    """Memory follows what is asked of it; a limit refuses another row as long as one is open."""
    model = tiny("llama")
    pool = Slots(model.cache_specs(), torch.device("cpu"), torch.float32, limit=512)
    assert (pool.rows, pool.capacity) == (1, PAGE)
    assert pool.open(0, 65, 1)
    assert pool.capacity == 2 * PAGE
    assert pool.open(1, 200, 1)
    assert (pool.rows, pool.capacity) == (2, 256)
    assert not pool.open(2, 10, 1)
    assert not pool.open(2, 500, 1)
    pool.close(0)
    pool.close(1)
    assert pool.fits(512)
    assert pool.open(0, 500, 1)
    assert not pool.fits(513)
