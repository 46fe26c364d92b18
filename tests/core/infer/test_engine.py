"""The engine: transformers' greedy tokens, and the same text alone or among others."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from minigpt.core.errors import UsageError
from minigpt.core.infer import lean
from minigpt.core.infer.cache import Pages
from minigpt.core.infer.engine import Engine
from minigpt.core.infer.prefill import CHUNK
from minigpt.core.infer.products import FP16
from minigpt.core.infer.sampling import SamplingParams
from minigpt.core.models import folder, model_types
from minigpt.core.runtime import DTYPES
from tests.conftest import tiny

ARCHITECTURES = model_types()
needs_fbgemm = pytest.mark.skipif(FP16 is None, reason="this build has no FBGEMM")


class Letters:
    """Stands in for a tokenizer: id → one printable character; ids below 10 are special, 2 ends."""

    eos_ids = (2,)
    document_id = 0

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids, skip_special=True):
        return "".join(chr(i + 200) for i in ids if i >= 10 or not skip_special)


def engine(model, rows: int = 32) -> Engine:
    return Engine(model, Letters(), rows=rows)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(10, 320, (n,), generator=generator).tolist() for n in lengths]


def never_ends(model):
    """The same model without token 2, so that answers have the length asked for."""
    with torch.no_grad():
        model.lm_head.weight[2] = 0
        model.lm_head.weight[2, 0] = -1e-9
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_equals_transformers(arch, tmp_path):
    """Token for token, for prompts of several lengths in one batch, with and without a repetition penalty."""
    model = tiny(arch)
    folder.write(tmp_path, model, model.config, bos_token_id=0, eos_token_id=2, pad_token_id=0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    given = prompts(5, 40, 1, 17)
    for penalty in (1.0, 1.3):
        params = SamplingParams(max_tokens=25, temperature=0, repetition_penalty=penalty)
        done = engine(model).generate(given, params)
        for prompt, completion in zip(given, done, strict=True):
            want = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=25, do_sample=False, repetition_penalty=penalty
            )[0, len(prompt) :].tolist()
            if want[-1] == 2:
                assert completion.finish_reason == "stop"
                want.pop()
            assert completion.ids == want


def test_greedy_among_others_equals_transformers(tmp_path):
    """Long prompts over several chunks, in pages as in slots, one let in while others are answered."""
    model = tiny("qwen3", max_position_embeddings=1024)
    folder.write(tmp_path, model, model.config, bos_token_id=0, eos_token_id=2, pad_token_id=0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    given = prompts(300, 20, 700, 257)
    for made in (engine(model, rows=2), Engine(model, Letters(), rows=2, paged=True, cache_tokens=2048)):
        done = made.generate(given, SamplingParams(max_tokens=30, temperature=0))
        for prompt, completion in zip(given, done, strict=True):
            want = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[
                0, len(prompt) :
            ].tolist()
            assert completion.ids == [id for id in want if id != 2]


@pytest.mark.parametrize("params", [
    SamplingParams(max_tokens=30, temperature=0),
    SamplingParams(max_tokens=30, temperature=1.0, seed=5),
    SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, top_k=50, repetition_penalty=1.1, seed=1),
])  # fmt: skip
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_batch_is_one_by_one(arch, params):
    """A prompt's answer is the same alone, in a batch, in another order and in several rounds."""
    model = tiny(arch)
    given = prompts(3, 50, 1, 12, 7, 30, 2)
    alone = [engine(model).generate([p], params)[0] for p in given]
    assert len({c.finish_reason for c in alone} | {len(c.ids) for c in alone}) > 1  # some end early
    for order, rows in ((range(7), 32), (range(6, -1, -1), 32), (range(7), 3)):
        together = engine(model, rows).generate([given[i] for i in order], params)
        assert [c.ids for c in together] == [alone[i].ids for i in order]
        assert [c.text for c in together] == [alone[i].text for i in order]
        assert [c.prompt_index for c in together] == list(range(7))


def test_samples_of_a_prompt():
    """n answers of each prompt differ among themselves, and are the same however many are asked for."""
    model, given = tiny("llama"), prompts(6, 4)
    params = SamplingParams(max_tokens=20, seed=2)
    three = engine(model).generate(given, params, n=3)
    assert [c.prompt_index for c in three] == [0, 0, 0, 1, 1, 1]
    assert len({tuple(c.ids) for c in three}) == 6
    assert engine(model, rows=4).generate(given, params, n=3) == three  # the second prompt's samples span two rounds
    one = engine(model).generate(given, params)
    assert [c.ids for c in one] == [three[0].ids, three[3].ids]
    other = engine(model).generate(given, SamplingParams(max_tokens=20, seed=3))
    assert [c.ids for c in other] != [c.ids for c in one]


