"""Row shapes of the ecosystem → Document or Conversation. Nothing is guessed: what does not fit is a bad row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minigpt.core.data import reader
from minigpt.core.data.schema import ROLES, BadRow, BadRows, Conversation, Document, Message, Record, WrongStage
from minigpt.core.errors import UsageError

_TEXT_KEYS = ("text", "content", "document", "raw_content")
_ANSWER_KEYS = ("completion", "response")
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
PLAIN = "plain text"  # a row that is a string: a text file's document
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)

Raw = Mapping[str, Any]


class Shape(NamedTuple):
    """name: how messages call it. fits: whether a row has it. read: the row as a record; raises BadRow."""

    name: str
    fits: Callable[[Raw], bool]
    read: Callable[[Raw], Record]


def detect(row: Any, kind: str = "chat") -> str | None:
    """The name of a row's shape, None when it has none that is known. kind: see `read`."""
    if isinstance(row, str):
        return PLAIN
    shape = _shape(row, kind) if isinstance(row, dict) else None
    return shape.name if shape else None


def normalise(row: Any, kind: str = "chat") -> Record:
    """A raw row as a record; see `read`."""
    return read(row, kind)[0]


def read(row: Any, kind: str = "chat") -> tuple[Record, str]:
    """A raw row as a record, and the name of the shape it came in.

    kind: `chat` or `text`, which decides when a row could be read as either (Alpaca rows with a `text` column).
    BadRow says what is wrong; WrongStage that the row belongs to another stage. A conversation under `text` is returned
    as such: whether it can be written out depends on the tokenizer.
    """
    if isinstance(row, str):
        record: Record = Document(_text(row, "text"))
        name = PLAIN
    elif not isinstance(row, dict):
        raise BadRow(f"{_a_type(row)} where an object should be", fix='write rows as {"text": …} or {"messages": […]}')
    else:
        shape = _shape(row, kind)
        if shape is None:
            raise _unknown(row, kind)
        record, name = shape.read(row), shape.name
    if kind == "chat" and isinstance(record, Document):
        raise WrongStage(
            "text but no conversation",
            fix="train on text with minigpt pretrain; sft takes messages, ShareGPT or Alpaca rows",
        )
    return record, name


def _shape(row: Raw, kind: str) -> Shape | None:
    return next((s for s in (SHAPES if kind == "chat" else TEXT_FIRST) if s.fits(row)), None)


def _unknown(row: Raw, kind: str) -> BadRow:
    keys = ", ".join(row) or "no keys"
    wanted = '{"messages": [{"role", "content"}, …]}' if kind == "chat" else '{"text": …}'
    return BadRow("no shape that is known", f" (its keys: {keys})", fix=f"write rows as {wanted}")


# ------------------------------------------------------------------------------------------------ shapes


def _has(*keys: str) -> Callable[[Raw], bool]:
    return lambda row: all(k in row for k in keys)


def _first(row: Raw, keys: Sequence[str]) -> str | None:
    return next((k for k in keys if k in row), None)


def _is_sharegpt(row: Raw) -> bool:
    turns = row.get("conversations")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def _preference(row: Raw) -> Record:
    raise WrongStage(
        "a preference pair (chosen, rejected) and no single answer",
        fix="keep the chosen answer as the assistant's message to train on it",
    )


def _token_ids(row: Raw) -> Record:
    raise BadRow("token ids instead of text", fix="give the text: it is tokenised here")


def _from_messages(row: Raw) -> Conversation:
    return _conversation(row, row["messages"])


def _from_conversations(row: Raw) -> Conversation:
    return _conversation(row, row["conversations"])


def _from_alpaca(row: Raw) -> Conversation:
    question = "\n".join(t for t in (_optional(row, "instruction"), _optional(row, "input")) if t)
    turns: list[Any] = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
            raise BadRow("a history that is not a list of question and answer pairs")
        turns += _pair(*pair)
    return _conversation(row, [*turns, *_pair(question, row["output"])])


def _from_prompt(row: Raw) -> Conversation:
    key = _first(row, _ANSWER_KEYS)
    assert key is not None
    prompt, answer = row["prompt"], row[key]
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if isinstance(answer, list):
        return _conversation(row, [*asked, *answer])
    return _conversation(
        row, [*asked, {"role": "assistant", "content": answer, "reasoning_content": row.get("thinking")}]
    )


def _from_question(row: Raw) -> Conversation:
    if "question" in row:
        return _conversation(row, _pair(row["question"], row["answer"]))
    return _conversation(row, _pair(row["problem"], row["solution"]))


def _from_text(row: Raw) -> Document:
    key = _first(row, _TEXT_KEYS)
    assert key is not None
    return Document(_text(row[key], key))


def _pair(question: Any, answer: Any) -> list[Any]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


SHAPES = [  # the first that fits is taken
    Shape("preference pairs", _has("chosen", "rejected"), _preference),
    Shape("token ids", lambda row: "input_ids" in row or "token_ids" in row, _token_ids),
    Shape("messages", _has("messages"), _from_messages),
    Shape("ShareGPT", _is_sharegpt, _from_conversations),
    Shape("MiniMind conversations", _has("conversations"), _from_conversations),
    Shape("Alpaca", _has("instruction", "output"), _from_alpaca),
    Shape("prompt and answer", lambda r: "prompt" in r and _first(r, _ANSWER_KEYS) is not None, _from_prompt),
    Shape(
        "question and answer",
        lambda r: ("question" in r and "answer" in r) or ("problem" in r and "solution" in r),
        _from_question,
    ),
    Shape("text", lambda row: _first(row, _TEXT_KEYS) is not None, _from_text),
]
TEXT_FIRST = [SHAPES[-1], *SHAPES[:-1]]


