"""loss.svg: a run's curve as one small self-contained picture, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 44
COLOURS = {"loss": "#3b82f6", "val_loss": "#f59e0b"}
NAMES = {"loss": "training", "val_loss": "validation"}
Point = tuple[float, float]


def loss_svg(rows: Sequence[dict[str, Any]], title: str) -> str:
    """rows: metrics.jsonl, in order. Returns the SVG text; without a finite loss, axes alone."""
    curves = {
        key: [(r["step"], r[key]) for r in rows if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])]
        for key in COLOURS
    }
    values = [y for points in curves.values() for _, y in points]
    last = max((x for points in curves.values() for x, _ in points), default=1)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = (high - low) * 0.05 or 0.5
    low, high = max(0.0, low - margin), high + margin

    def at(point: Point) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / max(last, 1)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - point[1]) / (high - low)
        return x, y

    body = [_axes(at, low, high, last)]
    for i, (key, points) in enumerate(curves.items()):
        if not points:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
        body.append(f'<polyline fill="none" stroke="{COLOURS[key]}" stroke-width="1.8" points="{path}"/>')
        label = f"{NAMES[key]} {points[-1][1]:.3f}"
        x = WIDTH - RIGHT - 150 * (2 - i)
        body.append(f'<rect x="{x}" y="{TOP - 22}" width="10" height="10" fill="{COLOURS[key]}"/>')
        body.append(f'<text x="{x + 15}" y="{TOP - 13}">{label}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#808080">\n<text x="{LEFT}" y="{TOP - 13}" font-weight="bold">{escape(title)}</text>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _axes(at: Any, low: float, high: float, last: float) -> str:
    parts = []
    for tick in ticks(low, high):
        x, y = at((0, tick))
        parts.append(f'<line x1="{x}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#808080" opacity=".25"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(0, last):
        x, y = at((tick, low))
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">optimizer step</text>')
    return "\n".join(parts)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside [low, high], about `about` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / about
    size = 10 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