def test_stream_is_generate():
    """The pieces joined are the text; the last piece comes with the end."""
    model = tiny("qwen3")
    prompt = prompts(9)[0]
    params = SamplingParams(max_tokens=40, seed=4)
    assert "".join(engine(model).stream(prompt, params)) == engine(model).generate([prompt], params)[0].text


def test_ends():
    """An end token, a stop string over several tokens, max_tokens, the end of the context."""
    model = never_ends(tiny("llama", tie_word_embeddings=False, max_position_embeddings=64))
    prompt = prompts(8)[0]
    long = engine(model).generate([prompt], SamplingParams(max_tokens=30, temperature=0))[0]
    assert (len(long.ids), long.finish_reason, long.end_id) == (30, "length", None)
    assert long.text == Letters().decode(long.ids)
    full = engine(model).generate([prompt], SamplingParams(max_tokens=500, temperature=0))[0]
    assert (len(full.ids), full.finish_reason) == (64 - 8, "length")

    at = next(i for i in range(4, 28) if long.text.find(long.text[i : i + 2]) == i)
    stopped = engine(model).generate([prompt], SamplingParams(temperature=0, stop=("zz", long.text[at : at + 2])))[0]
    assert stopped.text == long.text[:at]
    assert (stopped.finish_reason, stopped.ids, stopped.end_id) == ("stop", long.ids[: at + 2], None)

    class Ends(Letters):
        eos_ids = (3, long.ids[5])

    ended = Engine(model, Ends()).generate([prompt], SamplingParams(temperature=0))[0]
    first = long.ids.index(long.ids[5])
    assert (ended.ids, ended.finish_reason, ended.end_id) == (long.ids[:first], "stop", long.ids[5])


def test_a_stop_string_held_back_at_the_end_is_text():
    """Half a stop string when max_tokens is reached belongs to the answer."""
    model = never_ends(tiny("llama", tie_word_embeddings=False))
    prompt = prompts(8)[0]
    text = engine(model).generate([prompt], SamplingParams(max_tokens=6, temperature=0))[0].text
    params = SamplingParams(max_tokens=6, temperature=0, stop=(text[-1] + "never",))
    assert engine(model).generate([prompt], params)[0].text == text


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_the_models(temperature):
    """Each recorded value is the log-probability that a full forward gives that token, the ending one included."""

    class Ends(Letters):
        eos_ids = (50, 100, 150, 200)

    model = tiny("qwen3")
    params = SamplingParams(max_tokens=60, temperature=temperature, logprobs=True, seed=9)
    done = Engine(model, Ends()).generate(prompts(4, 11, 2), params, n=2)
    assert any(c.end_id is not None for c in done)
    for completion in done:
        prompt = prompts(4, 11, 2)[completion.prompt_index]
        new = completion.ids + ([completion.end_id] if completion.end_id is not None else [])
        ids = torch.tensor([[*prompt, *new]])
        with torch.inference_mode():
            logits = model.head(model.hidden(ids, torch.arange(ids.shape[1])[None]))[0, len(prompt) - 1 : -1]
        want = (logits / temperature).log_softmax(-1)
        want = want[torch.arange(len(new)), torch.tensor(new)]
        assert (torch.tensor(completion.logprobs) - want).abs().max() <= 1e-5


def test_long_prompts_are_computed_in_chunks():
    """Prompts around the chunk size, and one that leaves room for a single token, continue as the full forward says."""
    model = never_ends(tiny("llama", tie_word_embeddings=False, max_position_embeddings=2 * CHUNK + 3))
    for length in (CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK + 2):
        prompt = prompts(length)[0]
        done = engine(model).generate([prompt], SamplingParams(max_tokens=2, temperature=0))[0]
        ids = list(prompt)
        for token in done.ids:
            with torch.inference_mode():
                hidden = model.hidden(torch.tensor([ids]), torch.arange(len(ids))[None])
                assert model.head(hidden[0, -1]).argmax().item() == token
            ids.append(token)
        assert len(done.ids) == min(2, 2 * CHUNK + 3 - length)


def test_changed_weights_count():
    """The engine reads the live model: training between two calls changes the second."""
    model = tiny("llama")
    one = engine(model)
    params = SamplingParams(max_tokens=10, temperature=0)
    before = one.generate(prompts(5), params)[0].ids
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-3)
    assert one.generate(prompts(5), params)[0].ids != before