# ------------------------------------------------------------------------------------------------ messages


def _conversation(row: Raw, turns: Any) -> Conversation:
    """Canonical messages and tools; the system text and tools of the row itself come first."""
    if not isinstance(turns, list):
        raise BadRow("messages that are not a list", fix="write them as a list of objects")
    if not turns:
        raise BadRow("no messages", fix="add a question and an answer")
    tools = _tools(row)
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRow(
                f"{_a_type(turn)} where a message should be", fix='write messages as {"role": …, "content": …}'
            )
        tools = tools or _tools(turn)
        messages.append(_message(turn))
    if system := _optional(row, "system"):
        messages.insert(0, {"role": "system", "content": system})
    messages = [m for m in messages if m["role"] != "system" or m["content"]]
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow("no assistant message", ", so there is nothing to learn from it", fix="add the answer")
    return Conversation(messages, tools)


def prompt_messages(row: Raw) -> Conversation:
    """A row of `messages`, perhaps with tools, that ends where the assistant is to speak. BadRow as for training."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise BadRow("no messages", fix='write messages as [{"role": "user", "content": …}]')
    asked = _conversation(row, [*turns, {"role": "assistant", "content": "-"}])
    return Conversation(asked.messages[:-1], asked.tools)


def _message(turn: Raw) -> Message:
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
    reasoning = turn.get("reasoning_content")
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
        raise BadRow(f"{_a_type(reasoning)} as reasoning_content", fix="write it as a string")
    text = content if calls and content == "" else _content(content, "assistant", bool(reasoning))
    if not reasoning and (found := _THINK.match(text)):
        reasoning, text = found[1].strip(), text[found.end() :]
        if not (text or reasoning or calls):
            raise BadRow("an empty assistant message", fix="add the answer")
    message: Message = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = _whole(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _content(value: Any, role: str, may_be_empty: bool = False) -> str:
    """A message's text. Only a system message, a tool's result or a thought-only answer may be empty."""
    if value is None:
        raise BadRow(f"{_an(role)} message without content", fix="add the content")
    if not isinstance(value, str):
        raise BadRow(f"{_a_type(value)} as the content of {_an(role)} message", fix="write it as a string")
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
        kind = part.get("type") if isinstance(part, dict) else None
        key = _first(part, ("text", "value", "content", kind)) if isinstance(kind, str) else None
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
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str):
            raise BadRow("a tool call without a name", fix='write tool calls as {"name": …, "arguments": {…}}')
        arguments = _json(function.get("arguments", function.get("parameters")), "tool call arguments") or {}
        if not isinstance(arguments, dict):
            raise BadRow("tool call arguments that are not an object", fix="write arguments by name")
        calls.append({"type": "function", "function": {"name": name, "arguments": _checked(arguments)}})
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


def _text(value: Any, key: str) -> str:
    if value is None:
        raise BadRow(f"null as {key}", fix="add the text")
    if not isinstance(value, str):
        raise BadRow(f"{_a_type(value)} as {key}", fix="write it as a string")
    if not value.strip():
        raise BadRow(f"an empty {key}", fix="add the text")
    return _whole(value)


def _optional(row: Raw, key: str) -> str:
    """A text column that may be missing, null or blank."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{_a_type(value)} as {key}", fix="write it as a string")
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


def _a_type(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _an(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"


# ------------------------------------------------------------------------------------------------ text of anything


def texts(record: Record) -> Iterator[str]:
    """Every text in a record that a tokenizer will have to write."""
    if isinstance(record, Document):
        yield record.text
        return
    for tool in record.tools:
        yield json.dumps(tool, ensure_ascii=False)
    for message in record.messages:
        yield message.get("reasoning_content", "")
        yield message["content"]
        for call in message.get("tool_calls", ()):
            yield json.dumps(call["function"], ensure_ascii=False)


def texts_for_training(
    specs: Sequence[str], split_docs: str = "auto", max_bad: str = "0", most_bytes: float = 100e6
) -> Iterator[str]:
    """Text to train a tokenizer on: all of it, or rows taken evenly over the data when it is larger than `most_bytes`.

    DataError for too many bad rows (see BadRows), UsageError for a token store: its text is gone.
    """
    inputs = reader.expand(specs)
    for source in inputs:
        if source.path.is_dir():
            raise UsageError(
                f"{source.name} is a token store, so no tokenizer can be trained on it",
                fix="name its tokenizer with --tokenizer",
            )
    share = min(1.0, most_bytes / max(1, sum(reader.text_size(i.path) for i in inputs)))
    bad, credit, count = BadRows(max_bad), 1.0, 0
    for source in inputs:
        for row in reader.rows(source, split_docs):
            count += 1
            credit += share
            try:
                if row.fault:
                    raise row.fault
                if credit < 1 and share < 1:
                    continue
                record = normalise(row.value, "text")
            except BadRow as fault:
                bad.add(row.where, fault, row.value)
                continue
            credit -= 1
            yield from (t for t in texts(record) if t)
    bad.finish(count)
