"""What a person may type in a chat instead of a message: commands that begin with a slash."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from minigpt.core.errors import UsageError
from minigpt.core.files import quoted
from minigpt.core.report import Report
from minigpt.stages.conversation import Conversation


class Command(NamedTuple):
    """do: takes the conversation, what stands behind the name, and the report. argument: how help calls the latter."""

    do: Callable[[Conversation, str, Report], None]
    argument: str
    help: str


def obey(text: str, chat: Conversation, report: Report) -> None:
    """Run one slash command. UsageError for an unknown one and for a value that it does not take."""
    name, value = [*text.split(maxsplit=1), ""][:2]
    command = COMMANDS.get(name.lower())
    if command is None:
        near = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"{name} is no command",
            fix=f"{meant}/help lists them; a message that begins with a slash is written with two: //…",
        )
    if value and not command.argument:
        raise UsageError(f"{name} takes nothing behind it", found=value)
    if not value and command.argument and not command.argument.startswith("["):
        raise UsageError(f"{name} needs a {command.argument}", fix=f"such as {name} talk.jsonl")
    command.do(chat, value, report)


def show_help(chat: Conversation, value: str, report: Report) -> None:
    usages = {f"{name} {command.argument}": command.help for name, command in COMMANDS.items()}
    width = max(map(len, usages))
    rows = [f"  {usage:<{width}}  {words}" for usage, words in usages.items()]
    more = [
        "  A line that ends in \\ goes on in the next one. A message that begins with a slash is written with two.",
        "  Ctrl-C stops an answer and keeps what was said; Ctrl-D leaves.",
    ]
    report.note("help", "\n".join(["commands", *rows, *more]))


def reset(chat: Conversation, value: str, report: Report) -> None:
    chat.reset()
    report.note("reset", "the conversation is forgotten")


def system(chat: Conversation, value: str, report: Report) -> None:
    needs_chat_model(chat, "system message")
    if value:
        chat.set_system(None if value == "-" else value)
    report.note("system", chat.system or "no system message")


def retry(chat: Conversation, value: str, report: Report) -> None:
    chat.retry(report)
    if chat.sample.temperature == 0:
        report.note("retry", "at temperature 0 the answer stays the same; /temp 0.7 makes others possible")


def save(chat: Conversation, value: str, report: Report, overwrite: bool = False) -> None:
    path = Path(value).expanduser()
    left_out = chat.save(path, overwrite)
    without = f", without {left_out} that got no answer" if left_out else ""
    report.note(
        "saved", f"{path}{without}; train on it with minigpt sft -m {quoted(chat.model.path)} -d {quoted(path)}"
    )


def save_over(chat: Conversation, value: str, report: Report) -> None:
    save(chat, value, report, overwrite=True)


def load_file(chat: Conversation, value: str, report: Report) -> None:
    needs_chat_model(chat, "conversation")
    used = chat.load(Path(value).expanduser())
    report.note("loaded", f"{len(chat.messages)} messages, {used:,} of {chat.context:,} tokens")


def temperature(chat: Conversation, value: str, report: Report) -> None:
    if value:
        chat.sample.temperature = checked_temperature(value)
    report.note("temp", f"{chat.sample.temperature:g}")


def checked_temperature(value: str) -> float:
    with contextlib.suppress(ValueError):
        number = float(value)
        if 0 <= number <= 100:
            return number
    raise UsageError("/temp takes a number from 0 to 100", found=value, fix="such as /temp 0.7; 0 = greedy")


THINK = {"on": True, "off": False, "auto": None}


def think(chat: Conversation, value: str, report: Report) -> None:
    needs_chat_model(chat, "thinking")
    if value:
        if value.lower() not in THINK:
            raise UsageError("/think takes on, off or auto", found=value, fix="auto = the template's own way")
        chat.sample.think = THINK[value.lower()]
    state = next(name for name, wish in THINK.items() if wish is chat.sample.think)
    report.note("think", state + ("" if chat.can_think else "; but this model's chat template has no thinking"))


def tools(chat: Conversation, value: str, report: Report) -> None:
    needs_chat_model(chat, "tools")
    if value:
        switch_tools(chat, value.replace(",", " ").split(), "/tools")
    from minigpt.core.infer.tools import demo_tools

    rows = [
        f"  {'on ' if name in chat.tools else 'off'}  {name:<14}  {tool.description}"
        for name, tool in demo_tools().items()
    ]
    states = "on" if chat.tools else "off"
    unseen = "; but this model's chat template shows no tools" if chat.tools and not chat.can_call else ""
    report.note("tools", "\n".join([states + unseen, *rows]))


def switch_tools(chat: Conversation, wanted: list[str], where: str) -> None:
    """Let the model call the tools of these names and no others; `on` = all, `off` = none. where: for an error."""
    needs_chat_model(chat, "tools")
    from minigpt.core.infer.tools import demo_tools

    known = demo_tools()
    words = [word.lower() for word in wanted]
    names = {"on": [*known], "off": []}.get(words[0], words) if len(words) == 1 else words
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"{where} knows no tool {unknown[0]}", fix=f"{meant}on, off, or of {', '.join(known)}")
    chat.tools = {name: known[name] for name in names}


def tokens(chat: Conversation, value: str, report: Report) -> None:
    if chat.model.is_chat:
        used = chat.tokens()
        report.note("tokens", f"{used:,} of {chat.context:,} in the conversation ({used / chat.context:.0%})")
    else:
        report.note("tokens", f"a base model keeps no conversation; a text may have {chat.context:,}")
    if chat.last is not None:
        report.note("answer", chat.figures(chat.last))


def leave(chat: Conversation, value: str, report: Report) -> None:
    raise EOFError  # as Ctrl-D does


def needs_chat_model(chat: Conversation, what: str) -> None:
    if not chat.model.is_chat:
        raise UsageError(f"{chat.model.path} is a base model: it knows no {what}", fix="fine-tune it with minigpt sft")


COMMANDS = {
    "/help": Command(show_help, "", "this table"),
    "/reset": Command(reset, "", "forget the conversation; the system message stays"),
    "/system": Command(system, "[TEXT]", "show or set the system message; - removes it"),
    "/retry": Command(retry, "", "answer the last message again, in place of the last answer"),
    "/save": Command(save, "FILE", "write the conversation as a row for minigpt sft (.jsonl or .json)"),
    "/save!": Command(save_over, "FILE", "the same, replacing a file that is there"),
    "/load": Command(load_file, "FILE", "go on from a conversation in a file"),
    "/temp": Command(temperature, "[VALUE]", "show or set the temperature; 0 = greedy"),
    "/think": Command(think, "[on|off|auto]", "show or set whether a thinking model thinks; auto = the template's own"),
    "/tools": Command(tools, "[on|off|NAME…]", "show or set which demonstration tools the model may call"),
    "/tokens": Command(tokens, "", "tokens of the conversation and of the last answer, and its speed"),
    "/exit": Command(leave, "", "leave, as Ctrl-D does"),
    "/quit": Command(leave, "", "the same"),
}
