"""Tokens computed over a cache are the tokens of the full forward."""

from __future__ import annotations

import pytest
import torch

from minigpt.core.infer.cache import ContiguousCache
from minigpt.core.models import model_types
from tests.conftest import tiny

ARCHITECTURES = model_types()


def full(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one sequence (T,) without a cache, (T, V)."""
    return model.head(model.hidden(ids[None], torch.arange(len(ids))[None]))[0]


def cache_for(model, slots: int, capacity: int = 100) -> ContiguousCache:
    return ContiguousCache(model.cache_specs(), slots, capacity, "cpu", torch.float32)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ragged_prefill_and_decode(arch):
    """Right-padded rows of different lengths, then a token at a time: every logit within 2e-5 of the full forward."""
    model = tiny(arch)
    torch.manual_seed(0)
    lengths, more = [5, 30, 1, 17], 12
    sequences = [torch.randint(0, 320, (n + more,)) for n in lengths]
    cache = cache_for(model, 4)
    width = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(s[:n], (0, width - n)) for s, n in zip(sequences, lengths, strict=True)])
    with torch.inference_mode():
        logits = model.head(model.hidden(ids, torch.arange(width).expand(4, -1), cache))
        wanted = [full(model, s) for s in sequences]
        for row, n in enumerate(lengths):
            assert (logits[row, :n] - wanted[row][:n]).abs().max() <= 2e-5
        for step in range(more):
            at = torch.tensor(lengths)[:, None] + step
            new = torch.stack([s[n + step] for s, n in zip(sequences, lengths, strict=True)])[:, None]
            cache.read(int(at.max()) + 1)
            logits = model.head(model.hidden(new, at, cache))[:, 0]
            for row, n in enumerate(lengths):
                assert (logits[row] - wanted[row][n + step]).abs().max() <= 2e-5


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_prefill_in_chunks(arch):
    """A prompt computed in uneven chunks gives the logits of the prompt at once."""
    model = tiny(arch)
    ids = torch.randint(0, 320, (61,), generator=torch.Generator().manual_seed(0))
    cache = cache_for(model, 1)
    with torch.inference_mode():
        parts = []
        for begin, end in ((0, 20), (20, 21), (21, 61)):
            cache.read(end)
            hidden = model.hidden(ids[None, begin:end], torch.arange(begin, end)[None], cache)
            parts.append(model.head(hidden)[0])
        assert (torch.cat(parts) - full(model, ids)).abs().max() <= 2e-5


def test_what_a_slot_held_before_is_never_seen():
    """A cache full of another sequence's numbers gives the bits of a fresh one."""
    model = tiny("llama")
    ids = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).expand(2, -1)
    fresh, used = cache_for(model, 2, 128), cache_for(model, 2, 128)
    for layer in used._layers:
        for x in layer:
            x.fill_(1e4)
    with torch.inference_mode():
        for cache in (fresh, used):
            cache.read(9)
        assert torch.equal(model.hidden(ids, positions, fresh), model.hidden(ids, positions, used))


def test_copied_slot_continues_alike():
    """A copied slot answers as its source, and both go on independently."""
    model = tiny("qwen3")
    cache = cache_for(model, 2, 64)
    prompt = torch.arange(10)[None]
    with torch.inference_mode():
        model.hidden(prompt, torch.arange(10)[None], cache.slot(0))
        cache.copy(0, 1, 10)
        at = torch.full((2, 1), 10)
        same = model.hidden(torch.tensor([[7], [7]]), at, cache)
        assert torch.equal(same[0], same[1])
        model.hidden(torch.tensor([[7], [9]]), at, cache)
        after = model.hidden(torch.tensor([[3], [3]]), at + 1, cache)
        assert not torch.equal(after[0], after[1])


def test_reads_are_rounded_up():
    """Fewer keys are read than there are, in steps of 64, never beyond the capacity."""
    cache = ContiguousCache(tiny("llama").cache_specs(), 1, 100, "cpu", torch.float32)
    assert cache.layer(0).held == 100
    for positions, held in ((1, 64), (64, 64), (65, 100), (100, 100)):
        cache.read(positions)
        assert cache.layer(1).held == held
