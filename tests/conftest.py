"""Shared by all tests: tiny random models."""

from __future__ import annotations

from typing import Any

import torch

from minigpt.core.models import folder
from minigpt.core.models.decoder import Decoder

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},  # Qwen3's head size is free of hidden_size / heads
}


def tiny(arch: str, seed: int = 0, **overrides: Any) -> Decoder:
    """A float32 Decoder with random weights: two layers, grouped queries, tied embeddings; overrides are config keys."""
    config = folder.create({"model_type": arch, **TINY, **ARCHITECTURES[arch], **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Decoder(config)
        for parameter in model.parameters():  # far from the initial state, so that every weight matters
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model
