"""Sampling: transformers' filters, draws from the right distribution, the same draw whatever is computed beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt.core.errors import UsageError
from minigpt.core.infer.sampling import Sampler, SamplingParams, request_key, uniforms


@dataclass
class Row:
    """What sampling asks about a row."""

    params: SamplingParams = field(default_factory=SamplingParams)
    prompt: Sequence[int] = ()
    ids: Sequence[int] = ()
    key: int = 0
    ends: frozenset[int] = frozenset()

    def constrain(self, logits):
        pass


def at(key: int, position: int, params: SamplingParams | None = None) -> Row:
    """A row whose next token stands at `position`."""
    return Row(params or SamplingParams(), prompt=range(position), key=key)


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> tuple[list[int], torch.Tensor]:
    """One token a row, and the logits they were drawn from, by a sampler that is new."""
    sampler = Sampler(rows, logits.shape[-1], logits.device, steps=1)
    sampler.prepare(1)
    tokens, found = sampler(logits)
    return tokens.tolist(), found


def filtered(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    return sample(logits, rows)[1]


def theirs(params: SamplingParams, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The processors in the order in which transformers' generate applies them."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1:
        steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(ids, logits)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 0.9},
        {"top_p": 0.0},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "temperature": 2.0},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.1},
    ],
)
def test_filters_equal_transformers(changes, seed):
    """The same tokens are excluded and the others keep the same logits, ties included."""
    torch.manual_seed(seed)
    params = SamplingParams(**changes)
    logits = torch.randn(4, 200) * 3
    logits[1] = logits[1].round()  # many ties
    ids = torch.randint(0, 200, (4, 30))
    want = theirs(params, ids, logits.clone())
    got = filtered(logits, [Row(params, prompt=row) for row in ids.tolist()])
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 4.0, 8.0])
def test_top_p_over_a_large_vocabulary(spread, ties):
    """Also where only the likeliest tokens are looked at, and where a flat row among peaked ones forbids that."""
    torch.manual_seed(0)
    logits = torch.randn(5, 6400) * 8
    logits[0] = torch.randn(6400) * spread
    logits[1] = torch.randn(6400) * spread / 2
    if ties:
        logits = logits.round()
    params = SamplingParams(top_p=0.95)
    got, want = (
        f(params) for f in (lambda p: filtered(logits, [Row(p)] * 5), lambda p: theirs(p, logits, logits.clone()))
    )
    assert torch.equal(got.isinf(), want.isinf())


def test_greedy_is_the_likeliest_after_the_penalty():
    """Temperature 0 takes the maximum, ignores the other filters, and respects the repetition penalty."""
    logits = torch.tensor([[1.0, 3.0, 2.9]])
    ids, _ = sample(logits, [Row(SamplingParams(temperature=0, top_p=0.1))])
    assert ids == [1]
    ids, _ = sample(logits, [Row(SamplingParams(temperature=0, repetition_penalty=1.2), prompt=[1])])
    assert ids == [2]


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Statistic over its mean, in standard deviations: about N(0, 1) when the draws follow probs."""
    expected = probs * counts.sum()
    statistic = ((counts - expected).square() / expected).sum().item()
    freedom = len(probs) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("vary", ["position", "sample", "prompt", "seed"])
def test_draws_follow_the_distribution(vary):
    """χ² of 20,000 draws, whichever of the counters runs."""
    torch.manual_seed(0)
    logits = torch.randn(12) * 1.5
    params = SamplingParams(temperature=0.8)
    n = 20_000
    keys = {
        "position": lambda i: (request_key(1, 0, [5]), i),
        "sample": lambda i: (request_key(1, i, [5]), 3),
        "prompt": lambda i: (request_key(1, 0, [i, 5]), 3),
        "seed": lambda i: (request_key(i, 0, [5]), 3),
    }[vary]
    ids, _ = sample(logits.expand(n, -1), [at(*keys(i), params) for i in range(n)])
    counts = torch.bincount(torch.tensor(ids), minlength=12).double()
    assert abs(chi_square(counts, (logits / 0.8).double().softmax(0))) < 4


def splitmix64(x: int) -> int:
    """Steele et al., 2014, as published: the output of a generator whose state is x."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_draws_are_counters():
    """In exact arithmetic, for any 64 bits; and a position's number does not depend on where counting began."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the generator's first number from seed 0
    keys = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, *(request_key(5, n, [n, 7]) for n in range(20))]
    positions = [3 * i for i in range(len(keys))]
    each = zip(keys, positions, strict=True)
    want = [[(splitmix64(k ^ splitmix64(p + i)) >> 11) / 2**53 for i in range(9)] for k, p in each]
    assert uniforms(keys, positions, 9).tolist() == want
    assert uniforms(keys, [p + 4 for p in positions], 3).tolist() == [row[4:7] for row in want]