def test_bfloat16():
    """A bfloat16 model answers, alone as in a batch."""
    model = tiny("llama").bfloat16()
    params = SamplingParams(max_tokens=20, seed=1)
    together = engine(model).generate(prompts(3, 20, 8), params)
    assert [engine(model).generate([p], params)[0].ids for p in prompts(3, 20, 8)] == [c.ids for c in together]


def test_impossible_prompts():
    """An empty prompt, and one that fills the context, are named before anything is computed."""
    model = tiny("llama", max_position_embeddings=64)
    with pytest.raises(UsageError, match="no tokens"):
        engine(model).generate([[1], []], SamplingParams())
    with pytest.raises(UsageError, match="64 tokens") as e:
        engine(model).generate(prompts(64), SamplingParams())
    assert "64" in e.value.found
    engine(model).generate(prompts(63), SamplingParams(temperature=0))


# ---------------------------------------------------------------------------------------------- any load

LAYOUTS = {"fused": lean.fuse, "packed": lean.pack, "int8": lean.int8, "fp16": lean.fp16}
LOADS = {
    "slots": {},
    "pages": {"paged": True, "cache_tokens": 4096},
    "too few pages": {"paged": True, "cache_tokens": 640, "reserve": 0.3},
    "nothing remembered": {"prefix_tokens": 0},
    "ahead": {"ahead": 6},
}


