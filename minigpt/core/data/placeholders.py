"""`{{name}}` in data: places that whoever shares it leaves for others to fill."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minigpt.core.data.schema import BadRow, Conversation, Document, Record
from minigpt.core.errors import UsageError

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def placeholders(record: Record) -> list[str]:
    """Every placeholder of a record, braces included, each once."""
    whole = record.text if isinstance(record, Document) else [record.messages, record.tools]
    found = (key for text in _texts(whole) if "{{" in text for key in _PLACEHOLDER.findall(text))
    return [f"{{{{{key}}}}}" for key in dict.fromkeys(found)]


def _texts(value: Any) -> Iterator[str]:
    """Every text inside of lists and objects, keys apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def parse_fill(options: Sequence[str]) -> dict[str, str]:
    """key → text of `--fill` options, each `key=text` or several with commas between; a text may hold commas itself.

    UsageError for anything else, and for a key that is given two texts.
    """
    values: dict[str, str] = {}
    for option in options:
        for part in re.split(r",(?=\w+=)", option):
            key, equals, text = part.partition("=")
            if not (equals and re.fullmatch(r"\w+", key)):
                raise UsageError("--fill takes key=text", found=part, fix="such as --fill name=Ada,author=Anna")
            if values.setdefault(key, text) != text:
                raise UsageError(f"--fill gives {key} two texts", found=f"{values[key]}, {text}", fix="give it one")
    return values


def filled(record: Record, values: Mapping[str, str]) -> Record:
    """A record with every placeholder replaced. BadRow for one that has no value."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return _PLACEHOLDER.sub(text_of, value) if "{{" in value else value
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items()}
        return [fill(v) for v in value] if isinstance(value, list) else value

    def text_of(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise BadRow("a placeholder without a text", f": {found[0]}", fix=f"add --fill {found[1]}=…")
        return values[found[1]]

    if isinstance(record, Document):
        return Document(fill(record.text))
    return Conversation(fill(record.messages), fill(record.tools))
