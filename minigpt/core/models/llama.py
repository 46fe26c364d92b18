"""Llama (Touvron et al., 2023, arXiv:2302.13971; grouped queries arXiv:2307.09288). transformers: LlamaForCausalLM.

Pre-norm blocks: x + attention(norm(x)), then x + SwiGLU(norm(x)). Weights carry Hugging Face's names and layouts, so
nothing is renamed on import or export.
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
    """Defaults are those of transformers' LlamaConfig."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    written: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    }
    gguf: ClassVar[GGUF | None] = GGUF("llama", neighbours=True, rope_factors=True)
    minimind: ClassVar[dict[str, Any]] = {"rms_norm_eps": 1e-5}  # version 2

    vocab_size: int = 32_000


def make_block(cfg: Config, index: int) -> Block:
    """Layer `index` of the stack; all are alike."""
    attention = Attention(cfg.hidden_size, cfg.num_attention_heads, cfg.kv_heads, cfg.head_size)
    return Block(attention, MLP(cfg.hidden_size, cfg.intermediate_size), cfg.hidden_size, cfg.rms_norm_eps)
