"""A run's log as curves: what is measured over what, smoothed, thinned and laid on an axis. No pixels yet.

A point is (x, y). A y of NaN is a gap: something was to be measured there and was no number.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from minigpt.core.train.metrics import spell_time

Point = tuple[float, float]

OVER = {"step": "optimizer steps", "tokens": "tokens trained on", "time": "time spent training"}
TITLES = {
    "loss": "Training loss",
    "val_loss": "Validation loss",
    "val_ppl": "Validation perplexity",
    "val_bpb": "Validation, bits per byte",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "tok_s": "Tokens a second",
    "mfu": "Model FLOPs utilisation",
    "mem_gb": "Memory, GB",
    "skipped": "Steps left out",
}
AMOUNTS = ("tok_s", "mfu", "mem_gb")  # drawn from zero on: else a flat line's noise fills the picture
COUNTERS = ("step", "tokens", "epoch")  # numbers of a row that count the way instead of measuring anything
MOST_POINTS = 1000  # of one curve in a picture: more than a screen shows


@dataclass(frozen=True)
class Curve:
    """One line of a picture. slot picks its colour; raw is what it was before smoothing, if it was."""

    name: str
    points: list[Point]
    slot: int = 0
    raw: list[Point] | None = None

    @property
    def last(self) -> float | None:
        """The newest value that is a number."""
        return next((y for _, y in reversed(self.points) if math.isfinite(y)), None)


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes. start: the left end of the x axis. note: what to know besides the title.

    from_zero: the y axis begins at zero, so that heights compare; a logarithmic one has no zero.
    """

    title: str
    curves: list[Curve]
    over: str = "step"
    log: bool = False
    start: float = 0.0
    note: str = ""
    from_zero: bool = False

    @property
    def heading(self) -> str:
        """The title with what changes how the curves read."""
        return ", ".join(filter(None, [self.title, self.note, "logarithmic" if self.log else ""]))


# ---------------------------------------------------------------------------------------------- from rows


