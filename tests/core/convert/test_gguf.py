"""GGUF written and read: every number where it belongs, nothing silently changed, a damaged file never a crash."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("gguf")

import gguf
from gguf import GGMLQuantizationType as Type

from minigpt.core.convert import gguf_arch, gguf_read, gguf_write, stream
from minigpt.core.data import chat
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError, MinigptError, UsageError
from minigpt.core.models import architecture, folder, model_types
from minigpt.core.models.decoder import Decoder
from minigpt.core.report import Report
from tests.conftest import tiny
from tests.core.convert.llamacpp import mixed_texts

ARCHITECTURES = model_types()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip


class Told(Report):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str, *, fix: str | None = None) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    made = Tokenizer.train(mixed_texts(200, seed=1), 500)
    made.chat_template = chat.template(True)
    return made


def save(path: Path, model: Decoder, tokens: Tokenizer, dtype: str = "float32") -> Path:
    roles = {"bos_token_id": tokens.role("bos_token"), "pad_token_id": tokens.pad_id}
    folder.write(path, model, model.config, eos_token_id=tokens.eos_ids, dtype=dtype, **roles)
    tokens.save(path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokens) -> Path:
    """A GGUF file of a few tens of kilobytes, to be damaged."""
    base = tmp_path_factory.mktemp("small")
    model = tiny("llama", vocab_size=500, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    return gguf_write.write(save(base / "model", model, tokens), base / "small.gguf", quant="q8_0").path


# ---------------------------------------------------------------------------------------------- there


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_transformers_reads_the_same_model(arch, tmp_path, tokens):
    """transformers' own reading of the file gives our logits and tokens (float32, within 1e-5)."""
    pytest.importorskip("accelerate", reason="transformers wants it for GGUF files")
    size = {"head_dim": 128} if arch == "qwen3" else {}  # transformers does not read it from the file
    model = tiny(arch, vocab_size=510, tie_word_embeddings=False, **size)
    alone = gguf_write.write(
        save(tmp_path / "model", model, tokens), tmp_path / "file" / "x.gguf", quant="f32"
    ).path.parent
    theirs = AutoModelForCausalLM.from_pretrained(alone, gguf_file="x.gguf", dtype=torch.float32)
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.head(model.hidden(ids, torch.arange(40).expand(2, 40)))
        assert (theirs(ids).logits - ours).abs().max() < 1e-5
    reader = AutoTokenizer.from_pretrained(alone, gguf_file="x.gguf")
    texts = mixed_texts(50, seed=3)
    assert [reader.encode(t, add_special_tokens=False) for t in texts] == tokens.encode_batch(texts)


TYPES = {  # --quant → types of: a norm, a matrix, the embedding of a tied model, of an untied one, the head
    "f32": (Type.F32, Type.F32, Type.F32, Type.F32, Type.F32),
    "f16": (Type.F32, Type.F16, Type.F16, Type.F16, Type.F16),
    "bf16": (Type.F32, Type.BF16, Type.BF16, Type.BF16, Type.BF16),
    "q8_0": (Type.F32, Type.Q8_0, Type.Q8_0, Type.Q8_0, Type.Q8_0),
    "q4_0": (Type.F32, Type.Q4_0, Type.Q8_0, Type.Q4_0, Type.Q8_0),
}


