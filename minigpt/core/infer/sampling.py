"""Choosing the next token. The filters and their order are those of transformers' generate.

A draw depends on the request and the position alone, so a text does not depend on what else is computed with it.

Shapes: B rows · V vocab_size · W rows that are sampled, not greedy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from minigpt.core.errors import UsageError

if TYPE_CHECKING:
    from minigpt.core.infer.constraint import Form

HEADS = (32, 256)  # likeliest tokens among which top-p looks: sorting all of them costs more than the model does
MOST_TOP_LOGPROBS = 100


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. The defaults change nothing: the model's own distribution.

    max_tokens, min_tokens: of the answer; before the latter no end is sampled.
    temperature: 0 = the likeliest token. top_k, top_p, min_p: 0, 1 and 0 switch them off.
    repetition_penalty: divides the logits of tokens of the prompt and the answer. presence_penalty, frequency_penalty:
    subtracted from the logits of the answer's tokens, once and per occurrence. logit_bias: added to tokens' logits.
    stop: texts that end the answer and are not part of it. stop_ids: tokens that do.
    form: what the answer must look like; see `minigpt.core.infer.constraint`.
    logprobs: record each token's log-probability. top_logprobs: and those of so many likeliest tokens.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    form: Form | None = None
    seed: int = 0
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "max_tokens": self.max_tokens >= 1,
            "min_tokens": 0 <= self.min_tokens <= self.max_tokens,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 <= self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "presence_penalty": -2 <= self.presence_penalty <= 2,
            "frequency_penalty": -2 <= self.frequency_penalty <= 2,
            "top_logprobs": 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS,
            "stop": all(self.stop),
        }
        for name, ok in bounds.items():
            if not ok:
                raise UsageError(f"--{name.replace('_', '-')} is out of range", found=repr(getattr(self, name)))
        if self.form is not None and self.min_tokens:
            raise UsageError("min_tokens and a form do not go together: a form may have to end before")

    @property
    def edits(self) -> bool:
        """Whether logits change by what was said before, or token by token."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.form is not None
        )


class Asked(Protocol):
    """What sampling must know about a row. prompt, ids: tokens so far. ends: tokens that end the answer.

    constrain: exclude what the answer's form does not allow, in place.
    """

    @property
    def params(self) -> SamplingParams: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def ends(self) -> frozenset[int]: ...
    @property
    def key(self) -> int: ...
    def constrain(self, logits: Tensor) -> None: ...


def sample(logits: Tensor, rows: Sequence[Asked]) -> tuple[list[int], Tensor]:
    """One token a row, and the logits (B, V) of the distributions they were drawn from.

    logits: (B, V) float32. A draw is a function of a row's key and position.
    """
    logits = filtered(logits, rows)
    warm = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if not warm:
        return _likeliest(logits), logits
    drawn = _draw(logits if len(warm) == len(rows) else logits[warm], [rows[i] for i in warm])
    if len(warm) == len(rows):
        return drawn, logits
    ids = _likeliest(logits)
    for i, id in zip(warm, drawn, strict=True):
        ids[i] = id
    return ids, logits


def _likeliest(logits: Tensor) -> list[int]:
    """The first of the largest. (`argmax` finds the same one, in three times the time.)"""
    ids: list[int] = logits.max(-1).indices.tolist()
    return ids


def _draw(logits: Tensor, rows: Sequence[Asked]) -> list[int]:
    """logits: (W, V)."""
    below = logits.softmax(-1).cpu().cumsum(-1, dtype=torch.float64)
    numbers = [[uniform(row.key, len(row.prompt) + len(row.ids))] for row in rows]
    u = torch.tensor(numbers, dtype=torch.float64)
    # the first token whose sum exceeds u: one of probability 0 adds nothing, so it never is
    ids: list[int] = torch.searchsorted(below, u * below[:, -1:], right=True).squeeze(1).tolist()
    return ids


def filtered(logits: Tensor, rows: Sequence[Asked]) -> Tensor:
    """Logits of the distributions that are sampled, excluded tokens at -inf; greedy rows are edited but not filtered.

    logits: (B, V) float32. Returns (B, V).
    """
    early = [(i, id) for i, row in enumerate(rows) if len(row.ids) < row.params.min_tokens for id in row.ends]
    if early or any(row.params.edits for row in rows):
        logits = logits.clone()
        for values, row in zip(logits, rows, strict=True):
            if row.params.edits:
                edit(values, row)
    if early:
        logits[torch.tensor(early, device=logits.device).unbind(1)] = -torch.inf
    warm = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if not warm:
        return logits
    if len(warm) == len(rows):
        return _filter(logits, [row.params for row in rows])
    logits = logits.clone()
    logits[warm] = _filter(logits[warm], [rows[i].params for i in warm])
    return logits


