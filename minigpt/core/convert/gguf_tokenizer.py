"""A byte-level BPE tokenizer as `tokenizer.ggml.*` keys, and back.

llama.cpp does not read a tokenizer's pre-tokenizer: `tokenizer.ggml.pre` names one of those built into it. The wrong
name splits text in other places than the model was trained with, without any error. So the name is found by comparing
what tokenizer.json says, and a tokenizer that llama.cpp has no equal for is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import tokenizers
from gguf import TokenType

from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError
from minigpt.core.report import Report

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = {**_BYTES, "use_regex": True}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


class Pre(NamedTuple):
    """One of llama.cpp's pre-tokenizers. steps: the same in tokenizer.json's words. whole: tokens of the vocabulary are
    taken whole before any merge is tried (`ignore_merges`). aliases: names that llama.cpp treats alike."""

    steps: tuple[dict[str, Any], ...]
    whole: bool = False
    aliases: tuple[str, ...] = ()


PRE = {  # `tokenizer.ggml.pre` → what it does
    "gpt-2": Pre((_GPT2,), aliases=("phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion", "mpt", "olmo")),
    "smollm": Pre(
        ({"type": "Digits", "individual_digits": True}, _GPT2),
        aliases=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    "qwen2": Pre(
        (_split(_QWEN2), _BYTES),
        aliases=("deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan", "solar-open"),
    ),
    "llama-bpe": Pre((_split(_LLAMA3), _BYTES), whole=True, aliases=("llama3", "llama-v3", "falcon3", "lfm2")),
    "smaug-bpe": Pre((_split(_LLAMA3), _BYTES), aliases=("dbrx",)),
}
# Texts that end generation in llama.cpp whatever the keys say
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>", "</s>", "<eos>")
# transformers' marks of what is learnt are no jinja, and most readers of GGUF files fail at them. A comment takes their
# place, so that white space stays as it was and our reader can put them back.
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
_COMMENT = re.compile(r"\{#([-+]?) (end)?generation ([-+]?)#\}")


# ---------------------------------------------------------------------------------------------- writing


def add(writer: gguf.GGUFWriter, folder: Path, vocab_size: int, report: Report) -> str:
    """Add the keys of the tokenizer in `folder` to a GGUF file.

    vocab_size: the model's, which may be larger than the tokenizer's. Returns `tokenizer.ggml.pre`.
    DataError when llama.cpp has no equal for the tokenizer.
    """
    tokenizer = Tokenizer.load(folder)
    raw = tokenizer.raw
    pre = _recognise(raw, report)
    tokens, types = _vocabulary(raw, vocab_size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    if not merges:
        raise DataError("llama.cpp cannot read a tokenizer that merges nothing", fix="train one with more tokens")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    bos, eos, turn_end = tokenizer.role("bos_token"), tokenizer.role("eos_token"), tokenizer.turn_end_id
    eos = tokenizer.eos_ids[0] if eos is None else eos
    writer.add_bos_token_id(tokenizer.document_id if bos is None else bos)  # unsaid, llama.cpp would take id 11
    writer.add_eos_token_id(eos)
    if turn_end is not None:
        writer.add_eot_token_id(turn_end)
    writer.add_pad_token_id(tokenizer.pad_id)
    if (unknown := tokenizer.role("unk_token")) is not None:
        writer.add_unk_token_id(unknown)
    first, last = _added_around(raw, tokenizer)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    for id in tokenizer.eos_ids:
        if id not in (eos, turn_end) and tokens[id] not in _ENDS:
            report.warn(f"{tokens[id]} ends generation here; llama.cpp knows two such tokens by key, and goes on at it")
    if tokenizer.chat_template is not None:
        writer.add_chat_template(_GENERATION.sub(r"{#\1 \2generation \3#}", tokenizer.chat_template))
    return pre


def _recognise(raw: Mapping[str, Any], report: Report) -> str:
    """The name in PRE that splits text as this tokenizer.json does."""
    model = raw["model"]
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]
    if model.get("type") != "BPE" or odd or model.get("byte_fallback"):
        raise DataError(
            "only byte-level BPE tokenizers can be written as GGUF",
            found=f"{model.get('type')}{', byte_fallback' if model.get('byte_fallback') else ''} {' '.join(odd)}",
        )
    normalizer = raw.get("normalizer")
    if normalizer and normalizer.get("type") == "NFC":
        report.warn("the tokenizer composes characters (NFC); llama.cpp does not: decomposed text splits differently")
    elif normalizer:
        raise DataError("llama.cpp cannot apply the tokenizer's normalizer", found=json.dumps(normalizer)[:200])
    steps = _flat([raw["pre_tokenizer"]] if raw.get("pre_tokenizer") else [])
    whole = bool(model.get("ignore_merges"))
    name = next((name for name, known in PRE.items() if (_flat(known.steps), known.whole) == (steps, whole)), None)
    if name is None:
        raise DataError(
            "llama.cpp has no pre-tokenizer like this tokenizer's, so its GGUF would split text in other places",
            found=json.dumps(raw.get("pre_tokenizer"), ensure_ascii=False)[:300],
            fix=f"known: {', '.join(PRE)}",
        )
    for token in raw["added_tokens"]:
        if flags := [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]:
            report.warn(f"{token['content']} has {' and '.join(flags)}, which llama.cpp does not know")
    return name


def _flat(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Pre-tokenizers one after the other, sequences opened up, without what does not change where text is split."""
    flat: list[dict[str, Any]] = []
    for step in steps:
        if step["type"] == "Sequence":
            flat += _flat(step["pretokenizers"])
        elif step["type"] == "ByteLevel":
            flat.append({"use_regex": True, **{k: v for k, v in step.items() if k != "trim_offsets"}})
        else:
            flat.append(dict(step))
    return flat


