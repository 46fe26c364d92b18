"""llama.cpp as a reference, through the HTTP server inside the package xllamacpp."""

from __future__ import annotations

import json
import random
import unicodedata
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minigpt.core.models.decoder import Decoder


class LlamaCpp:
    """One model open in llama.cpp: one slot, one thread, everything that can be float32 in float32.

    at_once: tokens of a prompt that are computed together. Another number sums in another order.
    """

    def __init__(self, path: Path, *, at_once: int = 512):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
        params.n_ubatch = at_once
        params.fit_params = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_prompt = False
        self._server = xllamacpp.Server(params)

    def post(self, route: str, **body: Any) -> Any:
        """The answer of one route of the server."""
        request = urllib.request.Request(
            self._server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text. special: spellings of control tokens become those tokens."""
        return self.post("/tokenize", content=text, add_special=False, parse_special=special)["tokens"]

    def logprobs(self, prompt: Sequence[int], vocab_size: int) -> list[float]:
        """Log-probability of every token after `prompt`, by id."""
        # the server tells none for half a character or an end: make it choose a letter; what it tells is unbiased
        letter = self.tokenize("a")[0]
        answer = self.post(
            "/completion",
            prompt=list(prompt),
            n_predict=1,
            temperature=0,
            n_probs=vocab_size,
            logit_bias=[[letter, 1e4]],
        )
        found = {t["id"]: t["logprob"] for t in answer["completion_probabilities"][0]["top_logprobs"]}
        assert len(found) == vocab_size
        return [found[id] for id in range(vocab_size)]

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], str]:
        """Ids and text of the likeliest continuation, without the token that ended it."""
        answer = self.post("/completion", prompt=prompt, n_predict=count, temperature=0, return_tokens=True)
        return answer["tokens"], answer["content"]

    def template(self, messages: list[dict[str, Any]], **more: Any) -> str:
        """A conversation as text, in the chat template of the file."""
        return self.post("/apply-template", messages=messages, **more)["prompt"]


@torch.no_grad()
def logprobs(model: Decoder, prompt: Sequence[int]) -> Tensor:
    """Log-probability of every token after `prompt`, computed here in float32, (V,)."""
    ids = torch.tensor([prompt])
    return model.head(model.hidden(ids, torch.arange(len(prompt))[None]))[0, -1].log_softmax(-1)


def differences(model: Decoder, other: LlamaCpp, prompts: Sequence[Sequence[int]]) -> Tensor:
    """After every prompt, the largest difference of log-probabilities over the whole vocabulary, (prompts,)."""
    theirs = torch.tensor([other.logprobs(prompt, model.config.vocab_size) for prompt in prompts]).double()
    theirs = theirs.log_softmax(-1)  # the server's sum to 1.0002 for 49,152 tokens: it adds them up in float32
    return (torch.stack([logprobs(model, prompt) for prompt in prompts]) - theirs).abs().amax(1)


@contextmanager
def inputs_rounded(model: Decoder, quant: str) -> Iterator[None]:
    """What ggml does on a CPU before it multiplies with a matrix: the other side takes a type fit for the matrix's.

    That is float16 for f16, bfloat16 for bf16 and blocks of 32 bytes with one scale (q8_0) for q8_0 and q4_0
    (`vec_dot_type` in ggml-cpu.c). Sums stay float32, and so does all that multiplies no such matrix.
    """

    def rounded(x: Tensor) -> Tensor:
        if quant in ("f16", "bf16"):
            return x.to(torch.float16 if quant == "f16" else torch.bfloat16).float()
        gguf = pytest.importorskip("gguf")
        kind = gguf.GGMLQuantizationType.Q8_0
        blocks = gguf.quantize(x.contiguous().numpy(), kind)
        return torch.from_numpy(gguf.dequantize(blocks, kind)).view(x.shape)

    before = [
        layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
        for layer in model.model.modules()
        if isinstance(layer, nn.Linear)
    ]
    head = model.model.norm.register_forward_hook(lambda _, __, output: rounded(output))
    try:
        yield
    finally:
        for hook in (*before, head):
            hook.remove()


def _assigned(random_: random.Random) -> str:
    """Any character. What Unicode gave a meaning only lately is left out: each library has its own edition of it."""
    while unicodedata.category(found := chr(random_.randint(0x20, 0x2FFFF))) in ("Cn", "Cs"):
        pass
    return found


_KINDS = (
    lambda r: r.choice(("the", "Hello", "don't", "I'LL", "we've", "naïve", "Straße", "x_1", "http://a.b/c?d=e#f")),
    lambda r: "".join(chr(r.randint(0x4E00, 0x9FFF)) for _ in range(r.randint(1, 6))),
    lambda r: r.choice(("，", "。", "「你好」", "こんにちは", "カタカナ", "안녕하세요", "𠮷野家", "ｆｕｌｌ　ｗｉ")),
    lambda r: r.choice(("🙂", "👩‍👩‍👧‍👦", "🇨🇳", "👍🏽", "❤️", "🏴‍☠️", "🫠🫠", "™", "½", "Ⅷ", "①", "²")),
    lambda r: " " * r.randint(1, 9),
    lambda r: r.choice(("\n", "\n\n", "\r\n", "\t", " \n ", "\n    ", "\u00a0", "\u3000", "\u2028", "\x0b", "\u200b")),
    lambda r: str(r.randint(0, 10 ** r.randint(1, 12))),
    lambda r: r.choice(("3.14", "1,000", "-5", "2024-01-02", "١٢٣", "１２３", "१२३", "1e-5", "0x1F")),
    lambda r: "".join(r.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…—“”") for _ in range(r.randint(1, 5))),
    lambda r: r.choice(("שלום", "مرحبا", "привет", "Ωmega", "e\u0301", "ก็", "हिन्दी", "ǅ", "ﬁ", "İ")),
    lambda r: _assigned(r),
)  # fmt: skip


def mixed_texts(count: int, seed: int = 0) -> list[str]:
    """Texts that put pre-tokenizers to the test: scripts, emoji, digits, all sorts of white space, in any order."""
    random_ = random.Random(seed)
    return ["".join(random_.choice(_KINDS)(random_) for _ in range(random_.randint(1, 20))) for _ in range(count)]
