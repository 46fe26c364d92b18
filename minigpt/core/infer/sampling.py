"""Choosing the next token. The filters and their order are those of transformers' generate.

A draw depends on the request and the position alone, so a text does not depend on what else is computed with it.

Shapes: B rows · V vocab_size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from minigpt.core.errors import UsageError

if TYPE_CHECKING:
    from minigpt.core.infer.constraint import Form

HEADS = (32, 256)  # likeliest tokens among which top-p looks: sorting all of them costs more than the model does
MOST_TOP_LOGPROBS = 100
LARGEST_BIAS = 1e6  # logits are tens; an infinite one leaves no distribution
COLDEST = 1e-20  # at any lower temperature every difference of logits is as good as infinite, and logits overflow
NO_TOKEN = -1  # instead of a token where the logits are not numbers


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
            "temperature": 0 <= self.temperature < math.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0 <= self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "presence_penalty": -2 <= self.presence_penalty <= 2,
            "frequency_penalty": -2 <= self.frequency_penalty <= 2,
            "top_logprobs": 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS,
            "stop": all(self.stop),
            "stop_ids": all(id >= 0 for id in self.stop_ids),
            "logit_bias": all(id >= 0 and abs(bias) <= LARGEST_BIAS for id, bias in self.logit_bias.items()),
        }
        for name, ok in bounds.items():
            if not ok:
                raise UsageError(f"--{name.replace('_', '-')} is out of range", found=repr(getattr(self, name)))
        if self.form is not None and self.min_tokens:
            raise UsageError("min_tokens and a form do not go together: a form may have to end before")


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


class Sampler:
    """Chooses the next token of some rows, step after step, without looking at one: what the rows ask for lies on the
    device, in a column for every filter that one of them has.

    rows: in the order of the logits, the same ones for as long as this is used; what they say meanwhile is counted
    here. steps: so many draws of each are made at once.
    """

    def __init__(self, rows: Sequence[Asked], vocab_size: int, device: torch.device, steps: int = 64):
        self.rows, self.steps, self._left = rows, steps, 0
        self._forms = any(row.params.form is not None for row in rows)
        self._next = [len(row.prompt) + len(row.ids) for row in rows]  # positions of the draws that are made next
        self._vocab_size, self._device = vocab_size, device
        params = [row.params for row in rows]
        self.most = max((p.top_k for p in params if p.temperature > 0 and p.top_k < vocab_size), default=0)
        self.columns = {**self._of_what_was_said(params), **self._of_filters(params)}

    @property
    def kind(self) -> tuple[object, ...]:
        """Samplers of one kind do the same operations."""
        return self.most, *((name, tuple(column.shape)) for name, column in self.columns.items())

    def take(self, other: Sampler) -> None:
        """Go on as another one of the same kind would, in the memory of this one."""
        self.rows, self._left, self._next = other.rows, other._left, list(other._next)
        for name, column in self.columns.items():
            column.copy_(other.columns[name])

    def prepare(self, steps: int) -> None:
        """Have draws for so many steps."""
        if "draws" not in self.columns:
            return
        if self._left < steps:
            self._next = [position - self._left for position in self._next]
            self.columns["draws"].copy_(uniforms([row.key for row in self.rows], self._next, self.steps))
            self.columns["step"].zero_()
            self._next = [position + self.steps for position in self._next]
            self._left = self.steps
        self._left -= steps

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits: (B, V) float32, edited in place. Returns tokens (B,), and the logits (B, V) of the distributions they
        come from. A row whose logits are not numbers gets NO_TOKEN.

        Draws must have been made with `prepare`. Greedy rows are edited, but not filtered.
        """
        c, logits = self.columns, self._edited(logits)
        if "draws" not in c:
            tokens = _likeliest(logits)
        else:
            filtered = self._filtered(logits)
            tokens = self._draw(filtered)
            if "warm" in c:
                tokens = torch.where(c["warm"], tokens, _likeliest(logits))
                filtered = torch.where(c["warm"][:, None], filtered, logits)
            logits = filtered
        self._count(tokens[:, None].clamp(min=0))
        return tokens, logits

    # -------------------------------------------------------------------------------------------- what was said

    def _of_what_was_said(self, params: Sequence[SamplingParams]) -> dict[str, Tensor]:
        columns, shape = {}, (len(params), self._vocab_size)
        if any(p.repetition_penalty != 1 for p in params):
            columns["repetition"] = self._column([p.repetition_penalty for p in params])
            columns["seen"] = self._marked(shape, [{*row.prompt, *row.ids} for row in self.rows])
        if any(p.presence_penalty or p.frequency_penalty for p in params):
            columns["presence"] = self._column([p.presence_penalty for p in params])
            columns["frequency"] = self._column([p.frequency_penalty for p in params])
            columns["counts"] = self._dense(shape, [Counter(row.ids) for row in self.rows])
        if any(p.logit_bias for p in params):
            columns["bias"] = self._dense(shape, [p.logit_bias for p in params])
        early = [row.params.min_tokens > len(row.ids) and bool(row.ends) for row in self.rows]
        if any(early):
            ends = [sorted(row.ends) if e else [0] for row, e in zip(self.rows, early, strict=True)]
            width = max(map(len, ends))
            columns["ends"] = torch.tensor([e + e[:1] * (width - len(e)) for e in ends], device=self._device)
            wait = [row.params.min_tokens - len(row.ids) if e else 0 for row, e in zip(self.rows, early, strict=True)]
            columns["wait"] = torch.tensor(wait, device=self._device)[:, None]
        return columns

    def _edited(self, logits: Tensor) -> Tensor:
        """Penalties, bias, forms, and no end before its time."""
        c = self.columns
        if "repetition" in c:  # Keskar et al., 2019, arXiv:1909.05858
            less = torch.where(logits > 0, logits / c["repetition"], logits * c["repetition"])
            logits = torch.where(c["seen"], less, logits)
        if "counts" in c:
            less = logits - (c["presence"] + c["frequency"] * c["counts"])
            logits = torch.where(c["counts"] > 0, less, logits)
        if "bias" in c:
            logits = logits + c["bias"]
        if self._forms:
            for values, row in zip(logits, self.rows, strict=True):
                row.constrain(values)
        if "ends" in c:
            values = logits.gather(1, c["ends"]).masked_fill_(c["wait"] > 0, -torch.inf)
            logits.scatter_(1, c["ends"], values)
        return logits

    def _count(self, tokens: Tensor) -> None:
        """tokens: (B, 1)."""
        c = self.columns
        if "step" in c:
            c["step"] += 1
        if "seen" in c:
            c["seen"].scatter_(1, tokens, True)
        if "counts" in c:
            c["counts"].scatter_add_(1, tokens, torch.ones_like(tokens, dtype=c["counts"].dtype))
        if "wait" in c:
            c["wait"] -= 1

    # -------------------------------------------------------------------------------------------- filters and draws

    def _of_filters(self, params: Sequence[SamplingParams]) -> dict[str, Tensor]:
        columns, some = {}, [p for p in params if p.temperature > 0]
        if not some:
            return {}
        where = torch.device("cpu") if self._device.type == "mps" else self._device  # which has no float64
        columns["draws"] = torch.zeros(len(params), self.steps, dtype=torch.float64, device=where)
        columns["step"] = torch.zeros(1, dtype=torch.int64, device=where)  # of the draws
        if len(some) < len(params):
            columns["warm"] = torch.tensor([p.temperature > 0 for p in params], device=self._device)
        if any(p.temperature != 1 for p in some):
            columns["temperature"] = self._column(
                [max(p.temperature, COLDEST) if p.temperature else 1.0 for p in params]
            )
        if self.most:
            limits = [0 < p.top_k < self._vocab_size for p in params]
            columns["top_k"] = torch.tensor([limits], device=self._device).t()
            kth = [min(p.top_k, self.most) - 1 if on else 0 for p, on in zip(params, limits, strict=True)]
            columns["kth"] = torch.tensor([kth], device=self._device).t()
        if any(p.top_p < 1 for p in some):
            columns["top_p"] = self._column([p.top_p for p in params])
            if any(p.top_p >= 1 for p in params):
                columns["nucleus"] = columns["top_p"] < 1
        if any(p.min_p > 0 for p in some):
            columns["min_p"] = self._column([p.min_p for p in params])
        return columns

    def _filtered(self, logits: Tensor) -> Tensor:
        """Temperature, then top-k, top-p and min-p, of each row its own."""
        c = self.columns
        if "temperature" in c:
            logits = logits / c["temperature"]
        if self.most:
            least = logits.topk(self.most).values.gather(1, c["kth"])
            logits = logits.masked_fill((logits < least) & c["top_k"], -torch.inf)
        if "top_p" in c:  # a GPU sorts all in less time than it takes to ask it whether that is needed
            some = _top_p(logits, c["top_p"], HEADS if logits.device.type == "cpu" else ())
            logits = torch.where(c["nucleus"], some, logits) if "nucleus" in c else some
        if "min_p" in c:
            probs = logits.softmax(-1)
            logits = logits.masked_fill(probs < c["min_p"] * probs.amax(-1, keepdim=True), -torch.inf)
        return logits

    def _draw(self, logits: Tensor) -> Tensor:
        draws = self.columns["draws"]
        below = logits.softmax(-1).to(draws.device).cumsum(-1, dtype=torch.float64)
        u = draws.index_select(1, self.columns["step"])
        # the first token whose sum exceeds u: one of probability 0 adds nothing, so it never is
        tokens = torch.searchsorted(below, u * below[:, -1:], right=True).squeeze(1)
        return tokens.masked_fill(below[:, -1].isnan(), NO_TOKEN).to(logits.device)

    # -------------------------------------------------------------------------------------------- columns

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._device, dtype=torch.float32)[:, None]

    def _marked(self, shape: tuple[int, int], each: Sequence[Collection[int]]) -> Tensor:
        marked = torch.zeros(shape, dtype=torch.bool)
        for row, ids in zip(marked, each, strict=True):
            row[torch.tensor(list(ids), dtype=torch.int64)] = True
        return marked.to(self._device)

    def _dense(self, shape: tuple[int, int], each: Sequence[Mapping[int, float]]) -> Tensor:
        dense = torch.zeros(shape)
        for row, values in zip(dense, each, strict=True):
            row[torch.tensor(list(values), dtype=torch.int64)] = torch.tensor(
                list(values.values()), dtype=torch.float32
            )
        return dense.to(self._device)


