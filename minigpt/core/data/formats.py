"""Row shapes of the ecosystem → Document or Conversation. Nothing is guessed: what does not fit is a bad row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minigpt.core.data import reader
from minigpt.core.data.jsonstream import begins_object
from minigpt.core.data.messages import (
    REASONING_KEYS,
    Raw,
    Watched,
    a_type,
    conversation,
    first_key,
    optional_text,
    present,
    required_text,
)
from minigpt.core.data.placeholders import filled
from minigpt.core.data.plaintext import MARK
from minigpt.core.data.schema import (
    TEXT_KEYS,
    BadRow,
    BadRows,
    Conversation,
    Document,
    Record,
    WrongStage,
    as_found,
)
from minigpt.core.errors import UsageError

_ANSWER_KEYS = ("completion", "response")
_BESIDE = {  # columns that tell about a row
    "id", "uuid", "uid", "source", "dataset", "data_source", "origin", "url", "uri", "link", "file", "path",
    "license", "language", "lang", "locale", "domain", "category", "type", "topic", "task", "subject", "level",
    "difficulty", "kind", "split", "subset", "tags", "labels", "label", "score", "model", "author", "timestamp",
    "date", "created", "status", "created_at", "meta", "metadata",
}  # fmt: skip
LETTERS = "ABCDEFGHIJ"  # of choices
PLAIN = "plain text"  # a row that is a string: a text file's document


class Shape(NamedTuple):
    """name: how messages call it. fits: whether a row has it. read: the row as a record; raises BadRow."""

    name: str
    fits: Callable[[Raw], bool]
    read: Callable[[Raw], Record]


class Reading(NamedTuple):
    """shape: name of the shape that the row came in.

    unread: columns with text that is nowhere in the record. beside: other columns that were not read, such as an id.
    """

    record: Record
    shape: str
    unread: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def detect(row: Any, kind: str = "chat") -> str | None:
    """The name of a row's shape, None when it has none that is known. kind: see `read`."""
    if isinstance(row, str):
        return PLAIN
    shape = _shape(row, kind)[0] if isinstance(row, dict) else None
    return shape.name if shape else None


def normalise(row: Any, kind: str = "chat") -> Record:
    """A raw row as a record; see `read`."""
    return read(row, kind).record


def read(row: Any, kind: str = "chat") -> Reading:
    """A raw row as a record, with an account of what was read.

    kind: `chat` or `text`, which decides when a row could be read as either (Alpaca rows with a `text` column).
    BadRow says what is wrong; WrongStage that the row belongs to another stage. A conversation under `text` is returned
    as such: whether it can be written out depends on the tokenizer.
    """
    if isinstance(row, str):
        reading = Reading(Document(required_text(row, "text")), PLAIN)
    elif not isinstance(row, dict):
        raise BadRow(f"{a_type(row)} where an object should be", fix='write rows as {"text": …} or {"messages": […]}')
    else:
        shape, columns = _shape(row, kind)
        if shape is None:
            raise _unknown(row, kind)
        watched = Watched(columns)
        record = shape.read(watched)
        reading = Reading(record, shape.name, *_unread(watched, record))
    if kind == "chat" and reading.shape == PLAIN and begins_object(row):
        raise WrongStage(
            "JSON that is read as plain text", fix="rename the file to .jsonl, if its name says that it is text"
        )
    if kind == "chat" and isinstance(reading.record, Document):
        raise WrongStage(
            "text but no conversation",
            fix="train on text with minigpt pretrain; sft takes messages, ShareGPT or Alpaca rows",
        )
    if kind == "chat" and isinstance(reading.record, Conversation) and not _is_learnt(reading.record):
        raise BadRow("no assistant message that is learnt", ": all of them are masked", fix="leave it out")
    return reading


