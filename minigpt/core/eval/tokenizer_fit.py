"""How well a tokenizer fits some text: tokens a character, by script, and how often it falls back to single bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.core.data.tokenizer import Tokenizer

SCRIPTS = ("Latin", "CJK", "other")
_OTHER = 2
# First and last code points of each script's letters; digits, punctuation, spaces and all other scripts are "other".
_RANGES = (
    (0, ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A))),
    (
        1,
        (
            (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3040, 0x312F), (0x31A0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
            (0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
        ),
    ),
)  # fmt: skip
_BYTE = re.compile(r"<0x([89A-Fa-f][0-9A-Fa-f])>")  # how SentencePiece vocabularies spell a byte of a longer character


class Fit:
    """Counts over the texts added so far.

    texts, bytes, characters, tokens: totals. fallback: tokens that are one byte of a longer character.
    changed: texts that encode and decode do not give back; first_changed: the beginning of the first one.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.texts = self.bytes = self.characters = self.tokens = self.fallback = self.changed = 0
        self.first_changed = ""
        self._used = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_fallback = _fallback_tokens(tokenizer)
        self._script_characters = np.zeros(len(SCRIPTS), dtype=np.int64)
        self._script_tokens = np.zeros(len(SCRIPTS), dtype=np.int64)

    def add(self, texts: Sequence[str]) -> None:
        """Count some more texts."""
        for text, encoded in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            ids = np.array(encoded, dtype=np.int64)
            points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
            script = script_of(points)
            self.texts += 1
            self.characters += len(points)
            self.bytes += int(widths.sum())
            self.tokens += len(ids)
            self.fallback += int(self._is_fallback[ids].sum())
            self._used[ids] = True
            self._script_characters += np.bincount(script, minlength=len(SCRIPTS))
            self._script_tokens += np.bincount(
                self._token_scripts(ids, np.repeat(script, widths)), minlength=len(SCRIPTS)
            )
            if self.tokenizer.decode(encoded, skip_special=False) != text:
                self.first_changed = self.first_changed or text[:80]
                self.changed += 1

    def _token_scripts(self, ids: NDArray[np.int64], script: NDArray[np.int64]) -> NDArray[np.int64]:
        """The script of each token: that of most of its letters. script: of each byte of the text.

        Tokens that do not add up to the bytes of the text (a vocabulary that rewrites it) all count as other.
        """
        sizes = self.tokenizer.token_bytes[ids]
        if not len(ids) or int(sizes.sum()) != len(script) or not sizes.all():
            return np.full(len(ids), _OTHER, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        latin, cjk = (np.add.reduceat((script == s).astype(np.int64), starts) for s in (0, 1))
        return np.where((latin == 0) & (cjk == 0), _OTHER, np.where(cjk > latin, 1, 0))

    def figures(self) -> dict[str, Any]:
        """Everything as numbers; shares are of 1."""
        pairs = zip(SCRIPTS, self._script_characters.tolist(), self._script_tokens.tolist(), strict=True)
        scripts = {
            name: {"characters": c, "tokens": t, "tokens_per_character": t / c if c else None} for name, c, t in pairs
        }
        return {
            "texts": self.texts,
            "bytes": self.bytes,
            "characters": self.characters,
            "tokens": self.tokens,
            "used": float(self._used.mean()),
            "bytes_per_token": self.bytes / max(self.tokens, 1),
            "tokens_per_character": self.tokens / max(self.characters, 1),
            "fallback": self.fallback / max(self.tokens, 1),
            "changed": self.changed,
            "scripts": scripts,
        }


def script_of(points: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Index into SCRIPTS of each code point."""
    script = np.full(len(points), _OTHER, dtype=np.int64)
    for index, ranges in _RANGES:
        for low, high in ranges:
            script[(points >= low) & (points <= high)] = index
    return script


def _fallback_tokens(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """(V,) True for tokens that are a single byte of a character of several bytes."""
    found = np.zeros(tokenizer.vocab_size, dtype=bool)
    if tokenizer.is_byte_level:
        for id in np.flatnonzero(tokenizer.token_bytes == 1).tolist():
            found[id] = tokenizer.decode([id], skip_special=False) == "\ufffd"
    else:
        for id in range(tokenizer.vocab_size):
            found[id] = bool(_BYTE.fullmatch(tokenizer.token(id) or ""))
    return found
