"""Logits that are no numbers, temperatures next to zero, ids and biases that cannot be."""

from __future__ import annotations

import pytest
import torch

from minigpt.core.errors import Diverged, UsageError
from minigpt.core.infer.engine import Engine
from minigpt.core.infer.sampling import SamplingParams
from tests.conftest import tiny
from tests.core.infer.test_engine import Letters, never_ends, prompts

BAD = 300  # a token whose embedding is no number
GREEDY = SamplingParams(max_tokens=6, temperature=0)
WAYS = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 1.0},
    "filtered": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
    "recorded": {"temperature": 0.7, "logprobs": True, "top_logprobs": 3, "min_tokens": 3, "logit_bias": {11: 2.0}},
}


def damaged():
    model = never_ends(tiny("llama", tie_word_embeddings=False))
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = torch.nan
    return model


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("options", [{}, {"paged": True, "cache_tokens": 512, "reserve": 0.2}, {"ahead": 4}], ids=str)
def test_one_requests_logits_are_its_own(how, options):
    """A request whose logits are not numbers ends in an error that says so; those beside and after it do not notice,
    also where its memory is used again.
    """
    asked = [[i if i != BAD else 12 for i in p] for p in prompts(5, 9, 20, 7)]
    params = SamplingParams(max_tokens=8, **WAYS[how])
    want = [Engine(damaged(), Letters(), rows=4).generate([p], params)[0].ids for p in asked]
    engine = Engine(damaged(), Letters(), rows=2, **options)
    requests = [engine.request(p, params) for p in (*asked[:1], [11, BAD, 13] * 9, *asked[1:])]
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.step()
    with pytest.raises(Diverged, match="not numbers"):
        requests.pop(1).completion()
    assert [request.completion().ids for request in requests] == want


def test_callers_are_told():
    """`generate` and `stream` raise it, at temperature 0 as well, where the likeliest of NaN would be any token."""
    for temperature in (0, 1):
        params = SamplingParams(max_tokens=4, temperature=temperature)
        with pytest.raises(Diverged, match="not numbers"):
            Engine(damaged(), Letters()).generate([[11, BAD]], params)
        with pytest.raises(Diverged, match="not numbers"):
            list(Engine(damaged(), Letters()).stream([11, BAD], params))


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 1e-300])
def test_next_to_zero_is_greedy(temperature):
    """Logits divided by next to nothing are infinite, and no distribution: the likeliest token is meant."""
    engine = Engine(never_ends(tiny("llama", tie_word_embeddings=False)), Letters())
    want = [c.ids for c in engine.generate(prompts(5, 9), GREEDY)]
    params = SamplingParams(max_tokens=6, temperature=temperature, top_p=0.9)
    assert [c.ids for c in engine.generate(prompts(5, 9), params)] == want


@pytest.mark.parametrize("more", [
    {"temperature": float("nan")}, {"temperature": float("inf")}, {"repetition_penalty": float("inf")},
    {"logit_bias": {11: float("inf")}}, {"logit_bias": {11: float("-inf")}}, {"logit_bias": {11: float("nan")}},
    {"logit_bias": {-1: 1.0}}, {"stop_ids": (-1,)}, {"top_p": float("nan")},
])  # fmt: skip
def test_values_that_no_distribution_has(more):
    """Refused by name before anything is computed."""
    with pytest.raises(UsageError, match=next(iter(more)).replace("_", "-") + " is out of range"):
        SamplingParams(**more)


@pytest.mark.parametrize("prompt, more", [
    ([11, 320], {}), ([-1, 11], {}), ([11], {"logit_bias": {320: 1.0}}), ([11], {"stop_ids": (320,)}),
])  # fmt: skip
def test_ids_that_are_not_there(prompt, more):
    """A token that the model does not have is named, in a prompt, a bias or among the ends."""
    with pytest.raises(UsageError, match="names a token that is not there") as fault:
        Engine(tiny("llama"), Letters()).generate([prompt], SamplingParams(**more))
    assert fault.value.found in ("320", "-1") and "0 to 319" in fault.value.fix