def _unread(row: Watched, record: Record) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns of `Reading.unread` and `Reading.beside`."""
    rest = list(row.unread())
    rest += [(f"messages.{key}", value) for turn in row.turns for key, value in turn.unread()]
    if not rest:
        return (), ()
    told = [text for text in texts(record) if text.strip()]
    whole = "\n".join(told)

    def is_lost(value: Any) -> bool:
        if isinstance(value, (list, dict)):
            return any(map(is_lost, value.values() if isinstance(value, dict) else value))
        if not isinstance(value, str) or not value.strip():
            return False
        return value.strip() not in whole and not all(text in value for text in told)  # a `text` of the whole row

    columns = list(dict.fromkeys(key for key, _ in rest))
    lost = {key for key, value in rest if key.removeprefix("messages.") not in _BESIDE and is_lost(value)}
    return tuple(key for key in columns if key in lost), tuple(key for key in columns if key not in lost)


def _is_learnt(record: Conversation) -> bool:
    return any(m["role"] == "assistant" and m.get("weight", 1) for m in record.messages)


def _shape(row: Raw, kind: str) -> tuple[Shape | None, Raw]:
    """A row's shape, and its columns without those that are null, unless it takes these to have a shape at all."""
    for columns in (present(row), row):
        for shape in SHAPES if kind == "chat" else TEXT_FIRST:
            if shape.fits(columns):
                return shape, columns
    return None, row


def _unknown(row: Raw, kind: str) -> BadRow:
    keys = ", ".join(row) or "no keys"
    wanted = '{"messages": [{"role", "content"}, …]}' if kind == "chat" else '{"text": …}'
    return BadRow("no shape that is known", f" (its keys: {keys})", fix=f"write rows as {wanted}")


# ------------------------------------------------------------------------------------------------ shapes


def _has(*keys: str) -> Callable[[Raw], bool]:
    return lambda row: all(k in row for k in keys)


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
    return conversation(row, row["messages"])


def _from_conversations(row: Raw) -> Conversation:
    return conversation(row, row["conversations"])


def _from_alpaca(row: Raw) -> Conversation:
    key = first_key(row, ("output", *_ANSWER_KEYS))
    assert key is not None
    turns: list[Any] = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
            raise BadRow("a history that is not a list of question and answer pairs")
        turns += _pair(*pair)
    return conversation(row, [*turns, *_pair(_question(row, optional_text(row, "instruction")), row[key])])


def _from_prompt(row: Raw) -> Conversation:
    key = first_key(row, _ANSWER_KEYS)
    assert key is not None
    prompt, answer = row["prompt"], row[key]
    if isinstance(prompt, list):
        if any(optional_text(row, key) for key in ("context", "input")):
            raise BadRow("a context or an input beside a prompt that is a list", fix="put it into the messages")
    else:
        prompt = [{"role": "user", "content": _question(row, prompt)}]
    if isinstance(answer, list):
        return conversation(row, [*prompt, *answer])
    thought = {name: row[name] for name in REASONING_KEYS if name in row}
    return conversation(row, [*prompt, {"role": "assistant", "content": answer, **thought}])


def _from_question(row: Raw) -> Conversation:
    asked, answer = ("question", "answer") if "question" in row and "answer" in row else ("problem", "solution")
    return conversation(row, _pair(_question(row, row[asked]), row[answer]))


def _question(row: Raw, asked: Any) -> Any:
    """What the user says: the context and a blank line, the question, and the input on a line of its own."""
    if not isinstance(asked, str):
        return asked  # told as a bad content
    asked = "\n".join(part for part in (asked, optional_text(row, "input")) if part)
    return "\n\n".join(part for part in (optional_text(row, "context"), asked) if part)


def _by_small_name(row: Raw) -> dict[str, str]:
    """Columns by their names in small letters: `Question` and `question` are one."""
    return {key.strip().lower(): key for key in row}


def _is_exam(row: Raw) -> bool:
    named = _by_small_name(row).keys()
    return {"question", "answer"} <= named and ("choices" in named or {"a", "b"} <= named)


