"""Messages of any spelling → canonical ones: the turns of a conversation, their tools, and the values inside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minigpt.core.data.schema import ROLES, BadRow, Conversation, EmptyText, Message

_ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
_SYSTEM_KEYS = ("system", "system_prompt", "system_message")  # of a row, beside its messages
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_LOSS_KEYS = ("weight", "loss", "train", "loss_mask")  # of a message: whether it is learnt
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_THOUGHT_BEGINS, _THOUGHT_ENDS = "<think>", "</think>"

Raw = Mapping[str, Any]


class Watched(dict[str, Any]):
    """A row or a message that remembers which of its columns were read. turns: those of a row, once they were read."""

    def __init__(self, row: Raw):
        super().__init__(row)
        self.read: set[str] = set()
        self.turns: list[Watched] = []

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def unread(self) -> Iterator[tuple[str, Any]]:
        """(column, value) of what was not read."""
        return ((key, value) for key, value in self.items() if key not in self.read)


def conversation(row: Raw, turns: Any) -> Conversation:
    """Canonical messages and tools; the system text and tools of the row itself come first."""
    if not isinstance(turns, list):
        raise BadRow("messages that are not a list", fix="write them as a list of objects")
    if not turns:
        raise BadRow("no messages", fix="add a question and an answer")
    tools = _tools(row)
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRow(f"{a_type(turn)} where a message should be", fix='write messages as {"role": …, "content": …}')
        watched = Watched(present(turn))
        tools = tools or _tools(watched)
        messages.append(_message(watched))
        if isinstance(row, Watched):
            row.turns.append(watched)
    system = next((found for key in _SYSTEM_KEYS if (found := optional_text(row, key))), "")
    if system and messages[0] != (told := {"role": "system", "content": system}):
        messages.insert(0, told)
    messages = [m for m in messages if m["role"] != "system" or m["content"]]
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow("no assistant message", ", so there is nothing to learn from it", fix="add the answer")
    return Conversation(messages, tools)


def _message(turn: Raw) -> Message:
    """One canonical message: what was said, and what else of the turn a template may write."""
    learnt = _is_learnt(turn)
    message = _said(turn)
    if (name := _label(turn, "name")) is not None:
        message["name"] = name
    if message["role"] == "tool" and (id := _label(turn, "tool_call_id")) is not None:
        message["tool_call_id"] = id
    if message["role"] == "assistant" and not learnt:
        message["weight"] = 0
    return message


def _is_learnt(turn: Raw) -> bool:
    """Whether a turn's `weight`, `loss`, `train` and `loss_mask`, where it has them, let it be learnt."""
    learnt = True
    for key in _LOSS_KEYS:
        value = turn.get(key, 1)
        if not (isinstance(value, (bool, int, float)) and value in (0, 1)):
            shown = json.dumps(value, ensure_ascii=False, default=str)
            raise BadRow(f"a {key} that is neither 0 nor 1", f": {shown}", fix="write 0 or false to mask a message")
        learnt = learnt and bool(value)
    return learnt


def _label(value: Raw, key: str) -> str | int | None:
    """A name or an id, as it is; None when it is missing or blank."""
    label = value.get(key, "")
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        raise BadRow(f"{a_type(label)} as {key}", fix="write it as a string")
    return label if isinstance(label, int) else _whole(label) if label.strip() else None


def _said(turn: Raw) -> Message:
    named = turn.get("role", turn.get("from"))
    role = _ROLE_NAMES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        found = " at all" if named is None else f": {json.dumps(named, ensure_ascii=False)} is none"
        raise BadRow("a message without a known role", found, fix="use system, user, assistant or tool")
    content = turn.get("content", turn.get("value"))
    if role == "call":
        if not (called := _calls(content)):
            raise BadRow("an empty tool call", fix='write tool calls as {"name": …, "arguments": {…}}')
        return {"role": "assistant", "content": "", "tool_calls": called}
    calls = _calls(turn.get("tool_calls"))
    if not calls and isinstance(turn.get("function_call"), dict):
        calls = _calls([turn["function_call"]])
    reasoning = next((turn[key] for key in REASONING_KEYS if turn.get(key)), None)
    if isinstance(content, list):
        content, thought, more = _parts(content)
        reasoning, calls = reasoning or thought, calls + more
    elif content is None and calls:
        content = ""
    if role != "assistant":
        return {"role": role, "content": _content(content, role)}
    return _assistant(content, reasoning, calls)


