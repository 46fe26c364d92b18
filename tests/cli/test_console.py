"""cli.console: results on stdout, talk on stderr, and nothing that a terminal would obey."""

from __future__ import annotations

import io
import json
import sys

import pytest

from minigpt.cli.console import Console, OutputClosed, one_line, visible
from minigpt.core.errors import DataError, Stopped
from minigpt.core.report import Result


class Screen(io.TextIOWrapper):
    """A stream that says it is a terminal, or is not."""

    def __init__(self, terminal: bool, encoding: str = "utf-8", errors: str = "strict"):
        super().__init__(io.BytesIO(), encoding=encoding, errors=errors, newline="", write_through=True)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


@pytest.fixture
def screens(monkeypatch):
    """screens(terminal=…, encoding=…) replaces stdout and stderr and returns both."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    def make(terminal=False, encoding="utf-8"):
        out, err = Screen(terminal, encoding), Screen(terminal, encoding, "backslashreplace")  # as Python opens them
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    return make


def talk(console):
    console.title("minigpt demo")
    console.note("data", "3 documents")
    console.detail("rare")
    console.warn("odd", fix="mend it")
    console.out("result")


def test_plain_lines_without_a_terminal(screens):
    """No colour, no bar; the result alone on stdout."""
    out, err = screens()
    talk(Console())
    assert out.text == "result\n"
    assert err.text == "minigpt demo\ndata   3 documents\nwarning: odd\n  fix    mend it\n"


def test_quiet_and_verbose(screens):
    out, err = screens()
    talk(Console(quiet=True, verbose=True))
    assert (out.text, err.text) == ("result\n", "warning: odd\n  fix    mend it\n")
    _, err = screens()
    Console(verbose=True).detail("rare")
    assert err.text == "rare\n"


def test_faint_text_is_dimmed_in_colour_and_refused_elsewhere(screens, monkeypatch):
    """The caller learns that nothing was written, so that it can say it in another way."""
    out, err = screens(terminal=True)
    assert Console().faint("why\x1b") and (out.text, err.text) == ("\x1b[2mwhy\\x1b\x1b[0m", "")
    assert Console().faint("") and out.text.count("why") == 1
    assert not Console(json=True).faint("why") and out.text.count("why") == 1
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Console().faint("why") and out.text.count("why") == 1
    out, _ = screens()
    assert not Console().faint("why") and out.text == ""


def test_pictures_keep_their_colours(screens):
    """Where colours are welcome a drawing's own codes reach the terminal; a pipe and --json welcome none."""
    out, _ = screens(terminal=True)
    console = Console()
    assert console.colours and not Console(json=True).colours
    console.picture("\x1b[38;5;32m•\x1b[0m")
    assert out.text == "\x1b[38;5;32m•\x1b[0m\n"
    screens()
    assert not Console().colours


def test_json_leaves_stdout_to_one_object(screens):
    """Whatever a stage writes, stdout is one line of JSON; NaN, which JSON lacks, is null."""
    out, _ = screens()
    console = Console(json=True)
    talk(console)
    console.marked([("a", True)])
    console.finish(Result("text", {"loss": float("nan"), "list": [float("inf"), 1], "é": "春\udcff"}), 1.23456)
    assert out.text.count("\n") == 1
    told = json.loads(out.text)
    assert told["loss"] is None and told["list"] == [None, 1] and told["seconds"] == 1.235 and told["status"] == "ok"
    assert "春" in out.text


def test_colour_only_where_it_is_wanted(screens, monkeypatch):
    """A terminal gets colour; NO_COLOR and TERM=dumb take it away again."""
    _, err = screens(terminal=True)
    talk(Console())
    assert "\x1b[" in err.text
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            _, err = screens(terminal=True)
            talk(Console())
            assert "\x1b" not in err.text, name


def test_control_characters_are_spelled_out(screens):
    """Data cannot move the cursor, set the title or turn text around; to a pipe it goes unchanged."""
    evil = "a\x1b]0;title\x07b\x9b2Jc\u202ed\r\te\n"
    assert visible(evil) == "a\\x1b]0;title\\x07b\\x9b2Jc\\u202ed\\r\te\n"
    out, err = screens(terminal=True)
    Console().note("data", evil)
    Console().error(DataError(evil, found=evil, fix=evil))
    Console().out(evil)
    Console().marked([(evil, True)])
    for text in (out.text, err.text):
        assert "\x07" not in text and "\x9b" not in text and "\u202e" not in text and "\x1b]" not in text
    out, _ = screens()
    Console().out(evil)
    assert out.text == evil + "\n"


