"""Where words go: results to stdout, everything else to stderr, one JSON object instead when --json asks for it.

Colour only on a terminal that wants it (NO_COLOR, TERM=dumb). A reader that closes stdout early ends the program
quietly; a closed stderr never disturbs the work. Control characters in what is shown on a terminal are spelled out,
so that neither data nor a model's output can drive the terminal.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from minigpt.core.errors import DataError, MinigptError
from minigpt.core.report import Progress, Report, Result
from minigpt.core.train.metrics import spell_time

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

FOUND_LIMIT = 160  # characters of an error's `found` line
_STYLES = {"bold": "1", "dim": "2", "red": "1;31", "yellow": "33", "green": "32", "cyan": "36"}
# C0 without tab and newline, DEL, C1, and the marks that reorder text on screen
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class OutputClosed(Exception):
    """Whoever reads stdout has gone: there is nobody left to work for."""


def visible(text: str) -> str:
    """The text with control characters spelled out (`\\x1b`), so that showing it does nothing else."""
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str, limit: int = FOUND_LIMIT) -> str:
    """A visible one-line form, cut to `limit` characters."""
    flat = visible(" ".join(text.split()))
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def wants_colour(stream: TextIO | None) -> bool:
    """True for a terminal whose user did not ask for plain text."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def paint(text: str, style: str, colour: bool) -> str:
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if colour and text else text


def write(stream: TextIO, text: str) -> None:
    """Write and flush; what the stream's encoding cannot hold is written as an escape."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


class Console(Report):
    """The terminal's reporter."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False):
        self._bar: _Bar | None = None
        self._deaf = sys.stderr is None
        self.configure(json=json, quiet=quiet, verbose=verbose)

    def configure(self, *, json: bool, quiet: bool, verbose: bool) -> None:
        """Adopt a command's own wishes once they are known."""
        self.json, self.quiet, self.verbose = json, quiet, verbose
        self.interactive = is_terminal(sys.stderr) and not quiet

    # ---- talk: stderr

    def title(self, text: str) -> None:
        if not self.quiet:
            self._talk(self._paint(visible(text), "bold"))

    def note(self, label: str, text: str) -> None:
        if not self.quiet:
            self._talk(f"{self._paint(f'{label:<6}', 'cyan')} {visible(text)}")

    def warn(self, text: str, *, fix: str | None = None) -> None:
        self._talk(f"{self._paint('warning:', 'yellow')} {visible(text)}" + (_row("fix", fix) if fix else ""))

    def detail(self, text: str) -> None:
        if self.verbose and not self.quiet:
            self._talk(self._paint(visible(text), "dim"))

    def progress(self, total: int | None, *, start: int = 0, label: str = "") -> Progress:
        if self.quiet:
            return Progress()
        if self.interactive:
            return _Bar(self, total, start, label)
        return _Lines(self, total, label)

    def _paint(self, text: str, style: str) -> str:
        return paint(text, style, wants_colour(sys.stderr))

    def _talk(self, text: str) -> None:
        bar = self._bar
        self.tell(lambda: bar.above(text) if bar is not None else write(sys.stderr, text + "\n"))

    def tell(self, words: Callable[[], object]) -> None:
        """Do what writes to stderr; when that is closed, go on without words."""
        if self._deaf:
            return
        try:
            words()
        except (OSError, ValueError):
            self._deaf = True

    # ---- results: stdout

    def out(self, text: str, *, end: str = "\n") -> None:
        if not self.json:
            self._result((visible(text) if is_terminal(sys.stdout) else text) + end)

    @property
    def colours(self) -> bool:
        return not self.json and wants_colour(sys.stdout)

    def picture(self, text: str) -> None:
        self._result(text + "\n")

    def faint(self, text: str) -> bool:
        if not self.colours:
            return False
        self._result(paint(visible(text), "dim", True))
        return True

    def marked(self, parts: Sequence[tuple[str, bool]]) -> None:
        if self.json:
            return
        colour = wants_colour(sys.stdout)
        left, right = ("⟦", "⟧") if _holds(sys.stdout, "⟦⟧") else ("[[", "]]")
        pieces = [paint(f"{left}{visible(t)}{right}", "green", colour) if on else visible(t) for t, on in parts if t]
        self._result("".join(pieces) + "\n")

    def finish(self, result: Result, seconds: float) -> None:
        """A stage's result: its one line, or the --json object."""
        if self.json:
            status = {"status": "ok", **result.data, "seconds": round(seconds, 3)}
            self._result(_json(status) + "\n")
        elif result.text is not None:
            self.out(result.text)

    def error(self, e: MinigptError) -> None:
        """A fault in the one voice: what happened, what was found, what to do."""
        if self.json:
            fault = {"status": "error", "code": int(e.code), "kind": e.kind, "message": e.message}
            self._result(_json({**fault, "found": e.found, "hint": e.fix, **e.data}) + "\n")
            return
        word = "stopped:" if e.kind in ("stopped", "aborted") else "error:"
        lines = f"{self._paint(word, 'red')} {visible(e.message)}"
        if e.found:
            lines += _row("found", one_line(e.found))
        if e.fix:
            lines += _row("fix", e.fix)
        self._talk(lines)

    def raw(self, text: str) -> None:
        """Text for stderr as it is, such as a stack trace."""
        self._talk(text)

    def page(self, text: str) -> None:
        """A page for stdout that is already fit to be shown, such as help."""
        self._result(text + "\n")

    def _result(self, text: str) -> None:
        if sys.stdout is None:
            return
        pause = self._bar.paused if self._bar is not None and is_terminal(sys.stdout) else _at_once
        try:
            pause(lambda: write(sys.stdout, text))
        except (BrokenPipeError, ConnectionResetError):
            raise OutputClosed from None
        except OSError as e:
            if os.name == "nt" and e.errno == errno.EINVAL:  # how Windows says that the pipe is closed
                raise OutputClosed from None
            raise DataError(f"could not write the result to stdout: {e.strerror or e}") from None