def _assistant(content: Any, reasoning: Any, calls: list[dict[str, Any]]) -> Message:
    if reasoning is not None and not isinstance(reasoning, str):
        raise BadRow(f"{a_type(reasoning)} as reasoning_content", fix="write it as a string")
    text = content if calls and content == "" else _content(content, "assistant", bool(reasoning))
    if not reasoning:
        reasoning, text = _thought_apart(text)
        if not (text or reasoning or calls):
            raise BadRow("an empty assistant message", fix="add the answer")
    message: Message = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = _whole(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _thought_apart(text: str) -> tuple[str, str]:
    """(reasoning, answer). A thought may lack the tag that begins it: in many templates the prompt ends with that."""
    if found := _THINK.match(text):
        return found[1].strip(), text[found.end() :]
    before, ends, after = text.partition(_THOUGHT_ENDS)
    if ends and _THOUGHT_BEGINS not in before:
        return before.strip("\n"), after.lstrip("\n")
    return "", text


def _content(value: Any, role: str, may_be_empty: bool = False) -> str:
    """A message's text. Only a system message, a tool's result or a thought-only answer may be empty."""
    if value is None:
        raise BadRow(f"{_an(role)} message without content", fix="add the content")
    if not isinstance(value, str):
        raise BadRow(f"{a_type(value)} as the content of {_an(role)} message", fix="write it as a string")
    if not value.strip() and not (may_be_empty or role in ("system", "tool")):
        raise BadRow(f"an empty {role} message", fix="add the answer" if role == "assistant" else "add the content")
    return _whole(value)


def _parts(parts: list[Any]) -> tuple[str, str | None, list[dict[str, Any]]]:
    """(text, reasoning, tool calls) of a content given as a list of parts."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        part = present(part) if isinstance(part, dict) else part
        kind = part.get("type") if isinstance(part, dict) else None
        key = first_key(part, ("text", "value", "content", kind)) if isinstance(kind, str) else None
        value = None if key is None else part[key]
        if kind == "tool_call":
            calls += _calls(value if value is not None else part)
        elif kind in ("text", "reasoning", "thinking") and isinstance(value, str):
            (texts if kind == "text" else thoughts).append(value)
        else:
            raise BadRow(
                "a content part that is not text",
                f": {json.dumps(kind)}",
                fix="keep text, reasoning and tool_call parts",
            )
    return "".join(texts), "\n".join(thoughts) or None, calls


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls given as a list, one object, or either as JSON text."""
    value = _json(value, "a tool call")
    calls = []
    for call in value if isinstance(value, list) else [value] if value else []:
        call = present(call) if isinstance(call, dict) else {}
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str):
            raise BadRow("a tool call without a name", fix='write tool calls as {"name": …, "arguments": {…}}')
        arguments = _json(function.get("arguments", function.get("parameters")), "tool call arguments") or {}
        if not isinstance(arguments, dict):
            raise BadRow("tool call arguments that are not an object", fix="write arguments by name")
        id = _label(call, "id")
        calls.append(
            {
                **({} if id is None else {"id": id}),
                "type": "function",
                "function": {"name": name, "arguments": _checked(arguments)},
            }
        )
    return calls


def _tools(row: Raw) -> list[dict[str, Any]]:
    """Function descriptions in OpenAI's form; `tools` (MiniMind v2: `functions`) is a list or JSON text of one."""
    value = _json(row.get("tools") or row.get("functions"), "tools")
    if isinstance(value, dict):
        value = [value]
    tools = []
    for tool in value if isinstance(value, list) else [value] if value else []:
        if not isinstance(tool, dict):
            raise BadRow("tools that are not a list of objects", fix='write tools as [{"name": …, "parameters": {…}}]')
        tools.append(_checked(tool if "function" in tool else {"type": "function", "function": tool}))
    return tools


def _json(value: Any, what: str) -> Any:
    """JSON text parsed, anything else as it is; blank text is None."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise BadRow(f"invalid JSON in {what}", fix="write it as JSON") from None


# ------------------------------------------------------------------------------------------------ values


def present(row: Raw) -> Raw:
    """Without null columns: tables have them wherever other rows have a value."""
    return {k: v for k, v in row.items() if v is not None} if any(v is None for v in row.values()) else row


def first_key(row: Raw, keys: Sequence[str]) -> str | None:
    return next((k for k in keys if k in row), None)


def required_text(value: Any, key: str) -> str:
    if value is None:
        raise BadRow(f"null as {key}", fix="add the text")
    if not isinstance(value, str):
        raise BadRow(f"{a_type(value)} as {key}", fix="write it as a string")
    if not value.strip():
        raise EmptyText(key)
    return _whole(value)


def optional_text(row: Raw, key: str) -> str:
    """A text column that may be missing, null or blank."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{a_type(value)} as {key}", fix="write it as a string")
    return _whole(value) if value.strip() else ""


def _whole(text: str) -> str:
    """The text itself. JSON can spell half a character (a lone surrogate), which no encoding can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("half a character (a lone surrogate)", fix="remove it") from None
    return text


def _checked(value: dict[str, Any]) -> dict[str, Any]:
    _whole(json.dumps(value, ensure_ascii=False))
    return value


def a_type(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _an(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"
