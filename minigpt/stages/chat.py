"""Talk with a model."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from minigpt.core.config import group, opt
from minigpt.core.errors import MinigptError, UsageError
from minigpt.core.files import quoted
from minigpt.core.groups import CommonConfig, DeviceConfig, LoadConfig, SampleConfig
from minigpt.core.report import Context, Report, Result
from minigpt.stages.conversation import Conversation
from minigpt.stages.loading import load_model, model_option, sample_as_its_makers
from minigpt.stages.prompts import BOM
from minigpt.stages.slash import obey, switch_tools

EXAMPLES = (
    "minigpt chat -m runs/chat",
    "minigpt chat -m runs/chat -p 'What is the capital of France?'",
    "echo 你好 | minigpt chat -m runs/chat --temperature 0",
)


@dataclass
class Config:
    model: str | None = model_option(shown="the newest run")
    prompt: str | None = opt(None, "ask this once and end", short="-p", panel="Data", metavar="TEXT")
    system: str | None = opt(None, "system message", panel="Data", metavar="TEXT")
    tools: list[str] = opt(
        [], "let the model call this demonstration tool (repeatable); on = all of them", panel="Data", metavar="NAME"
    )
    load: LoadConfig = group(LoadConfig)
    sample: SampleConfig = group(SampleConfig)
    device: DeviceConfig = group(DeviceConfig)
    common: CommonConfig = group(CommonConfig)


def run(cfg: Config, context: Context) -> Result:
    """Read messages from the terminal or a pipe, a line each; answers stream to stdout. /help lists the commands."""
    report = context.report
    path = model_path(cfg.model, report)
    from minigpt.core.infer.engine import Engine

    sample_as_its_makers(cfg.sample, context.origins, path, report)
    model = load_model(path, cfg.load, cfg.device, report)
    if not model.is_chat:
        report.warn(
            f"{model.path} is a base model: it continues your text instead of answering",
            fix=f"to make it answer: minigpt sft -m {quoted(model.path)} -d conversations.jsonl",
        )
    chat = Conversation(Engine(model, rows=1, compile=cfg.load.compile), model, cfg.sample, cfg.device.seed, cfg.system)
    if cfg.tools:
        switch_tools(chat, cfg.tools, "--tools")
        if not chat.can_call:
            report.warn("this model's chat template shows no tools, so none will be called")
    if cfg.prompt is not None:
        chat.ask(cfg.prompt, report)
    else:
        converse(chat, report)
    return Result(data={"model": str(model.path), "messages": chat.messages})


def model_path(named: str | None, report: Report) -> Path:
    """The model folder that was named, else the newest run's. Checked before torch is imported."""
    from minigpt.core.convert.open import open_model
    from minigpt.core.models.folder import resolve
    from minigpt.core.train.run import newest_run

    if named is not None:
        return open_model(named, report).path
    newest = newest_run()
    if newest is None:
        raise UsageError(
            "chat needs a model, and there is no run with a saved step",
            fix="make one with minigpt quickstart, or name one with --model, such as -m runs/chat",
        )
    report.note("model", f"{newest}, the newest run; --model names another")
    return resolve(newest)


# ---------------------------------------------------------------------------------------------- the loop


def converse(chat: Conversation, report: Report) -> None:
    """Answer line after line until the end. At a terminal Ctrl-C ends an answer, in a pipe the program."""
    reader = Reader()
    if reader.person:
        report.note("chat", "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    warned = False
    while True:
        try:
            text = reader.message()
        except EOFError:
            break
        except KeyboardInterrupt:
            if not reader.person:
                raise
            if warned:
                break
            warned = True
            report.note("chat", "press Ctrl-D or type /exit to leave")
            continue
        warned = False
        try:
            respond(text, chat, report)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not reader.person:
                raise
        except MinigptError as fault:
            tell(fault, report)


def respond(text: str, chat: Conversation, report: Report) -> None:
    """Obey a command, answer anything else. EOFError when the person wants to leave."""
    text = text.strip()
    if text.startswith("/") and not text.startswith("//"):
        obey(text, chat, report)
    elif text:
        chat.ask(text.removeprefix("/"), report)


def tell(fault: MinigptError, report: Report) -> None:
    """A fault that does not end the program, in the one voice."""
    found = " ".join((fault.found or "").split())
    row = f"\n  found  {found if len(found) <= 160 else found[:159] + '…'}" if found else ""
    report.warn(fault.message + row, fix=fault.fix)


class Reader:
    """Messages from stdin. person: somebody types them, so there is a prompt and a line can be edited."""

    def __init__(self) -> None:
        self.person = is_terminal(sys.stdin)
        # Only with both ends at a terminal does input() edit lines; else it would write the prompt into a piped stdout.
        self.edits = self.person and is_terminal(sys.stdout) and sys.stderr is not None
        if self.edits:
            with contextlib.suppress(ImportError):  # Windows edits lines by itself
                import readline  # noqa: F401
        if sys.stdin is not None:
            encoding = None if self.person else "utf-8"
            sys.stdin.reconfigure(encoding=encoding, errors="replace")  # type: ignore[union-attr]

    def message(self) -> str:
        """The next message; a line that ends in a backslash goes on in the next one. EOFError at the end."""
        lines: list[str] = []
        try:
            while True:
                line = self._line("...> " if lines else "you> ")
                if not line.endswith("\\"):
                    return "\n".join([*lines, line])
                lines.append(line[:-1])
        except EOFError:
            if lines:
                return "\n".join(lines)
            self._prompt("\n")
            raise
        except KeyboardInterrupt:
            self._prompt("\n")
            raise

    def _line(self, prompt: str) -> str:
        if self.edits:
            return input(prompt)
        self._prompt(prompt)
        line = sys.stdin.readline() if sys.stdin is not None else ""
        if not line:
            raise EOFError
        return line.lstrip(BOM).rstrip("\r\n")

    def _prompt(self, text: str) -> None:
        """Write to a person's stderr; a closed one disturbs nothing."""
        if self.person:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(text)
                sys.stderr.flush()


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()
