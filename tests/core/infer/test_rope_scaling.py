"""A stretched context computes what transformers computes for a model whose config says so."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from minigpt.core.errors import UsageError
from minigpt.core.infer.rope_scaling import apply
from minigpt.core.models import folder, model_types
from tests.conftest import tiny


@pytest.mark.parametrize("scaling", ["yarn:4", "yarn:2.5", "linear:4"])
@pytest.mark.parametrize("arch", model_types())
def test_equals_transformers(arch, scaling, tmp_path):
    """Logits within 1e-4, beyond the original context too; the context is so many times as long."""
    model = tiny(arch, max_position_embeddings=64)
    folder.write(tmp_path, model, model.config)
    kind, factor = scaling.split(":")
    config = json.loads((tmp_path / "config.json").read_text())
    rope = {"rope_type": kind, "factor": float(factor), "rope_theta": config["rope_theta"]}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 64
    config |= {"rope_scaling": rope, "rope_parameters": rope, "max_position_embeddings": int(64 * float(factor))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.randint(0, 320, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        unchanged = model.head(model.hidden(ids, torch.arange(150)[None]))
        apply(model, scaling)
        got = model.head(model.hidden(ids, torch.arange(150)[None]))
    assert model.config.max_position_embeddings == int(64 * float(factor))
    assert (got - want).abs().max() <= 1e-4
    assert (unchanged - want).abs().max() > 1e-2


def test_factors_do_not_multiply():
    """A model that is stretched already starts from the context it was trained on."""
    twice, once = tiny("llama", max_position_embeddings=64), tiny("llama", max_position_embeddings=64)
    apply(twice, "linear:2")
    apply(twice, "yarn:8")
    apply(once, "yarn:8")
    assert twice.config == once.config
    assert torch.equal(twice.rotary.inv_freq, once.rotary.inv_freq)
    apply(twice, "yarn:2")
    assert twice.config.max_position_embeddings == 128


@pytest.mark.parametrize("wrong", ["yarn", "yarn:0.5", "yarn:x", "ntk:2", "linear:99999", ""])
def test_no_scaling(wrong):
    with pytest.raises(UsageError, match="yarn:4"):
        apply(tiny("llama"), wrong)


def test_a_scaling_of_its_own():
    """Llama 3's own scaling is not mixed with another."""
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0}  # fmt: skip
    with pytest.raises(UsageError, match="llama3"):
        apply(tiny("llama", rope_scaling=rope), "yarn:4")
