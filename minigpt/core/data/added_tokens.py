"""Added tokens: which a tokenizer has, with the ids that transformers gives them, and which of them are control."""

from __future__ import annotations

import re
from typing import Any

import tokenizers

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")  # in their order
MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")  # transformers 4's key, transformers 5's
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


def merged(full: tokenizers.Tokenizer, listed: list[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
    """Every added token with its flags and the id that the library gives it, whatever the file says.

    full: gets the tokens that only tokenizer_config.json names, in transformers' order: those of its
    `added_tokens_decoder`, the roles, further special tokens. listed: tokenizer.json's.
    """
    known = {t.content: t for t in full.get_added_tokens_decoder().values()}
    named = [_content(config.get(role)) for role in ROLES]
    decoder = config.get("added_tokens_decoder") or {}
    new = []
    for _, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        made = _added_token(token)
        made.special = made.special or made.content in named
        if made.content not in known or any(getattr(made, f) != getattr(known[made.content], f) for f in _FLAGS):
            new.append(made)
    roles = [config.get(role) for role in ROLES]
    more = [token for key in MORE_SPECIAL for token in _listed(config.get(key))]
    there = {*known, *(t.content for t in new)}
    for special in (*roles, *more):
        content = _content(special)
        if content is not None and content not in there:
            there.add(content)
            new.append(_added_token(special))
    if new:
        full.add_tokens(new)
    ids = full.get_added_tokens_decoder()
    if not new and {(int(t["id"]), t["content"]) for t in listed} == {(id, t.content) for id, t in ids.items()}:
        return listed
    return [
        {"id": id, "content": t.content, **{flag: getattr(t, flag) for flag in _FLAGS}} for id, t in sorted(ids.items())
    ]


def _content(token: Any) -> str | None:
    """The text of a token as tokenizer_config.json names it: a text, or an object."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _added_token(token: Any) -> tokenizers.AddedToken:
    """A token as tokenizer_config.json names it; a bare text is a special one."""
    if isinstance(token, dict):
        return tokenizers.AddedToken(token["content"], **{flag: token[flag] for flag in _FLAGS if flag in token})
    return tokenizers.AddedToken(token, special=True, normalized=False)


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens or ())


def of_older_days(ids: dict[str, int], config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """An `added_tokens.json` of older days (text → id) as `added_tokens_decoder`."""
    named = {_content(t) for t in [*(config.get(role) for role in ROLES), *_listed(config.get(MORE_SPECIAL[0]))]}
    return {
        str(id): {"content": text, "special": text in named, "normalized": text not in named}
        for text, id in ids.items()
    }


def is_control(token: dict[str, Any], template: str) -> bool:
    """Whether an added token is a marker, which content must not become, and not a word or white space."""
    text = token["content"]
    if text.isspace():
        return False  # some families add runs of spaces as tokens, marked as special or not
    looks = re.fullmatch(r"<.*>|\[.*\]", text.strip(), re.DOTALL) is not None
    return bool(token.get("special")) or looks or (text in template and not text.isalnum())
