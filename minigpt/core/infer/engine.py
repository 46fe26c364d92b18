"""One way to sample: prompts in, completions out, batched over a cache that the model declares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import UsageError
from minigpt.core.infer.cache import ContiguousCache
from minigpt.core.infer.sampling import SamplingParams, sample
from minigpt.core.infer.text import Detokenizer, StopText
from minigpt.core.models.decoder import Decoder

if TYPE_CHECKING:
    from minigpt.core.infer.model import Model

FEWEST_ROWS = 4  # float32 products of fewer rows round differently, and a text must not depend on its neighbours


@dataclass
class Completion:
    """One answer. text: without stop strings and special tokens. finish_reason: `stop`, or `length` when cut off."""

    prompt_index: int
    ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float] = field(default_factory=list)


@dataclass
class _Request:
    """A sequence being made."""

    prompt_index: int
    number: int  # among the samples of its prompt
    prompt: Sequence[int]
    limit: int  # of new tokens
    detokenizer: Detokenizer
    stop: StopText
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def position(self) -> int:
        """Where the newest token stands."""
        return len(self.prompt) + len(self.ids) - 1

    def accept(self, id: int, eos: Sequence[int]) -> str:
        """Take one sampled id. Returns the text it makes final."""
        if id in eos:
            self.finish_reason = "stop"
            return self._close()
        self.ids.append(id)
        out = self.stop.add(self.detokenizer.add(id))
        self.text.append(out)
        if self.stop.hit:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.limit:
            self.finish_reason = "length"
            out += self._close()
        return out

    def _close(self) -> str:
        rest = self.stop.add(self.detokenizer.finish())
        rest += "" if self.stop.hit else self.stop.finish()
        self.text.append(rest)
        return rest

    def completion(self) -> Completion:
        return Completion(
            self.prompt_index, self.ids, "".join(self.text), self.finish_reason or "length", self.logprobs
        )


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
        self.rows = max(rows, FEWEST_ROWS)

    def complete(self, text: str, params: SamplingParams | None = None) -> str:
        """Continue `text` as the beginning of a document."""
        prompt = [self.tokenizer.document_id, *self.tokenizer.encode(text)]
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
        room = self.model.config.max_position_embeddings - len(prompt)
        if not prompt:
            raise UsageError("a prompt has no tokens")
        if room < 1:
            raise UsageError(
                f"a prompt of {len(prompt):,} tokens does not fit the model's context",
                found=f"context {self.model.config.max_position_embeddings:,} tokens",
                fix="shorten the prompt",
            )
        limit = min(params.max_tokens, room)
        return _Request(index, number, prompt, limit, Detokenizer(self.tokenizer), StopText(params.stop))

    # -------------------------------------------------------------------------------------------- the loop

    @torch.inference_mode()
    def _run(self, requests: list[_Request], params: SamplingParams) -> Iterator[tuple[_Request, str]]:
        """Sample until every request is finished. Yields (request, text) for each token."""
        eos = self.tokenizer.eos_ids
        slots = max(len(requests), FEWEST_ROWS)
        capacity = max(len(r.prompt) + r.limit for r in requests)
        weight = self.model.head_weight
        capacity = max(capacity, FEWEST_ROWS)
        cache = ContiguousCache(self.model.cache_specs(), slots, capacity, weight.device, weight.dtype)
        logits = self._prefill(requests, cache)
        live = list(range(len(requests)))  # request in each slot
        while True:
            active = [requests[i] for i in live]
            tokens, logprobs = sample(
                logits,
                params,
                [[*r.prompt, *r.ids] for r in active] if params.repetition_penalty != 1 else [()] * len(active),
                [(r.number, r.position + 1) for r in active],
            )
            for i, (request, token) in enumerate(zip(active, tokens, strict=True)):
                if params.logprobs:
                    request.logprobs.append(logprobs[i])
                yield request, request.accept(token, eos)
            going = [i for i, r in enumerate(active) if r.finish_reason is None]
            if not going:
                return
            if len(going) < len(live):
                live = [live[i] for i in going]
                spare = [i for i in range(slots) if i not in going][: max(0, FEWEST_ROWS - len(going))]
                cache.keep(torch.tensor([*going, *spare], device=weight.device))
                slots = len(going) + len(spare)
            logits = self._decode([requests[i] for i in live], cache, slots)

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
                continue
            rows.append(self._prompt(request.prompt, cache.slot(slot)))
        return torch.cat(rows)

    def _prompt(self, prompt: Sequence[int], cache: ContiguousCache) -> Tensor:
        length = max(len(prompt), FEWEST_ROWS)
        ids = torch.zeros(1, length, dtype=torch.long, device=self.model.head_weight.device)
        ids[0, : len(prompt)] = torch.tensor(prompt)
        positions = torch.arange(length, device=ids.device)[None]  # fillers behind the prompt are overwritten later
        hidden = self.model.hidden(ids, positions, cache)[:, len(prompt) - 1]
        return self.model.head(hidden.expand(FEWEST_ROWS, -1))[:1]

    def _decode(self, requests: list[_Request], cache: ContiguousCache, slots: int) -> Tensor:
        """One token further for every request. Returns (B, V)."""
        device = self.model.head_weight.device
        ids = torch.zeros(slots, 1, dtype=torch.long, device=device)
        positions = torch.zeros(slots, 1, dtype=torch.long, device=device)
        count = len(requests)
        ids[:count, 0] = torch.tensor([r.ids[-1] for r in requests])
        positions[:count, 0] = torch.tensor([r.position for r in requests])
        hidden = self.model.hidden(ids, positions, cache)[:, 0]
        return self.model.head(hidden)[:count]
