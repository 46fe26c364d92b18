"""One way to sample: requests in, completions out, batched continuously over a cache that the model declares.

A step lets waiting requests in, computes a part of their prompts, then one token of every answer. Each product is made
of so many rows that the build's kernels give every row the same bits whatever stands beside it (`BatchInvariance`),
prompts are computed alone in fixed chunks, and draws come from counters: a text does not depend on its neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import Diverged, UsageError
from minigpt.core.infer.ahead import STEPS, Ahead, can
from minigpt.core.infer.batch_invariance import BatchInvariance, fewest_keys
from minigpt.core.infer.cache import PAGE, Pages, Pool, Slots, pages
from minigpt.core.infer.compiled import CompiledStep, rounded
from minigpt.core.infer.prefill import Prefill
from minigpt.core.infer.prefix import Prefixes
from minigpt.core.infer.request import Completion, Request
from minigpt.core.infer.sampling import Sampler, SamplingParams, request_key
from minigpt.core.infer.text import Detokenizer, StopText
from minigpt.core.models.decoder import Decoder

if TYPE_CHECKING:
    from minigpt.core.infer.constraint import Compiler
    from minigpt.core.infer.model import Model

POOL = 65_536  # tokens of a paged cache, where nothing else is asked for

END = object()  # of the requests
Piece = tuple[Request, str]  # whose text, and what of it became final


class Engine:
    """Samples from a live model: weights changed between two calls count in the second.

    rows: sequences computed at once. cache_tokens: most tokens that are remembered; None = as many as needed.
    paged: remember them in pages of one pool of `cache_tokens` instead of a slot a row; `reserve` is its share of what
    a request may still need that is set aside when it is let in, and below 1 the newest are set aside when it is short.
    prefix_tokens: prompt tokens kept for prompts that begin alike; 0 = none.
    compile: put decoding through torch.compile; see `compiled.py`. MissingError where there is no compiler.
    ahead: tokens of each answer that are computed before one is looked at (see `ahead.py`), which is as often as a
    stream says something; None = 16 on CUDA, 1 elsewhere. Pages, forms and top_logprobs are looked at one by one.
    """

    def __init__(
        self,
        model: Decoder | Model,
        tokenizer: Tokenizer | None = None,
        rows: int = 32,
        *,
        cache_tokens: int | None = None,
        paged: bool = False,
        reserve: float = 1.0,
        prefix_tokens: int = 8192,
        compile: bool = False,
        ahead: int | None = None,
    ):
        if isinstance(model, Decoder):
            assert tokenizer is not None, "a bare Decoder needs its tokenizer"
            self.model, self.tokenizer = model, tokenizer
        else:
            self.model, self.tokenizer = model.decoder, model.tokenizer
        self.rows = rows
        weight = self.model.head_weight
        self.device = weight.device
        specs, dtype = self.model.cache_specs(), weight.dtype
        if paged:
            context = self.model.config.max_position_embeddings
            tokens = cache_tokens or max(context, min(rows * context, POOL))
            self.pool: Pool = Pages(specs, self.device, dtype, tokens, reserve)
        else:
            self.pool = Slots(specs, self.device, dtype, cache_tokens)
        self.prefixes = Prefixes(self.pool, prefix_tokens)
        self.live: list[Request] = []  # row i of the cache belongs to live[i]
        self.prefill = Prefill(self.model, self.pool, self.prefixes, self.live, rows)
        self._invariance = BatchInvariance(self.model)
        self._fewest_keys = fewest_keys(self.model)
        self.pool.prepare(1, self._fewest_keys)
        self._sampler: Sampler | None = None
        self._compiled = CompiledStep(self.model, self.pool) if compile else None
        steps = ahead or (STEPS if self.device.type == "cuda" else 1)
        self._ahead = None
        if steps > 1 and isinstance(self.pool, Slots):
            self._ahead = Ahead(self.model, self.pool, self._compiled or self._logits, steps)
        self._version: object = None
        self._compiler: Compiler | None = None

    # -------------------------------------------------------------------------------------------- for everyone

    def complete(self, text: str, params: SamplingParams | None = None) -> str:
        """Continue `text` as the beginning of a document."""
        prompt = [self.tokenizer.opening_id, *self.tokenizer.encode(text)]
        return self.generate([prompt], params or SamplingParams())[0].text

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        n: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """n completions of each prompt, in the order of the prompts. params: one for all, or one for each.

        progress: told the number of finished completions. UsageError when a prompt is empty or leaves no room in the
        context; nothing has been computed then.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        made = [self.request(q, p, i, j) for i, (q, p) in enumerate(zip(prompts, each, strict=True)) for j in range(n)]
        done = []
        for request in self._ordered(made, len(made)):
            done.append(request.completion())
            if progress is not None:
                progress(len(done))
        return done

    def completions(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """Answer requests as they come, and hand completions over in that order as soon as they are ready.

        None among the requests says that there is none now; it is asked again after a step. More are taken than can be
        computed at once, so that none waits for a long one. The first request with a fault raises it and ends all.
        """
        return (request.completion() for request in self.ended(requests))

    def ended(self, requests: Iterable[Request | None]) -> Iterator[Request]:
        """As `completions`, but hands the requests over: one with a fault takes no other with it."""
        return self._ordered(requests, 4 * self.rows)

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[str]:
        """The text of one completion as it becomes final."""
        mine = self.request(prompt, params)
        self.submit(mine)
        try:
            while mine.finish_reason is None:
                for request, text in self.step():
                    if request is mine and text:
                        yield text
            if mine.fault is not None:
                raise mine.fault
        finally:
            self.cancel(mine)

    def request(self, prompt: Sequence[int], params: SamplingParams, index: int = 0, number: int = 0) -> Request:
        """A request for `submit`. index: for the caller. number: among the samples of the same prompt.

        UsageError when the prompt is empty, leaves no room in the context, or does not fit the cache.
        """
        context = self.model.config.max_position_embeddings
        if not prompt:
            raise UsageError("a prompt has no tokens")
        if len(prompt) >= context:
            raise UsageError(
                f"a prompt of {len(prompt):,} tokens does not fit the model's context",
                found=f"context {context:,} tokens",
                fix="shorten the prompt",
            )
        size = self.model.config.vocab_size
        for what, ids in (("a prompt", prompt), ("logit_bias", params.logit_bias), ("stop_ids", params.stop_ids)):
            if ids and not 0 <= (worst := min(ids) if min(ids) < 0 else max(ids)) < size:
                raise UsageError(
                    f"{what} names a token that is not there", found=str(worst), fix=f"ids go from 0 to {size - 1:,}"
                )
        limit = min(params.max_tokens, context - len(prompt))
        if not self.pool.fits(len(prompt) + limit):
            raise UsageError(
                f"{len(prompt):,} tokens of prompt and {limit:,} of answer do not fit the cache",
                fix="ask for fewer with --max-tokens, or give the engine more cache_tokens",
            )
        constraint = self._compile().start(params.form) if params.form is not None else None
        return Request(
            prompt_index=index,
            prompt=prompt,
            params=params,
            limit=limit,
            key=request_key(params.seed, number, prompt),
            ends=frozenset((*self.tokenizer.eos_ids, *params.stop_ids)),
            detokenizer=Detokenizer(self.tokenizer),
            stop=StopText(params.stop),
            constraint=constraint,
        )

    def _compile(self) -> Compiler:
        if self._compiler is None:
            from minigpt.core.infer.constraint import Compiler

            self._compiler = Compiler(self.tokenizer, self.model.config.vocab_size)
        return self._compiler

    def _ordered(self, requests: Iterable[Request | None], ahead: int) -> Iterator[Request]:
        """Finished requests in the order in which they were given. ahead: most that are taken and not handed over."""
        source, given, more = iter(requests), deque[Request](), True
        try:
            while more or given:
                while more and len(given) < ahead:
                    request = next(source, END)
                    more = request is not END
                    if not isinstance(request, Request):
                        break
                    given.append(request)
                    request.streams = False
                    if request.finish_reason is not None:  # handed over before more is waited for
                        break
                    self.submit(request)
                if self.busy:
                    self.step()
                while given and given[0].finish_reason is not None:
                    yield given.popleft()
        finally:
            for request in given:
                self.cancel(request)

    # -------------------------------------------------------------------------------------------- the schedule

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self.prefill.waiting or self.live or self.prefill.filling)

    def submit(self, request: Request) -> None:
        """Put a request in the queue; steps answer it. One that has finished stays as it is."""
        if not self.busy:
            self._look_at_weights()
        if request.finish_reason is None:
            self.prefill.waiting.append(request)

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Forget an unfinished request, wherever it stands."""
        if request in self.prefill.waiting:
            self.prefill.waiting.remove(request)
            self._discard(request)
        elif request is self.prefill.filling:
            self.pool.close(len(self.live))
            self.prefill.filling = None
        elif request in self.live:
            self._leave(self.live.index(request))

    @torch.inference_mode()
    def step(self) -> list[Piece]:
        """Let requests in, then make one token of every answer. Returns what became final of each one's text.

        An exception leaves the engine empty: what was being made is lost.
        """
        try:
            self._make_room()
            fresh = self.prefill()
            if self._ahead is not None and not fresh and self.prefill.filling is None and self._goes_ahead():
                return self._several(self._ahead)
            logits = [*self._decode(self.live[: len(self.live) - sum(map(len, fresh))]), *fresh]
            return self._sample(torch.cat(logits) if len(logits) > 1 else logits[0]) if logits else []
        except BaseException:
            self._clear()
            raise

    def _goes_ahead(self) -> bool:
        """Whether several tokens of every live row can be computed at once, all rows in one forward."""
        return bool(self.live) and len(self.live) == self._most_rows(len(self.live)) and can(self.live)

    def _several(self, ahead: Ahead) -> list[Piece]:
        """Some tokens for every live row."""
        requests, count = list(self.live), len(self.live)
        idle = range(count, ahead.rows(count, self._fewest_rows(count)))
        tokens, logprobs = ahead(requests, [self._unwritten(row) for row in idle], self._fewest_keys)
        self._sampler = None  # it has not heard of these tokens
        out: list[Piece] = []
        for step, chosen in enumerate(tokens):
            for row, request in enumerate(requests):
                if request.finish_reason is None:
                    if request.params.logprobs:
                        request.logprobs.append(logprobs[step][row])
                    out.append((request, request.accept(chosen[row])))
        self._leave_finished(requests)
        return out

    def _sample(self, logits: Tensor) -> list[Piece]:
        """One token for every live row. logits: (B, V)."""
        requests = list(self.live)
        if self._sampler is None or self._sampler.rows != requests:
            self._sampler = Sampler(requests, logits.shape[-1], self.device)
        self._sampler.prepare(1)
        chosen, logits = self._sampler(logits)
        tokens: list[int] = chosen.tolist()
        _record(requests, tokens, logits)
        out = [(request, request.accept(token)) for request, token in zip(requests, tokens, strict=True)]
        self._leave_finished(requests)
        return out

    def _leave_finished(self, requests: Sequence[Request]) -> None:
        if any(isinstance(request.fault, Diverged) for request in requests):
            self._forget_what_is_no_number(requests)
        for row in reversed(range(len(requests))):
            if requests[row].finish_reason is not None:
                self._leave(row)

    def _forget_what_is_no_number(self, requests: Sequence[Request]) -> None:
        """Others will use the memory of rows whose numbers were none: what is hidden from them counts 0 times, and
        0 times NaN is NaN.
        """
        if (filling := self.prefill.filling) is not None:  # it may have begun with a chunk that is no number
            self.pool.close(len(self.live))
            filling.filled, self.prefill.filling = 0, None
            self.prefill.waiting.appendleft(filling)
        self.prefixes.clear()
        for row, request in enumerate(requests):
            if isinstance(request.fault, Diverged):
                length = self.pool.capacity if isinstance(self.pool, Slots) else pages(request.position + 1) * PAGE
                piece = self.pool.take(row, 0, length, copy=True)
                for k, v in piece.copies:
                    k.nan_to_num_(0, 0, 0), v.nan_to_num_(0, 0, 0)
                self.pool.put(row, 0, piece)

    def _leave(self, row: int) -> None:
        """Free a live row. The last live one takes its place, and the one that is being filled takes the last one's:
        live rows are always the first ones.
        """
        last = len(self.live) - 1
        self.pool.close(row)
        if row != last:
            self.pool.move(last, row, self.live[last].position)  # its newest token is not computed yet
            self.live[row] = self.live[last]
        self.live.pop()
        if self.prefill.filling is not None:
            self.pool.move(last + 1, last, self.prefill.filling.filled)

    def _clear(self) -> None:
        for row in range(self.rows):
            self.pool.close(row)
        for request in self.prefill.waiting:
            self._discard(request)
        self.prefill.waiting.clear()
        self.live.clear()
        self.prefill.filling = None

    def _discard(self, request: Request) -> None:
        if request.swapped is not None:
            self.pool.drop(request.swapped)
            request.swapped = None

    def _look_at_weights(self) -> None:
        """Prompts that were computed with other weights are worth nothing."""
        version = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        if version != self._version:
            self.prefixes.clear()
            self._version = version

    # -------------------------------------------------------------------------------------------- answers

    def _make_room(self) -> None:
        """Where less was reserved than is needed now, set the newest requests aside until the others have room."""
        row = 0
        while row < len(self.live):
            if self.pool.extend(row, self.live[row].position + 1):
                row += 1
            elif not self.prefixes.forget():
                self._set_aside(len(self.live) - 1)

    def _set_aside(self, row: int) -> None:
        request = self.live[row]
        request.swapped = self.pool.take(row, 0, request.position, copy=True)
        self._leave(row)
        self.prefill.waiting.appendleft(request)

    def _decode(self, known: Sequence[Request]) -> list[Tensor]:
        """One token further for the first rows. Returns (B, V) in groups."""
        if not known:
            return []
        count = -(-len(known) // self._most_rows(len(known)))
        borders = [len(known) * i // count for i in range(count + 1)]
        return [self._forward(known[begin:end], begin) for begin, end in pairwise(borders)]

    def _forward(self, requests: Sequence[Request], first: int) -> Tensor:
        """Rows first … and, where these are too few, some behind them that compute on unseen. Returns (B, V)."""
        end = first + len(requests)
        idle = range(end, first + self._fewest_rows(len(requests)))
        at = [r.position for r in requests] + [self._unwritten(row) for row in idle]
        ids = torch.tensor([r.ids[-1] for r in requests] + [0] * len(idle), device=self.device)[:, None]
        positions = torch.tensor(at, device=self.device)[:, None]
        if self._compiled is not None:
            return self._compiled(ids, positions, max(at) + 1)[: len(requests)]
        seen = max(self._fewest_keys, *(p + 1 for p in at))
        return self._logits(ids, positions, seen, first)[: len(requests)]

    def _logits(self, ids: Tensor, position_ids: Tensor, seen: int, first: int = 0) -> Tensor:
        """(B, V) of the next token, for rows first … first + B. ids, position_ids: (B, 1)."""
        window = self.pool.window(first, position_ids, seen)
        return self.model.head(self.model.hidden(ids, position_ids, window)[:, 0])

    def _most_rows(self, count: int) -> int:
        """How many of so many rows are in one forward."""
        return count if self._compiled is not None else self._invariance.largest(count)

    def _fewest_rows(self, count: int) -> int:
        """How many rows a forward for so many has."""
        return rounded(count) if self._compiled is not None else self._invariance.padded(count)

    def _unwritten(self, row: int) -> int:
        """A position of a row that will be written before it is read."""
        if row < len(self.live):
            return self.live[row].position + 1
        return self.prefill.filling.filled if self.prefill.filling is not None and row == len(self.live) else 0


def _record(requests: Sequence[Request], tokens: Sequence[int], logits: Tensor) -> None:
    """Log-probabilities for those that asked for them. logits: (B, V) of the distributions that were sampled."""
    wanted = [i for i, r in enumerate(requests) if r.params.logprobs or r.params.top_logprobs]
    if not wanted:
        return
    logprobs = logits[wanted].log_softmax(-1)
    ids = torch.tensor([[max(tokens[i], 0)] for i in wanted], device=logits.device)
    chosen = logprobs.gather(1, ids).squeeze(1).tolist()
    for row, i, value in zip(logprobs, wanted, chosen, strict=True):
        requests[i].logprobs.append(value)
        if count := requests[i].params.top_logprobs:
            best = row.topk(min(count, len(row)))
            requests[i].top_logprobs.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