def _likeliest(logits: Tensor) -> Tensor:
    """The first of the largest, (B,). (`argmax` finds the same one, in three times the time.)"""
    best = logits.max(-1)  # which is no number where one of them is none
    return best.indices.masked_fill(~best.values.isfinite(), NO_TOKEN)


def _top_p(logits: Tensor, top_p: Tensor, heads: Sequence[int] = HEADS) -> Tensor:
    """Drop the unlikeliest tokens that together hold at most 1 - top_p (Holtzman et al., 2020, arXiv:1904.09751).

    logits: (B, V). top_p: (B, 1), below 1; rows of 1 are not to be used. heads: how many of the likeliest to look at,
    and how many where that is too few; then all of them.
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
    unsure = (((rest > 1 - top_p) | (border == 0) | tied) & (top_p < 1)).squeeze(1)
    logits_left = _without(logits, order, drop)
    if unsure.any():
        logits_left[unsure] = _top_p(logits[unsure], top_p[unsure], heads[1:])
    return logits_left


def _dropped(values: Tensor, rest: Tensor, top_p: Tensor) -> Tensor:
    """Which of ascending probabilities go, (B, n). rest: what lies below them, (B, 1)."""
    drop = rest + values.cumsum(-1) <= 1 - top_p
    drop[:, -1] = False  # the likeliest always stays
    return drop


def _without(logits: Tensor, order: Tensor, drop: Tensor) -> Tensor:
    """Logits of only those tokens of `order` that do not go. order, drop: (B, n)."""
    return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).scatter(1, order, drop), -torch.inf)


def request_key(seed: int, number: int, prompt: Sequence[int]) -> int:
    """What the draws of one answer depend on, beside the position: seed, which answer to the prompt, and the prompt."""
    key = 0
    for part in (seed, number, *prompt):
        key = _mix(key ^ (part & _MASK))
    return key


def uniforms(keys: Sequence[int], positions: Sequence[int], count: int) -> Tensor:
    """Numbers in [0, 1) from counters, 53 bits of splitmix64 (Steele et al., 2014): (B, count) float64 of the positions
    from each of `positions` on.
    """
    at = torch.tensor(positions)[:, None] + torch.arange(count)
    key = torch.tensor([k - (1 << 64) if k >> 63 else k for k in keys])[:, None]
    return _shifted(_mixed(key ^ _mixed(at)), 11).double() / (1 << 53)


def _mixed(x: Tensor) -> Tensor:
    """`_mix` of each; products of int64 keep the low 64 bits."""
    x = x + (_STEP - (1 << 64))
    x = (x ^ _shifted(x, 30)) * (_FIRST - (1 << 64))
    x = (x ^ _shifted(x, 27)) * (_SECOND - (1 << 64))
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """As if x had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


_MASK = (1 << 64) - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(x: int) -> int:
    x = (x + _STEP) & _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)