def _from_exam(row: Raw) -> Conversation:
    """The question and its choices by letter; the answer is the letter of the right one."""
    named = _by_small_name(row)
    lettered = [named[letter] for letter in LETTERS.lower() if letter in named]
    given = row[named["choices"]] if "choices" in named else [row[key] for key in lettered if row[key] is not None]
    if not isinstance(given, list) or not 2 <= len(given) <= len(LETTERS):
        raise BadRow("choices that are not a list of two or more", fix='write choices as ["…", "…"]')
    choices = [str(choice) for choice in given]
    question, answer = row[named["question"]], row[named["answer"]]
    if isinstance(answer, str):
        said = answer.strip()
        right = LETTERS.find(said.upper()) if len(said) == 1 else choices.index(said) if said in choices else -1
    else:
        right = answer if isinstance(answer, int) else -1
    if not 0 <= right < len(choices):
        raise BadRow("an answer that is none of the choices", f": {as_found(answer)}", fix="name its letter")
    if not isinstance(question, str) or not question.strip():
        raise BadRow("a question without words", fix="add the question")
    lines = [question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))]
    return conversation(row, _pair("\n".join(lines), LETTERS[right]))


def _from_text(row: Raw) -> Document:
    key = first_key(row, TEXT_KEYS)
    assert key is not None
    return Document(required_text(row[key], key))


def _pair(question: Any, answer: Any) -> list[Any]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


SHAPES = [  # the first that fits is taken
    Shape("preference pairs", _has("chosen", "rejected"), _preference),
    Shape("token ids", lambda row: "input_ids" in row or "token_ids" in row, _token_ids),
    Shape("messages", _has("messages"), _from_messages),
    Shape("ShareGPT", _is_sharegpt, _from_conversations),
    Shape("MiniMind conversations", _has("conversations"), _from_conversations),
    Shape(
        "Alpaca",
        lambda row: "instruction" in row and first_key(row, ("output", *_ANSWER_KEYS)) is not None,
        _from_alpaca,
    ),
    Shape("exam", _is_exam, _from_exam),
    Shape("prompt and answer", lambda row: "prompt" in row and first_key(row, _ANSWER_KEYS) is not None, _from_prompt),
    Shape(
        "question and answer",
        lambda row: ("question" in row and "answer" in row) or ("problem" in row and "solution" in row),
        _from_question,
    ),
    Shape("text", lambda row: first_key(row, TEXT_KEYS) is not None, _from_text),
]
TEXT_FIRST = [SHAPES[-1], *SHAPES[:-1]]


def prompt_messages(row: Raw) -> Conversation:
    """A row of `messages`, perhaps with tools, that ends where the assistant is to speak. BadRow as for training."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise BadRow("no messages", fix='write messages as [{"role": "user", "content": …}]')
    asked = conversation(row, [*turns, {"role": "assistant", "content": "-"}])
    return Conversation(asked.messages[:-1], asked.tools)


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


def split_text(record: Record, split_docs: str) -> list[Record]:
    """The documents that a row of text becomes under --split-docs endoftext; any other row is one."""
    if split_docs != "endoftext" or not isinstance(record, Document) or MARK not in record.text:
        return [record]
    return [Document(text.strip("\r\n")) for text in record.text.split(MARK) if text.strip()]


def texts_for_training(
    specs: Sequence[str],
    split_docs: str = "auto",
    max_bad: str = "0",
    most_bytes: float = 100e6,
    fill: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Text to train a tokenizer on: all of it, or rows taken evenly over the data when it is larger than `most_bytes`.

    fill: see placeholders.filled. DataError for too many bad rows (see BadRows), UsageError for a token store: its text
    is gone.
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
                record = filled(record, fill) if fill else record
            except BadRow as fault:
                bad.add(row.where, fault, row.value)
                continue
            credit -= 1
            yield from (t for part in split_text(record, split_docs) for t in texts(part) if t)
    bad.finish(count)
