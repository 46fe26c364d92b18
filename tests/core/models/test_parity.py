"""Our models are transformers' models: logits, gradients, names and files, both ways."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from minigpt.core.data.batch import Batch
from minigpt.core.models import folder, model_types
from tests.conftest import tiny

HF = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "no groups": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 20},
    "yarn": {"rope_parameters": YARN},
    "yarn with its own factor": {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0}},
    "yarn mscale": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False}},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "other epsilon": {"rms_norm_eps": 1e-3},
}


def batch_of(ids: torch.Tensor) -> Batch:
    """Whole rows as one document each, next-token labels, the last token unlabelled."""
    labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), 1)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, labels, positions, torch.zeros_like(ids), units=float((labels != -100).sum()))


def compare(ours, theirs) -> None:
    """Logits ≤ 1e-5, the loss, and every gradient ≤ 1e-5 relative."""
    torch.manual_seed(1)
    ids = torch.randint(1, ours.config.vocab_size, (3, 150))  # transformers gives the padding id, 0, no gradient
    batch = batch_of(ids)
    out = ours(batch, {"nll", "logits"})
    (out.nll.sum() / batch.units).backward()
    reference = theirs(input_ids=ids, labels=ids)
    reference.loss.backward()
    assert (out.logits - reference.logits).abs().max() <= 1e-5
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert error <= 1e-5, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", model_types())
def test_written_folder_opens_in_transformers(arch, variant, tmp_path):
    """write → from_pretrained: equal logits and gradients, no tensor missing or left over."""
    model = tiny(arch, **VARIANTS[variant])
    folder.write(tmp_path, model, model.config, bos_token_id=1, eos_token_id=[2, 0], pad_token_id=0)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs) is HF[arch][1]
    assert theirs.generation_config.eos_token_id == [2, 0]
    compare(model, theirs)


@pytest.mark.parametrize("variant", ["tied", "untied", "yarn", "llama3", "linear", "wide heads"])
@pytest.mark.parametrize("arch", model_types())
def test_transformers_folder_loads(arch, variant, tmp_path):
    """save_pretrained → load: equal logits and gradients, and written again the same tensors come out."""
    hf = tiny(arch, **VARIANTS[variant]).config.to_hf(bos_token_id=1, eos_token_id=2)
    for key in ("architectures", "dtype", "torch_dtype", "model_type", "rope_theta", "rope_scaling"):
        del hf[key]
    config_class, model_class = HF[arch]
    torch.manual_seed(2)
    theirs = model_class(config_class(**hf))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, raw = folder.load(tmp_path / "theirs")
    assert raw["model_type"] == arch
    compare(ours, theirs)
    folder.write(tmp_path / "ours", ours, ours.config)
    before, after = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("arch", model_types())
def test_sharded_folder_loads(arch, tmp_path):
    """Several shards and an index are read like one file."""
    model = tiny(arch, num_hidden_layers=3)
    folder.write(tmp_path / "one", model, model.config)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    again, _ = folder.load(tmp_path / "many")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("arch", model_types())
def test_defaults_are_transformers_defaults(arch):
    """A config.json without a key means what transformers takes it to mean."""
    ours = folder.architecture(arch).Config.from_hf({"model_type": arch})
    theirs = HF[arch][0]()
    for name in vars(ours):
        if name != "rope_parameters":
            assert getattr(ours, name) == getattr(theirs, name), name
    for key in ("rope_theta", "rope_type"):
        assert ours.rope_parameters[key] == theirs.rope_parameters[key]


@pytest.mark.parametrize("arch", model_types())
def test_bfloat16_model_follows_transformers(arch, tmp_path):
    """In bfloat16 both are within its rounding of the float32 logits; ours returns float32."""
    model = tiny(arch)
    folder.write(tmp_path, model, model.config)
    ids = torch.randint(0, 320, (2, 60))
    exact = model(batch_of(ids), {"logits"}).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids).logits
    half, _ = folder.load(tmp_path, dtype=torch.bfloat16)
    logits = half(batch_of(ids), {"logits"}).logits
    assert logits.dtype == torch.float32
    assert (logits - exact).norm() <= 1.2 * (theirs - exact).norm()