def metrics(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Names of what the rows measure: the well-known ones first, then the others as they appear."""
    found = {key: None for row in rows for key, value in row.items() if is_number(value) and key not in COUNTERS}
    return [*(key for key in TITLES if key in found), *(key for key in found if key not in TITLES)]


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def series(rows: Sequence[dict[str, Any]], key: str, over: str = "step", start: int = 0) -> list[Point]:
    """`key` over `over` from step `start` on. A row without the key is no point; one with null or NaN is a gap."""
    points = []
    for row, x in zip(rows, positions(rows, over), strict=True):
        if key in row and row["step"] >= start and math.isfinite(x):
            value = float(row[key]) if is_number(row[key]) else math.nan
            points.append((x, value if math.isfinite(value) else math.nan))
    return points


def positions(rows: Sequence[dict[str, Any]], over: str) -> list[float]:
    """Where each row stands on the x axis; NaN where the row does not tell."""
    if over == "time":
        return seconds(rows)
    return [float(row[over]) if is_number(row.get(over)) else math.nan for row in rows]


def seconds(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds spent in training steps until each row: its new tokens at its pace, summed.

    That leaves out evaluation, saving and the time between two sessions. A row without a pace has that of the row
    before; until the first pace the time is unknown.
    """
    spent, pace, before, result = 0.0, math.nan, 0.0, []
    for row in rows:
        tokens, rate = row.get("tokens"), row.get("tok_s")
        pace = float(rate) if is_number(rate) and 0 < rate < math.inf else pace
        if is_number(tokens) and not math.isnan(pace):
            spent += max(0.0, tokens - before) / pace
            before = tokens
        result.append(spent if not math.isnan(pace) else math.nan)
    return result


def smooth(points: Sequence[Point], width: float) -> list[Point]:
    """Exponential moving average that remembers about `width` points; gaps stay and are not counted.

    The sum is divided by the weight it has collected so far, as Adam's moments are (Kingma & Ba, 2015,
    arXiv:1412.6980, section 3): without that the first points would be drawn towards zero.
    """
    keep = 1 - 1 / max(width, 1.0)
    total = weight = 0.0
    result = []
    for x, y in points:
        if math.isnan(y):
            result.append((x, y))
            continue
        total = keep * total + (1 - keep) * y
        weight = keep * weight + (1 - keep)
        result.append((x, total / weight))
    return result


def thin(points: Sequence[Point], limit: int = MOST_POINTS) -> list[Point]:
    """At most `limit` of the points: of every stretch the lowest, the highest and a gap, so that spikes survive."""
    if len(points) <= limit:
        return list(points)
    buckets = (limit - 2) // 3
    kept = {0, len(points) - 1}
    for i in range(buckets):
        stretch = range(i * len(points) // buckets, (i + 1) * len(points) // buckets)
        values = [(points[j][1], j) for j in stretch if not math.isnan(points[j][1])]
        gaps = [j for j in stretch if math.isnan(points[j][1])]
        kept.update(gaps[:1], (j for _, j in (min(values), max(values))) if values else ())
    return [points[j] for j in sorted(kept)]


def pieces(points: Sequence[Point]) -> list[list[Point]]:
    """The unbroken stretches between gaps."""
    found: list[list[Point]] = [[]]
    for point in points:
        if math.isnan(point[1]):
            found.append([])
        else:
            found[-1].append(point)
    return [piece for piece in found if piece]


# ---------------------------------------------------------------------------------------------- axes


@dataclass(frozen=True)
class Scale:
    """Data → picture along one axis: low lies at `start`, high at `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        bend: Callable[[float], float] = math.log if self.log else float
        low, high = bend(self.low), bend(self.high)
        return self.start + (self.end - self.start) * (bend(value) - low) / (high - low)

    def ticks(self, about: int = 5) -> list[float]:
        return log_ticks(self.low, self.high, about) if self.log else ticks(self.low, self.high, about)


def drawable(panel: Panel) -> list[Curve]:
    """The panel's curves, thinned, with a gap for what a log axis cannot show."""

    def fit(points: list[Point]) -> list[Point]:
        shown = [(x, y if y > 0 else math.nan) for x, y in points] if panel.log else points
        return thin(shown)

    return [Curve(c.name, fit(c.points), c.slot, fit(c.raw) if c.raw else None) for c in panel.curves]


def bounds(curves: Sequence[Curve], log: bool, from_zero: bool = False) -> tuple[float, float]:
    """What the y axis spans: every value, with a little air; no lower than zero when nothing is below it.

    from_zero: zero as well, on an axis that is not logarithmic.
    """
    values = [y for c in curves for _, y in (*c.points, *(c.raw or ())) if not math.isnan(y)]
    if not values:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if from_zero and not log:
        low, high = min(low, 0.0), max(high, 0.0)
    if log:
        air = max(math.exp(0.05 * (math.log(high) - math.log(low))), 1.02)
        return low / air, high * air
    air = (high - low) * 0.05 or abs(high) * 0.1 or 0.5
    return (max(0.0, low - air) if low >= 0 else low - air), high + air


def extent(panel: Panel) -> tuple[float, float]:
    """What the x axis spans."""
    last = max((c.points[-1][0] for c in panel.curves if c.points), default=panel.start)
    return panel.start, last if last > panel.start else panel.start + 1


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside [low, high], about `about` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / about
    size = 10 ** math.floor(math.log10(raw))
    step = min((m * size for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / raw)))
    return _multiples(low, high, step)


def _multiples(low: float, high: float, step: float) -> list[float]:
    digits = 3 - math.floor(math.log10(step))  # sums of such steps should not show what binary fractions leave over
    return [round(i * step, digits) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Powers of ten inside [low, high]; with their 2 and 5, or evenly spaced numbers, when those are too few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [t for e in exponents for f in (1, 2, 5) if low <= (t := float(f"{f}e{e}")) <= high]
    tens = [t for t in inside if f"{t:e}".startswith("1.0")]
    if len(tens) >= 3:
        return tens[:: math.ceil(len(tens) / (about + 2))]
    return inside if len(inside) >= 3 else ticks(low, high, about)


CLOCK = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)  # seconds


def time_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Like `ticks`, at times as a clock divides them."""
    raw = (high - low) / about
    step = next((s for s in CLOCK if s >= raw), None)
    return _multiples(low, high, step or 86400 * math.ceil(raw / 86400))


def x_ticks(panel: Panel, about: int = 6) -> list[tuple[float, str]]:
    """Places on the x axis with their labels."""
    low, high = extent(panel)
    if panel.over == "time":
        return [(t, spell_time(t)) for t in time_ticks(low, high, about)]
    whole = [t for t in ticks(low, high, about) if t == int(t)]
    return [*zip(whole, labels(whole), strict=True)]


UNITS = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, ""))  # (from where on, size, letter)


def spell(value: float, digits: int = 6) -> str:
    """A value for people: 1,200 · 12.5k · 0.003 · 2e-5."""
    size, letter = _unit(value)
    return f"{value / size:,.{digits}g}{letter}".replace("e-0", "e-")


def _unit(value: float) -> tuple[float, str]:
    return (
        next((size, letter) for least, size, letter in UNITS if abs(value) >= least) if abs(value) < 1e15 else (1, "")
    )


def labels(values: Sequence[float]) -> list[str]:
    """Ticks of one axis for people: of the same unit and with as many decimals, unless they lie far apart."""
    sizes = [abs(v) for v in values if v]
    if not sizes or max(sizes) > 1000 * min(sizes) or max(sizes) >= 1e15 or min(sizes) < 1e-4:
        return [spell(v) for v in values]
    size, letter = _unit(max(sizes))
    decimals = max(len(f"{v / size:.6g}".partition(".")[2]) for v in values)
    return [f"{v / size:,.{decimals}f}{letter}" if v else "0" for v in values]


def columns(text: str) -> int:
    """Columns that a terminal gives to the text: two for a Chinese character, none for a combining mark."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def clip(text: str, limit: int, tail: str = "…") -> str:
    """The text in at most `limit` columns; `tail`, one column wide, stands for what was cut off."""
    if columns(text) <= limit:
        return text
    while text and columns(text) > limit - 1:
        text = text[:-1]
    return text + tail
