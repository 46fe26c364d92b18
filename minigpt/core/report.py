"""What a stage tells its user, without knowing where it goes.

Results go to `out` (stdout); everything else is talk (stderr). The base class is silent, for use as a library;
`cli.console.Console` writes to the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class Progress:
    """A running bar. Use as a context manager; `update` takes the absolute position.

    On a terminal the bar shows position, total, the caller's text and the time left. Without one there is no bar:
    only the calls with `line=True` print, one plain line each, so the caller decides how often a log hears of it.
    """

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def update(self, done: int, text: str = "", *, line: bool = False) -> None:
        """done: units finished so far. text: the figures behind the bar, already formatted.

        line: without a terminal, print `label  done/total  text` as one line; on a terminal it changes nothing.
        """


class Report:
    """Silent reporter and the interface of all others."""

    interactive = False  # stderr is a terminal: bars are drawn and redrawn
    json = False  # the user asked for one JSON object at the end

    @property
    def colours(self) -> bool:
        """Whether result text may be coloured: stdout is a terminal whose user did not ask for plain text."""
        return False

    def title(self, text: str) -> None:
        """The one line that says what runs."""

    def note(self, label: str, text: str) -> None:
        """One labelled line, such as `data   60,000 documents`."""

    def warn(self, text: str, *, fix: str | None = None) -> None:
        """Something the user should know, while the work goes on."""

    def detail(self, text: str) -> None:
        """A line for --verbose."""

    def progress(self, total: int | None, *, start: int = 0, label: str = "") -> Progress:
        """A bar of `total` units (None = unknown) beginning at `start`. One bar at a time."""
        return Progress()

    def out(self, text: str, *, end: str = "\n") -> None:
        """Result text. Written and flushed at once, so that a pipe sees each line as it is made.

        With --json nothing is written: stdout then holds one object, made of `Result.data`.
        """

    def faint(self, text: str) -> bool:
        """Result text that matters less, dimmed, without a line's end.

        False, with nothing written, where stdout shows no colour: the caller then says it in another way.
        """
        return False

    def picture(self, text: str) -> None:
        """Result text with colour codes of our own in it; only where `colours` holds."""

    def marked(self, parts: Sequence[tuple[str, bool]]) -> None:
        """Result text of which some parts are marked: within ⟦ ⟧, and in colour on a terminal."""


@dataclass
class Result:
    """What a stage hands back.

    text: the result line for stdout (a path, say); None when `out` already wrote it.
    data: the fields of the `--json` object, and the return value of the Python API.
    """

    text: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What surrounds a stage: the reporter, where each option's value came from, and the command as typed."""

    report: Report = field(default_factory=Report)
    origins: dict[str, str] = field(default_factory=dict)
    argv: list[str] = field(default_factory=list)
