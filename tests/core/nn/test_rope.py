"""Rotary frequencies are those of transformers, to the last bits."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from minigpt.core.models.config import normalise_rope
from minigpt.core.nn.rope import RotaryEmbedding, frequencies, rotate

CASES = {
    "default": {"rope_type": "default"},
    "big theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn 2": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024},
    "yarn 16, no factor on cos": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 2048,
        "attention_factor": 1.0,
    },
    "yarn 4, own betas": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 4,
        "beta_slow": 1,
    },
    "yarn 40, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
    "yarn 8, not truncated": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "truncate": False,
    },
    "yarn, narrow ramp": {
        "rope_type": "yarn",
        "factor": 2.5,
        "original_max_position_embeddings": 64,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
    },
}


def reference(rope: dict, head_dim: int) -> LlamaRotaryEmbedding:
    theta = rope.get("rope_theta", 10_000.0)
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": theta, **rope},
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("head_dim", [32, 64, 96])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_equal_transformers(case, head_dim):
    """inv_freq within 1e-7 and the same factor on cos and sin."""
    theirs = reference(dict(CASES[case]), head_dim)
    ours, factor = frequencies(normalise_rope(CASES[case], 8192), head_dim)
    assert ours.dtype == torch.float32
    assert (ours - theirs.inv_freq).abs().max() <= 1e-7
    assert factor == pytest.approx(theirs.attention_scaling, abs=1e-12)


@pytest.mark.parametrize("case", ["default", "yarn 40, mscale", "llama3"])
def test_rotation_equals_transformers(case):
    """Rotated queries equal apply_rotary_pos_emb, in float32 and in bfloat16."""
    torch.manual_seed(0)
    positions = torch.tensor([[0, 1, 2, 0, 1, 700], [5, 6, 7, 8, 9, 4000]])
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 0.04)):
        x = torch.randn(2, 6, 3, 64, dtype=dtype)
        theirs = reference(dict(CASES[case]), 64)
        want, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), *theirs(x, positions))
        rope = RotaryEmbedding(normalise_rope(CASES[case], 8192), 64)
        got = rotate(x, *rope(positions, dtype))
        assert got.dtype == dtype
        assert (got.transpose(1, 2) - want).abs().max() <= bound


def test_rotation_gradient():
    """The hand-written backward is the derivative of the rotation."""
    torch.manual_seed(0)
    x = torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(1, 4, 3, dtype=torch.float64)
    cos = torch.cat((angle.cos(), angle.cos()), -1)[:, :, None]
    sin = torch.cat((-angle.sin(), angle.sin()), -1)[:, :, None]
    assert torch.autograd.gradcheck(lambda t: rotate(t, cos, sin), (x,))
