"""How a model of ours looks in a GGUF file: its keys, the names and rows of its tensors.

The keys are those that llama.cpp reads (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, `llama-arch.cpp`);
names of tensors come from the gguf package's own table, what is one architecture's alone from its file in core.models.
A key that is not listed here is never guessed at: it is refused by name, because it may change the maths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from minigpt.core.errors import DataError, MinigptError
from minigpt.core.models import architecture, model_types
from minigpt.core.models.config import GGUF, ModelConfig
from minigpt.core.nn.rope import frequencies

ROPE_FACTORS = "rope_freqs.weight"  # (D/2,): what each default frequency is divided by
# GGUF key behind the architecture's name → config field
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
_SAME_AS_HEAD = ("attention.value_length", "rope.dimension_count")
_EPS, _THETA, _SCALING = "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling."
_BETAS = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
# keys with no influence on this maths, or none at these values
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "use_parallel_residual": (False,),
    "attention.sliding_window": (0,),
}
_IGNORED = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")


def of(model_type: str) -> GGUF:
    """The GGUF side of an architecture of ours. DataError lists those that have one."""
    known = _known()
    if model_type not in known:
        raise DataError(
            "this model_type cannot be written as GGUF", found=model_type, fix=f"supported: {', '.join(known)}"
        )
    return known[model_type]


def _known() -> dict[str, GGUF]:
    """Each architecture that says how llama.cpp knows it, by our model_type."""
    sides = {model_type: architecture(model_type).Config.gguf for model_type in model_types()}
    return {model_type: side for model_type, side in sides.items() if side is not None}


# ---------------------------------------------------------------------------------------------- configuration


def to_keys(config: ModelConfig) -> dict[str, int | float | str]:
    """The keys of a configuration, without the architecture's name in front. DataError: RoPE that GGUF cannot say."""
    keys: dict[str, int | float | str] = {key: getattr(config, field) for key, field in SIZES.items()}
    keys |= dict.fromkeys(_SAME_AS_HEAD, config.head_size)
    keys |= {"vocab_size": config.vocab_size, _EPS: config.rms_norm_eps, _THETA: config.rope_parameters["rope_theta"]}
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind == "llama3" and not of(config.model_type).rope_factors:
        raise DataError(
            f"llama.cpp does not read rope_type llama3 for {config.model_type} models",
            fix="use yarn or linear, or export with --to hf",
        )
    if kind in ("linear", "yarn"):
        keys |= {_SCALING + "type": kind, _SCALING + "factor": float(rope["factor"])}
    if kind == "yarn":
        _check_yarn(config)
        keys[_SCALING + "original_context_length"] = int(rope["original_max_position_embeddings"])
        keys |= {_SCALING + theirs: float(rope[ours]) for theirs, ours in _BETAS.items() if rope.get(ours)}
        _, attention = frequencies(rope, config.head_size)
        if not math.isclose(attention, usual := _yarn_attention(rope["factor"]), rel_tol=1e-6):
            keys[_SCALING + "attn_factor"] = attention / usual  # llama.cpp multiplies its own by it
    return keys


def _check_yarn(config: ModelConfig) -> None:
    """llama.cpp has keys for the ends of YaRN's ramp, and does not read them for these architectures."""
    rope = config.rope_parameters
    usual = {key: value for key, value in rope.items() if key not in (*_BETAS.values(), "truncate")}
    try:
        same = torch.equal(frequencies(usual, config.head_size)[0], frequencies(rope, config.head_size)[0])
    except ArithmeticError:  # a base of 1, a factor of 1e300
        same = False
    if not same:
        raise DataError(
            f"llama.cpp knows YaRN for {config.model_type} models with beta_fast 32 and beta_slow 1, truncated, alone",
            found=f"rope_parameters: {rope}",
        )


def _yarn_attention(factor: float) -> float:
    """What llama.cpp, like transformers, multiplies cos and sin with when nothing else is said."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """ROPE_FACTORS of a model with `llama3` scaling, (D/2,); None for any other."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    plain, _ = frequencies({"rope_type": "default", "rope_theta": rope["rope_theta"]}, config.head_size)
    scaled, _ = frequencies(rope, config.head_size)
    return (plain / scaled).numpy()


