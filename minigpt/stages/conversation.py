"""A conversation with a model: what was said so far, answers that stream, and a file that fine-tuning can read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.errors import DataError, UsageError
from minigpt.core.groups import SampleConfig
from minigpt.core.infer.thinking import OPEN, ThinkSplitter, split
from minigpt.core.report import Report

if TYPE_CHECKING:
    from minigpt.core.data import schema
    from minigpt.core.infer.engine import Engine
    from minigpt.core.infer.model import Model

Message = dict[str, Any]
SUFFIXES = (".jsonl", ".json")  # a file of another name would be read as plain text
_LOADABLE = "name a file with one conversation, such as /save writes"
_TAIL = 16  # tokens at a prompt's end that surely hold an opening tag, even if it is spelled letter by letter


class Conversation:
    """Messages so far, and the engine that answers them.

    sample: how to answer; may be changed between two answers. seed: of the first answer, each later one adds 1.
    last: the newest answer, for its figures.
    """

    def __init__(self, engine: Engine, model: Model, sample: SampleConfig, seed: int = 0, system: str | None = None):
        self.engine = engine
        self.model = model
        self.sample = sample
        self.seed = seed
        self.messages: list[Message] = []
        self.tools: list[dict[str, Any]] = []
        self.last: Answer | None = None
        if system:
            self.set_system(system)

    # ---- what was said

    @property
    def context(self) -> int:
        """Tokens that the model can look at."""
        return int(self.model.decoder.config.max_position_embeddings)

    @property
    def system(self) -> str | None:
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Put another system message before the same history; None removes it."""
        spoken = self.messages[1:] if self.system is not None else self.messages
        self.messages = [*([{"role": "system", "content": text}] if text else []), *spoken]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = self.messages[:1] if self.system is not None else []
        self.tools = []

    def tokens(self) -> int:
        """Length of the conversation as a chat model would read it next."""
        return len(self._prompt(self.messages)) if self.messages else 0

    def figures(self, answer: Answer) -> str:
        """Size and speed of an answer. Its text is counted, which may differ a little from what was sampled."""
        count = len(self.model.tokenizer.encode_template(answer.text))
        passed = answer.last_at - answer.first_at
        speed = f", {(count - 1) / passed:,.0f} tokens/s" if count > 1 and passed > 0 else ""
        wait = f", the first after {answer.first_at - answer.asked_at:.2f} s" if count else ""
        return f"about {count:,} tokens{wait}{speed}"

    # ---- answers

    def ask(self, text: str, report: Report) -> None:
        """Stream the answer to `text` and remember both.

        A fault leaves the history as it was. KeyboardInterrupt passes through; what was said until then is remembered.
        """
        self._answer([*self.messages, {"role": "user", "content": text}], report)

    def retry(self, report: Report) -> None:
        """Answer the last user message again, with another seed; the new answer replaces the old one."""
        asked = next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None)
        if asked is None:
            raise UsageError("there is no message to answer again", fix="ask something first")
        self._answer(self.messages[: asked + 1], report)

    def _answer(self, messages: list[Message], report: Report) -> None:
        from minigpt.stages.generate import sampling

        asked_at = time.perf_counter()
        messages, ids = self._fitting(messages, report)
        answer = Answer(self._opens_thought(ids), asked_at)
        params = sampling(self.sample, self.seed)
        self.seed += 1
        voice = _Voice(report, answer.opened)
        try:
            for piece in self.engine.stream(ids, params):
                answer.add(piece)
                voice.say(piece)
        except KeyboardInterrupt:
            if answer.pieces:
                self._remember(messages, answer)
            raise
        finally:
            voice.finish()
        self._remember(messages, answer)

    def _remember(self, messages: list[Message], answer: Answer) -> None:
        self.messages, self.last = [*messages, remembered(answer.text, answer.opened)], answer

    def _fitting(self, messages: list[Message], report: Report) -> tuple[list[Message], list[int]]:
        """The messages that fit and their prompt; the oldest turns of a long conversation are forgotten, aloud."""
        room = min(self.sample.max_tokens, self.context // 4)  # an answer cut after a word would help nobody
        dropped = 0
        while True:
            ids = self._prompt(messages)
            shorter = without_oldest_turn(messages) if self.model.is_chat else None
            if len(ids) + room <= self.context or (shorter is None and len(ids) < self.context):
                break
            if shorter is None:
                raise DataError(
                    f"this message makes {len(ids):,} tokens, and the context has {self.context:,}: it is left out",
                    fix="shorten it",
                )
            messages = shorter
            dropped += 1
        if dropped:
            oldest = "turn is" if dropped == 1 else f"{dropped} turns are"
            report.warn(f"the conversation has outgrown the context: the oldest {oldest} forgotten")
        return messages, ids

    def _prompt(self, messages: list[Message], thinking: bool | None = None) -> list[int]:
        """The whole conversation for a chat model, the last text alone for a base model. thinking: None = as set."""
        tokenizer = self.model.tokenizer
        if not self.model.is_chat:
            return [tokenizer.opening_id, *tokenizer.encode(messages[-1]["content"])]
        from minigpt.core.data.chat import render

        wish = self.sample.think if thinking is None else thinking
        return render(tokenizer, messages, self.tools, generation_prompt=True, thinking=wish).ids

    def _opens_thought(self, ids: list[int]) -> bool:
        end = self.model.tokenizer.decode(ids[-_TAIL:], skip_special=False)
        return self.model.is_chat and end.rstrip().endswith(OPEN)

    @property
    def can_think(self) -> bool:
        """Whether the chat template makes a difference between thinking and not."""
        probe = [{"role": "user", "content": "?"}]
        return self._prompt(probe, thinking=True) != self._prompt(probe, thinking=False)

    # ---- files

    def save(self, path: Path, overwrite: bool = False) -> int:
        """Write the answered turns as one row that `minigpt sft` reads. Returns how many questions were left out."""
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{path} is no name for a conversation", fix=f"let it end in {' or '.join(SUFFIXES)}")
        if path.exists() and not overwrite:
            raise UsageError(f"{path} is already there", fix=f"choose another name, or replace it with /save! {path}")
        kept, left_out = answered(self.messages)
        if not any(m["role"] == "assistant" for m in kept):
            raise UsageError("nothing has been answered yet, so there is nothing to save", fix="ask something first")
        from minigpt.core.files import write_atomic

        row = {"messages": kept, **({"tools": self.tools} if self.tools else {})}
        try:
            write_atomic(path, json.dumps(row, ensure_ascii=False) + "\n")
        except DataError as e:
            raise DataError(e.message, found=e.found, fix="choose a file that can be written") from None
        return left_out

    def load(self, path: Path) -> int:
        """Go on from the one conversation in a file, in any shape that `minigpt sft` reads. Returns its tokens."""
        found = list(islice(_conversations(path), 2))
        if len(found) != 1:
            raise DataError(f"{path} holds {'more than one' if found else 'no'} conversation", fix=_LOADABLE)
        before = self.messages, self.tools
        self.messages, self.tools = found[0].messages, found[0].tools
        try:
            return self.tokens()
        except DataError:  # the chat template does not take it
            self.messages, self.tools = before
            raise


def _conversations(path: Path) -> Iterator[schema.Conversation]:
    from minigpt.core.data import schema
    from minigpt.core.data.formats import normalise
    from minigpt.core.data.reader import Input, rows

    if not path.is_file():
        raise DataError(f"there is no file {path}", fix=_LOADABLE)
    for row in rows(Input(path, 1.0, str(path))):
        try:
            if row.fault is not None:
                raise row.fault
            record = normalise(row.value)
        except schema.BadRow as e:
            found = schema.as_found(row.value)
            raise DataError(f"{row.where} has {e.reason}{e.detail}", found=found, fix=_LOADABLE) from None
        assert isinstance(record, schema.Conversation), "running text is a bad row here"
        yield record


@dataclass
class Answer:
    """One answer while it comes. opened: it began inside a thought. Times are perf_counter's, in seconds."""

    opened: bool
    asked_at: float
    pieces: list[str] = field(default_factory=list)
    first_at: float = 0.0
    last_at: float = 0.0

    def add(self, piece: str) -> None:
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at
        self.pieces.append(piece)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class _Voice:
    """Shows an answer. In colour its thought is dimmed and the tags are gone; elsewhere stdout gets the exact text."""

    def __init__(self, report: Report, opened: bool):
        self.report = report
        self.splitter = ThinkSplitter(opened) if report.faint("") else None
        self.thought = False  # something was shown that the answer is to stand apart from

    def say(self, piece: str) -> None:
        if self.splitter is None:
            self.report.out(piece, end="")
        else:
            self._show(self.splitter.add(piece))

    def finish(self) -> None:
        if self.splitter is not None:
            self._show(self.splitter.finish())
        self.report.out("")

    def _show(self, parts: list[tuple[str, bool]]) -> None:
        for text, thinking in parts:
            if thinking:
                self.report.faint(text)
            else:
                self.report.out(f"\n\n{text}" if self.thought else text, end="")
            self.thought = thinking


def remembered(answer: str, opened: bool = False) -> Message:
    """An answer as the chat template knows it: what was thought apart from what was said."""
    thought, said = split(answer, opened)
    return {"role": "assistant", "content": said, **({"reasoning_content": thought} if thought else {})}


def turns(messages: list[Message]) -> Iterator[list[Message]]:
    """A user message with all that follows it; what stands before the first one comes first."""
    turn: list[Message] = []
    for message in messages:
        if message["role"] == "user" and turn:
            yield turn
            turn = []
        turn.append(message)
    if turn:
        yield turn


def without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """The same without the first question and its answer; None when only the newest turn is left."""
    system = [m for m in messages[:1] if m["role"] == "system"]
    spoken = list(turns(messages[len(system) :]))
    return [*system, *(m for turn in spoken[1:] for m in turn)] if len(spoken) > 1 else None


def answered(messages: list[Message]) -> tuple[list[Message], int]:
    """The messages without the questions that got no answer, and the number of those."""
    kept: list[Message] = []
    left_out = 0
    for turn in turns(messages):
        if turn[0]["role"] != "user" or any(m["role"] == "assistant" and not _is_empty(m) for m in turn):
            kept += turn
        else:
            left_out += 1
    return kept, left_out


def _is_empty(message: Message) -> bool:
    return not (message["content"].strip() or message.get("reasoning_content") or message.get("tool_calls"))
