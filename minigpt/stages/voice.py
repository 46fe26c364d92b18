"""How an answer is shown while it comes."""

from __future__ import annotations

from collections.abc import Sequence

from minigpt.core.infer.reply import Part, ReplyParser, Text
from minigpt.core.infer.thinking import CLOSE, OPEN, ThinkSplitter
from minigpt.core.report import Report


class Voice:
    """Shows an answer. In colour its thought is dimmed and the tags are gone; elsewhere stdout gets the exact text.

    opened: the answer begins inside of a thought. calls: calls of tools are left out; whoever runs them tells of them.
    """

    def __init__(self, report: Report, opened: bool, calls: bool = False):
        self.report = report
        self.colour = report.faint("")
        self.parser = ReplyParser(opened) if calls else None
        self.splitter = ThinkSplitter(opened) if self.colour and not calls else None
        self.opened = opened
        self.thought = False  # the last that was shown; what follows is to stand apart from it
        self.silent = True  # nothing was shown

    def say(self, piece: str) -> None:
        if self.parser is not None:
            self._show(self.parser.add(piece))
        elif self.splitter is not None:
            self._show([Text(*part) for part in self.splitter.add(piece)])
        else:
            self.report.out(piece, end="")

    def finish(self, interrupted: bool = False) -> None:
        """End the line; an answer of nothing but calls has none. interrupted: the beginning of a call stays unseen."""
        if self.parser is not None:
            self._show(() if interrupted else self.parser.finish())
        elif self.splitter is not None:
            self._show([Text(*part) for part in self.splitter.finish()])
        if self.parser is None or not self.silent:
            self.report.out("")

    def _show(self, parts: Sequence[Part]) -> None:
        for part in parts:
            thought = isinstance(part, Text) and part.thought
            if self.thought and not thought and not self.colour:
                self.report.out(f"\n{CLOSE}", end="")
            if isinstance(part, Text):
                self._tell(part)
                self.silent = False
            self.thought = thought

    def _tell(self, part: Text) -> None:
        if not part.thought:
            self.report.out(f"\n\n{part.text}" if self.thought else part.text, end="")
        elif not self.report.faint(part.text):
            begins = not self.thought and not self.opened
            self.report.out(f"{OPEN}\n{part.text}" if begins else part.text, end="")