def from_keys(
    name: str, keys: Mapping[str, Any], *, vocab_size: int, tied: bool, factors: NDArray[np.float32] | None
) -> ModelConfig:
    """The configuration that a file's keys describe.

    name: `general.architecture`. keys: without it in front. vocab_size: rows of the embedding. factors: ROPE_FACTORS.
    DataError: an architecture that we do not have, a key that is missing, malformed or not implemented here.
    """
    known = {side.name: ours for ours, side in _known().items()}
    if (model_type := known.get(name)) is None:
        raise DataError("this architecture is not supported here", found=name, fix=f"supported: {', '.join(known)}")
    values: dict[str, Any] = {}
    for key, field in SIZES.items():
        if (value := keys.get(key)) is not None:
            values[field] = _whole(key, value)
        elif key not in ("attention.head_count_kv", "attention.key_length"):
            raise DataError(f"the key {name}.{key} is missing")
    if (eps := keys.get(_EPS)) is None:
        raise DataError(f"the key {name}.{_EPS} is missing")
    values |= {"rms_norm_eps": _number(_EPS, eps), "vocab_size": vocab_size, "tie_word_embeddings": tied}
    # GGUF's default is hidden_size / heads, for every architecture; a Hugging Face class may have another
    values.setdefault("head_dim", values["hidden_size"] // max(values["num_attention_heads"], 1))
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    for key in _SAME_AS_HEAD:
        if keys.get(key, values["head_dim"]) != values["head_dim"]:
            raise DataError(
                f"the key {name}.{key} differs from the size of a head, which is not supported here",
                found=f"{keys[key]}, heads of {values['head_dim']}",
            )
    values["rope_parameters"] = _rope(name, keys, values, factors)
    _refuse_others(name, keys)
    try:
        config = architecture(model_type).Config(**values)
    except MinigptError as e:  # a usage error elsewhere; here the file is at fault
        raise DataError(f"its keys describe no possible model: {e.message}", found=e.found) from None
    if config.rope_parameters["rope_type"] == "yarn":
        _check_yarn(config)
    return config


def _rope(
    name: str, keys: Mapping[str, Any], values: Mapping[str, Any], factors: NDArray[np.float32] | None
) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": _number(_THETA, keys.get(_THETA, 10_000.0))}
    kind = keys.get(_SCALING + "type", "none")
    if factors is not None:
        if kind != "none":
            raise DataError(f"it has both {ROPE_FACTORS} and {name}.{_SCALING}type, which is not supported here")
        return {**rope, **_llama3(factors, rope["rope_theta"], values["head_dim"])}
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise DataError(f"{name}.{_SCALING}type is not supported here", found=str(kind), fix="supported: linear, yarn")
    factor = _number(_SCALING + "factor", keys.get(_SCALING + "factor", 1.0))
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        context = keys.get(_SCALING + "original_context_length", values["max_position_embeddings"])
        rope["original_max_position_embeddings"] = _whole(_SCALING + "original_context_length", context)
        for theirs, ours in _BETAS.items():
            if (value := keys.get(_SCALING + theirs)) is not None:
                rope[ours] = _number(_SCALING + theirs, value)
        if (value := keys.get(_SCALING + "attn_factor")) is not None:
            rope["attention_factor"] = _number(_SCALING + "attn_factor", value) * _yarn_attention(factor)
    return rope


def _llama3(factors: NDArray[np.float32], theta: float, head_dim: int) -> dict[str, Any]:
    """The `llama3` parameters behind ROPE_FACTORS, which alone travel in the file.

    Llama 3.1 to 3.3 all have low 1 and high 4; the factor is the largest divisor, and the original context the power
    of two that gives exactly these divisors. DataError when none does.
    """
    for context in (1 << n for n in range(5, 21)):
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": _shortest(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }
        plain, _ = frequencies({"rope_type": "default", "rope_theta": theta}, head_dim)
        scaled, _ = frequencies(rope, head_dim)
        if factors.shape == tuple(plain.shape) and np.allclose((plain / scaled).numpy(), factors, rtol=1e-5):
            return rope
    raise DataError(
        f"{ROPE_FACTORS} holds factors that are not those of Llama 3's scaling, which is not supported here",
        found=", ".join(f"{v:g}" for v in factors[:8]),
    )


def _refuse_others(name: str, keys: Mapping[str, Any]) -> None:
    read = {*SIZES, *_SAME_AS_HEAD, _EPS, _THETA, *_IGNORED}
    read |= {_SCALING + k for k in ("type", "factor", "original_context_length", "attn_factor")}
    read |= {_SCALING + k for k in _BETAS}
    for key, value in keys.items():
        if key not in read and value not in _NEUTRAL.get(key, ()):
            raise DataError(
                f"it sets {name}.{key}, which is not supported here", found=f"{name}.{key} = {str(value)[:100]}"
            )


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise DataError(f"the key {key} must be a positive whole number", found=str(value)[:100])
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise DataError(f"the key {key} must be a positive number", found=str(value)[:100])
    return _shortest(value)


def _shortest(value: float) -> float:
    """The shortest number with the same float32: 1e-05 was stored as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# ---------------------------------------------------------------------------------------------- tensors


def tensor_names(config: ModelConfig, names: Sequence[str]) -> dict[str, str]:
    """Our name → GGUF name, for every one of `names`."""
    arch = of(config.model_type).name
    kind = next(kind for kind, written in gguf.MODEL_ARCH_NAMES.items() if written == arch)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    if missing := [name for name, theirs in found.items() if theirs is None]:
        raise ValueError(f"the gguf package has no name for {missing} of {arch}")
    return {name: str(theirs) for name, theirs in found.items()}


def is_permuted(config: ModelConfig, name: str) -> bool:
    """Whether the rows of a tensor change places between our layout and llama.cpp's."""
    return of(config.model_type).neighbours and name.endswith(("q_proj.weight", "k_proj.weight"))


def to_neighbours(rows: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Whole heads, (n·D, …): row i and row i + D/2 of each head become rows 2i and 2i + 1."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def from_neighbours(rows: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """The reverse of `to_neighbours`."""
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
