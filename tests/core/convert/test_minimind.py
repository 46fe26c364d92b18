"""MiniMind's `.pth` files: read as its own formulas compute them, refused when they are something else, and written."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.core.convert import minimind
from minigpt.core.convert.open import open_model
from minigpt.core.data.batch import Batch
from minigpt.core.data.chat import template
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError, UsageError
from minigpt.core.models import folder
from tests.conftest import tiny

VOCAB = 320


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer.train(["Hello there! 你好，有什麼可以幫您？"] * 40, VOCAB)
    made.chat_template = template()
    return made


def state_dict(
    version: int, hidden: int = 64, layers: int = 3, kv_heads: int = 2, heads: int = 8, ffn: int = 176
) -> dict[str, Tensor]:
    """Random weights under MiniMind's names, float16, the head a second name of the embedding."""
    generator = torch.Generator().manual_seed(version)
    size = hidden // heads

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.1).half()

    def norm(width: int) -> Tensor:
        return (1 + 0.1 * torch.randn(width, generator=generator)).half()

    state = {"model.embed_tokens.weight": matrix(VOCAB, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        state[layer + "self_attn.q_proj.weight"] = matrix(heads * size, hidden)
        state[layer + "self_attn.k_proj.weight"] = matrix(kv_heads * size, hidden)
        state[layer + "self_attn.v_proj.weight"] = matrix(kv_heads * size, hidden)
        state[layer + "self_attn.o_proj.weight"] = matrix(hidden, heads * size)
        if version == 3:
            state[layer + "self_attn.q_norm.weight"] = norm(size)
            state[layer + "self_attn.k_norm.weight"] = norm(size)
        state[layer + "input_layernorm.weight"] = norm(hidden)
        state[layer + "post_attention_layernorm.weight"] = norm(hidden)
        state[layer + "mlp.gate_proj.weight"] = matrix(ffn, hidden)
        state[layer + "mlp.down_proj.weight"] = matrix(hidden, ffn)
        state[layer + "mlp.up_proj.weight"] = matrix(ffn, hidden)
    state["model.norm.weight"] = norm(hidden)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def reference(state: dict[str, Tensor], ids: Tensor, heads: int) -> Tensor:
    """MiniMind's forward from its description: pre-RMSNorm, rotary halves with theta 1e6, grouped queries, SwiGLU,
    tied head; version 3 norms each query and key head before the rotation. One row of ids, logits (T, V)."""
    w = {name: tensor.float() for name, tensor in state.items()}
    third = "model.layers.0.self_attn.q_norm.weight" in w
    eps = 1e-6 if third else 1e-5

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * w[name]

    def turn(x: Tensor) -> Tensor:  # (T, heads, D)
        half = x.shape[-1] // 2
        angle = torch.arange(len(x))[:, None] * 1e6 ** (-torch.arange(half) / half)  # (T, D/2)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(sum(name.endswith("q_proj.weight") for name in w)):
        layer = f"model.layers.{i}."
        h = norm(x, layer + "input_layernorm.weight")
        q, k, v = (h @ w[f"{layer}self_attn.{name}_proj.weight"].T for name in "qkv")
        size = q.shape[-1] // heads
        q, k, v = (t.unflatten(-1, (-1, size)) for t in (q, k, v))
        if third:
            q, k = norm(q, layer + "self_attn.q_norm.weight"), norm(k, layer + "self_attn.k_norm.weight")
        q, k = turn(q), turn(k)
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[layer + "self_attn.o_proj.weight"].T
        h = norm(x, layer + "post_attention_layernorm.weight")
        gate, up = h @ w[layer + "mlp.gate_proj.weight"].T, h @ w[layer + "mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ w[layer + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["model.embed_tokens.weight"].T


def save(path: Path, state: object, tokenizer: Tokenizer | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    if tokenizer is not None:
        tokenizer.save(path.parent)
    return path


def logits(path: Path, ids: Tensor) -> Tensor:
    model, _ = folder.load(path)
    rows = ids[None]
    batch = Batch(rows, rows, torch.arange(len(ids))[None], torch.zeros_like(rows), units=1.0)
    return model(batch, {"logits"}).logits[0].detach()


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("version", [2, 3])
def test_computes_what_minimind_computes(tmp_path, tokenizer, version, kv_heads):
    """Shapes alone give the model: logits within 1e-5 of the formulas, for each number of key/value heads."""
    state = state_dict(version, kv_heads=kv_heads)
    opened = open_model(save(tmp_path / "full_sft_64.pth", state, tokenizer))
    config, raw = folder.read_config(opened.path)
    assert config.model_type == {2: "llama", 3: "qwen3"}[version]
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (8, kv_heads, 3)
    assert (raw["dtype"], raw["eos_token_id"]) == ("float16", [2, 0])
    ids = torch.randint(0, VOCAB, (80,), generator=torch.Generator().manual_seed(1))
    expected = reference(state, ids, 8)
    assert expected.abs().max() > 1
    assert (logits(opened.path, ids) - expected).abs().max() <= 1e-5


def test_the_reference_can_tell_versions_apart(tmp_path, tokenizer):
    """The comparison above is sharp enough to see an epsilon, a theta and a head count that are wrong."""
    state = state_dict(2)
    path = save(tmp_path / "m.pth", state, tokenizer)
    ids = torch.randint(0, VOCAB, (80,), generator=torch.Generator().manual_seed(1))
    expected = reference(state, ids, 8)
    for wrong in ({"rms_norm_eps": 1e-3}, {"model.rope_theta": 1e4}, {"num_attention_heads": 4}):
        opened = open_model(path, overrides=wrong)
        assert (logits(opened.path, ids) - expected).abs().max() > 1e-3, wrong


def test_number_of_heads(tmp_path, tokenizer):
    """Version 2 has 8 heads unless told otherwise; version 3 tells by its norms."""
    state = state_dict(2, heads=4)
    path = save(tmp_path / "two.pth", state, tokenizer)
    opened = open_model(path, overrides={"model.num_attention_heads": 4})
    ids = torch.arange(40)
    assert (logits(opened.path, ids) - reference(state, ids, 4)).abs().max() <= 1e-5
    with pytest.raises(UsageError, match="heads do not fit") as e:
        open_model(path, overrides={"num_attention_heads": 7})
    assert "--set model.num_attention_heads" in e.value.fix
    state = state_dict(3, heads=4)
    opened = open_model(save(tmp_path / "three.pth", state, tokenizer))
    assert folder.read_config(opened.path)[0].num_attention_heads == 4
    assert (logits(opened.path, ids) - reference(state, ids, 4)).abs().max() <= 1e-5


def test_resume_file(tmp_path, tokenizer):
    """Of a checkpoint with optimizer and counters, the model's part."""
    state = state_dict(3)
    whole = {"model": state, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "epoch": 1, "step": 30}
    opened = open_model(save(tmp_path / "full_sft_64_resume.pth", whole, tokenizer))
    ids = torch.arange(30)
    assert (logits(opened.path, ids) - reference(state, ids, 8)).abs().max() <= 1e-5


def expert(state):
    state["model.layers.0.mlp.experts.0.gate_proj.weight"] = torch.zeros(8, 8)


def lora(state):
    state["model.layers.0.self_attn.q_proj.lora.A.weight"] = torch.zeros(8, 8)


def first_version(state):
    state["tok_embeddings.weight"] = state.pop("model.embed_tokens.weight")


def missing(state):
    del state["model.layers.1.mlp.up_proj.weight"]


def unexpected(state):
    state["model.layers.1.mlp.bias"] = torch.zeros(4)


def lost_layer(state):
    for name in [n for n in state if n.startswith("model.layers.1.")]:
        del state[name]


def other_shape(state):
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(170, 64)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (expert, "mixture of experts, which is not supported yet"),
        (lora, "LoRA"),
        (first_version, "MiniMind 1"),
        (missing, "model.layers.1.mlp.up_proj.weight"),
        (unexpected, "model.layers.1.mlp.bias"),
        (lost_layer, "model.layers.1.self_attn.q_proj.weight"),
        (other_shape, "another shape"),
        (lambda state: state.clear(), "no state dict"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, tokenizer, change, word):
    """Nothing is loaded with a name missing, unknown or of another shape; what is no dense model is named."""
    state = state_dict(2)
    change(state)
    path = save(tmp_path / "m.pth", state, tokenizer)
    with pytest.raises(DataError) as e:
        open_model(path)
    assert word in f"{e.value.message} {e.value.found}"


def test_a_file_cannot_run_code(tmp_path, tokenizer):
    """A pickle that would call something is refused, unread."""

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = save(tmp_path / "m.pth", {"model.embed_tokens.weight": Harm()}, tokenizer)
    with pytest.raises(DataError, match="not a file of tensors"):
        open_model(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_damaged_file(tmp_path, tokenizer, keep):
    """Cut anywhere, it is a DataError that names the file."""
    path = save(tmp_path / "m.pth", state_dict(2), tokenizer)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if keep < 1 else keep])
    with pytest.raises(DataError, match=r"m\.pth"):
        open_model(path)


def test_tokenizer(tmp_path, tokenizer):
    """Beside the file, in `model/` beside its directory as MiniMind has it, or given; one that is too large is not."""
    path = save(tmp_path / "repo" / "out" / "m.pth", state_dict(2))
    with pytest.raises(UsageError, match="without a tokenizer") as e:
        open_model(path)
    assert "--tokenizer" in e.value.fix
    tokenizer.save(tmp_path / "elsewhere")
    given = open_model(path, tokenizer=tmp_path / "elsewhere")
    tokenizer.save(tmp_path / "repo" / "model")
    assert open_model(path) == given
    assert Tokenizer.load(given.path).fingerprint == tokenizer.fingerprint
    larger = Tokenizer.train(["some other text, long enough for many merges"] * 30, VOCAB + 16)
    larger.save(tmp_path / "larger")
    assert larger.vocab_size > VOCAB
    with pytest.raises(DataError, match="tokens, the model"):
        open_model(path, tokenizer=tmp_path / "larger")


# ---------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("version", [2, 3])
def test_round_trip(tmp_path, tokenizer, version, dtype):
    """What comes back as `.pth` is what went in: MiniMind's names, the tied head one storage, a sound archive."""
    state = state_dict(version)
    opened = open_model(save(tmp_path / "m.pth", state, tokenizer))
    minimind.write(opened.path, tmp_path / "back.pth", dtype=dtype)
    for mapped in (True, False):
        back = torch.load(tmp_path / "back.pth", weights_only=True, mmap=mapped)
        assert back.keys() == state.keys()
        kind = getattr(torch, dtype)
        assert all(torch.equal(back[name], tensor.to(kind)) for name, tensor in state.items())
        assert back["lm_head.weight"].data_ptr() == back["model.embed_tokens.weight"].data_ptr()
    assert zipfile.ZipFile(tmp_path / "back.pth").testzip() is None


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_what_a_file_cannot_say_is_refused(tmp_path, arch):
    """A model that its reader would take for another is written only when the flags say that he will be told."""
    model = tiny(arch, num_attention_heads=8, head_dim=8, rope_theta=5e4, rms_norm_eps=1e-4)
    folder.write(tmp_path / "m", model, model.config)
    with pytest.raises(UsageError, match="rms_norm_eps, rope_theta") as e:
        minimind.write(tmp_path / "m", tmp_path / "m.pth")
    told = {"model.rms_norm_eps": 1e-4, "model.rope_theta": 50000.0}
    assert all(f"--set {key}={value}" in e.value.fix for key, value in told.items())
    assert not (tmp_path / "m.pth").exists()
    minimind.write(tmp_path / "m", tmp_path / "m.pth", overrides=told)
    stretched = tiny(arch, num_attention_heads=8, rope_parameters={"rope_type": "linear", "factor": 2.0})
    folder.write(tmp_path / "s", stretched, stretched.config)
    with pytest.raises(UsageError, match="context was extended"):
        minimind.write(tmp_path / "s", tmp_path / "s.pth", overrides=told)


def test_numbers_too_large_for_float16(tmp_path):
    """They would become infinite; the tensor is named."""
    model = tiny("qwen3", rope_theta=1e6)
    with torch.no_grad():
        model.model.norm.weight[3] = 7e4
    folder.write(tmp_path / "m", model, model.config)
    with pytest.raises(DataError, match=r"model\.norm\.weight") as e:
        minimind.write(tmp_path / "m", tmp_path / "m.pth")
    assert "bfloat16" in e.value.fix
