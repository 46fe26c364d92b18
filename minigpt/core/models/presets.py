"""Model sizes by name. Plain dictionaries of Hugging Face config keys; `max_len` is the default training row in tokens.

No torch here: flags and `--help` read this file.
"""

from __future__ import annotations

import difflib
from typing import Any

from minigpt.core.errors import UsageError


def _ours(hidden: int, layers: int, heads: int, ffn: int, max_len: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "intermediate_size": ffn,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "max_len": max_len,
    }


def _minimind(model_type: str, hidden: int, layers: int, kv_heads: int, ffn: int, eps: float) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": 6400,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // 8,
        "intermediate_size": ffn,
        "rms_norm_eps": eps,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "max_len": 512,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "1m": _ours(128, 4, 4, 352, 256),
    "3m": _ours(192, 5, 6, 512, 512),
    "10m": _ours(384, 5, 6, 1024, 512),
    "minimind2-small": _minimind("llama", 512, 8, 2, 1408, 1e-5),
    "minimind2": _minimind("llama", 768, 16, 2, 2048, 1e-5),
    "minimind3": _minimind("qwen3", 768, 8, 4, 2432, 1e-6),
    "llama-100m": {
        "model_type": "llama",
        "vocab_size": 32_004,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2064,
        "max_position_embeddings": 512,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "max_len": 512,
    },
}


def preset(name: str) -> dict[str, Any]:
    """A copy of one preset. UsageError names the nearest for an unknown one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError("--size is not one of the presets", found=name, fix=f"{hint}choose {', '.join(PRESETS)}")
    return dict(PRESETS[name])
