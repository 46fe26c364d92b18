"""Prompts for `generate`: from the command line, a file or a pipe, as they arrive."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from minigpt.core.errors import DataError, UsageError

if TYPE_CHECKING:
    from minigpt.core.infer.model import Model

Row = dict[str, Any]
BOM = "\ufeff"  # before a file, and, where files were joined, before any line
AHEAD = 1024  # lines that are read before they are asked for


def rows(given: Sequence[str], stream: IO[str] | None, idle: Callable[[], bool]) -> Iterator[Row | None]:
    """Prompt rows: those that were given, then the stream's. None = nothing has arrived yet, ask again.

    idle: whether there is nothing else to do than to wait for the next line. `where` names each row for messages.
    A line that is neither text nor a prompt has its DataError under `fault`, and its text as the prompt.
    """
    yield from ({"prompt": p, "where": "--prompt"} for p in given)
    if stream is None:
        return
    number = 0
    for line in _arriving(stream, idle):
        number += line is not None
        if line is None:
            yield None
        elif (text := line.lstrip(BOM)).strip():
            yield {**parse(text, number), "where": f"stdin:{number}"}


def _arriving(stream: IO[str], idle: Callable[[], bool]) -> Iterator[str | None]:
    """Lines of a stream; None while none is there and there is something else to do."""
    lines: queue.Queue[str | BaseException | None] = queue.Queue(AHEAD)

    def read() -> None:
        try:
            for line in _lines(stream):
                lines.put(line)
            lines.put(None)
        except BaseException as fault:
            lines.put(fault)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(block=idle())
        except queue.Empty:
            yield None
            continue
        if isinstance(line, BaseException):
            raise line
        if line is None:
            return
        yield line


def _lines(stream: IO[str]) -> Iterator[str]:
    """Lines as they come. The file is read past Python's buffer, whose lock a thread must not hold when the program
    ends.
    """
    try:
        handle = stream.fileno()
    except (OSError, ValueError):  # not a real file: text given to us in process
        yield from stream
        return
    rest = b""
    while block := os.read(handle, 1 << 16):
        *complete, rest = (rest + block).split(b"\n")
        yield from (line.decode("utf-8", errors="replace") for line in complete)
    if rest:
        yield rest.decode("utf-8", errors="replace")


def parse(line: str, number: int) -> Row:
    """A JSON object with `prompt` or `messages`, a JSON string, or plain text."""
    text = line.rstrip("\r\n")
    if not text.lstrip().startswith(("{", '"')):
        return {"prompt": text}
    try:
        row = json.loads(text)
    except ValueError:
        return {"prompt": text}  # a prompt may begin with a brace or a quotation mark
    if isinstance(row, str):
        return {"prompt": row}
    if isinstance(row.get("prompt"), str) or "messages" in row:
        return dict(row)
    fault = DataError(
        f"stdin:{number} has neither a `prompt` text nor a `messages` list", found=text, fix='write {"prompt": "…"}'
    )
    return {"prompt": text, "fault": fault}


def ids(model: Model, row: Row, *, raw: bool = False, control: bool = False, think: bool | None = None) -> list[int]:
    """Token ids of one prompt row: the chat template for a chat model, else a document's beginning.

    control: special tokens spelled in a raw prompt are these tokens. DataError for a row that is no prompt, messages
    that are none, and a prompt that fills the context; UsageError for messages to a base model, and for control where
    the chat template alone writes it.
    """
    from minigpt.core.data.chat import render
    from minigpt.core.data.formats import prompt_messages
    from minigpt.core.data.schema import BadRow

    tokenizer, where = model.tokenizer, row["where"]
    if "fault" in row:
        raise row["fault"]
    if "messages" in row or (model.is_chat and not raw):
        if control:
            raise UsageError(
                f"{where} is asked through the chat template, which writes the special tokens itself",
                fix="--control is for prompts of base models, and with --raw for those of others",
            )
        if not model.is_chat:
            raise UsageError(f"{model.path} has no chat template, so it cannot read messages", fix="give it prompts")
        asked = row if "messages" in row else {"messages": [{"role": "user", "content": row["prompt"]}]}
        try:
            record = prompt_messages(asked)
        except BadRow as fault:
            raise DataError(f"{where} has {fault.reason}{fault.detail}", found=str(asked), fix=fault.fix) from None
        found = render(tokenizer, record.messages, record.tools, generation_prompt=True, thinking=think).ids
    else:
        found = tokenizer.encode_template(row["prompt"]) if control else tokenizer.encode(row["prompt"])
        if found[:1] != [tokenizer.opening_id]:
            found = [tokenizer.opening_id, *found]
    context = model.decoder.config.max_position_embeddings
    if len(found) >= context:
        raise DataError(
            f"{where} has {len(found):,} tokens, and the model's context is {context:,}", fix="shorten this prompt"
        )
    return found


def spelled_marker(model: Model, row: Row, control: bool) -> str | None:
    """A special token that a raw prompt spells, where it is read as letters."""
    if control or "messages" in row:
        return None
    return next((marker for marker in model.tokenizer.added if marker in row["prompt"]), None)
