"""Choosing the next token. The filters and their order are those of transformers' generate.

A draw depends on the request and the position alone, so a text does not depend on what else is computed with it.

Shapes: B rows · V vocab_size · P tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.core.errors import UsageError

HEAD = 256  # likeliest tokens among which top-p looks first: sorting all of them costs more than the model does


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. The defaults change nothing: the model's own distribution.

    temperature: 0 = the likeliest token. top_k, top_p, min_p: 0, 1 and 0 switch them off.
    stop: texts that end the answer and are not part of it. logprobs: record each token's log-probability.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        bounds = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 <= self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "stop": all(self.stop),
        }
        for name, ok in bounds.items():
            if not ok:
                raise UsageError(f"--{name.replace('_', '-')} is out of range", found=repr(getattr(self, name)))


def filtered(logits: Tensor, params: SamplingParams, history: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the distribution that is sampled; excluded tokens at -inf.

    logits: (B, V) float32. history: each row's prompt and answer so far, for the repetition penalty. Returns (B, V).
    """
    logits = _penalise(logits, params.repetition_penalty, history)
    if params.temperature == 0:
        return logits
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        least = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if params.top_p < 1:
        logits = _top_p(logits, params.top_p)
    if params.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return logits


def _top_p(logits: Tensor, top_p: float) -> Tensor:
    """Drop the unlikeliest tokens that together hold at most 1 - top_p (Holtzman et al., 2020, arXiv:1904.09751)."""
    probs = logits.softmax(-1)
    values, order = (x.flip(-1) for x in probs.topk(min(HEAD, logits.shape[-1])))  # ascending
    rest = 1 - values.sum(-1, keepdim=True)
    if logits.shape[-1] <= HEAD or (rest > 1 - top_p).any():  # a flat distribution: the border lies further down
        ascending, order = logits.sort()
        values, rest = ascending.softmax(-1), torch.zeros_like(rest)
    drop = rest + values.cumsum(-1) <= 1 - top_p
    drop[:, -1] = False  # the likeliest always stays
    return logits.masked_fill(torch.ones_like(probs, dtype=torch.bool).scatter(1, order, drop), -torch.inf)


def _penalise(logits: Tensor, penalty: float, history: Sequence[Sequence[int]]) -> Tensor:
    """Divide positive and multiply negative logits of tokens already there (Keskar et al., 2019, arXiv:1909.05858)."""
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, history, strict=True):
        seen = torch.tensor(sorted(set(ids)), device=logits.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def sample(
    logits: Tensor, params: SamplingParams, history: Sequence[Sequence[int]], draws: Sequence[tuple[int, int]]
) -> tuple[list[int], list[float]]:
    """One token a row, and its log-probability in the distribution sampled (empty unless params.logprobs).

    logits: (B, V) float32. draws: (request_key, position) of each row.
    """
    logits = filtered(logits, params, history)
    if params.temperature == 0:
        ids = logits.argmax(-1)
    else:
        below = logits.softmax(-1).cpu().cumsum(-1, dtype=torch.float64)
        u = torch.tensor([[uniform(*draw)] for draw in draws], dtype=torch.float64)
        # the first token whose sum exceeds u: one of probability 0 adds nothing, so it never is
        ids = torch.searchsorted(below, u * below[:, -1:], right=True).squeeze(1).to(logits.device)
    chosen = logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1).tolist() if params.logprobs else []
    return ids.tolist(), chosen


def request_key(seed: int, number: int, prompt: Sequence[int]) -> int:
    """What the draws of one answer depend on, beside the position: seed, which answer to the prompt, and the prompt."""
    key = 0
    for part in (seed, number, *prompt):
        key = _mix(key ^ (part & _MASK))
    return key


def uniform(key: int, position: int) -> float:
    """A number in [0, 1) from a counter, 53 bits of splitmix64 (Steele et al., 2014)."""
    return (_mix(key ^ _mix(position & _MASK)) >> 11) / (1 << 53)


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
