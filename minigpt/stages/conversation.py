"""A conversation with a model: what was said so far, answers that stream, and a file that fine-tuning can read."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.errors import DataError, UsageError
from minigpt.core.groups import SampleConfig
from minigpt.core.infer.reply import Reply, ToolCall, parse
from minigpt.core.infer.thinking import OPEN
from minigpt.core.report import Report
from minigpt.stages.voice import Voice

if TYPE_CHECKING:
    from minigpt.core.data import schema
    from minigpt.core.infer.engine import Engine
    from minigpt.core.infer.model import Model
    from minigpt.core.infer.tools import Tool

Message = dict[str, Any]
SUFFIXES = (".jsonl", ".json")  # a file of another name would be read as plain text
_LOADABLE = "name a file with one conversation, such as /save writes"
MOST_ROUNDS = 8  # of calling tools before an answer
_SHOWN = 200  # characters of a call's arguments, and of its result
_TAIL = 16  # tokens at a prompt's end that surely hold an opening tag, even if it is spelled letter by letter


class Conversation:
    """Messages so far, and the engine that answers them.

    sample: how to answer; may be changed between two answers. seed: of the first answer, each later one adds 1.
    tools: that the model may call, by name. loaded_tools: descriptions that came with a conversation from a file; the
    model sees them too. last: the newest answer, for its figures.
    """

    def __init__(self, engine: Engine, model: Model, sample: SampleConfig, seed: int = 0, system: str | None = None):
        self.engine = engine
        self.model = model
        self.sample = sample
        self.seed = seed
        self.messages: list[Message] = []
        self.tools: dict[str, Tool] = {}
        self.loaded_tools: list[dict[str, Any]] = []
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
        """Forget everything but the system message and the tools that are on."""
        self.messages = self.messages[:1] if self.system is not None else []
        self.loaded_tools = []

    @property
    def described_tools(self) -> list[dict[str, Any]]:
        """What the model is told of tools."""
        functions = [tool["function"] for tool in self.loaded_tools]
        loaded = [function.get("name") for function in functions if isinstance(function, dict)]
        return [*self.loaded_tools, *(tool.schema for name, tool in self.tools.items() if name not in loaded)]

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
        """Let the model speak, and run the tools that it calls, until it has answered."""
        for past in range(MOST_ROUNDS):  # rounds of calls
            asked_at = time.perf_counter()
            messages, ids = self._fitting(messages, report)
            answer = Answer(self._opens_thought(ids), asked_at)
            try:
                self._stream(ids, answer, report)
                reply = answer.reply()
                results = self._run(reply, report)
            except KeyboardInterrupt:
                said = answer.interrupted()
                if said or past:
                    self._remember([*messages, *said], answer)
                raise
            messages = [*messages, reply.message(), *results]
            if not results:
                self._remember(messages, answer)
                return
        self._remember(messages, answer)
        report.warn(
            f"the model has called tools {MOST_ROUNDS} times without an answer: it is stopped",
            fix="ask in another way, or switch tools off with /tools",
        )

    def _stream(self, ids: list[int], answer: Answer, report: Report) -> None:
        """Show one answer while it comes."""
        from minigpt.stages.generate import sampling

        params = sampling(self.sample, self.seed)
        self.seed += 1
        voice = Voice(report, answer.opened, calls=bool(self.tools))
        interrupted = True
        try:
            for piece in self.engine.stream(ids, params):
                answer.add(piece)
                voice.say(piece)
            interrupted = False
        finally:
            voice.finish(interrupted)

    def _run(self, reply: Reply, report: Report) -> list[Message]:
        """What the tools say that were called, as messages; none where tools are off. Each call is told."""
        if not self.tools:
            return []
        for fault in reply.faults:
            report.warn(f"the answer has {fault}: it stays text")
        return [self._result(call, report) for call in reply.tool_calls]

    def _result(self, call: ToolCall, report: Report) -> Message:
        from minigpt.core.infer import tools

        result = tools.call(self.tools, call.name, call.arguments)
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        report.note("tool", f"{call.name} {_cut(arguments)} → {_cut(result)}")
        return {"role": "tool", "content": result}

    def _remember(self, messages: list[Message], answer: Answer) -> None:
        self.messages, self.last = messages, answer

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
                    fix="shorten it" + (", or show the model fewer tools with /tools NAME" if self.tools else ""),
                )
            messages = shorter
            dropped += 1
        if dropped:
            oldest = "turn is" if dropped == 1 else f"{dropped} turns are"
            report.warn(f"the conversation has outgrown the context: the oldest {oldest} forgotten")
        return messages, ids

    def _prompt(
        self, messages: list[Message], thinking: bool | None = None, tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """The whole conversation for a chat model, the last text alone for a base model.

        thinking, tools (descriptions): None = as set.
        """
        tokenizer = self.model.tokenizer
        if not self.model.is_chat:
            return [tokenizer.opening_id, *tokenizer.encode(messages[-1]["content"])]
        from minigpt.core.data.chat import render

        wish = self.sample.thinks if thinking is None else thinking
        shown = self.described_tools if tools is None else tools
        return render(tokenizer, messages, shown, generation_prompt=True, thinking=wish).ids

    def _opens_thought(self, ids: list[int]) -> bool:
        end = self.model.tokenizer.decode(ids[-_TAIL:], skip_special=False)
        return self.model.is_chat and end.rstrip().endswith(OPEN)

    @property
    def can_think(self) -> bool:
        """Whether the chat template makes a difference between thinking and not."""
        probe = [{"role": "user", "content": "?"}]
        return self._prompt(probe, thinking=True) != self._prompt(probe, thinking=False)

    @property
    def can_call(self) -> bool:
        """Whether the chat template shows tools to the model."""
        probe = [{"role": "user", "content": "?"}]
        tool = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}
        return self._prompt(probe, tools=[tool]) != self._prompt(probe, tools=[])

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

        row = {"messages": kept, **({"tools": self.described_tools} if self.described_tools else {})}
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
        before = self.messages, self.loaded_tools
        self.messages, self.loaded_tools = found[0].messages, found[0].tools
        try:
            return self.tokens()
        except DataError:  # the chat template does not take it
            self.messages, self.loaded_tools = before
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

    def reply(self) -> Reply:
        return parse(self.text, self.opened)

    def interrupted(self) -> list[Message]:
        """What was said until then as a message, if anything; without calls, which nobody has run."""
        said = replace(parse(self.text, self.opened, whole=False), tool_calls=[]).message()
        return [] if _is_empty(said) else [said]


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def remembered(answer: str, opened: bool = False) -> Message:
    """An answer as the chat template knows it: thought, speech and calls apart."""
    return parse(answer, opened).message()


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
            kept += [
                m for m in turn if m["role"] != "assistant" or not _is_empty(m)
            ]  # the model fell silent at a result
        else:
            left_out += 1
    return kept, left_out


def _is_empty(message: Message) -> bool:
    return not (message["content"].strip() or message.get("reasoning_content") or message.get("tool_calls"))
