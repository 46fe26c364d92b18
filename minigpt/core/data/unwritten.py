"""Which parts of a conversation a chat template leaves out.

Templates drop what they do not know: reasoning, tool calls, names. Whether one does is not read off its source but
tried: a part that can be taken away without changing the text was not written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from minigpt.core.data import chat
from minigpt.core.data.schema import Conversation, Message
from minigpt.core.data.tokenizer import Tokenizer

REASONING = "reasoning"
EARLIER = "reasoning of earlier turns"  # which many templates leave out on purpose
CONTENTS = {
    "system": "system messages",
    "user": "user messages",
    "assistant": "assistant messages",
    "tool": "results of tools",
}


def unwritten(tokenizer: Tokenizer, record: Conversation, parts: chat.Parts) -> list[str]:
    """Names of the parts of a conversation that the tokenizer's template does not write.

    parts: what `chat.prepare` made of it. A text that stands in there is written; the others are tried.
    """
    text = "".join(piece for piece, _, _ in parts)
    whole: list[str] = []

    def is_lost(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> bool:
        """Whether the text is the same with these messages and tools."""
        if not whole:
            whole.append(chat.written(tokenizer, record.messages, record.tools))
        try:
            return chat.written(tokenizer, messages, tools) == whole[0]
        except chat.Unwritable:  # the template looks at what is missing
            return False

    lost = [name for name, messages in _poorer(record, text) if is_lost(messages, record.tools)]
    if record.tools and is_lost(record.messages, ()):
        lost.append("tools")
    return lost


def _poorer(record: Conversation, text: str) -> Iterator[tuple[str, list[Message]]]:
    """(part, the messages without it) of every part that may be missing from a text."""
    messages = record.messages
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    thoughts = [i for i, m in enumerate(messages) if not _stands_alone(m.get("reasoning_content", ""), messages, text)]
    for name, places in ((REASONING, {last}), (EARLIER, set(range(last)))):
        if unseen := places.intersection(thoughts):
            yield name, _without(messages, "reasoning_content", unseen.__contains__)
    if any("tool_calls" in m for m in messages):
        yield "tool calls", _without(messages, "tool_calls")
        if any("id" in call for m in messages for call in m.get("tool_calls", ())):
            yield "ids of tool calls", [_without_ids(m) for m in messages]
    for key, name in (("name", "names"), ("tool_call_id", "ids of results")):
        if any(key in m for m in messages):
            yield name, _without(messages, key)
    for role, name in CONTENTS.items():
        unseen = {i for i, m in enumerate(messages) if m["role"] == role and m["content"].strip() not in text}
        if unseen:
            yield name, [{**m, "content": "-"} if i in unseen else m for i, m in enumerate(messages)]


def _stands_alone(thought: str, messages: Sequence[Message], text: str) -> bool:
    """Whether a text has a thought as often as the messages think it or, in their contents, repeat it."""
    thought = thought.strip()
    held = [m["content"] for m in messages] + [m.get("reasoning_content", "") for m in messages]
    return not thought or text.count(thought) >= sum(part.count(thought) for part in held)


def _without(messages: Sequence[Message], key: str, of: Callable[[int], bool] = lambda place: True) -> list[Message]:
    return [{k: v for k, v in m.items() if k != key} if of(i) else m for i, m in enumerate(messages)]


def _without_ids(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [{k: v for k, v in call.items() if k != "id"} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}
