"""Curves as SVG: small, self-contained, readable on light and dark pages and without colour vision.

A run's loss.svg, `minigpt plot -o curves.svg` and the pictures of its report are all drawn here.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Iterator, Sequence
from typing import Any
from xml.sax.saxutils import escape

from minigpt.core.train.curves import (
    OVER,
    Curve,
    Panel,
    Point,
    Scale,
    bounds,
    clip,
    columns,
    drawable,
    extent,
    labels,
    pieces,
    series,
    spell,
    ticks,
    x_ticks,
)
from minigpt.core.train.metrics import spell_time

__all__ = ["loss_svg", "pen", "picture", "text", "ticks"]

LOSSES = {"loss": "training", "val_loss": "validation"}  # the curves of a single run's picture
SIZE = (720, 300)  # width of a picture and height of one panel's field
LEFT, RIGHT, TITLE, LEGEND, BOTTOM = 60, 16, 26, 19, 50  # margins; heights of the title and of a legend's line
# Blue, vermillion, bluish green and reddish purple of Okabe & Ito (jfly.uni-koeln.de/color, 2008), told apart with any
# colour vision. Their orange, sky blue and yellow are left out: they fade on a white page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ("", "7 4", "2 3", "10 3 2 3")  # from the fifth curve on, the colours come again with the next of these
FEW = 60  # up to this many points, each is marked
STRIPS = 80  # places along the x axis that tell their values when pointed at
LETTER = 6.7  # width of a column of text in pixels, on the safe side
STYLE = """<style>
.curves { color: #5f6670 }
.curves .strip:hover { fill-opacity: .14 }
@media screen and (prefers-color-scheme: dark) { .curves { color: #a8b0ba } }
</style>"""
# What XML 1.0 cannot hold, and control characters that no reader wants: lone surrogates, C0, C1, non-characters
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def loss_svg(rows: Sequence[dict[str, Any]], title: str) -> str:
    """rows: metrics.jsonl, in order. Returns the SVG text; without a finite loss, axes alone."""
    curves = [Curve(name, series(rows, key), slot) for slot, (key, name) in enumerate(LOSSES.items())]
    return picture([Panel(title, [c for c in curves if c.last is not None])], title, hover=False)


def picture(
    panels: Sequence[Panel],
    title: str,
    *,
    size: tuple[int, int] = SIZE,
    hover: bool = True,
    style: str = STYLE,
    name: str = "plot",
) -> str:
    """The panels, one below the other, as one SVG element.

    hover: let places along the x axis tell their values when pointed at. style: "" where the page around has its own.
    name: prefix of the element ids, which must differ within a page.
    """
    body, top = [], 0.0
    for panel in panels:
        drawn, height = _panel(panel, size, hover)
        body.append(f'<g transform="translate(0 {top:g})">\n' + "\n".join(drawn) + "\n</g>")
        top += height
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="curves" viewBox="0 0 {size[0]} {top:g}" role="img" '
            f'aria-labelledby="{name}-title {name}-words" font-family="system-ui, sans-serif" font-size="12" '
            'color="#767676" fill="currentColor">',
            f'<title id="{name}-title">{text(title)}</title>',
            f'<desc id="{name}-words">{text("; ".join(map(describe, panels)))}</desc>',
            *filter(None, [style]),
            *body,
            "</svg>\n",
        ]
    )


def text(value: str) -> str:
    """Text fit for XML: escaped, and without characters that it cannot hold."""
    return escape(_UNFIT.sub("\ufffd", value), {'"': "&quot;", "'": "&#39;"})


def describe(panel: Panel) -> str:
    """A panel in words, for those who do not see it."""
    words = []
    for c in panel.curves:
        values = [y for _, y in c.points if not math.isnan(y)]
        if values:
            words.append(
                f"{c.name} from {spell(values[0], 4)} to {spell(values[-1], 4)}, lowest {spell(min(values), 4)}"
            )
    return f"{panel.heading} over {OVER[panel.over]}: {', '.join(words) or 'nothing measured yet'}"


# ---------------------------------------------------------------------------------------------- one panel


def _panel(panel: Panel, size: tuple[int, int], hover: bool) -> tuple[list[str], float]:
    """The SVG lines of a panel and its height."""
    curves = drawable(panel)
    x = Scale(*extent(panel), LEFT, size[0] - RIGHT)
    legend, lines = _legend(curves, x.end)
    top = TITLE + lines * LEGEND
    bottom = top + size[1]
    y = Scale(*bounds(curves, panel.log, panel.from_zero), bottom, top, panel.log)
    parts = [
        f'<text x="{LEFT}" y="15" font-size="13" font-weight="600">{text(clip(panel.heading, size[0] // 8))}</text>'
    ]
    parts += [*legend, *_axes(panel, x, y)]
    for curve in curves:
        parts += _curve(curve, x, y)
    if hover:
        parts += _strips(curves, x, y, panel.over)
    return parts, bottom + BOTTOM


def _axes(panel: Panel, x: Scale, y: Scale) -> Iterator[str]:
    heights = y.ticks()
    for tick, label in zip(heights, labels(heights), strict=True):
        at = f"{y(tick):.1f}"
        yield f'<line x1="{LEFT}" x2="{x.end:g}" y1="{at}" y2="{at}" stroke="currentColor" stroke-opacity=".18"/>'
        yield f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{label}</text>'
    for tick, label in x_ticks(panel):
        at = f"{x(tick):.1f}"
        yield f'<line x1="{at}" x2="{at}" y1="{y.start:.1f}" y2="{y.start + 4:.1f}" stroke="currentColor"/>'
        yield f'<text x="{at}" y="{y.start + 18:.1f}" text-anchor="middle">{label}</text>'
    yield f'<line x1="{LEFT}" x2="{x.end:g}" y1="{y.start:g}" y2="{y.start:g}" stroke="currentColor"/>'
    middle = (LEFT + x.end) / 2
    yield f'<text x="{middle:g}" y="{y.start + 37:.1f}" text-anchor="middle">{OVER[panel.over]}</text>'


def pen(slot: int, width: float = 1.8) -> str:
    dash = DASHES[slot // len(COLOURS) % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{COLOURS[slot % len(COLOURS)]}" stroke-width="{width:g}" stroke-linejoin="round"{dashed}'


def _legend(curves: Sequence[Curve], right: float) -> tuple[list[str], int]:
    """A swatch, name and newest value for each curve, in as many lines as they need."""
    parts, left, line = [], float(LEFT), 1
    for curve in curves:
        words = clip(curve.name, 48) + ("" if curve.last is None else f" {spell(curve.last, 4)}")
        width = 30 + columns(words) * LETTER + 14
        if left > LEFT and left + width > right:
            left, line = float(LEFT), line + 1
        y = TITLE + (line - 1) * LEGEND + 4
        parts.append(f'<line x1="{left:.1f}" x2="{left + 24:.1f}" y1="{y}" y2="{y}" {pen(curve.slot, 2.4)}/>')
        parts.append(f'<text x="{left + 30:.1f}" y="{y + 4}">{text(words)}</text>')
        left += width
    return parts, line


def _curve(curve: Curve, x: Scale, y: Scale) -> Iterator[str]:
    if curve.raw is not None:
        yield from _lines(curve.raw, x, y, f'{pen(curve.slot, 1)} stroke-opacity=".3"')
    yield from _lines(curve.points, x, y, pen(curve.slot))
    colour = COLOURS[curve.slot % len(COLOURS)]
    alone = {piece[0] for piece in pieces(curve.points) if len(piece) == 1}  # a line of one point would not be seen
    marked = [p for p in curve.points if not math.isnan(p[1])] if len(curve.points) <= FEW else sorted(alone)
    for a, b in marked:
        yield f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.2" fill="{colour}"/>'


def _lines(points: Sequence[Point], x: Scale, y: Scale, pen: str) -> Iterator[str]:
    for piece in pieces(points):
        if len(piece) > 1:
            path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in piece)
            yield f'<polyline fill="none" {pen} points="{path}"/>'


def _strips(curves: Sequence[Curve], x: Scale, y: Scale, over: str) -> Iterator[str]:
    """Upright strips that nobody sees until one points at them: browsers then show their title. No script needed."""
    known = [(c.name, [p for p in c.points if not math.isnan(p[1])]) for c in curves]
    width = (x.high - x.low) / STRIPS
    for i in range(STRIPS):
        middle = x.low + (i + 0.5) * width
        near = [(name, _nearest(points, middle)) for name, points in known if points]
        told = [f"{name}: {spell(b, 5)} at {_place(a, over)}" for name, (a, b) in near if abs(a - middle) <= 2 * width]
        if told:
            yield (
                f'<rect class="strip" x="{x(middle - width / 2):.1f}" y="{y.end:g}" width="{x(width) - x(0):.1f}" '
                f'height="{y.start - y.end:g}" fill-opacity="0"><title>{text(chr(10).join(told))}</title></rect>'
            )


def _nearest(points: Sequence[Point], x: float) -> Point:
    at = bisect(points, (x, 0.0))
    return min(points[max(0, at - 1) : at + 1], key=lambda p: abs(p[0] - x))


def _place(x: float, over: str) -> str:
    return {"time": spell_time(x), "step": f"step {x:,.0f}", "tokens": f"{x:,.0f} tokens"}[over]
