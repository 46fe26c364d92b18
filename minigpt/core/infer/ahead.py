"""Several tokens of every answer before the host looks at one.

A GPU computes a token of a small model faster than Python can ask for it. So positions, draws and the tokens themselves
stay on the device, where a step's tokens are the next step's input; on CUDA a step is recorded once as a graph, which a
single call launches. The host reads some steps at once, and forgets what came after an answer's end.

Shapes: B rows, answers first · N steps.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minigpt.core.infer.cache import Slots, stepped
from minigpt.core.infer.compiled import rounded
from minigpt.core.infer.request import Request
from minigpt.core.infer.sampling import Asked, Sampler, SamplingParams
from minigpt.core.models.decoder import Decoder

STEPS = 16  # tokens between two looks; an answer that ends computes half of them for nothing
FEWEST_KEYS = 256  # of a graph; then twice as many, and so on
KEPT = 32  # kinds of samplers and numbers of rows whose graphs are kept

Forward = Callable[[Tensor, Tensor, int], Tensor]  # ids, position_ids (B, 1), a bound of them → logits (B, V)


def can(requests: Sequence[Request]) -> bool:
    """Whether nobody has to look at a token before the next one is chosen."""
    return not any(r.params.form is not None or r.params.top_logprobs for r in requests)


@dataclass
class _Nobody:
    """Who fills a step up to one of few numbers of rows."""

    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0))
    prompt: Sequence[int] = ()
    ids: Sequence[int] = ()
    ends: frozenset[int] = frozenset()
    key: int = 0

    def constrain(self, logits: Tensor) -> None:
        pass


@dataclass
class _State:
    """What steps read and write.

    token, position: (B, 1) of the newest token, whose keys are not computed yet. pace: (B, 1), 1 for an answer and 0
    for a row that stands still. last: (B, 1), the last position there is room for. step: (1,). tokens: (N, B) chosen;
    logprobs: (N, B) float32 of them, where somebody wants to know.
    """

    token: Tensor
    position: Tensor
    pace: Tensor
    last: Tensor
    step: Tensor
    tokens: Tensor
    logprobs: Tensor | None
    sampler: Sampler
    graphs: dict[int, Any] = field(default_factory=dict)  # number of keys → a step over so many

    def changing(self) -> list[Tensor]:
        return [self.token, self.position, self.step, *self.sampler.columns.values()]


class Ahead:
    """Computes tokens of live rows ahead.

    forward: computes logits; the pool's memory is ready for it. steps: most that are computed at once.
    """

    def __init__(self, model: Decoder, pool: Slots, forward: Forward, steps: int = STEPS):
        self._model, self._pool, self._forward, self.steps = model, pool, forward, steps
        self._device, self._dtype = model.head_weight.device, model.head_weight.dtype
        self._graphs = self._device.type == "cuda"
        self._states: OrderedDict[tuple[object, ...], _State] = OrderedDict()
        self._current: tuple[_State, list[Request], list[int]] | None = None  # what a step would go on with, and where
        self._seen: list[int] = []  # addresses that graphs hold
        self._memory = torch.cuda.graph_pool_handle() if self._graphs else None

    def __call__(
        self, requests: Sequence[Request], idle: Sequence[int], fewest_keys: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Some tokens of each request: (N, B) ids and log-probabilities, the latter empty if nobody asked for them.

        idle: positions that rows behind the requests may write, as many as fill the step up. fewest_keys: to be read.
        """
        steps = min(self.steps, max(r.limit - len(r.ids) for r in requests))
        seen = [min(r.position + steps, r.most) for r in requests] + [p + 1 for p in idle]
        keys = stepped(max(fewest_keys, *seen))
        self._pool.prepare(len(seen), keys)
        if self._graphs:  # what goes beyond the cache is not read
            keys = max(FEWEST_KEYS, 1 << (keys - 1).bit_length())
        self._model.rotary.table(self._device, self._dtype, keys)
        self._forget_if_moved()
        state = self._ready(requests, idle)
        self._current = None  # until this is done
        state.sampler.prepare(steps)
        state.step.zero_()
        advance = self._graph(state, keys) or (lambda: self._step(state, keys))
        for _ in range(steps):
            advance()
        self._current = (state, list(requests), [r.position + steps for r in requests])
        tokens: list[list[int]] = state.tokens[:steps, : len(requests)].tolist()
        logprobs = [] if state.logprobs is None else state.logprobs[:steps, : len(requests)].tolist()
        return tokens, logprobs

    def rows(self, count: int, fewest: int) -> int:
        """How many rows a step for so many answers has: of graphs there are few sizes."""
        return rounded(max(count, fewest)) if self._graphs else max(count, fewest)

    def _ready(self, requests: Sequence[Request], idle: Sequence[int]) -> _State:
        """Every request at its newest token; as the last call left them, if nothing came between."""
        asked: list[Asked] = [*requests, *(_Nobody() for _ in idle)]
        if self._current is not None:
            state, live, stands = self._current
            if live == list(requests) and stands == [r.position for r in live] and len(state.token) == len(asked):
                return state
        sampler = Sampler(asked, self._model.config.vocab_size, self._device, self.steps)
        logprobs = any(r.params.logprobs for r in requests)
        key = (len(asked), logprobs, sampler.kind)
        if key in self._states:
            state = self._states[key]
            state.sampler.take(sampler)
        else:
            state = self._states[key] = self._new(sampler, logprobs)
            if len(self._states) > KEPT:
                self._states.popitem(last=False)
        self._states.move_to_end(key)
        for target, values in (
            (state.token, [r.ids[-1] for r in requests] + [0] * len(idle)),
            (state.position, [r.position for r in requests] + list(idle)),
            (state.pace, [1] * len(requests) + [0] * len(idle)),
            (state.last, [r.most - 1 for r in requests] + list(idle)),
        ):
            target.copy_(torch.tensor(values)[:, None])
        return state

    def _new(self, sampler: Sampler, logprobs: bool) -> _State:
        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self._device)

        rows = len(sampler.rows)
        token, position, pace, last = (whole(rows, 1) for _ in range(4))
        values = torch.zeros(self.steps, rows, device=self._device) if logprobs else None
        return _State(token, position, pace, last, whole(1), whole(self.steps, rows), values, sampler)

    def _step(self, s: _State, keys: int) -> None:
        """One token further, in place."""
        chosen, logits = s.sampler(self._forward(s.token, s.position, keys))
        s.tokens.index_copy_(0, s.step, chosen[None])
        if s.logprobs is not None:
            of_chosen = logits.log_softmax(-1).gather(1, chosen[:, None].clamp(min=0))
            s.logprobs.index_copy_(0, s.step, of_chosen.t())
        s.token.copy_(chosen[:, None].clamp(min=0))  # an answer that has no token ends when the host looks
        torch.minimum(s.position.add_(s.pace), s.last, out=s.position)
        s.step.add_(1)

    def _graph(self, state: _State, keys: int) -> Callable[[], None] | None:
        """The step as a recorded graph. What it reads and writes stays where it is. None where there are no graphs."""
        if not self._graphs:
            return None
        if keys not in state.graphs:
            kept = [x.clone() for x in state.changing()]
            if "step" in state.sampler.columns:
                state.sampler.columns["step"].zero_()  # there may be no draws left for what comes now
            graph = self._recorded(state, keys)
            for x, before in zip(state.changing(), kept, strict=True):
                x.copy_(before)
            if graph is None:
                return None
            state.graphs[keys] = graph
        replay: Callable[[], None] = state.graphs[keys].replay
        return replay

    def _recorded(self, state: _State, keys: int) -> Any:
        """A CUDAGraph of the step, which changes the state meanwhile. None, and never again, where that fails."""
        beside = torch.cuda.Stream(self._device)
        beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(beside):  # libraries allocate and compilers compile in their first calls
            for _ in range(2):
                self._step(state, keys)
        torch.cuda.current_stream(self._device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                self._step(state, keys)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as fault:  # drivers, libraries and compiled programs may each refuse
            self._graphs = False
            warnings.warn(f"CUDA graphs cannot be recorded, so answers come slower: {fault}", stacklevel=2)
            return None
        return graph

    def _forget_if_moved(self) -> None:
        """A graph holds addresses: of weights, of the cache, of the table of rotary angles."""
        if not self._graphs:
            return
        table = self._model.rotary.table(self._device, self._dtype, 1)
        now = [p.data_ptr() for p in self._model.parameters()] + [table.data_ptr(), *self._pool.addresses()]
        if now != self._seen:
            self._seen = now
            for state in self._states.values():
                state.graphs.clear()
