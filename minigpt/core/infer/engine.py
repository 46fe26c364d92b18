"""One way to sample: prompts in, completions out, batched over a cache that the model declares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import UsageError
from minigpt.core.infer.cache import ContiguousCache
from minigpt.core.infer.sampling import SamplingParams, request_key, sample
from minigpt.core.infer.text import Detokenizer, StopText
from minigpt.core.models.decoder import Decoder

if TYPE_CHECKING:
    from minigpt.core.infer.model import Model

FEWEST_ROWS = 4  # products of fewer rows round differently, and a text must not depend on its neighbours
CHUNK = 256  # prompt tokens computed at once: bounds the memory of attention over a long prompt


@dataclass
class Completion:
    """One answer.

    ids: sampled tokens, without the one that ended it. text: without stop strings and special tokens.
    finish_reason: `stop`, or `length` when cut off by max_tokens or the end of the context.
    end_id: the token that ended it; None after a stop string or `length`.
    logprobs: nats, in the distribution that was sampled, of each of `ids` and then of `end_id`; empty unless asked for.
    """

    prompt_index: int
    ids: list[int]
    text: str
    finish_reason: str
    end_id: int | None = None
    logprobs: list[float] = field(default_factory=list)


@dataclass
class _Request:
    """A sequence being made."""

    prompt_index: int
    number: int  # among the samples of its prompt
    prompt: Sequence[int]
    limit: int  # of new tokens
    key: int  # of its random draws
    detokenizer: Detokenizer
    stop: StopText
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    end_id: int | None = None

    @property
    def position(self) -> int:
        """Where the newest token stands."""
        return len(self.prompt) + len(self.ids) - 1

    def accept(self, id: int, eos: Sequence[int]) -> str:
        """Take one sampled id. Returns the text it makes final."""
        out = ""
        if id in eos:
            self.end_id, self.finish_reason = id, "stop"
        else:
            self.ids.append(id)
            out = self.stop.add(self.detokenizer.add(id))
            if len(self.ids) >= self.limit:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            out += self.stop.add(self.detokenizer.finish())
            out += self.stop.finish()
        if self.stop.hit:
            self.finish_reason = "stop"
        self.text.append(out)
        return out

    def completion(self) -> Completion:
        text, reason = "".join(self.text), self.finish_reason or "length"
        return Completion(self.prompt_index, self.ids, text, reason, self.end_id, self.logprobs)


class Engine:
    """Samples from a live model: weights changed between two calls count in the second.

    rows: sequences computed at once.
    """

    def __init__(self, model: Decoder | Model, tokenizer: Tokenizer | None = None, rows: int = 32):
        if isinstance(model, Decoder):
            assert tokenizer is not None, "a bare Decoder needs its tokenizer"
            self.model, self.tokenizer = model, tokenizer
        else:
            self.model, self.tokenizer = model.decoder, model.tokenizer
        self.rows = rows

    def complete(self, text: str, params: SamplingParams | None = None) -> str:
        """Continue `text` as the beginning of a document."""
        prompt = [self.tokenizer.opening_id, *self.tokenizer.encode(text)]
        return self.generate([prompt], params or SamplingParams())[0].text

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1) -> list[Completion]:
        """n completions of each prompt, in the order of the prompts.

        UsageError when a prompt is empty or leaves no room in the context.
        """
        requests = [self._request(i, j, p, params) for i, p in enumerate(prompts) for j in range(n)]
        for begin in range(0, len(requests), self.rows):
            for _ in self._run(requests[begin : begin + self.rows], params):
                pass
        return [r.completion() for r in requests]

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[str]:
        """The text of one completion as it becomes final."""
        for _, text in self._run([self._request(0, 0, prompt, params)], params):
            if text:
                yield text

    def _request(self, index: int, number: int, prompt: Sequence[int], params: SamplingParams) -> _Request:
        context = self.model.config.max_position_embeddings
        if not prompt:
            raise UsageError("a prompt has no tokens")
        if len(prompt) >= context:
            raise UsageError(
                f"a prompt of {len(prompt):,} tokens does not fit the model's context",
                found=f"context {context:,} tokens",
                fix="shorten the prompt",
            )
        return _Request(
            prompt_index=index,
            number=number,
            prompt=prompt,
            limit=min(params.max_tokens, context - len(prompt)),
            key=request_key(params.seed, number, prompt),
            detokenizer=Detokenizer(self.tokenizer),
            stop=StopText(params.stop),
        )

    # -------------------------------------------------------------------------------------------- the loop

    @torch.inference_mode()
    def _run(self, requests: list[_Request], params: SamplingParams) -> Iterator[tuple[_Request, str]]:
        """Sample until every request is finished. Yields (request, text) for each token."""
        eos = self.tokenizer.eos_ids
        capacity = max(len(r.prompt) + max(r.limit, FEWEST_ROWS) for r in requests)
        weight = self.model.head_weight
        slots = max(len(requests), FEWEST_ROWS)
        cache = ContiguousCache(self.model.cache_specs(), slots, capacity, weight.device, weight.dtype)
        logits = self._prefill(requests, cache)
        live = list(requests)  # the owner of each slot
        while live:
            penalised = params.repetition_penalty != 1
            tokens, logprobs = sample(
                logits,
                params,
                [[*r.prompt, *r.ids] if penalised else () for r in live],
                [(r.key, r.position + 1) for r in live],
            )
            for i, (request, token) in enumerate(zip(live, tokens, strict=True)):
                if params.logprobs:
                    request.logprobs.append(logprobs[i])
                yield request, request.accept(token, eos)
            self._close_ranks(live, cache)
            if live:
                logits = self._decode(live, cache)

    def _close_ranks(self, live: list[_Request], cache: ContiguousCache) -> None:
        """Give the slots of finished requests to the last ones, so that the first slots are the ones in use."""
        for slot in reversed(range(len(live))):
            if live[slot].finish_reason is None:
                continue
            last = live.pop()
            if slot < len(live):
                cache.copy(len(live), slot, last.position)  # its newest token is not computed yet
                live[slot] = last

    def _prefill(self, requests: list[_Request], cache: ContiguousCache) -> Tensor:
        """Fill each request's slot; samples of one prompt share the work. Returns (B, V) logits of the next token.

        A prompt is computed alone, so nothing about it depends on the others.
        """
        rows: list[Tensor] = []
        for slot, request in enumerate(requests):
            first = slot - request.number
            if request.number and first >= 0 and requests[first].prompt is request.prompt:
                cache.copy(first, slot, len(request.prompt))
                rows.append(rows[first])
            else:
                rows.append(self._prompt(request.prompt, cache.slot(slot)))
        return torch.cat(rows)

    def _prompt(self, prompt: Sequence[int], cache: ContiguousCache) -> Tensor:
        """Put one prompt into an empty slot, a chunk at a time. Returns (1, V)."""
        device = self.model.head_weight.device
        for begin in range(0, len(prompt), CHUNK):
            part = torch.tensor(prompt[begin : begin + CHUNK], device=device)
            ids = F.pad(part, (0, max(0, FEWEST_ROWS - len(part))))[None]
            positions = torch.arange(begin, begin + ids.shape[1], device=device)[None]  # fillers are overwritten later
            cache.read(begin + ids.shape[1])
            hidden = self.model.hidden(ids, positions, cache)[:, len(part) - 1]
        return self.model.head(hidden.expand(FEWEST_ROWS, -1))[:1]

    def _decode(self, live: list[_Request], cache: ContiguousCache) -> Tensor:
        """One token further for every request. Returns (B, V)."""
        device = self.model.head_weight.device
        idle = [0] * max(0, FEWEST_ROWS - len(live))  # slots without an owner compute on, unseen
        ids = torch.tensor([r.ids[-1] for r in live] + idle, device=device)[:, None]
        positions = torch.tensor([r.position for r in live] + idle, device=device)[:, None]
        cache.read(max(r.position for r in live) + 1)
        return self.model.head(self.model.hidden(ids, positions, cache)[:, 0])[: len(live)]
