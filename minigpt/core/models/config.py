"""What every architecture's configuration shares: Hugging Face's field names, reading and writing `config.json`.

No torch here, so that a configuration can be checked before the slow imports.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

from minigpt.core.errors import UsageError

C = TypeVar("C", bound="ModelConfig")

# rope_type → keys it needs, keys it may have; `rope_type` and `rope_theta` go without saying
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}

# Keys of other decoders that change the maths, none of which is implemented here → the values that change nothing.
# transformers' Llama and Qwen3 ignore them as well; whoever wrote one meant it, so the model would be silently wrong.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (),
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "rope_interleaved": (False,),
    "no_rope_layers": ([],),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "scale_emb": (1.0,),
    "scale_depth": (),
    "clip_qkv": (),
    "alibi": (False,),
    "use_sliding_window": (False,),
    "parallel_attn": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "attention_chunk_size": (),
}


class GGUF(NamedTuple):
    """What llama.cpp's files say differently from ours.

    name: the architecture's there, `general.architecture`.
    neighbours: (x_2i, x_2i+1) turn together there, (x_i, x_i+D/2) here: rows of q_proj and k_proj change places.
    rope_factors: the tensor `rope_freqs.weight` is read, which is how `llama3` scaling travels.
    """

    name: str
    neighbours: bool
    rope_factors: bool


@dataclass(kw_only=True)
class ModelConfig:
    """Fields that decide the maths of a decoder. Subclasses set the defaults of their Hugging Face class."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]  # the transformers class that opens the export
    written: ClassVar[dict[str, Any]] = {}  # constant keys of config.json, which are also the only values accepted
    gguf: ClassVar[GGUF | None] = None  # None: llama.cpp cannot run it
    minimind: ClassVar[dict[str, Any]] = {}  # constants of MiniMind's own configuration, in no shape of its weights

    vocab_size: int
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_sizes()
        self.rope_parameters = normalise_rope(self.rope_parameters, self.max_position_embeddings)

    def _check_sizes(self) -> None:
        if not isinstance(self.tie_word_embeddings, bool):
            raise UsageError("model.tie_word_embeddings must be true or false", found=repr(self.tie_word_embeddings))
        for f in fields(self):
            if f.name in ("rope_parameters", "tie_word_embeddings"):
                continue
            value = getattr(self, f.name)
            if value is None and f.name == "head_dim":
                continue
            fraction = f.name in ("initializer_range", "rms_norm_eps")
            if isinstance(value, bool) or not isinstance(value, (int, float) if fraction else int) or value <= 0:
                raise UsageError(
                    f"model.{f.name} must be a positive {'number' if fraction else 'whole number'}", found=repr(value)
                )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UsageError(
                    "model.hidden_size is not a multiple of model.num_attention_heads",
                    found=f"{self.hidden_size} and {self.num_attention_heads}",
                    fix="change one of them, or set model.head_dim",
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise UsageError("model.head_dim must be even: rotary embedding turns pairs", found=str(self.head_dim))
        if self.num_attention_heads % self.kv_heads:
            raise UsageError(
                "model.num_attention_heads is not a multiple of model.num_key_value_heads",
                found=f"{self.num_attention_heads} and {self.num_key_value_heads}",
            )

    @property
    def kv_heads(self) -> int:
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_size(self) -> int:
        assert self.head_dim is not None
        return self.head_dim

    @classmethod
    def known_keys(cls) -> list[str]:
        """Every key that `--set model.KEY=…` takes."""
        return [f.name for f in fields(cls)] + ["rope_theta", "rope_scaling"]

    @classmethod
    def from_hf(cls: type[C], raw: Mapping[str, Any], origin: str = "config.json") -> C:
        """A `config.json` of any transformers version. Missing keys take the defaults of the Hugging Face class.

        Keys without influence on the maths are ignored; those with an influence that is not implemented here are
        refused by name (UsageError).
        """
        neutral = NEUTRAL | {key: (value,) for key, value in cls.written.items()}
        if "use_sliding_window" not in cls.written and raw.get("use_sliding_window") is not False:
            neutral["sliding_window"] = ()  # a class without the switch: the window itself is one
        for key, allowed in neutral.items():
            if raw.get(key) is not None and raw[key] not in allowed:
                raise UsageError(
                    f"{origin} sets `{key}`, which {cls.model_type} models do not support here",
                    found=f"{key}: {raw[key]!r}",
                    fix=f"only {key}: {allowed[0]!r} is supported" if allowed else f"only models without `{key}` are",
                )
        if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
            raise UsageError(
                f"{origin} sets `layer_types` other than full_attention, which are not supported here",
                found=str(raw["layer_types"]),
            )
        names = {f.name for f in fields(cls)} - {"rope_parameters"}
        known = {k: v for k, v in raw.items() if k in names and (v is not None or k in cls._nullable())}
        rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
        if raw.get("rope_theta") is not None:
            rope.setdefault("rope_theta", raw["rope_theta"])
        return cls(**known, rope_parameters=rope)

    @classmethod
    def _nullable(cls) -> tuple[str, ...]:
        return ("head_dim", "num_key_value_heads")

    def to_hf(
        self,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> dict[str, Any]:
        """The `config.json` dictionary; both spellings of RoPE and dtype let transformers 4.57 and 5 read it alike."""
        scaling = {k: v for k, v in self.rope_parameters.items() if k != "rope_theta"}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **asdict(self),
            "rope_theta": self.rope_parameters["rope_theta"],
            "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
            **self.written,
            "attention_dropout": 0.0,
            "bos_token_id": bos_token_id,
            "eos_token_id": list(eos_token_id) if isinstance(eos_token_id, Sequence) else eos_token_id,
            "pad_token_id": pad_token_id,
            "use_cache": True,
            "dtype": "float32",
            "torch_dtype": "float32",
        }


def normalise_rope(rope: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """`rope_parameters` with `rope_type` and `rope_theta` always set, and the original context where it matters.

    Refuses unknown kinds and keys by name: a frequency read wrongly is a model that is silently wrong.
    """
    result = {k: v for k, v in rope.items() if v is not None and k != "type"}
    kind = result.setdefault("rope_type", rope.get("type") or "default")
    result.setdefault("rope_theta", 10_000.0)
    if result.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError("`partial_rotary_factor` is not supported here", found=str(rope["partial_rotary_factor"]))
    if kind not in ROPE_KEYS:
        raise UsageError("this rope_type is not supported here", found=str(kind), fix=f"choose {', '.join(ROPE_KEYS)}")
    needed, optional = ROPE_KEYS[kind]
    if "original_max_position_embeddings" in needed:
        result.setdefault("original_max_position_embeddings", max_position_embeddings)
    for key in needed:
        if key not in result:
            raise UsageError(f"rope_type {kind} needs `{key}`", found=str(dict(rope)))
    for key in set(result) - {"rope_type", "rope_theta", *needed, *optional}:
        if kind == "default":  # left over from another kind; without influence
            del result[key]
            continue
        near = difflib.get_close_matches(key, (*needed, *optional), n=1)
        hint = f"did you mean `{near[0]}`?" if near else None
        raise UsageError(f"rope_type {kind} has no key `{key}`", found=str(dict(rope)), fix=hint)
    for key in ("rope_theta", *needed):
        if isinstance(result[key], bool) or not isinstance(result[key], (int, float)) or not result[key] > 0:
            raise UsageError(f"`{key}` of rope_parameters must be a positive number", found=repr(result[key]))
    return result
