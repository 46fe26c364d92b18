"""Help pages: one line an option, in panels, with every default and choice; three commands to copy at the end."""

from __future__ import annotations

import shutil
import sys
import textwrap

from minigpt.cli.console import paint, wants_colour
from minigpt.cli.flags import Command, stage_commands
from minigpt.core.config import PANELS, Option, options
from minigpt.stages import STAGES

WIDEST = 110
ROOT_EXAMPLES = (
    "minigpt pretrain -d book.txt --size 1m -o runs/book",
    "minigpt sft -m runs/book -d chats.jsonl -o runs/talk",
    "minigpt chat -m runs/talk",
)
_METAVAR = {int: "N", float: "X", str: "TEXT"}


def metavar(option: Option) -> str:
    """What stands for an option's value: PATH, N, X, TEXT, with … when it may be given again; a switch has none."""
    if option.type is bool:
        return ""
    return (option.meta["metavar"] or _METAVAR[option.type]) + ("…" if option.many else "")


def default_text(option: Option) -> str:
    """An option's default as help shows it; empty when there is nothing to say."""
    if option.meta["shown"]:
        return option.meta["shown"]
    value = option.default
    if isinstance(value, bool):
        return "on" if value else ""
    if value is None or value == [] or value == "":
        return ""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def names(option: Option) -> str:
    """`-d, --data`, `--think/--no-think`."""
    if option.meta["argument"]:
        return argument(option)
    long = option.flag
    if option.type is bool and option.default is not False:
        long += f"/--no-{option.flag[2:]}"
    return f"{option.meta['short']}, {long}" if option.meta["short"] else long


def argument(option: Option) -> str:
    """A positional argument as the usage line shows it: PATH, [PATH], [TEXT…]."""
    name = (option.meta["metavar"] or option.name.upper()) + ("…" if option.many else "")
    return name if option.default is None and not option.optional else f"[{name}]"


def missing_choices(option: Option) -> str:
    """The choices of an option, when its help text does not already name them all."""
    choices = option.meta["choices"] or ()
    named = set(option.meta["help"].replace(",", " ").replace(";", " ").replace(":", " ").split())
    return "" if all(c in named for c in choices) else "one of " + ", ".join(choices)


def usage(command: Command) -> str:
    """`minigpt info PATH [OPTIONS]`."""
    words = [argument(o) for o in options(command.config) if o.meta["argument"]]
    return " ".join(["minigpt", command.name, *words, "[OPTIONS]"])


def page(command: Command, everything: bool = False) -> str:
    """The help page of one command."""
    paper = _Paper()
    paper.text(usage(command), style="bold")
    paper.text(command.help)
    hidden = 0
    panels: dict[str, list[Option]] = {name: [] for name in ("Arguments", *PANELS)}
    for option in options(command.config):
        if option.meta["advanced"] and not everything:
            hidden += 1
        else:
            panels.setdefault("Arguments" if option.meta["argument"] else option.meta["panel"], []).append(option)
    for name, rows in panels.items():
        if rows:
            paper.heading(name)
        for option in rows:
            paper.row(_left(option), _right(option))
    if hidden:
        paper.row("    --help-all", f"{hidden} more options")
    paper.examples(command.examples)
    return paper.done()


def verbs_page(stage: str) -> str:
    """The help page of a command that has verbs."""
    commands = stage_commands(stage)
    paper = _Paper()
    paper.text(f"minigpt {stage} VERB [OPTIONS]", style="bold")
    paper.text(STAGES[stage][1])
    paper.heading("Verbs")
    for verb, command in commands.items():
        paper.row(verb, command.help)
    paper.text(f"Options of a verb: minigpt {stage} VERB --help", gap=True)
    paper.examples(tuple(c.examples[0] for c in commands.values())[:3])
    return paper.done()


def root_page() -> str:
    """`minigpt --help`. Reads the table of stages and imports none of them."""
    paper = _Paper()
    paper.text("minigpt COMMAND [OPTIONS]", style="bold")
    paper.text("Train, understand and own small language models.")
    paper.heading("Commands")
    for name, (_, text) in STAGES.items():
        paper.row(name, text)
    paper.heading("Options")
    paper.row("-h, --help", "of any command: minigpt COMMAND --help, or --help-all for its rare options")
    paper.row("-V, --version", "with --json also the versions of python, torch and the rest")
    paper.row("    --install-completion", "complete commands and flags in this shell")
    paper.examples(ROOT_EXAMPLES)
    return paper.done()


def _left(option: Option) -> str:
    name = names(option)
    indent = "" if option.meta["short"] or option.meta["argument"] else "    "
    value = "" if option.meta["argument"] else metavar(option)
    return f"{indent}{name} {value}".rstrip()


def _right(option: Option) -> str:
    default = default_text(option)
    parts = [option.meta["help"], missing_choices(option)]
    return "; ".join(filter(None, parts)) + (f" [{default}]" if default else "")


class _Paper:
    """Lines of a page, wrapped to the terminal. Examples are never wrapped: they are there to be copied."""

    def __init__(self) -> None:
        self.colour = wants_colour(sys.stdout)
        self.width = max(40, min(WIDEST, shutil.get_terminal_size((100, 24)).columns))
        self.column = 28 if self.width >= 70 else 8
        self.lines: list[str] = []

    def text(self, text: str, style: str = "", gap: bool = False) -> None:
        self.lines += [""] * gap
        for line in textwrap.wrap(text, self.width):
            self.lines.append(paint(line, style, self.colour) if style else line)

    def heading(self, text: str) -> None:
        self.lines += ["", paint(text, "bold", self.colour)]

    def row(self, left: str, right: str) -> None:
        room = self.column - 4
        wrapped = textwrap.wrap(right, self.width - self.column) or [""]
        first = paint(left, "cyan", self.colour) + " " * max(0, room - len(left))
        if len(left) <= room:
            self.lines.append(f"  {first}  {wrapped.pop(0)}".rstrip())
        else:
            self.lines.append(f"  {first}")
        self.lines += [" " * self.column + line for line in wrapped]

    def examples(self, commands: tuple[str, ...]) -> None:
        self.heading("Examples")
        self.lines += [f"  {command}" for command in commands]

    def done(self) -> str:
        return "\n".join(self.lines)
