"""What a Markdown page asks its reader to type: fenced blocks, and commands named in running text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.docs import shell

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    if "docs/reference/cli" not in page.as_posix()  # made from the examples of the stages, which are checked as such
)
SHELL, TRANSCRIPT, PYTHON = ("bash", "sh", "shell"), ("console",), ("python", "py")

FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}(?=[^`]*$)|~{3,})\s*(?P<language>[\w+-]*)")
NOT_RUN = re.compile(r"^\s*<!-- not run: (.*\S) -->\s*$")
TRANSLATION = re.compile(r"<!-- translation of (\S+) -->")  # the first line of a page
SPAN = re.compile(r"(?<!`)`((?:[^`\n]|\n(?!\s*\n))+)`(?!`)")  # within a paragraph
TABLE = re.compile(r"^minigpt (\S+) {2,}\S")  # a list of commands, each with what it does


@dataclass(frozen=True)
class Block:
    """A fenced block. line: that of its opening fence, from 1. not_run: the reason of the comment above it."""

    line: int
    language: str
    text: str
    not_run: str | None = None

    @property
    def shell(self) -> str:
        """What the reader types into a shell; empty for another language."""
        if self.language in TRANSCRIPT:
            return "".join(f"{line}\n" for line in typed(self.text))
        return self.text if self.language in SHELL else ""

    @property
    def python(self) -> str:
        return self.text if self.language in PYTHON else ""

    @property
    def runs(self) -> bool:
        return self.not_run is None and bool(self.shell or self.python)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def original(page: Path) -> Path | None:
    """The page that this one translates, command by command; None when it is no translation."""
    marker = TRANSLATION.match(read(page))
    return (page.parent / marker[1]).resolve() if marker else None


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page (CommonMark 0.31, section 4.5), also indented ones in lists."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        if not (opening := FENCE.match(lines[at])):
            at += 1
            continue
        end = closing(lines, at, opening["fence"])
        indent = len(opening["indent"])
        body = [line[min(indent, len(line) - len(line.lstrip())) :] for line in lines[at + 1 : end]]
        marker = NOT_RUN.match(lines[at - 1]) if at else None
        yield Block(at + 1, opening["language"], "".join(f"{b}\n" for b in body), marker[1] if marker else None)
        at = end + 1


def closing(lines: list[str], opening: int, fence: str) -> int:
    """The line that closes a fence: the same character, at least as often, and nothing else; else the page's end."""
    closes = re.compile(rf"^\s*{re.escape(fence[0])}{{{len(fence)},}}\s*$")
    for at in range(opening + 1, len(lines)):
        if closes.match(lines[at]):
            return at
    return len(lines)


def typed(transcript: str) -> Iterator[str]:
    """The lines behind `$ ` prompts, with those that a backslash joins to them."""
    goes_on = False
    for line in transcript.splitlines():
        if goes_on or line.startswith("$ "):
            text = line.removeprefix("> " if goes_on else "$ ")
            yield text
            goes_on = text.endswith("\\")


def mentions(text: str) -> Iterator[tuple[int, str]]:
    """Commands named outside the blocks to run, with their lines: `minigpt …` as code, or in a list of commands."""
    lines = text.splitlines()
    for block in blocks(text):
        rows = block.text.splitlines()
        if not block.language:
            for number, row in enumerate(rows, block.line + 1):
                if listed := TABLE.match(row):
                    yield number, f"minigpt {listed[1]}"
        lines[block.line - 1 : block.line + len(rows) + 1] = [""] * (len(rows) + 2)
    prose = "\n".join(lines)
    for span in SPAN.finditer(prose):
        if "minigpt " in (code := " ".join(span[1].split())) and any(shell.commands(code)):
            yield prose.count("\n", 0, span.start()) + 1, code
