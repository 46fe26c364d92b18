"""What an answer's text says, apart: thought, speech and calls of tools.

A call is `<tool_call>`, a JSON object with `name` and `arguments`, `</tool_call>`: the form of Hermes and Qwen, which
the chat templates here write too. What looks like a call and is none stays speech, with a fault that says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from minigpt.core.infer.thinking import CLOSE as THOUGHT_ENDS
from minigpt.core.infer.thinking import OPEN as THOUGHT_BEGINS
from minigpt.core.infer.thinking import ThinkSplitter

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_BEFORE = "\n" + OPEN  # the newline that sets a call off is no speech
# A string of JSON, also one that is still open, or a tag. Strings come first: a tag inside of one is an argument.
_STRING_OR_TAG = re.compile(rf'"(?:[^"\\\n]|\\[^\n])*"?|{OPEN}|{CLOSE}')
_OBJECT_BEGINS = re.compile(r"\s*\{")
_OBJECT_MAY_BEGIN = re.compile(r"\s*(?:\{|\Z)")


@dataclass(frozen=True)
class ToolCall:
    """A tool's name and its arguments by name: plain values of JSON."""

    name: str
    arguments: dict[str, Any]

    def message(self) -> dict[str, Any]:
        """As messages hold it."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Text:
    """Some text of an answer, never empty, and whether it is thought."""

    text: str
    thought: bool = False


Part = Text | ToolCall


@dataclass
class Reply:
    """A whole answer. faults: why something that looks like a call is none and stayed in `content`."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Part], faults: Iterable[str] = ()) -> Reply:
        """The parts of a finished stream put together."""
        parts = list(parts)
        texts = [part for part in parts if isinstance(part, Text)]
        return cls(
            reasoning="".join(part.text for part in texts if part.thought),
            content="".join(part.text for part in texts if not part.thought),
            tool_calls=[part for part in parts if isinstance(part, ToolCall)],
            faults=list(faults),
        )

    def message(self) -> dict[str, Any]:
        """The assistant's message for a chat template, and for a row of training data."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.message() for call in self.tool_calls]
        return message


def parse(text: str, opened: bool = False, whole: bool = True) -> Reply:
    """An answer's text. opened: the prompt ended with the tag that begins a thought.

    whole: the answer came to its end; else what may have been the beginning of a call is left out.
    A tag that ends a thought, before any call, ends one also where none was begun: small models forget the first tag.
    A stream cannot know that; otherwise the result is that of a ReplyParser, however the text is cut.
    """
    parser = ReplyParser(opened or _ends_unbegun_thought(text))
    parts = [*parser.add(text), *(parser.finish() if whole else ())]
    return Reply.of(parts, parser.faults)


def _ends_unbegun_thought(text: str) -> bool:
    return THOUGHT_ENDS in text.partition(OPEN)[0] and not text.lstrip().startswith(THOUGHT_BEGINS)


class ReplyParser:
    """Parts of an answer as they become final: text at once, a call when it is whole, never a piece of a tag.

    opened: as for `parse`. faults: so far; see Reply.
    """

    def __init__(self, opened: bool = False):
        self._thought = ThinkSplitter(opened)
        self._calls = _CallSplitter()

    @property
    def faults(self) -> list[str]:
        return self._calls.faults

    def add(self, text: str) -> list[Part]:
        return self._sort(self._thought.add(text))

    def finish(self) -> list[Part]:
        """What was held back, now that nothing follows."""
        return [*self._sort(self._thought.finish()), *self._calls.finish()]

    def _sort(self, parts: list[tuple[str, bool]]) -> list[Part]:
        sorted_: list[Part] = []
        for text, thought in parts:
            sorted_ += [Text(text, True)] if thought else self._calls.add(text)
        return sorted_


class _CallSplitter:
    """Tells calls from speech in what follows the thought."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._held = ""  # may still turn out to be a tag, a call, or white space beside one
        self._gap: str | None = None  # white space before the call that is being read; None outside of calls
        self._bare = True  # nothing but white space since the beginning or the last call
        self._called = False

    def add(self, text: str) -> list[Part]:
        self._held += text
        if self._gap is not None and ">" not in text and _OBJECT_MAY_BEGIN.match(self._held):
            return []  # no tag ends here: spares a long argument from being looked through at every piece
        return self._read(last=False)

    def finish(self) -> list[Part]:
        parts = self._read(last=True)
        rest, self._held = self._held, ""
        if self._bare and self._called:  # white space behind the last call
            return parts
        return [*parts, Text(rest)] if rest else parts

    def _read(self, last: bool) -> list[Part]:
        """All parts that the held text makes final. last: no text follows, so an open call ends here."""
        parts: list[Part] = []
        while self._gap is not None or OPEN in self._held:
            if self._gap is None:
                parts += self._speech()
            part = self._call(last)
            if part is None:
                break
            parts.append(part)
        if self._gap is None:
            parts += self._ready()
        return parts

    def _speech(self) -> list[Part]:
        """What stands before an opening tag; the call begins."""
        before, _, self._held = self._held.partition(OPEN)
        if self._bare and not before.strip():
            said = ""
        else:
            said = before.removesuffix("\n")
        self._gap = before[len(said) :]
        return [Text(said)] if said else []

    def _ready(self) -> list[Part]:
        """Speech that can no longer be part of a tag."""
        if self._bare and not self._held.strip():
            return []
        keep = max(_overlap(self._held, _BEFORE), _overlap(self._held, OPEN))
        cut = len(self._held) - keep
        if self._bare and not self._held[:cut].strip():
            return []
        said, self._held = self._held[:cut], self._held[cut:]
        self._bare = self._bare and not said
        return [Text(said)] if said else []

    def _call(self, last: bool) -> Part | None:
        """The call that the held text begins with, or the tag where it is none; None while that is open."""
        found = next((m for m in _STRING_OR_TAG.finditer(self._held) if m[0][0] == "<"), None)
        if found is None and not last and _OBJECT_MAY_BEGIN.match(self._held):
            return None
        try:
            call = _tool_call(self._held[: found.start() if found else None])
        except ValueError as fault:
            self.faults.append(str(fault))
            text, self._gap, self._bare = f"{self._gap}{OPEN}", None, False
            return Text(text)  # what follows the tag is read on as speech
        self._held = self._held[found.start() :].removeprefix(CLOSE) if found else ""
        self._gap, self._bare, self._called = None, True, True
        return call


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of the text that begins the tag."""
    longest = min(len(tag) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


def _tool_call(body: str) -> ToolCall:
    """What stands between the tags. ValueError says why it is no call."""
    if not _OBJECT_BEGINS.match(body):  # told alike, however much of it has come
        raise ValueError("a tool call that is not a JSON object")
    call = _object(body, "a tool call that is")
    name = call.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError("a tool call without a name")
    arguments = call.get("arguments", call.get("parameters"))  # Llama's word
    if isinstance(arguments, str) and arguments.strip():
        arguments = _object(arguments, "a tool call with arguments that are")
    arguments = arguments or {}
    if not isinstance(arguments, dict):
        raise ValueError("a tool call with arguments that are not a JSON object")
    return ToolCall(name, arguments)


def _object(text: str, what: str) -> dict[str, Any]:
    """A JSON object that can be written again: without NaN, infinite numbers and halves of characters."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"{what} not valid JSON: {fault}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} not a JSON object")
    return value
