"""Models as they lie on the hub open here as if they were our own: weights, configurations, tokenizers, templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minigpt.core.convert.check import TEXTS
from minigpt.core.data.batch import Batch
from minigpt.core.data.chat import render
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError, UsageError
from minigpt.core.models import folder
from tests.conftest import run_cli
from tests.core.convert.families import FAMILIES, RELEASED, TOKENIZER_OF, write_tokenizer


def release(path: Path, name: str, *, shards: int = 3) -> Path:
    """A folder as its author would have uploaded it: that config.json, weights in its precision, several files."""
    raw = RELEASED[name]
    write_tokenizer(path, TOKENIZER_OF[name])
    (path / "config.json").write_text(json.dumps(raw))
    dtype = getattr(torch, raw.get("dtype") or raw["torch_dtype"])
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.1)
    state = dict(model.state_dict())
    if raw.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    names = sorted(state)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({n: state[n].contiguous() for n in names[i::shards]}, path / file, metadata={"format": "pt"})
    where = {n: files[i % shards] for i, n in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


# ---------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_compute_the_same(tmp_path, name):
    """Sharded half-precision folders with either spelling of RoPE: float32 logits within 1e-5 of transformers' in
    float32, and of what it computes in float64, so that a failure tells which side has moved.
    """
    path = release(tmp_path, name)
    theirs, wide = (AutoModelForCausalLM.from_pretrained(path, dtype=d) for d in (torch.float32, torch.float64))
    ours, _ = folder.load(path)
    ids = torch.randint(0, 720, (2, 200), generator=torch.Generator().manual_seed(4))
    positions = torch.arange(200).expand_as(ids)
    logits = ours(Batch(ids, ids, positions, torch.zeros_like(ids), units=1.0), {"logits"}).logits
    expected, exact = theirs(ids).logits, wide(ids).logits
    assert exact.abs().max() > 1
    apart = {"ours": logits - exact, "theirs": expected - exact, "each other": logits - expected}
    assert max((far := {k: d.abs().max().item() for k, d in apart.items()}).values()) <= 1e-5, far


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
          "rope_scaling": None}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)  # fmt: skip
def test_keys_that_change_the_maths_are_refused_by_name(tmp_path, change, word):
    """A key that is not implemented is never ignored, before any weight is read."""
    (tmp_path / "config.json").write_text(json.dumps({**RELEASED["Llama-3.2-1B-Instruct"], **change}))
    with pytest.raises(UsageError) as e:
        folder.read_config(tmp_path)
    assert word in f"{e.value.message} {e.value.found}"


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "minimind", "architectures": ["MiniMindForCausalLM"]},
    ],
)
def test_unsupported_classes_are_told_with_those_we_have(tmp_path, change):
    """Also another head on a body that we have."""
    (tmp_path / "config.json").write_text(json.dumps({**RELEASED["Llama-3.2-1B-Instruct"], **change}))
    with pytest.raises(DataError, match="not supported here") as e:
        folder.read_config(tmp_path)
    assert change["architectures"][0] in e.value.found
    assert "LlamaForCausalLM (llama)" in e.value.fix and "Qwen3ForCausalLM (qwen3)" in e.value.fix


def test_nothing_is_read_of_weights_that_do_not_fit(tmp_path):
    """Names and shapes are compared before the first tensor, over all shards."""
    path = release(tmp_path, "Qwen3-0.6B")
    (path / "config.json").write_text(json.dumps({**RELEASED["Qwen3-0.6B"], "num_hidden_layers": 3}))
    with pytest.raises(DataError, match="do not fit") as e:
        folder.load(path)
    assert "missing: model.layers.2." in e.value.found


# ---------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Each family's tokenizer, ours and transformers'."""
    made = {}
    for name in FAMILIES:
        path = write_tokenizer(tmp_path_factory.mktemp(name), name)
        (path / "config.json").write_text('{"model_type": "llama"}')
        made[name] = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_of_texts(both, name):
    """Other normalizers and pre-tokenizers, mixed texts: the ids are transformers'."""
    ours, theirs = both[name]
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("name", ["qwen3", "llama3", "smollm2"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_ids_of_any_text(both, name, text):
    """Any text at all, half characters and literals of special tokens excepted: those are content here."""
    ours, theirs = both[name]
    if not any("\ud800" <= c <= "\udfff" for c in text):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


CHATS = [
    [{"role": "user", "content": "Hello there"}],
    [
        {"role": "system", "content": "Be brief.\n\nAnd kind."},
        {"role": "user", "content": "你好! 12345 e\u0301"},
        {"role": "assistant", "content": "fine, thanks 🙂"},
        {"role": "user", "content": " more?  And more. "},
    ],
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["qwen3", "llama3", "smollm2", "llama2", "mistral"])
def test_ids_of_chats(both, name, chat):
    """Prompts and whole conversations in the model's own template: the ids are apply_chat_template's."""
    ours, theirs = both[name]
    for thinking in (None, False):
        extra = {} if thinking is None else {"enable_thinking": thinking}
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, **extra)
        assert render(ours, chat, generation_prompt=True, thinking=thinking).ids == list(expected["input_ids"])
    whole = [*chat, {"role": "assistant", "content": "Well, yes."}]
    trained = render(ours, whole)
    assert trained.ids == list(theirs.apply_chat_template(whole, return_dict=True)["input_ids"])
    learnt = [i for i, learn in zip(trained.ids, trained.mask, strict=True) if learn]
    end = {"llama3": "<|eot_id|>", "llama2": "</s>", "mistral": "</s>"}.get(name, "<|im_end|>")
    assert ours.decode(learnt, skip_special=False).endswith(f"Well, yes.{end}")


@pytest.mark.parametrize(("name", "token"), [("qwen3", "<|endoftext|>"), ("llama3", "<|begin_of_text|>"),
                                             ("smollm2", "<|endoftext|>"), ("llama2", "<s>")])  # fmt: skip
def test_what_stands_before_a_text(both, name, token):
    """The token that the model's own tokenizer puts there; without such a one, that between documents."""
    ours, _ = both[name]
    assert ours.token(ours.opening_id) == token


def test_bos_by_the_configuration(tmp_path):
    """`add_bos_token` counts as well as a post-processor."""
    ours = Tokenizer.load(write_tokenizer(tmp_path, "smollm2", add_bos_token=True))
    assert ours.token(ours.opening_id) == "<|im_start|>"


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_text_that_goes_on_gets_no_space(both, name):
    """Old tokenizers put a space before a text; in the midst of a line there is none. Pieces then join to the whole."""
    ours, theirs = both[name]
    for left, right in (("Hello there,", " how are you"), ("你好", "！有什麼"), ("x =", "\n1")):
        pieces = [*ours.encode(left), *ours.encode_batch([right], inner=True)[0]]
        assert theirs.decode(pieces) == left + right
    assert ours.encode_batch(["a"], inner=True) != ours.encode_batch(["a"])
    same = both["qwen3"][0]
    assert same.encode_batch(["a b"], inner=True) == same.encode_batch(["a b"])


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_of_tokens(both, name):
    """Bits per byte divides by these: over a text they sum to its bytes, and to the space that some put in front."""
    ours, _ = both[name]
    for text in TEXTS:
        if name == "qwen3":
            text = text.replace("é", "e")  # normalisation may change the number of bytes
        extra = 1 if name in ("llama2", "mistral") and text and not (name == "mistral" and text[0] == " ") else 0
        assert sum(ours.token_bytes[i] for i in ours.encode(text)) == len(text.encode()) + extra


def test_template_by_name(tmp_path):
    """tokenizer_config.json may hold several templates: the default one is taken. A .jinja file wins over all."""
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    path = write_tokenizer(tmp_path, "smollm2", chat_template=named)
    assert Tokenizer.load(path).chat_template == "plain"
    (path / "chat_template.jinja").write_text("own")
    assert Tokenizer.load(path).chat_template == "own"


def test_tokenizer_in_an_older_form(tmp_path):
    """A sentencepiece file alone: the way to tokenizer.json is told."""
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(DataError, match="older form") as e:
        Tokenizer.load(tmp_path)
    assert "save_pretrained" in e.value.fix


# ---------------------------------------------------------------------------------------------- use


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Llama-3.2-1B-Instruct", "SmolLM2-135M-Instruct"])
def test_it_trains_and_answers(tmp_path, name):
    """Fine-tuning and chat take the folder as one of ours; what is trained opens in transformers again."""
    path = release(tmp_path / "theirs", name)
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}]}] * 30
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = run_cli("sft", "-m", path, "-d", tmp_path / "chat.jsonl", "--steps", 2, "--max-len", 64, "-o",
                             tmp_path / "run", "--dtype", "float32")  # fmt: skip
    assert code == 0, err
    code, _, err = run_cli("chat", "-m", out.strip(), "-p", "hi", "--max-tokens", 4)
    assert code == 0, err
    loaded = AutoModelForCausalLM.from_pretrained(out.strip(), output_loading_info=True)[1]
    assert not any(loaded.values())