def _vocabulary(raw: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Spelling and type of every row of the embedding. Rows without a token get a name that no text can become."""
    ids = [*raw["model"]["vocab"].values(), *(token["id"] for token in raw["added_tokens"])]
    if max(ids) >= vocab_size:
        raise DataError(f"the tokenizer has {max(ids) + 1:,} tokens, its model {vocab_size:,}")
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for spelling, id in raw["model"]["vocab"].items():
        tokens[id], types[id] = spelling, TokenType.NORMAL
    for token in raw["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return tokens, types


def _added_around(raw: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether the post_processor puts bos before and eos after a text. DataError when it puts anything else."""
    full = tokenizers.Tokenizer.from_str(json.dumps({**raw, "truncation": None, "padding": None}))
    plain, whole = (full.encode("a", add_special_tokens=special).ids for special in (False, True))
    first = whole[:1] == [tokenizer.role("bos_token")] and whole != plain
    last = whole[-1:] == [tokenizer.role("eos_token")] and whole != plain
    if whole[int(first) : len(whole) - int(last)] != plain:
        raise DataError("the tokenizer adds tokens around a text that llama.cpp would not", found=f"{whole}: {plain}")
    return first, last


# ---------------------------------------------------------------------------------------------- reading


def load(keys: Mapping[str, Any], max_length: int) -> Tokenizer:
    """The tokenizer that a GGUF file's keys describe. keys: all of them. max_length: tokens of the model's context.

    DataError names the key that is missing, malformed, or not supported here.
    """
    if (kind := keys.get("tokenizer.ggml.model")) != "gpt2":
        raise DataError("only byte-level BPE tokenizers are supported", found=f"tokenizer.ggml.model = {kind}")
    name = keys.get("tokenizer.ggml.pre")
    pre = next((pre for main, pre in PRE.items() if name == main or name in pre.aliases), None)
    if pre is None:
        raise DataError(
            "its pre-tokenizer is not supported here",
            found=f"tokenizer.ggml.pre = {name}",
            fix=f"known: {', '.join(PRE)}",
        )
    tokens, types, merges = (_strings(keys, "tokens"), _types(keys), _strings(keys, "merges"))
    while tokens and types[-1] == TokenType.UNUSED:  # rows of the embedding that stand for nothing
        tokens.pop()
        types.pop()
    added = [
        {
            "id": id, "content": tokens[id], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind != TokenType.USER_DEFINED,
        }
        for id, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    ]  # fmt: skip
    tail = len(tokens)
    while tail and added and types[tail - 1] != TokenType.NORMAL:  # added after training: no part of the vocabulary
        tail -= 1
    roles = {
        role: tokens[id]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (id := _id(keys, f"{key}_token_id", len(tokens))) is not None
    }
    raw = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pre.steps)},
        "post_processor": _around(keys, tokens), "decoder": _GPT2,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre.whole,
            "vocab": {spelling: id for id, spelling in enumerate(tokens[:tail])}, "merges": merges,
        },
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": spelling for role, spelling in roles.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    template = keys.get("tokenizer.chat_template")
    turn_end = _id(keys, "eot_token_id", len(tokens))
    try:
        return Tokenizer(
            json.dumps(raw, ensure_ascii=False),
            config,
            _COMMENT.sub(r"{%\1 \2generation \3%}", template) if isinstance(template, str) else None,
            [] if turn_end is None else [turn_end],
        )
    except Exception as e:  # the library raises bare Exception for a file it cannot read
        raise DataError("its tokenizer does not hold together", found=str(e)) from None


def _strings(keys: Mapping[str, Any], name: str) -> list[str]:
    values = keys.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise DataError(f"tokenizer.ggml.{name} is missing or no list of texts")
    if name == "tokens" and len(set(values)) < len(values):
        raise DataError("tokenizer.ggml.tokens has the same token twice")
    return list(values)


def _types(keys: Mapping[str, Any]) -> list[int]:
    types, count = keys.get("tokenizer.ggml.token_type"), len(keys["tokenizer.ggml.tokens"])
    if not isinstance(types, list) or len(types) != count:
        raise DataError("tokenizer.ggml.token_type is missing, or not as long as tokenizer.ggml.tokens")
    return list(types)


def _id(keys: Mapping[str, Any], name: str, count: int) -> int | None:
    id = keys.get(f"tokenizer.ggml.{name}")
    if id is not None and (isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < count):
        raise DataError(f"tokenizer.ggml.{name} is no token of the vocabulary", found=str(id)[:100])
    return id


def _around(keys: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """A post_processor for add_bos_token and add_eos_token, as tokenizer.json writes one."""
    name = keys.get("tokenizer.ggml.pre")
    bos_unsaid = any(pre.whole and name in (main, *pre.aliases) for main, pre in PRE.items())  # llama.cpp's default
    wanted = [
        id if keys.get(f"tokenizer.ggml.add_{end}_token", default) else None
        for end, default in (("bos", bos_unsaid), ("eos", False))
        for id in [_id(keys, f"{end}_token_id", len(tokens))]
    ]
    if wanted == [None, None]:
        return None
    ends = [[] if id is None else [{"SpecialToken": {"id": tokens[id], "type_id": 0}}] for id in wanted]
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": [*ends[0], *text, *ends[1]],
        "pair": [*ends[0], *text, {"Sequence": {"id": "B", "type_id": 1}}, *ends[1]],
        "special_tokens": {
            tokens[id]: {"id": tokens[id], "ids": [id], "tokens": [tokens[id]]} for id in wanted if id is not None
        },
    }