def test_neighbouring_draws_are_independent():
    """Pairs of draws at following positions fill the unit square evenly."""
    draws = uniforms([request_key(7, 0, [1, 2])], [0], 20_000)[0]
    assert draws.min() >= 0 and draws.max() < 1
    cells = (draws[:-1] * 10).long() * 10 + (draws[1:] * 10).long()
    counts = torch.bincount(cells, minlength=100).double()
    assert abs(chi_square(counts, torch.full((100,), 0.01, dtype=torch.float64))) < 4


def test_excluded_tokens_are_never_drawn():
    """Also when the draw is at the very edges of its range."""
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(4000, -1)
    ids, _ = sample(logits, [at(request_key(0, 0, [1]), i) for i in range(4000)])
    assert set(ids) == {1, 3}


def test_what_is_drawn_from_comes_back():
    """The logits beside the tokens are those after penalty, temperature and filters."""
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    rows = [at(i, 0, SamplingParams(temperature=0.5, top_k=7)) for i in range(3)]
    ids, found = sample(logits, rows)
    assert torch.equal(found, filtered(logits, rows))
    assert all(found[row, id].isfinite() for row, id in enumerate(ids))
    assert (found.isfinite().sum(1) == 7).all()


MIXED = (
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.5, top_k=7),
    SamplingParams(top_p=0.9),
    SamplingParams(temperature=0, repetition_penalty=1.5, top_p=0.1),
    SamplingParams(temperature=1.3, min_p=0.05, presence_penalty=1.0, frequency_penalty=0.5),
    SamplingParams(top_k=40, top_p=0.8, logit_bias={3: 5.0, 4: -100.0}),
)


@pytest.mark.parametrize("size", [100, 6400])
def test_a_row_depends_on_itself_only(size):
    """Rows of different parameters, together, alone and backwards: the same tokens from the same logits."""
    torch.manual_seed(0)
    logits = torch.randn(7, size) * torch.tensor([0.1, 1, 2, 3, 4, 5, 6])[:, None]
    rows = [Row(p, prompt=range(i), ids=[1, 2, 2], key=request_key(3, 0, [i])) for i, p in enumerate(MIXED)]
    ids, found = sample(logits, rows)
    for i, row in enumerate(rows):
        alone, same = sample(logits[i : i + 1], [row])
        assert alone == [ids[i]]
        assert torch.equal(same[0], found[i])
    backwards, _ = sample(logits.flip(0), rows[::-1])
    assert backwards == ids[::-1]


def test_step_after_step_is_each_by_itself():
    """One sampler over many steps chooses what new ones would, which are told all that was said before."""
    torch.manual_seed(0)
    least = SamplingParams(temperature=0.8, min_tokens=9, repetition_penalty=0.7, logit_bias={5: 4.0})
    rows = [Row(p, prompt=range(i), key=request_key(3, 0, [i])) for i, p in enumerate((*MIXED, least))]
    rows[-1].ends = frozenset({5, 7})
    rows[2].ends = frozenset({5})
    for row in rows:
        row.ids = [1, 2, 2]
    kept = Sampler(rows, 60, torch.device("cpu"), steps=4)
    for _ in range(14):
        logits = torch.randn(len(rows), 60) * 2
        want, same = sample(logits, rows)
        kept.prepare(1)
        got, found = kept(logits)
        assert got.tolist() == want
        assert torch.equal(found, same)
        for row, id in zip(rows, want, strict=True):
            row.ids = [*row.ids, id]
    assert 5 not in rows[-1].ids[3:9] and 5 in rows[-1].ids[9:]


def test_penalties_count_what_the_answer_has():
    """OpenAI's: once for being there, and for each time, in the answer and not in the prompt."""
    logits = torch.zeros(1, 6)
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    got = filtered(logits, [Row(params, prompt=[5, 5], ids=[1, 2, 2, 2])])
    assert torch.equal(got, torch.tensor([[0.0, -0.75, -1.25, 0.0, 0.0, 0.0]]))


def test_bias_and_least_length():
    """A bias is added to a logit. No end is sampled before min_tokens."""
    logits = torch.zeros(1, 4)
    params = SamplingParams(temperature=0, logit_bias={1: 3.0, 2: -1.0}, min_tokens=2)
    got = filtered(logits, [Row(params, ids=[0], ends=frozenset({3}))])
    assert torch.equal(got, torch.tensor([[0.0, 3.0, -1.0, -math.inf]]))
    assert filtered(logits, [Row(params, ids=[0, 0], ends=frozenset({3}))])[0, 3] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
        {"stop": ("a", "")},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -3},
        {"top_logprobs": 101},
        {"min_tokens": 300},
    ],
)
def test_values_out_of_range(wrong):
    """Named as the flag is."""
    with pytest.raises(UsageError, match="--" + next(iter(wrong)).replace("_", "-")):
        SamplingParams(**wrong)