def _row(label: str, text: str) -> str:
    indented = visible(text).replace("\n", "\n" + " " * 9)
    return f"\n  {label:<6} {indented}"


def _at_once(action: Callable[[], None]) -> None:
    action()


def _json(value: Any) -> str:
    """One line. Escapes what a stdout of another encoding than UTF-8 could not hold, so no character is lost."""
    plain = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "").replace("_", "") != "utf8"
    text = json.dumps(_finite(value), ensure_ascii=plain, default=str)
    return text if plain else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _finite(value: Any) -> Any:
    """The same value with NaN and infinities, which JSON does not have, as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _holds(stream: TextIO | None, text: str) -> bool:
    """True when the stream's encoding has these characters."""
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


class _Lines(Progress):
    """Progress without a terminal: a line when the caller says so."""

    def __init__(self, console: Console, total: int | None, label: str):
        self.console, self.total, self.label = console, total, label

    def update(self, done: int, text: str = "", *, line: bool = False) -> None:
        if line:
            count = f"{done:,}" if self.total is None else f"{done:,}/{self.total:,}"
            self.console._talk("  ".join(visible(part) for part in (self.label, count, text) if part))


class _Bar(Progress):
    """A bar that rich draws and redraws, at most ten times a second; no thread of its own."""

    def __init__(self, console: Console, total: int | None, start: int, label: str):
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        screen = RichConsole(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        bar = BarColumn(bar_width=max(8, min(40, screen.width // 3)))
        words = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("label", "count", "text")]
        self.drawn: RichProgress = RichProgress(
            words[0], bar, *words[1:], console=screen, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self.console, self.total, self.start = console, total, start
        self.began = self.shown = time.monotonic()
        self.task = self.drawn.add_task("", total=total, completed=start, label=visible(label), count="", text="")
        self.latest = (start, "")

    def __enter__(self) -> Progress:
        self.console._bar = self
        self.console.tell(self.drawn.start)
        return self

    def __exit__(self, *exc: object) -> None:
        self.console.tell(self._draw)
        self.console.tell(self.drawn.stop)
        self.console._bar = None

    def update(self, done: int, text: str = "", *, line: bool = False) -> None:
        self.latest = (done, text)
        if time.monotonic() - self.shown >= 0.1:
            self.console.tell(self._draw)

    def _draw(self) -> None:
        done, text = self.latest
        self.shown = time.monotonic()
        count, left = f"{done:,}", ""
        if self.total is not None:
            count = f"{done:,}/{self.total:,}"
            passed = self.shown - self.began
            if passed >= 1 and self.start < done < self.total:
                left = f"  ETA {spell_time(passed * (self.total - done) / (done - self.start))}"
        self.drawn.update(self.task, completed=done, count=count, text=visible(text) + left)
        self.drawn.refresh()

    def above(self, text: str) -> None:
        """A line that stays, above the bar."""
        from rich.text import Text

        self.drawn.console.print(Text.from_ansi(text))

    def paused(self, action: Callable[[], None]) -> None:
        """Take the bar off the screen while `action` writes there."""
        live = self.drawn.live
        live.transient = True
        self.drawn.stop()
        live.transient = False
        try:
            action()
        finally:
            self.drawn.start()