def _filter(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Temperature, then top-k, top-p and min-p, of each row its own. logits: (W, V)."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device, dtype=logits.dtype)[:, None]

    if any(p.temperature != 1 for p in params):
        logits = logits / column([p.temperature for p in params])
    vocab_size = logits.shape[-1]
    if most := max(p.top_k for p in params if p.top_k < vocab_size) if any(p.top_k < vocab_size for p in params) else 0:
        kth = torch.tensor([p.top_k - 1 if 0 < p.top_k < vocab_size else 0 for p in params], device=logits.device)
        least = logits.topk(most).values.gather(1, kth[:, None])
        off = torch.tensor([not 0 < p.top_k < vocab_size for p in params], device=logits.device)
        logits = logits.masked_fill((logits < least) & ~off[:, None], -torch.inf)
    nucleus = [i for i, p in enumerate(params) if p.top_p < 1]
    if nucleus:
        limit = column([params[i].top_p for i in nucleus])
        if len(nucleus) == len(params):
            logits = _top_p(logits, limit)
        else:
            logits = logits.index_copy(0, torch.tensor(nucleus, device=logits.device), _top_p(logits[nucleus], limit))
    if any(p.min_p > 0 for p in params):
        probs = logits.softmax(-1)
        logits = logits.masked_fill(
            probs < column([p.min_p for p in params]) * probs.amax(-1, keepdim=True), -torch.inf
        )
    return logits


def _top_p(logits: Tensor, top_p: Tensor, heads: Sequence[int] = HEADS) -> Tensor:
    """Drop the unlikeliest tokens that together hold at most 1 - top_p (Holtzman et al., 2020, arXiv:1904.09751).

    logits: (W, V). top_p: (W, 1). heads: how many of the likeliest to look at, and how many where that is too few.
    """
    if not heads or logits.shape[-1] <= heads[0]:
        ascending, order = logits.sort()
        return _without(logits, order, _dropped(ascending.softmax(-1), torch.zeros_like(top_p), top_p))
    values, order = (x.flip(-1) for x in logits.softmax(-1).topk(heads[0]))  # ascending
    rest = 1 - values.sum(-1, keepdim=True)
    drop = _dropped(values, rest, top_p)
    border = drop.sum(-1, keepdim=True)  # where the first one that stays stands
    # Among equal ones at the border those stay that a sort puts last; and the border may lie below the head.
    tied = values.gather(1, border) == values.gather(1, (border - 1).clamp(min=0))
    unsure = ((rest > 1 - top_p) | (border == 0) | tied).squeeze(1)
    if not unsure.any():
        return _without(logits, order, drop)
    out = torch.empty_like(logits)
    out[unsure] = _top_p(logits[unsure], top_p[unsure], heads[1:])
    out[~unsure] = _without(logits[~unsure], order[~unsure], drop[~unsure])
    return out


def _dropped(values: Tensor, rest: Tensor, top_p: Tensor) -> Tensor:
    """Which of ascending probabilities go, (W, n). rest: what lies below them, (W, 1)."""
    drop = rest + values.cumsum(-1) <= 1 - top_p
    drop[:, -1] = False  # the likeliest always stays
    return drop


def _without(logits: Tensor, order: Tensor, drop: Tensor) -> Tensor:
    """Logits of only those tokens of `order` that do not go. order, drop: (W, n)."""
    return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).scatter(1, order, drop), -torch.inf)


def edit(logits: Tensor, row: Asked) -> None:
    """Bias, penalties and constraints of one row, in place. logits: (V,)."""
    p, device = row.params, logits.device
    if p.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt, *row.ids}), device=device)
        values = logits[seen]  # Keskar et al., 2019, arXiv:1909.05858
        logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and row.ids:
        counts = Counter(row.ids)
        seen = torch.tensor(list(counts), device=device)
        often = torch.tensor(list(counts.values()), device=device, dtype=logits.dtype)
        logits[seen] -= p.presence_penalty + p.frequency_penalty * often
    for id, bias in p.logit_bias.items():
        logits[id] += bias
    row.constrain(logits)


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
