"""Tokenizers and configurations in the manner of models that people bring, small enough to make in a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minigpt.core.convert.check import TEXTS

CORPUS = [
    *TEXTS,
    "Hello there, how are you? 你好！有什麼可以幫您？ 12345 the quick brown fox is user assistant\n\n",
] * 20

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CHATML = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor -%}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_LLAMA3 = (
    "{{- bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_DOCUMENT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def _byte_level(pre: Any, special: list[str], normalizer: Any = None, **options: Any) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(**options))
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return made


def _split(numbers: str) -> Any:
    pattern = pre_tokenizers.Split(Regex(_WORDS % numbers), "isolated")
    return pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def qwen3() -> tokenizers.Tokenizer:
    made = _byte_level(_split(r"\p{N}"), _DOCUMENT, normalizers.NFC())
    made.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in ("<think>", "</think>", "<tool_call>")])
    return made


def llama3() -> tokenizers.Tokenizer:
    made = _byte_level(_split(r"\p{N}{1,3}"), _HEADERS, ignore_merges=True)
    begin = ("<|begin_of_text|>", 0)
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]),
        ]
    )
    return made


def smollm2() -> tokenizers.Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return _byte_level(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]), _DOCUMENT)


def _sentencepiece(normalizer: Any = None, pre: Any = None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizer or normalizers.NFC()
    if pre is not None:
        made.pre_tokenizer = pre
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=[*special, *bytes_], limit_alphabet=100, show_progress=False
        ),
    )
    raw = json.loads(made.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in special]
    made = tokenizers.Tokenizer.from_str(json.dumps(raw))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made


def llama2() -> tokenizers.Tokenizer:
    return _sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def mistral() -> tokenizers.Tokenizer:
    return _sentencepiece(pre=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


class Family(NamedTuple):
    """make: its tokenizer. config: tokenizer_config.json."""

    make: Callable[[], tokenizers.Tokenizer]
    config: dict[str, Any]


_SENTENCEPIECE = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
                  "unk_token": "<unk>", "chat_template": _ZEPHYR}  # fmt: skip
FAMILIES = {
    "qwen3": Family(
        qwen3,
        {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
         "pad_token": "<|endoftext|>", "add_bos_token": False, "chat_template": _CHATML},
    ),
    "llama3": Family(
        llama3,
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
         "clean_up_tokenization_spaces": True, "chat_template": _LLAMA3},
    ),
    "smollm2": Family(
        smollm2,
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
         "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "chat_template": _CHATML},
    ),
    "llama2": Family(llama2, _SENTENCEPIECE),
    "mistral": Family(mistral, _SENTENCEPIECE),
}  # fmt: skip


@cache
def _made(name: str) -> str:
    return FAMILIES[name].make().to_str()


def write_tokenizer(folder: Path, name: str, **config: Any) -> Path:
    """The two files of a family's tokenizer. config: keys of tokenizer_config.json that are to be others."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_made(name), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({**FAMILIES[name].config, **config}), encoding="utf-8")
    return folder


# config.json of released models, as they are on the hub, made small. Old spelling (transformers 4) and new (5).
RELEASED: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 2, "head_dim": 32, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
        "intermediate_size": 96, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": 720,
    },
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": [1, 4], "head_dim": 16, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
        "intermediate_size": 96, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 64, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 720,
    },
    "SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 54, "initializer_range": 0.0417,
        "intermediate_size": 96, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 2, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "transformers_version": "4.42.3",
        "use_cache": True, "vocab_size": 720,
    },
    "Qwen3 with YaRN, written by transformers 5": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "dtype": "bfloat16", "eos_token_id": 2,
        "head_dim": 16, "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
        "layer_types": ["full_attention", "full_attention"], "max_position_embeddings": 512,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_parameters": {"factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1000000,
                            "rope_type": "yarn"},
        "sliding_window": None, "tie_word_embeddings": False, "transformers_version": "5.3.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 720,
    },
    "a Llama of 2023, untied": {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 2048,
        "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2, "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16",
        "transformers_version": "4.31.0", "use_cache": True, "vocab_size": 720,
    },
}  # fmt: skip
TOKENIZER_OF = dict(zip(RELEASED, ("qwen3", "llama3", "smollm2", "qwen3", "llama2"), strict=True))
