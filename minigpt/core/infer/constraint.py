"""Answers held to a form: a JSON object, a schema, a regular expression, or one of a few texts.

The form is a grammar over bytes; llguidance (Microsoft, 2024) follows it and says after each token which ones can come
next. Their logits stay as they are, so what is sampled is the model's own distribution over the texts that fit.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import MissingError, UsageError
from minigpt.core.files import read_json

if TYPE_CHECKING:
    from llguidance import LLMatcher

KINDS = ("json", "schema", "regex", "choice")
_KNOWN = "json, schema:FILE.json, regex:[0-9]+ or choice:yes|no"
# Between the parts of JSON: a model that may write any white space can write it for ever.
_WHITE_SPACE = r" |\n {0,40}"
_CACHED = 64  # compiled forms of a tokenizer
_PLACE = re.compile(r'^at \d+\(\d+\): (?:invalid regex ".*" \(in regex\): |failed to compile JSON schema: )?', re.S)


@dataclass(frozen=True)
class Form:
    """What an answer has to be.

    kind: `json` any JSON object · `schema` JSON that a JSON schema describes · `regex` text that a regular expression
    matches as a whole (syntax of Rust's regex: no look-around, no back-references) · `choice` one of some texts.
    value: the schema as JSON text, the regular expression, or the texts; empty for `json`.

    UsageError when the value does not make such a form, MissingError without the package that knows.
    """

    kind: str
    value: str | tuple[str, ...] = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"there is no form {self.kind!r}", fix=f"use {', '.join(KINDS)}")
        need_llguidance()
        from llguidance import LLMatcher

        if any("\ud800" <= c <= "\udfff" for c in "".join(self.value)):
            raise UsageError("the form holds half a character (a lone surrogate)", found=ascii(self.value))
        if fault := LLMatcher.validate_grammar(self.grammar()):
            raise _unusable(self, fault)

    def grammar(self) -> str:
        """The form in llguidance's language of grammars. UsageError for what it could not even write down."""
        rule = {"json": self._json, "schema": self._schema, "regex": self._regex, "choice": self._choice}[self.kind]
        # llguidance would allow one spelling where only one text can follow; here every token that fits is allowed.
        return f'%llguidance {{"no_forcing": true}}\n{rule()}'

    def _json(self) -> str:
        return _schema_rule({"type": "object"})

    def _schema(self) -> str:
        try:
            schema = json.loads(self.value) if isinstance(self.value, str) else None
        except (ValueError, RecursionError) as fault:
            raise UsageError("the JSON schema of the form is not JSON", found=str(fault)) from None
        if not isinstance(schema, dict):
            raise UsageError("the JSON schema of the form is not an object", fix='such as {"type": "object"}')
        return _schema_rule(schema)

    def _regex(self) -> str:
        from llguidance import regex_to_lark

        if not isinstance(self.value, str) or not self.value:
            raise UsageError("the regular expression of the form is empty", fix="such as [0-9]+")
        slashes = len(self.value) - len(self.value.rstrip("\\"))
        if slashes % 2:
            raise UsageError("the regular expression of the form ends in a backslash", found=self.value)
        return f"start: /{regex_to_lark(self.value, use_ascii='')}/"

    def _choice(self) -> str:
        texts = (self.value,) if isinstance(self.value, str) else self.value
        if not texts or not all(texts):
            raise UsageError("a choice needs texts, and none of them empty", fix="such as choice:yes|no")
        return "start: CHOICE\nCHOICE: " + " | ".join(map(_literal, texts))


def _literal(text: str) -> str:
    """A string of llguidance's: JSON's, in which U+007F has to be escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _schema_rule(schema: dict[str, Any]) -> str:
    return "start: %json " + json.dumps({"x-guidance": {"whitespace_pattern": _WHITE_SPACE}, **schema})


def parse_form(text: str) -> Form:
    r"""`json`, `schema:FILE.json`, `regex:[0-9]+` or `choice:yes|no`; a bar inside of a choice is written `\|`.

    UsageError for anything else, DataError for a file that is not JSON.
    """
    kind, colon, value = text.partition(":")
    if kind not in KINDS or (kind == "json") == bool(colon):
        raise UsageError("--form takes " + _KNOWN, found=text)
    if kind == "schema":
        return Form(kind, json.dumps(read_json(Path(value).expanduser())))
    if kind == "choice":
        return Form(kind, tuple(part.replace(r"\|", "|") for part in re.split(r"(?<!\\)\|", value)))
    return Form(kind, value)


def need_llguidance() -> None:
    """MissingError when the package that follows the forms is not here."""
    if find_spec("llguidance") is None:
        raise MissingError(
            "--form needs a package that is not installed",
            found="llguidance",
            fix="pip install 'minigpt-lm[constraints]'",
        )


def _unusable(form: Form, fault: str) -> UsageError:
    """The library's words for what is wrong, without the places in our grammar."""
    told = re.search(r"^error: (.*)$", fault, re.M)
    reason = told[1] if told else _PLACE.sub("", fault).splitlines()[0]
    what = {"regex": f"the regular expression {form.value}", "schema": "the JSON schema"}.get(form.kind, "the form")
    return UsageError(f"{what} cannot be followed", found=reason, fix="write the form in another way")


# ------------------------------------------------------------------------------------------------ following


class Constraint:
    """How far one answer has come in its form."""

    def __init__(self, matcher: LLMatcher, form: Form):
        self._matcher = matcher
        self._form = form

    @property
    def done(self) -> bool:
        """The form is complete and nothing but an end may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self, logits: Tensor) -> None:
        """Set the logits (V,) of every token that cannot come next to -inf, in place.

        An end of the answer can come exactly when the form is complete. UsageError when the form takes too much work,
        or nothing in the vocabulary can write what has to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").astype(bool)
        logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), float("-inf"))

    def accept(self, id: int) -> None:
        """The token that was chosen; one that `mask` allowed."""
        self._matcher.consume_token(id)
        self._check()

    def _check(self) -> None:
        fault = self._matcher.get_error()
        if fault.startswith("NoExtension"):
            raise UsageError("this tokenizer has no token for what the form needs next", found=str(self._form.value))
        if fault:
            raise _unusable(self._form, fault)


class Compiler:
    """Forms made ready for one tokenizer, and kept.

    vocab_size: of the model's logits; those behind the tokenizer's tokens are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        need_llguidance()
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
        self._tokenizer = LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=list(tokenizer.eos_ids))
        self._compiled = lru_cache(_CACHED)(self._compile)

    def start(self, form: Form) -> Constraint:
        """A new answer in this form."""
        return Constraint(self._compiled(form).deep_copy(), form)

    def _compile(self, form: Form) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, form.grammar(), log_level=0)
        if matcher.is_error():
            raise _unusable(form, matcher.get_error())
        return matcher


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.eos_token_id = tokenizer.eos_ids[0]
        contents = token_contents(tokenizer)
        self.tokens = contents + [b""] * (vocab_size - len(contents))
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"))


def token_contents(tokenizer: Tokenizer) -> list[bytes]:
    """(V,) the bytes that each token writes; none for the tokens that control."""
    control = {*tokenizer.special_ids, *tokenizer.eos_ids}
    return [b"" if id in control else content for id, content in enumerate(tokenizer.contents)]
