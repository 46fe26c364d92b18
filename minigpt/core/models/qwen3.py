"""Qwen3, dense (Yang et al., 2025, arXiv:2505.09388). transformers: Qwen3ForCausalLM.

Llama's block with an RMSNorm over each query and key head before rotation, and a head size free of hidden_size / heads.
Weights carry Hugging Face's names and layouts, so nothing is renamed on import or export.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from minigpt.core.models.config import GGUF, ModelConfig
from minigpt.core.models.decoder import Block
from minigpt.core.nn.attention import Attention
from minigpt.core.nn.layers import MLP


@dataclass(kw_only=True)
class Config(ModelConfig):
    """Defaults are those of transformers' Qwen3Config."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"
    written: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    }
    gguf: ClassVar[GGUF | None] = GGUF("qwen3", neighbours=False, rope_factors=False)
    minimind: ClassVar[dict[str, Any]] = {"rms_norm_eps": 1e-6}  # version 3

    vocab_size: int = 151_936
    intermediate_size: int = 22_016
    num_key_value_heads: int | None = 32
    head_dim: int | None = 128
    max_position_embeddings: int = 32_768


def make_block(cfg: Config, index: int) -> Block:
    """Layer `index` of the stack; all are alike."""
    attention = Attention(
        cfg.hidden_size, cfg.num_attention_heads, cfg.kv_heads, cfg.head_size, qk_norm_eps=cfg.rms_norm_eps
    )
    return Block(attention, MLP(cfg.hidden_size, cfg.intermediate_size), cfg.hidden_size, cfg.rms_norm_eps)
