"""Tokens computed ahead are those computed one by one, and a step holds nothing that a recorded one would miss."""

from __future__ import annotations

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minigpt.core.infer import lean, sampling
from minigpt.core.infer.ahead import Ahead
from minigpt.core.infer.engine import Engine
from minigpt.core.infer.sampling import SamplingParams
from tests.conftest import tiny
from tests.core.infer.test_engine import Letters, any_requests, never_ends, prompts


def storages(values) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


class Recording(TorchDispatchMode):
    """A CUDA graph on a CPU: operations as they ran, run again on the same memory, whatever Python would do now."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert all(isinstance(x, torch.Tensor) for x in tree_leaves(out)), f"{function} makes the host wait"
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if not storages(old) & storages((args, kwargs)):  # a view or a change in place is there already
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """Makes engines record their steps as on CUDA. Counts the recordings."""
    made = []

    @contextlib.contextmanager
    def record(graph, **_):
        made.append(graph)
        with graph:
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(sampling, "HEADS", ())  # as on a GPU
    init = Ahead.__init__

    def with_graphs(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self._graphs = True

    monkeypatch.setattr(Ahead, "__init__", with_graphs)
    return made


def everything(completions):
    return [(c.ids, c.text, c.finish_reason, c.end_id, c.logprobs) for c in completions]


def alone(model, asked):
    return [Engine(model, Letters(), prefix_tokens=0).generate([p], params)[0] for p, params in asked]


@pytest.mark.parametrize("steps", [2, 5, 16])
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_ahead_is_one_by_one(steps, quant):
    """Parameters of every kind, requests that come while others are made: to the bit as alone and one by one."""
    model = tiny("qwen3", max_position_embeddings=512)
    (lean.int8 if quant == "int8" else lean.fuse)(model)
    asked = any_requests(steps, 16, logprobs=True)
    want = alone(model, asked)
    one = Engine(model, Letters(), rows=5, ahead=steps)
    made = [one.request(prompt, params, i) for i, (prompt, params) in enumerate(asked)]
    waiting, dice = list(made), random.Random(0)
    while waiting or one.busy:
        while waiting and dice.random() < 0.5:
            one.submit(waiting.pop())
        one.step()
    assert everything(r.completion() for r in made) == everything(want)


def test_a_long_prompt_comes_between():
    """While it is read the others go on one by one; before and after that, ahead."""
    model = never_ends(tiny("llama", tie_word_embeddings=False, max_position_embeddings=2048))
    lean.fuse(model)
    params = SamplingParams(max_tokens=40, temperature=1.0, repetition_penalty=1.3, logprobs=True)
    asked = [(p, params) for p in prompts(5, 9, 1500)]
    one = Engine(model, Letters(), rows=8, ahead=4)
    made = [one.request(prompt, params, i) for i, (prompt, params) in enumerate(asked)]
    one.submit(made[0])
    one.submit(made[1])
    for _ in range(3):
        one.step()
    assert len(made[0].ids) == 9
    one.submit(made[2])
    while one.busy:
        one.step()
    assert everything(r.completion() for r in made) == everything(alone(model, asked))


def test_the_host_looks_once_in_a_while(monkeypatch):
    """Sixteen tokens a look, fewer for the last ones; nothing is uploaded in between."""
    model = never_ends(tiny("llama", tie_word_embeddings=False))
    looks, ready = [], Ahead._ready
    monkeypatch.setattr(Ahead, "_ready", lambda self, *a: looks.append(ready(self, *a)) or looks[-1])
    one = Engine(model, Letters(), ahead=16)
    params = SamplingParams(max_tokens=41, temperature=1.0)
    pieces = [len(text) for text in one.stream(prompts(5)[0], params)]
    assert sum(pieces) == 41
    assert len(looks) == 3  # 1 by itself, then 16, 16, 8
    assert len({id(state) for state in looks}) == 1


def test_no_more_memory_than_was_granted():
    """Nobody writes or reads beyond what a request may need, however far ahead it is computed."""
    model = never_ends(tiny("llama", tie_word_embeddings=False, max_position_embeddings=128))
    given, params = prompts(20, 30, 60), SamplingParams(max_tokens=4, temperature=0)
    one = Engine(model, Letters(), ahead=16, cache_tokens=128, prefix_tokens=0)
    found = one.generate(given, params)
    assert one.pool.rows * one.pool.capacity <= max(128, one.pool.rows * 64)
    assert [c.ids for c in found] == [c.ids for c in alone(model, [(p, params) for p in given])]
    last = SamplingParams(max_tokens=200, temperature=0)  # up to the context's end
    assert one.generate(given[:1], last)[0].ids == alone(model, [(given[0], last)])[0].ids


def test_recorded_steps_are_steps(recorded):
    """What is recorded once and run again on other requests, positions and penalties: to the bit as one by one."""
    model = tiny("qwen3", max_position_embeddings=512)
    lean.fuse(model)
    asked = any_requests(3, 12, logprobs=True)
    want = alone(model, asked)
    one = Engine(model, Letters(), rows=4, ahead=4, prefix_tokens=0)
    for _ in range(2):
        made = [one.request(prompt, params, i) for i, (prompt, params) in enumerate(asked)]
        for request in made:
            one.submit(request)
        while one.busy:
            one.step()
        assert everything(r.completion() for r in made) == everything(want)
    assert len(recorded) > 3


def test_steps_of_one_kind_are_recorded_once(recorded):
    """Other prompts, seeds and values of the same filters use the same recording, and changed weights count in it."""
    model = never_ends(tiny("llama", tie_word_embeddings=False))
    lean.fuse(model)
    one = Engine(model, Letters(), rows=4, ahead=4, prefix_tokens=0)
    for turn, (temperature, top_p) in enumerate(((0.9, 0.9), (0.7, 0.8), (1.3, 0.5))):
        with torch.no_grad():
            model.model.norm.weight += 0.5
        params = SamplingParams(max_tokens=20, temperature=temperature, top_p=top_p, seed=turn)
        given = prompts(5 + turn, 9 + turn)
        found = one.generate(given, params)
        assert everything(found) == everything(alone(model, [(p, params) for p in given]))
    assert len(recorded) == 1


def test_memory_that_moves_is_recorded_anew(recorded):
    """A longer request makes the cache grow: what held the old addresses is forgotten."""
    model = never_ends(tiny("llama", tie_word_embeddings=False, max_position_embeddings=1024))
    lean.fuse(model)
    one = Engine(model, Letters(), rows=4, ahead=4, prefix_tokens=0)
    params = SamplingParams(max_tokens=12, temperature=0)
    for given in (prompts(5), prompts(600), prompts(5)):
        assert one.generate(given, params)[0].ids == alone(model, [(given[0], params)])[0].ids
    assert len(recorded) == 3  # short, long, and short in the new memory


def test_where_nothing_can_be_recorded(recorded, monkeypatch):
    """A refusal is said once, and answers are the same."""

    @contextlib.contextmanager
    def refuse(graph, **_):
        with graph:
            yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    model = never_ends(tiny("llama", tie_word_embeddings=False))
    lean.fuse(model)
    one = Engine(model, Letters(), rows=4, ahead=4, prefix_tokens=0)
    params = SamplingParams(max_tokens=20, temperature=0.8, repetition_penalty=1.2, logprobs=True)
    given = prompts(5, 9, 7)
    with pytest.warns(UserWarning, match="not permitted") as said:
        found = one.generate(given, params)
    assert len(said) == 1
    assert everything(found) == everything(alone(model, [(p, params) for p in given]))


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_graphs_on_cuda(compile):
    """Greedy and drawn tokens of recorded steps are those of eager ones; log-probabilities within 1e-4."""
    model = tiny("qwen3", max_position_embeddings=512).to("cuda")
    asked = any_requests(1, 12, logprobs=True)
    eager = Engine(model, Letters(), rows=4, ahead=1)
    graphs = Engine(model, Letters(), rows=4, compile=compile)
    want, got = (e.generate([p for p, _ in asked], [params for _, params in asked]) for e in (eager, graphs))
    assert graphs._ahead is not None
    assert graphs._ahead._graphs, "recording was refused"
    for a, b in zip(want, got, strict=True):
        assert (a.ids, a.text, a.finish_reason) == (b.ids, b.text, b.finish_reason)
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4)
