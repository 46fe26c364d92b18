"""Curves in a terminal.

In colour every curve is drawn with braille dots, two by four in a character. Without colour each has a marker of its
own, and where several meet they take turns. The markers are chosen among those that terminals for Chinese do not widen.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import groupby
from operator import itemgetter, or_

from minigpt.core.train.curves import (
    OVER,
    Curve,
    Panel,
    Scale,
    bounds,
    clip,
    columns,
    drawable,
    extent,
    labels,
    pieces,
    spell,
    x_ticks,
)

MARKERS = "▪+◦*▴#▵%"
PLAIN_MARKERS = "*+o#x%@&"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # for more curves than there are markers
SHADES = (32, 166, 36, 175)  # of the terminal's 256 colours, those nearest to plot.COLOURS
FRAME, PLAIN_FRAME = "│┤└─┬", "||+-+"
# A braille character is U+2800 plus one bit a dot; these are the bits by row and column (Unicode 16, chapter 21.1)
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
NEEDED = MARKERS + FRAME + "⣿…"  # what stdout must be able to hold for anything but ASCII
LEAST_ROWS = 5
Cells = dict[tuple[int, int], list[tuple[int, int]]]  # (row, column) → (slot, braille bits) of those that pass there


def draw(panel: Panel, width: int, height: int, *, colour: bool = False, plain: bool = False) -> list[str]:
    """The panel in lines of at most `width` columns, about `height` of them. plain: ASCII only, names excepted."""
    curves = drawable(panel)
    braille = colour or (len(curves) == 1 and not plain)
    legend = list(_legend(curves, width, braille, colour, plain))
    rows = max(LEAST_ROWS, height - len(legend) - 3)
    y = Scale(*bounds(curves, panel.log, panel.from_zero), rows * 4 - 1, 0, panel.log)
    heights = y.ticks(max(2, rows // 3))
    marks = {round(y(t)) // 4: label for t, label in zip(heights, labels(heights), strict=True)}
    margin = max(map(len, marks.values()), default=0)
    field = max(10, width - margin - 3)
    x = Scale(*extent(panel), 0, field * 2 - 1)
    cells: Cells = {}
    for curve in curves:
        for row, column, bits in _trace(curve, x, y):
            cells.setdefault((row, column), []).append((curve.slot, bits))
    frame = PLAIN_FRAME if plain else FRAME
    lines = [clip(f"{_tame(panel.heading)}, over {OVER[panel.over]}", width, "~" if plain else "…"), *legend]
    for row in range(rows):
        edge = f"{marks.get(row, ''):>{margin}} {frame[row in marks]}"
        here = [cells.get((row, column), []) for column in range(field)]
        inside = _dots(here, colour) if braille else _turns(here, plain)
        lines.append((edge + inside).rstrip())
    return [*lines, *_foot(panel, x, margin, field, frame)]


def _legend(curves: Sequence[Curve], width: int, braille: bool, colour: bool, plain: bool) -> Iterator[str]:
    """Lines of `marker name value`, as many to a line as fit."""
    line, used = "", 0
    for curve in curves:
        mark = _paint("⣿", curve.slot, colour) if braille else _marker(curve.slot, plain)
        last = "" if curve.last is None else f" {spell(curve.last, 4)}"
        name = clip(_tame(curve.name), width - 2 - len(last), "~" if plain else "…")
        size = 2 + columns(name) + len(last)
        if used and used + 3 + size > width:
            yield line
            line, used = "", 0
        line += " " * 3 * bool(used) + f"{mark} {name}{last}"
        used += 3 * bool(used) + size
    if line:
        yield line


def _tame(words: str) -> str:
    """The words without characters that would steer the terminal: names of directories may hold anything."""
    return "".join("?" if unicodedata.category(c).startswith("C") else c for c in words)


def _marker(slot: int, plain: bool) -> str:
    marks = (PLAIN_MARKERS if plain else MARKERS) + LETTERS
    return marks[slot % len(marks)]


def _paint(word: str, slot: int, colour: bool) -> str:
    return f"\x1b[38;5;{SHADES[slot % len(SHADES)]}m{word}\x1b[0m" if colour else word


def _turns(here: Sequence[list[tuple[int, int]]], plain: bool) -> str:
    """One line of markers. Where curves meet, each is seen in its turn."""
    present = [sorted({slot for slot, _ in cell}) for cell in here]
    return "".join(_marker(who[c % len(who)], plain) if who else " " for c, who in enumerate(present))


def _dots(here: Sequence[list[tuple[int, int]]], colour: bool) -> str:
    """One line of braille. A character has one colour: that of the last curve in it."""
    signs = [(cell[-1][0] if cell else None, _braille(bits for _, bits in cell)) for cell in here]
    parts = [(slot, "".join(sign for _, sign in group)) for slot, group in groupby(signs, key=itemgetter(0))]
    return "".join(word if slot is None else _paint(word, slot, colour) for slot, word in parts)


def _braille(dots: Iterable[int]) -> str:
    bits = reduce(or_, dots, 0)
    return chr(0x2800 + bits) if bits else " "


def _trace(curve: Curve, x: Scale, y: Scale) -> Iterator[tuple[int, int, int]]:
    """(row, column, braille bits) of every dot on the way of a curve."""
    for piece in pieces(curve.points):
        at = [(round(x(a)), round(y(b))) for a, b in piece]
        for (x0, y0), (x1, y1) in zip(at, at[1:] or at, strict=False):
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            for i in range(steps + 1):
                dx, dy = x0 + round((x1 - x0) * i / steps), y0 + round((y1 - y0) * i / steps)
                yield dy // 4, dx // 2, DOTS[dy % 4][dx % 2]


def _foot(panel: Panel, x: Scale, margin: int, field: int, frame: str) -> Iterator[str]:
    """The x axis and its labels, each below its tick; those that would touch another are left out."""
    axis, labels = [frame[3]] * field, [" "] * field
    free = 0
    for tick, label in x_ticks(panel, max(2, field // 14)):
        column = math.floor(x(tick)) // 2
        left = min(max(0, column - len(label) // 2), field - len(label))
        if left >= free:
            axis[column] = frame[4]
            labels[left : left + len(label)] = label
            free = left + len(label) + 2
    pad = " " * (margin + 1)
    yield pad + frame[2] + "".join(axis)
    yield (pad + " " + "".join(labels)).rstrip()