@pytest.mark.parametrize("quant", TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_types(quant, tied, tmp_path, tokens, monkeypatch):
    """Read by the gguf package: each tensor has its type, and the numbers its quantiser makes of the whole tensor."""
    monkeypatch.setattr(stream, "PIECE", 3000)  # several pieces a tensor
    model = tiny("llama", vocab_size=500, hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
    told = Told()
    written = gguf_write.write(save(tmp_path, model, tokens), tmp_path / "x.gguf", quant=quant, report=told)
    reader = gguf.GGUFReader(written.path)
    found = {t.name: t for t in reader.tensors}
    norm, matrix, tied_embedding, embedding, head = TYPES[quant]
    assert found["output_norm.weight"].tensor_type == found["blk.1.ffn_norm.weight"].tensor_type == norm
    assert {found[f"blk.0.{name}.weight"].tensor_type for name in ("attn_q", "attn_v", "ffn_down")} == {matrix}
    assert found["token_embd.weight"].tensor_type == (tied_embedding if tied else embedding)
    assert tied is ("output.weight" not in found)
    assert tied or found["output.weight"].tensor_type == head
    assert (written.size, written.tensors) == (written.path.stat().st_size, len(found))
    assert (told.warnings, written.wider) == ([], {})
    state = model.state_dict()
    written_down, down = found["blk.0.ffn_down.weight"].data, state["model.layers.0.mlp.down_proj.weight"].numpy()
    assert written_down.tobytes() == gguf.quantize(down, matrix).tobytes()
    assert reader.get_field("general.file_type").contents() == getattr(
        gguf.LlamaFileType, "ALL_F32" if quant == "f32" else f"MOSTLY_{quant.upper()}"
    )


def test_rows_that_do_not_fit_are_wider_and_named(tmp_path, tokens):
    """A row of 48 has no whole number of blocks of 32: float16, and the report says which tensors."""
    model, told = tiny("llama", vocab_size=500), Told()
    written = gguf_write.write(save(tmp_path, model, tokens), tmp_path / "x.gguf", quant="q8_0", report=told)
    names = {name for name, p in model.named_parameters() if p.dim() == 2 and p.shape[1] % 32}
    assert written.wider == dict.fromkeys(names, "f16") and len(names) > 5
    (warning,) = told.warnings
    assert all(re.sub(r"\.\d\.", ".*.", name) in warning for name in names) and "down_proj" in warning
    types = {t.name: t.tensor_type for t in gguf.GGUFReader(written.path).tensors}
    assert types["blk.0.attn_q.weight"] == Type.F16


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rope", [None, YARN, YARN | {"attention_factor": 1.5}, LINEAR, LLAMA3])
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back(arch, rope, tied, tmp_path, tokens, monkeypatch):
    """float32 comes back bit for bit, with the same configuration, tokens, roles and template."""
    if rope is LLAMA3 and arch != "llama":
        return
    monkeypatch.setattr(stream, "PIECE", 3000)
    model = tiny(arch, vocab_size=507, tie_word_embeddings=tied, rms_norm_eps=1e-5, rope_theta=5e5, rope_scaling=rope)
    gguf_write.write(save(tmp_path / "a", model, tokens), tmp_path / "x.gguf", quant="f32")
    gguf_read.unpack(tmp_path / "x.gguf", tmp_path / "b")
    back, raw = folder.load(tmp_path / "b")
    ours = dict(model.config.rope_parameters)
    theirs = dict(back.config.rope_parameters)
    assert theirs.pop("attention_factor", None) == pytest.approx(ours.pop("attention_factor", None))
    back.config.rope_parameters, model.config.rope_parameters = theirs, ours
    assert back.config == model.config
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    read = Tokenizer.load(tmp_path / "b")
    texts = mixed_texts(100)
    assert read.encode_batch(texts) == tokens.encode_batch(texts)
    assert (read.added, read.eos_ids, read.pad_id, read.document_id, read.turn_end_id) == (
        tokens.added, tokens.eos_ids, tokens.pad_id, tokens.document_id, tokens.turn_end_id
    )  # fmt: skip
    assert [read.role(r) for r in ("bos_token", "eos_token", "pad_token", "unk_token")] == [
        tokens.role(r) for r in ("bos_token", "eos_token", "pad_token", "unk_token")
    ]
    assert (read.chat_template, raw["eos_token_id"]) == (tokens.chat_template, list(tokens.eos_ids))
    assert read.decode([30, 1, 40]) == tokens.decode([30, 1, 40])  # which tokens show in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_of_half_the_bits(dtype, tmp_path, tokens):
    """A bfloat16 or float16 folder written in its own type loses nothing."""
    model = tiny("qwen3", vocab_size=500)
    save(tmp_path, model, tokens, dtype)
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    gguf_write.write(tmp_path, tmp_path / "x.gguf", quant=short)
    want, _ = folder.load(tmp_path)
    for name, tensor in gguf_read.read(tmp_path / "x.gguf").tensors():
        assert torch.equal(tensor, want.state_dict()[name])


@pytest.mark.parametrize(
    "kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q6_K, Type.Q4_K]
)
def test_types_read(kind, tmp_path, tokens, monkeypatch):
    """A matrix of every common type, read in pieces, is what the gguf package makes of the whole."""
    monkeypatch.setattr(stream, "PIECE", 2000)
    model = tiny("llama", vocab_size=500, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    source = gguf_write.write(save(tmp_path, model, tokens), tmp_path / "x.gguf", quant="f32").path
    values, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        raw = gguf.quantize(np.random.default_rng(0).standard_normal((256, 256), np.float32), kind)
    except NotImplementedError:  # the package has no quantiser for it: any bits, with scales of a moderate size
        raw = np.random.default_rng(0).integers(0, 60, (256, size * 256 // values), np.uint8)
    names = ("blk.0.ffn_up.weight", "blk.0.attn_q.weight")
    rewritten(source, tmp_path / "y.gguf", tensors=dict.fromkeys(names, (raw, kind)))
    foreign = gguf_read.read(tmp_path / "y.gguf")
    want = gguf.dequantize(raw.view(np.uint8).reshape(256, -1), kind)
    assert np.array_equal(foreign.tensor("model.layers.0.mlp.up_proj.weight").numpy(), want)
    turned = foreign.tensor("model.layers.0.self_attn.q_proj.weight").numpy()
    assert np.array_equal(gguf_arch.to_neighbours(turned, 64), want)


def rewritten(
    source: Path, out: Path, *, keys: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None
) -> Path:
    """A copy of a GGUF file, made by the gguf package, with keys set (None: left out) and tensors replaced."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, (keys or {}).get("general.architecture") or "llama")
    kinds = {str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in (keys or {}):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for name, value in (keys or {}).items():
        if value is not None and name != "general.architecture":
            writer.add_key_value(name, value, kinds.get(type(value), gguf.GGUFValueType.FLOAT32))
    for tensor in reader.tensors:
        data, kind = (tensors or {}).get(tensor.name, (tensor.data, tensor.tensor_type))
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    for name in (tensors or {}).keys() - {t.name for t in reader.tensors}:
        writer.add_tensor(name, tensors[name][0], raw_dtype=tensors[name][1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


# ---------------------------------------------------------------------------------------------- refused on writing


def refused(path: Path, out: Path, quant: str = "f32") -> DataError:
    with pytest.raises(DataError) as error:
        gguf_write.write(path, out, quant=quant)
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    return error.value


def test_what_cannot_be_written(tmp_path, tokens):
    """A type unknown, numbers beyond float16, numbers that are none, RoPE without words: nothing is left behind."""
    out = tmp_path / "x.gguf"
    model = tiny("llama", vocab_size=500)
    path = save(tmp_path / "model", model, tokens)
    with pytest.raises(UsageError, match="--quant"):
        gguf_write.write(path, out, quant="q3_k")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(state, path / folder.WEIGHTS)
    error = refused(path, out, "f16")
    assert "blk.1.ffn_up" in error.message and error.found == "100000" and "bf16" in str(error.fix)
    gguf_write.write(path, tmp_path / "fits.gguf", quant="bf16")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(state, path / folder.WEIGHTS)
    assert "not numbers" in refused(path, out).message
    del state["model.norm.weight"]
    save_file(state, path / folder.WEIGHTS)
    assert "model.norm.weight" in str(refused(path, out).found)
    steep = tiny("llama", vocab_size=500, rope_scaling=YARN | {"beta_slow": 8.0})
    assert "beta_slow" in refused(save(tmp_path / "steep", steep, tokens), out).message
    other = tiny("qwen3", vocab_size=500, rope_scaling=LLAMA3)
    assert "llama3" in refused(save(tmp_path / "other", other, tokens), out).message


def test_an_architecture_that_llama_cpp_does_not_know(tmp_path, tokens, monkeypatch):
    """Its file says so, and those that it knows are listed, to the writer and to the reader."""
    source = save(tmp_path / "m", tiny("qwen3", vocab_size=tokens.vocab_size), tokens)
    gguf_write.write(source, tmp_path / "x.gguf")
    monkeypatch.setattr(architecture("qwen3").Config, "gguf", None)
    for attempt in (lambda: gguf_write.write(source, tmp_path / "y.gguf"), lambda: gguf_read.read(tmp_path / "x.gguf")):
        with pytest.raises(DataError) as e:
            attempt()
        assert (e.value.found, e.value.fix) == ("qwen3", "supported: llama")


def test_an_earlier_file_survives_a_failure(tmp_path, tokens):
    """Writing is all or nothing: the old file stays when the new one cannot be finished."""
    out = tmp_path / "x.gguf"
    model = tiny("llama", vocab_size=500)
    gguf_write.write(save(tmp_path / "model", model, tokens), out, quant="f32")
    before = out.read_bytes()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(DataError):
        gguf_write.write(save(tmp_path / "model", model, tokens), out, quant="f32")
    assert out.read_bytes() == before and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("change", "named"), [
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}, "add_prefix_space"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}}, "Split"),
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ({"post_processor": {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}}},
     "[1,"),
])  # fmt: skip
def test_tokenizers_that_llama_cpp_has_no_words_for(change, named, tmp_path, tokens):
    """Refused by name, never approximated."""
    path = save(tmp_path / "model", tiny("llama", vocab_size=500), tokens)
    raw = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    (path / "tokenizer.json").write_text(json.dumps(raw | change), encoding="utf-8")
    assert named in str(refused(path, tmp_path / "x.gguf").found)


def test_tokenizers_that_do_not_fit(tmp_path, tokens):
    """More tokens than the model has rows; none that was merged, which llama.cpp refuses to load."""
    path = save(tmp_path / "model", tiny("llama", vocab_size=499), tokens)
    assert "500 tokens, its model 499" in refused(path, tmp_path / "x.gguf").message
    Tokenizer.train(["a"], 292).save(path)
    assert "merges nothing" in refused(path, tmp_path / "x.gguf").message


def test_marks_of_training_stay_inside(tmp_path, tokens):
    """`{% generation %}` is no jinja to most readers of GGUF files: comments take its place, and ours reads them."""
    path = save(tmp_path / "model", tiny("llama", vocab_size=500), tokens)
    written = gguf_write.write(path, tmp_path / "x.gguf", quant="f32").path
    template = gguf.GGUFReader(written).get_field("tokenizer.chat_template").contents()
    assert "generation -%}" in str(tokens.chat_template) and "generation -%}" not in template
    assert gguf_read.read(written).tokenizer.chat_template == tokens.chat_template


def test_composing_normalizer_is_told(tmp_path, tokens):
    """Qwen's tokenizers compose characters first, which llama.cpp does not: written, with a warning."""
    path = save(tmp_path / "model", tiny("llama", vocab_size=500), tokens)
    raw = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    (path / "tokenizer.json").write_text(json.dumps(raw | {"normalizer": {"type": "NFC"}}), encoding="utf-8")
    told = Told()
    gguf_write.write(path, tmp_path / "x.gguf", quant="f32", report=told)
    assert len(told.warnings) == 1 and "NFC" in told.warnings[0]


# ---------------------------------------------------------------------------------------------- refused on reading


def misread(path: Path) -> str:
    with pytest.raises(DataError) as error:
        gguf_read.read(path)
    assert str(path) in error.value.message
    return f"{error.value.message} | {error.value.found} | {error.value.fix}"


@pytest.mark.parametrize(("key", "value", "named"), [
    ("general.architecture", "mamba", "supported: llama, qwen3"),
    ("llama.expert_count", 8, "llama.expert_count = 8"),
    ("llama.attention.sliding_window", 4096, "llama.attention.sliding_window"),
    ("llama.logit_scale", 0.25, "llama.logit_scale"),
    ("llama.attention.key_length", 12, "attention.value_length"),
    ("llama.rope.dimension_count", 4, "rope.dimension_count"),
    ("llama.rope.scaling.type", "longrope", "longrope"),
    ("llama.block_count", None, "llama.block_count is missing"),
    ("llama.block_count", 2_000_000_000, "larger than the whole file"),
    ("llama.embedding_length", 2_000_000_000, "larger than the whole file"),
    ("llama.embedding_length", 64, "another shape"),
    ("llama.attention.head_count", 3, "multiple"),
    ("llama.attention.layer_norm_rms_epsilon", 0.0, "positive number"),
    ("tokenizer.ggml.model", "llama", "tokenizer.ggml.model = llama"),
    ("tokenizer.ggml.pre", "viking", "tokenizer.ggml.pre = viking"),
    ("tokenizer.ggml.eos_token_id", 100_000, "eos_token_id"),
    ("split.count", 2, "several files"),
])  # fmt: skip
def test_what_is_not_ours_is_refused_by_name(key, value, named, tmp_path, small):
    """An architecture, a key that changes the maths, a tokenizer of another kind."""
    assert named in misread(rewritten(small, tmp_path / "x.gguf", keys={key: value}))


def test_neutral_keys_are_no_obstacle(tmp_path, small):
    """Keys that converters write for every model of a family, at the values that change nothing."""
    rewritten(small, tmp_path / "x.gguf", keys={"llama.expert_count": 0, "llama.logit_scale": 1.0, "x.y": 3})
    gguf_read.read(tmp_path / "x.gguf")


def test_unknown_tensors_are_refused_by_name(tmp_path, small):
    """A bias that nobody would add."""
    bias = (np.zeros(32, np.float32), Type.F32)
    assert "blk.0.attn_q.bias" in misread(rewritten(small, tmp_path / "x.gguf", tensors={"blk.0.attn_q.bias": bias}))


def test_types_that_are_not_read(tmp_path, small):
    """Types without a dequantiser here, and a norm in blocks."""
    raw = np.zeros((32, 18), np.uint8)
    found = misread(rewritten(small, tmp_path / "x.gguf", tensors={"blk.0.attn_q.weight": (raw, Type.IQ4_NL)}))
    assert "blk.0.attn_q.weight" in found and "IQ4_NL" in found
    blocks = (np.zeros(34, np.uint8), Type.Q8_0)
    found = misread(rewritten(small, tmp_path / "x.gguf", tensors={"blk.0.attn_norm.weight": blocks}))
    assert "blk.0.attn_norm.weight" in found


def test_other_rope_factors_are_refused(tmp_path, small):
    """Frequencies that no scaling of ours gives."""
    factors = (np.array([1, 3, 1, 2], np.float32), Type.F32)
    assert "rope_freqs" in misread(rewritten(small, tmp_path / "x.gguf", tensors={gguf_arch.ROPE_FACTORS: factors}))


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "0 are left"),
        (b"GGU", "3 are left"),
        (b"PK\x03\x04" * 10, "no GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), "entries of tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "entries of keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(32), "would take"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**61), "entries of k"),
        (b"GGUF" + struct.pack("<IQQQ1sII", 3, 0, 1, 1, b"k", 9, 9) + bytes(8), "unknown kind 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "general.architecture is missing"),
    ],
)
def test_headers_of_nonsense(raw, named, tmp_path):
    """Sizes beyond the file, other versions, other byte order: one sentence, no memory taken."""
    (tmp_path / "x.gguf").write_bytes(raw)
    assert named in misread(tmp_path / "x.gguf")


def test_truncated_anywhere(tmp_path, small):
    """A file cut at any place is told as such."""
    whole = small.read_bytes()
    for length in sorted({random.Random(0).randrange(len(whole)) for _ in range(80)} | {len(whole) - 40}):
        (tmp_path / "x.gguf").write_bytes(whole[:length])
        misread(tmp_path / "x.gguf")


def test_mutated_anywhere(tmp_path, small):
    """Bytes changed at random, mostly in the header: an error of exit code 3, or a file that still reads whole."""
    whole, rng = small.read_bytes(), random.Random(0)
    data = gguf.GGUFReader(small).data_offset
    names = whole.index(b"token_embd.weight") - 200  # where tensors are described, and their shapes
    survived = 0
    for n in range(300):
        damaged = bytearray(whole)
        low, high = ((0, 1200), (names, data), (0, data))[n % 3]
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(low, high)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        (tmp_path / "x.gguf").write_bytes(damaged)
        try:
            foreign = gguf_read.read(tmp_path / "x.gguf")
            for _name, tensor in foreign.tensors():
                assert tensor.numel()
            foreign.tokenizer.decode(foreign.tokenizer.encode("Hello 你好"))
            survived += 1
        except MinigptError as error:
            assert error.code == 3, error
    assert 0 < survived < 280


# ---------------------------------------------------------------------------------------------- memory


MEASURE = """
    import re, sys
    from pathlib import Path
    from minigpt.core.convert import gguf_read, gguf_write, weights
    from minigpt.core.models import folder

    small, big, work = (Path(a) for a in sys.argv[1:])

    def resident(kind):  # VmRSS: now; VmHWM: the most since the last reset
        return int(re.search(rf"{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    def more(work):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        work()
        return resident("VmHWM") - before

    def iterate():
        for _ in gguf_read.read(work / "big.gguf").tensors():
            pass

    for quant in ("f32", "bf16", "q8_0", "q4_0"):  # everything imported and allocated once
        gguf_write.write(small, work / "small.gguf", quant=quant)
        gguf_read.unpack(work / "small.gguf", work / "small")
    for quant in ("f32", "bf16", "q8_0", "q4_0"):
        print(more(lambda: gguf_write.write(big, work / "big.gguf", quant=quant)))
    print(more(lambda: gguf_read.unpack(work / "big.gguf", work / "big")))
    print(more(iterate))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak")
def test_memory(tmp_path, tokens):
    """Writing and unpacking take less than half of the largest tensor above the baseline (measured: 12 to 18 MB, for
    tensors of any size); iterating takes that tensor and a piece, 1.3 times it at most."""
    path = save(tmp_path / "small", tiny("llama", vocab_size=500), tokens)
    config = folder.create(
        {"model_type": "llama", "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 4096,
         "num_hidden_layers": 2, "num_attention_heads": 8, "tie_word_embeddings": False}
    )  # fmt: skip
    big = save(tmp_path / "big", Decoder(config), tokens)
    (tmp_path / "work").mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(path), str(big), str(tmp_path / "work")],
        capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"},  # what is freed is given back
    )  # fmt: skip
    *streamed, iterated = map(int, ran.stdout.split())
    largest = 32_000 * 512 * 4
    assert len(streamed) == 5 and max(streamed) < largest / 2
    assert largest < iterated < 1.3 * largest