def any_requests(seed: int, count: int, logprobs: bool = False) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that share beginnings or not, with parameters of every kind."""
    dice = random.Random(seed)
    beginnings = prompts(300, 40)
    asked = []
    for i in range(count):
        prompt = dice.choice(beginnings)[: dice.choice((0, 30, 256, 290))] + prompts(20)[0][: dice.randint(1, 20)]
        asked.append((prompt, SamplingParams(
            max_tokens=dice.randint(1, 60),
            temperature=dice.choice((0.0, 0.7, 1.0, 1.5)),
            top_k=dice.choice((0, 0, 20)),
            top_p=dice.choice((1.0, 0.9)),
            min_p=dice.choice((0.0, 0.02)),
            repetition_penalty=dice.choice((1.0, 1.2)),
            presence_penalty=dice.choice((0.0, 0.5)),
            logit_bias=dice.choice(({}, {30: 2.0})),
            stop=dice.choice(((), ("\u00fb",))),
            seed=i,
            logprobs=logprobs,
        )))  # fmt: skip
    return asked


@pytest.mark.parametrize("load", LOADS)
def test_prompts_of_a_size_are_computed_together(load, monkeypatch):
    """In 8 bits: those of 17 to 32 tokens in one forward as far as a step goes, one of 40 between them alone; to the
    bit as one by one.
    """
    model = tiny("qwen3", max_position_embeddings=512)
    lean.int8(model)
    given = prompts(*range(17, 25), 40, *range(25, 33), 7)
    params = SamplingParams(max_tokens=6, temperature=0, logprobs=True)
    alone = [Engine(model, Letters(), prefix_tokens=0).generate([p], params)[0] for p in given]
    busy = Engine(model, Letters(), **LOADS[load])
    shapes = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: shapes.append(tuple(ids.shape)) or hidden(ids, *rest))
    together = busy.generate(given, params)
    assert [(c.ids, c.text, c.logprobs) for c in together] == [(c.ids, c.text, c.logprobs) for c in alone]
    if "cache_tokens" not in LOADS[load]:
        assert [shape for shape in shapes if shape[1] > 1] == [(8, 32), (1, 48), (8, 32), (1, 16)]


def test_prompts_wait_for_answers(monkeypatch):
    """Many prompt tokens are computed before the first answer is begun, and few between two tokens of an answer."""
    model = tiny("qwen3", max_position_embeddings=512)
    lean.int8(model)
    shapes = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: shapes.append(tuple(ids.shape)) or hidden(ids, *rest))
    mine = Engine(model, Letters(), rows=16, prefix_tokens=0)
    for i, prompt in enumerate(prompts(*[128] * 24)):
        mine.submit(mine.request(prompt, SamplingParams(max_tokens=5 + i % 2, temperature=0)))
    filled = []
    while mine.busy:
        shapes.clear()
        mine.step()
        filled.append([shape for shape in shapes if shape[1] > 1])
    assert [f for f in filled if f] == [[(4, 128)] * 4, [(4, 128)], [(4, 128)]]


@pytest.mark.parametrize("layout", ["plain", "packed", "int8"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 1, 128), (12, 2, 96), (4, 2, 80), (2, 2, 16)])
def test_short_texts_beside_a_long_one(heads, kv_heads, head_dim, layout):
    """A CPU multiplies few keys in another way than many, where heads are large: to the bit as alone all the same."""
    model = tiny("qwen3", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    LAYOUTS.get(layout, lambda model: None)(model)
    given, params = prompts(3, 17, 30, 31, 100), SamplingParams(max_tokens=20, temperature=0, logprobs=True)
    alone = [Engine(model, Letters(), rows=1, prefix_tokens=0).generate([p], params)[0] for p in given]
    together = Engine(model, Letters(), prefix_tokens=0).generate(given, params)
    assert [(c.ids, c.logprobs) for c in together] == [(c.ids, c.logprobs) for c in alone]


@pytest.mark.parametrize(("layout", "dtype"), [
    ("fused", "float32"), ("fused", "bfloat16"), ("packed", "float32"), ("packed", "bfloat16"), ("int8", "float32"),
    pytest.param("fp16", "float32", marks=needs_fbgemm),
])  # fmt: skip
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_the_same_text_at_any_load(load, layout, dtype, seed):
    """Requests submitted at random moments, some cancelled: ids, text and log-probabilities to the bit as alone, which
    is how `chat` and `--batch-size 1` ask.
    """
    model = tiny("qwen3", max_position_embeddings=512).to(DTYPES[dtype])
    LAYOUTS[layout](model)
    asked = any_requests(seed, 24, logprobs=True)
    alone = []
    for prompt, params in asked:
        alone.append(Engine(model, Letters(), rows=1, prefix_tokens=0).generate([prompt], params)[0])
    dice = random.Random(seed)
    busy = Engine(model, Letters(), rows=dice.choice((5, 16)), **LOADS[load])
    made = [busy.request(prompt, params, i) for i, (prompt, params) in enumerate(asked)]
    waiting, unwanted = list(made), set()
    while waiting or busy.busy:
        for _ in range(dice.choice((0, 0, 1, 5))):
            if waiting:
                busy.submit(waiting.pop(dice.randrange(len(waiting))))
        busy.step()
        if dice.random() < 0.02:
            gone = dice.choice(made)
            if gone not in waiting and gone.finish_reason is None:
                busy.cancel(gone)
                unwanted.add(gone.prompt_index)
    for request, want in zip(made, alone, strict=True):
        if request.prompt_index not in unwanted:
            got = request.completion()
            assert (got.ids, got.text, got.finish_reason) == (want.ids, want.text, want.finish_reason)
            assert got.logprobs == want.logprobs
    assert len(unwanted) < len(made) / 2
    if isinstance(busy.pool, Pages):  # nothing leaks
        busy.prefixes.clear()
        assert busy.pool.free == busy.pool.count - 1


def test_a_short_pool_sets_the_newest_aside(monkeypatch):
    """With little reserved and few pages, some answers wait outside of the cache, and none is computed twice."""
    model = never_ends(tiny("llama", tie_word_embeddings=False, max_position_embeddings=512))
    one = Engine(model, Letters(), paged=True, cache_tokens=640, reserve=0.1, prefix_tokens=0)
    aside, computed = [], []
    set_aside, window = one._set_aside, one.pool.window
    monkeypatch.setattr(one, "_set_aside", lambda row: (aside.append(row), set_aside(row)))
    monkeypatch.setattr(one.pool, "window", lambda *a: (computed.append(a[1].numel()), window(*a))[1])
    given = prompts(60, 61, 62, 63)
    params = SamplingParams(max_tokens=200, temperature=0)
    done = one.generate(given, params)
    assert aside
    assert [c.ids for c in done] == [engine(model).generate([p], params)[0].ids for p in given]
    assert sum(computed) <= 246 + 4 * 200 + 4 * len(computed)  # prompts, tokens, and rows that fill up


@pytest.mark.parametrize("paged", [False, True])
def test_a_prompt_is_computed_once(paged, monkeypatch):
    """Samples of one prompt, also when they do not fit at once; then a conversation that goes on from it."""
    model = never_ends(tiny("llama", tie_word_embeddings=False, max_position_embeddings=1024))
    one = Engine(model, Letters(), rows=3, paged=paged, cache_tokens=4096 if paged else None)
    lengths = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *rest: (lengths.append(ids.shape[1]), hidden(ids, *rest))[1])
    prompt = prompts(300)[0]
    params = SamplingParams(max_tokens=8, seed=1)
    done = one.generate([prompt], params, n=8)
    assert [n for n in lengths if n > 1] == [CHUNK, 44]
    lengths.clear()
    longer = one.generate([prompt + prompts(10)[0]], params)
    assert [n for n in lengths if n > 1] == [54]  # the last chunk has another end; the whole one is known
    monkeypatch.undo()
    fresh = engine(model)
    assert [c.ids for c in fresh.generate([prompt], params, n=8)] == [c.ids for c in done]
    assert [c.ids for c in fresh.generate([prompt + prompts(10)[0]], params)] == [c.ids for c in longer]


def test_completions_come_in_order_as_requests_do():
    """Requests are taken while others are answered; None means: not now."""
    model = never_ends(tiny("llama", tie_word_embeddings=False))
    one = engine(model, rows=2)
    taken = []

    def arriving():
        for i, prompt in enumerate(prompts(3, 4, 5, 6, 7)):
            while i > 2 and one.busy and len(taken) == i:
                taken.append(i)
                yield None
            yield one.request(prompt, SamplingParams(max_tokens=20 - 3 * i, seed=i), index=i)

    assert [c.prompt_index for c in one.completions(arriving())] == list(range(5))
    assert not one.busy


def test_an_answer_nobody_reads_on_is_given_up():
    """A stream that is closed frees its row; one that fails leaves an engine that works."""
    model = never_ends(tiny("llama", tie_word_embeddings=False))
    one = engine(model)
    pieces = one.stream(prompts(5)[0], SamplingParams(max_tokens=50))
    next(pieces)
    assert one.busy
    pieces.close()
    assert not one.busy
    with pytest.raises(RuntimeError, match="torn"):
        for _ in one.stream(prompts(5)[0], SamplingParams(max_tokens=50)):
            one.tokenizer = None
            one.pool.window = lambda *_: (_ for _ in ()).throw(RuntimeError("torn"))  # type: ignore[method-assign]
    assert not one.busy


def test_stop_ids_and_least_length():
    """Other tokens may end an answer, and none does before min_tokens."""
    model = never_ends(tiny("llama", tie_word_embeddings=False))
    prompt = prompts(8)[0]
    long = engine(model).generate([prompt], SamplingParams(max_tokens=30, temperature=0))[0].ids
    first = long.index(long[5])
    done = engine(model).generate([prompt], SamplingParams(temperature=0, stop_ids=(long[5],)))[0]
    assert (done.ids, done.end_id, done.finish_reason) == (long[:first], long[5], "stop")
    params = SamplingParams(max_tokens=20, min_tokens=20, temperature=0, stop_ids=(long[5],))
    kept = engine(model).generate([prompt], params)[0]
    assert len(kept.ids) == 20
    assert long[5] not in kept.ids


def test_top_logprobs():
    """The likeliest tokens of the distribution that was sampled, with the full forward's values, to 1e-5."""
    model = tiny("llama")
    prompt = prompts(12)[0]
    params = SamplingParams(max_tokens=10, temperature=0.8, logprobs=True, top_logprobs=5, seed=3)
    done = engine(model).generate([prompt], params)[0]
    assert len(done.top_logprobs) == len(done.logprobs) == len(done.ids) + (done.end_id is not None)
    ids = torch.tensor([[*prompt, *done.ids]])
    with torch.inference_mode():
        logits = model.head(model.hidden(ids, torch.arange(ids.shape[1])[None]))[0, len(prompt) - 1 :]
    want = (logits / 0.8).log_softmax(-1)
    for row, (got, chosen, id) in enumerate(zip(done.top_logprobs, done.logprobs, done.ids, strict=False)):
        assert [i for i, _ in got] == want[row].topk(5).indices.tolist()
        assert torch.allclose(torch.tensor([v for _, v in got]), want[row].topk(5).values, rtol=0, atol=1e-5)
        assert abs(chosen - want[row, id].item()) <= 1e-5


def test_a_fault_of_one_is_not_the_others():
    """A form that cannot be followed any further ends its own answer, with its own fault."""
    model = never_ends(tiny("llama", tie_word_embeddings=False))
    given, params = prompts(5, 6), SamplingParams(max_tokens=10, temperature=0)
    want = engine(model).generate(given, params)

    class Broken:
        left = 3

        def mask(self, logits):
            self.left -= 1
            if not self.left:
                raise UsageError("no further")

        def accept(self, id):
            pass

    one = engine(model)
    first, second = (one.request(prompt, params) for prompt in given)
    first.params, first.constraint = replace(params, form="any"), Broken()
    one.submit(first)
    one.submit(second)
    while one.busy:
        one.step()
    assert second.completion().ids == want[1].ids
    assert first.ids == want[0].ids[:2]
    with pytest.raises(UsageError, match="no further"):
        first.completion()
