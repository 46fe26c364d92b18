"""Curves in a terminal fit its width, are told apart without colour, and steer nothing."""

import math

import pytest

from minigpt.core.train.curves import Curve, Panel, columns
from minigpt.core.train.plot_text import MARKERS, PLAIN_MARKERS, draw

DOWN = [(float(i), 100.0 - i) for i in range(101)]
UP = [(float(i), float(i)) for i in range(101)]


def field(lines):
    """The lines between legend and x axis, without the y axis."""
    return [line.partition("│")[2] or line.partition("┤")[2] for line in lines if "│" in line or "┤" in line]


@pytest.mark.parametrize("width", [30, 60, 100, 173])
@pytest.mark.parametrize("colour", [False, True])
def test_fits(width, colour):
    """No line is wider than asked for, Chinese names counted as they show, and there are about `height` of them."""
    panel = Panel("Loss", [Curve("春風" * 40, DOWN), Curve("b" * 90, UP, 1), Curve("c", UP, 2)])
    lines = draw(panel, width, 25, colour=colour)
    bare = [line for line in lines if "\x1b" not in line]
    assert bare and max(map(columns, bare)) <= width
    assert len(lines) == 25


def test_corners():
    """A falling line begins in the upper left corner and ends in the lower right one, and passes every row."""
    rows = field(draw(Panel("x", [Curve("a", [(0, 1.0), (100, 0.0)])]), 60, 20))
    inked = [row for row in rows if row.strip()]
    assert len(inked) >= len(rows) - 1  # a little air above
    starts = [len(row) - len(row.lstrip()) for row in inked]
    assert starts == sorted(starts)
    assert starts[0] == 0 and len(inked[-1]) == max(map(len, rows))


def test_runs_have_markers_of_their_own_without_colour():
    """Two crossing runs are both seen, the legend says which is which, and nothing steers the terminal."""
    lines = draw(Panel("x", [Curve("down", DOWN), Curve("up", UP, 1)]), 80, 20)
    assert f"{MARKERS[0]} down 0   {MARKERS[1]} up 100" in lines
    drawn = "".join(field(lines))
    assert drawn.count(MARKERS[0]) > 20 and drawn.count(MARKERS[1]) > 20
    assert "\x1b" not in "".join(lines)


def test_meeting_curves_take_turns():
    """Two equal runs do not hide each other."""
    drawn = "".join(field(draw(Panel("x", [Curve("a", UP), Curve("b", UP, 1)]), 80, 20)))
    assert abs(drawn.count(MARKERS[0]) - drawn.count(MARKERS[1])) < 12
    assert min(drawn.count(MARKERS[0]), drawn.count(MARKERS[1])) > 20


def test_a_run_keeps_its_marker_where_another_is_missing():
    """The marker goes with the run, not with its place among those that have this metric."""
    lines = draw(Panel("x", [Curve("c", UP, 2), Curve("d", DOWN, 3)]), 80, 20)
    assert lines[1] == f"{MARKERS[2]} c 100   {MARKERS[3]} d 0"
    assert not {MARKERS[0], MARKERS[1]} & {*"".join(lines)}


def test_ascii():
    """With `plain` everything but names is ASCII."""
    lines = draw(Panel("Loss" * 30, [Curve("a", UP), Curve("b" * 200, DOWN, 1)]), 60, 20, plain=True)
    assert "".join(lines).isascii()
    assert any(PLAIN_MARKERS[1] in line for line in lines[3:-2])


def test_colour_is_that_of_the_run():
    """Each stretch of braille is wrapped in its run's colour and reset after it."""
    lines = draw(Panel("x", [Curve("a", UP), Curve("b", DOWN, 1)]), 60, 20, colour=True)
    text = "\n".join(lines)
    assert "\x1b[38;5;32m⣿\x1b[0m a" in text and "\x1b[38;5;166m⣿\x1b[0m b" in text
    assert text.count("\x1b[38;5;") == text.count("\x1b[0m") > 10


def test_gaps_stay_empty():
    """Where nothing was measured nothing is drawn, and a lone point is."""
    points = [(float(i), 1.0 if i < 40 or i == 70 else math.nan) for i in range(100)]
    (row,) = [
        row for row in field(draw(Panel("x", [Curve("a", [*points, (100.0, math.nan)])]), 103, 12)) if row.strip()
    ]
    first, _, second = row.partition(" ")
    assert 36 < len(first) < 44
    assert len(second.strip()) == 1


def test_names_steer_nothing():
    """Control characters of a name are not passed on, in colour or not."""
    for colour in (False, True):
        text = "\n".join(draw(Panel("x\x1b]0;t\x07", [Curve("a\x1b[2J\n\u202e", UP)]), 80, 20, colour=colour))
        assert "\x1b[2J" not in text and "\x1b]" not in text and "\x07" not in text and "\u202e" not in text
        assert "a?[2J??" in text


def test_log_axis_is_labelled_and_said():
    lines = draw(Panel("x", [Curve("a", [(float(i), 10.0**i) for i in range(4)])], log=True), 60, 20)
    assert "logarithmic" in lines[0]
    assert [line.split()[0] for line in lines if "┤" in line] == ["1,000", "100", "10", "1"]