def test_marks_are_seen_with_and_without_colour(screens):
    """Brackets always, colour beside them on a terminal, ASCII where the encoding has nothing better."""
    parts = [("user ", False), ("answer", True), ("", True), (" end", False)]
    out, _ = screens()
    Console().marked(parts)
    assert out.text == "user ⟦answer⟧ end\n"
    out, _ = screens(terminal=True)
    Console().marked(parts)
    assert out.text == "user \x1b[32m⟦answer⟧\x1b[0m end\n"
    out, _ = screens(encoding="cp1252")
    Console().marked(parts)
    assert out.text == "user [[answer]] end\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_narrow_encoding_never_crashes(screens, terminal):
    """On a cp1252 stream everything still appears, what it lacks as escapes; JSON loses no character."""
    out, err = screens(terminal, encoding="cp1252")
    console = Console()
    console.note("data", "春 é")
    console.out("春 é")
    with console.progress(3, label="春") as bar:
        bar.update(3, "風", line=True)
    console.error(DataError("春"))
    assert "\\u6625 é" in out.text and "\\u6625 é" in err.text
    out, _ = screens(encoding="cp1252")
    Console(json=True).finish(Result(None, {"a": "春\udcff"}), 0)
    assert json.loads(out.text)["a"] == "春\udcff"


def test_an_error_has_three_lines(screens):
    _, err = screens()
    Console().error(DataError("a.jsonl:3 is odd", found='{"a":\n  1}' + "x" * 500, fix="mend it\nor not"))
    first, found, *fix = err.text.rstrip("\n").split("\n")
    assert first == "error: a.jsonl:3 is odd" and fix == ["  fix    mend it", "         or not"]
    assert found.startswith('  found  {"a": 1}xxx') and found.endswith("…") and len(found) < 180
    _, err = screens()
    Console().error(Stopped("stopped at step 3", fix="minigpt sft --resume runs/a"))
    assert err.text.startswith("stopped: stopped at step 3\n")


def test_progress_without_a_terminal_prints_only_asked_lines(screens):
    """No flood in a log file: one plain line for each update with line=True."""
    _, err = screens()
    with Console().progress(2000, label="train") as bar:
        for i in range(2000):
            bar.update(i + 1, f"loss {i}", line=i in (0, 1999))
    assert err.text == "train  1/2,000  loss 0\ntrain  2,000/2,000  loss 1999\n"
    _, err = screens()
    with Console().progress(None) as bar:
        bar.update(5000, "rows", line=True)
    assert err.text == "5,000  rows\n"
    _, err = screens()
    with Console(quiet=True).progress(3) as bar:
        bar.update(3, line=True)
    assert err.text == ""


def test_progress_on_a_terminal_draws_a_bar(screens, monkeypatch):
    """Position, figures and the time left; lines stay above the bar; results wait for it to step aside."""
    out, err = screens(terminal=True)
    now = [0.0]
    monkeypatch.setattr("minigpt.cli.console.time.monotonic", lambda: now[0])
    console = Console()
    assert console.interactive
    with console.progress(424, start=64, label="train") as bar:
        for step in (65, 164, 264):
            now[0] += 10
            bar.update(step, f"loss {step / 100:.2f} [bold]")
        console.note("saved", "step-264")
        console.out("result")
    assert "264/424" in err.text and "loss 2.64 [bold]" in err.text and "ETA 0:24" in err.text and "━" in err.text
    assert "saved" in err.text and out.text == "result\n"
    assert err.text.rstrip().endswith("\x1b[?25h"), "the cursor must be visible again"


def test_a_bar_draws_at_most_ten_times_a_second(screens):
    _, err = screens(terminal=True)
    with Console().progress(10_000) as bar:
        for i in range(10_000):
            bar.update(i)
    assert len(err.text) < 50_000


class Closed(Screen):
    """A stream whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("terminal", [False, True])
def test_a_closed_stderr_does_not_matter(screens, monkeypatch, terminal):
    """A lost terminal or pipe never stops the work; results still come."""
    out, _ = screens()
    monkeypatch.setattr(sys, "stderr", Closed(terminal))
    console = Console()
    talk(console)
    with console.progress(3) as bar:
        bar.update(3, line=True)
    console.error(DataError("odd"))
    assert out.text == "result\n"


def test_a_closed_stdout_is_told_to_the_program(screens, monkeypatch):
    screens()
    monkeypatch.setattr(sys, "stdout", Closed(False))
    with pytest.raises(OutputClosed):
        Console().out("more")


def test_one_line_cuts():
    assert one_line("a\n\n b\tc") == "a b c" and len(one_line("x" * 999)) == 160
