"""A point stands where its value says; spikes survive thinning; gaps stay gaps; the picture is whole XML."""

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.core.train.curves import (
    MOST_POINTS,
    Curve,
    Panel,
    Scale,
    bounds,
    columns,
    labels,
    log_ticks,
    metrics,
    pieces,
    seconds,
    series,
    smooth,
    thin,
    time_ticks,
    x_ticks,
)
from minigpt.core.train.plot import COLOURS, LEFT, RIGHT, SIZE, loss_svg, picture

SVG = "{http://www.w3.org/2000/svg}"
ROWS = [
    {"step": 10, "tokens": 1000, "tok_s": 100.0, "loss": 8.0},
    {"step": 20, "tokens": 3000, "tok_s": 200.0, "loss": None},
    {"step": 30, "tokens": 4000, "tok_s": 50.0, "loss": 4.0, "val_loss": 5.0},
    {"step": 40, "tokens": 5000, "tok_s": None, "loss": 3.0},
]
NAN = math.nan


def lines(svg):
    """The curves' polylines as lists of (x, y)."""
    found = ET.fromstring(svg).iter(f"{SVG}polyline")
    return [[tuple(map(float, pair.split(","))) for pair in e.get("points").split()] for e in found]


def same(found, wanted):
    """Equal points, with NaN equal to NaN."""
    return repr([tuple(map(float, p)) for p in found]) == repr([tuple(map(float, p)) for p in wanted])


# ---------------------------------------------------------------------------------------------- from rows


def test_series_leaves_absent_keys_out_and_marks_gaps():
    """No `val_loss` in a row is no point, a null `loss` is a gap; NaN and infinity in a row are gaps too."""
    assert same(series(ROWS, "loss"), [(10, 8), (20, NAN), (30, 4), (40, 3)])
    assert same(series(ROWS, "val_loss"), [(30, 5)])
    assert same(series([{"step": 1, "loss": math.inf}, {"step": 2, "loss": NAN}], "loss"), [(1, NAN), (2, NAN)])
    assert same(series(ROWS, "loss", "tokens", start=30), [(4000, 4), (5000, 3)])


def test_time_is_new_tokens_at_the_pace_of_their_row():
    """10 s, then 10 s, then 20 s; a row without a pace has that of the row before."""
    assert seconds(ROWS) == [10, 20, 40, 60]
    assert same(seconds_as_points([{"step": 1, "tokens": 5}, *ROWS[1:2]]), [(0, NAN), (1, 15)])


def seconds_as_points(rows):
    return list(enumerate(seconds(rows)))


def test_metrics_are_what_rows_measure():
    """Counters are no metrics, nor is a key that never holds a number; the well-known ones come first."""
    rows = [{"step": 1, "tokens": 2, "epoch": 0.1, "reward": 1.0, "note": "x", "never": None, "loss": 2.0}]
    assert metrics(rows) == ["loss", "reward"]


def test_smoothing_is_unbiased_and_keeps_gaps():
    """A constant stays itself from the first point on; two points average as their weights say; a gap has no part."""
    assert [y for _, y in smooth([(i, 7.0) for i in range(5)], 10)] == pytest.approx([7.0] * 5)
    keep = 0.75
    expected = (keep * 1 + 2) / (keep + 1)
    assert same(smooth([(0, 1), (1, NAN)], 4), [(0, 1), (1, NAN)])
    assert smooth([(0, 1), (1, NAN), (2, 2)], 4)[2][1] == pytest.approx(expected)


def test_thinning_keeps_spikes_gaps_and_ends():
    """Of 100,000 points at most 1,000 stay, and among them the one spike up, the one down and the gap."""
    points = [(i, 1.0 + i % 7 * 1e-3) for i in range(100_000)]
    points[41_234], points[77_777], points[55_555] = (41_234, 99.0), (77_777, -99.0), (55_555, NAN)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS
    assert {(41_234, 99.0), (77_777, -99.0), points[0], points[-1]} <= set(kept)
    assert [x for x, y in kept if math.isnan(y)] == [55_555]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert thin(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_pieces_end_at_gaps():
    assert pieces([(0, NAN), (1, 1), (2, 2), (3, NAN), (4, NAN), (5, 5)]) == [[(1, 1), (2, 2)], [(5, 5)]]


# ---------------------------------------------------------------------------------------------- axes


def test_scale_maps_known_points():
    """Linear: halfway is halfway. Logarithmic: the geometric mean is halfway."""
    linear, log = Scale(0, 10, 100, 0), Scale(1, 100, 200, 0, log=True)
    assert [linear(v) for v in (0, 5, 10)] == [100, 50, 0]
    assert [log(v) for v in (1, 10, 100)] == pytest.approx([200, 100, 0])


def test_log_ticks_are_powers_of_ten_or_finer_when_those_are_few():
    assert log_ticks(1e-5, 1.0) == [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]
    assert log_ticks(0.9, 60) == [1, 2, 5, 10, 20, 50]
    assert log_ticks(5.5, 8.5) == [5.5, 6, 6.5, 7, 7.5, 8, 8.5]
    assert len(log_ticks(1e-30, 1e30)) <= 10


@given(st.floats(1e-30, 1e30), st.floats(1.01, 1e30))
def test_log_ticks_lie_inside(low, ratio):
    """Wherever the axis lies, there are ticks on it and not beside it."""
    found = log_ticks(low, low * ratio)
    assert found and len(found) <= 16
    assert all(low * (1 - 1e-9) <= t <= low * ratio * (1 + 1e-9) for t in found)


def test_labels_agree_and_stay_apart():
    """One axis has one unit and one number of decimals, but a logarithmic one each its own."""
    assert labels([0, 2000, 14000]) == ["0", "2k", "14k"]
    assert labels([500_000, 1e6, 1.5e6]) == ["0.5M", "1.0M", "1.5M"]
    assert labels([6.5, 7.0]) == ["6.5", "7.0"]
    assert labels([120_500, 121_000]) == ["120.5k", "121.0k"]
    assert labels([1e-5, 1e-3, 1e7]) == ["1e-5", "0.001", "10M"]


def test_time_has_the_ticks_of_a_clock():
    assert time_ticks(0, 100) == [0, 30, 60, 90]
    assert x_ticks(Panel("x", [Curve("a", [(4000, 1)])], "time"))[-1] == (3600, "1:00:00")


def test_columns_counts_what_a_terminal_shows():
    assert [columns(t) for t in ("abc", "春風", "e\u0301")] == [3, 4, 1]


# ---------------------------------------------------------------------------------------------- the picture


def test_geometry():
    """The ends of the x axis are the edges of the field, and y runs upwards in proportion."""
    panel = Panel("x", [Curve("a", [(0, 0.0), (50, 5.0), (100, 10.0)])])
    (points,) = lines(picture([panel], "x"))
    assert [x for x, _ in points] == [LEFT, (LEFT + SIZE[0] - RIGHT) / 2, SIZE[0] - RIGHT]
    low, middle, high = (y for _, y in points)
    assert low > middle > high
    assert low - middle == pytest.approx(middle - high, abs=0.11)
    assert low - high == pytest.approx(SIZE[1] * 10 / 10.5, abs=0.11)  # 5 % of air above, none below zero


def test_amounts_are_drawn_from_zero():
    """Memory that hardly moves is a flat line high up, not a mountain range; a logarithmic axis stays as it is."""
    flat = [Curve("memory", [(0, 1.829), (10, 1.831)])]
    assert bounds(flat, False)[0] > 1.8
    low, high = bounds(flat, False, from_zero=True)
    assert low == 0 and 1.831 < high < 2.1
    assert bounds(flat, True, from_zero=True) == bounds(flat, True)
    assert bounds([Curve("a", [(0, -2.0), (1, -1.0)])], False, from_zero=True)[1] > 0


def test_log_axis_bends():
    """On a logarithmic axis equal ratios are equal distances; what is not above zero is a gap."""
    panel = Panel("x", [Curve("a", [(0, 1.0), (1, 10.0), (2, 100.0), (3, 0.0), (4, 10.0), (5, 1.0)])], log=True)
    first, second = lines(picture([panel], "x"))
    assert first[0][1] - first[1][1] == pytest.approx(first[1][1] - first[2][1], abs=0.11)
    assert [y for _, y in second] == [first[1][1], first[0][1]]


def test_gaps_break_the_line_and_a_lone_point_is_marked():
    """NaN is not drawn over, and a value between two gaps is still seen."""
    points = [(i, 2.0) for i in range(100)]
    points[30] = points[32] = (30, NAN)
    svg = picture([Panel("x", [Curve("a", points)])], "x")
    assert [len(line) for line in lines(svg)] == [30, 67]
    (dot,) = ET.fromstring(svg).iter(f"{SVG}circle")
    assert float(dot.get("cx")) == pytest.approx(LEFT + (SIZE[0] - LEFT - RIGHT) * 31 / 99, abs=0.06)


def test_runs_are_overlaid_and_told_apart():
    """Each has a colour or a dash of its own, a name in the legend, and the smoothed stands over the faint raw one."""
    curves = [Curve(f"run-{i}", [(0, 1.0 + i), (1, 2.0)], i, [(0, 1.0), (1, 2.5)]) for i in range(6)]
    root = ET.fromstring(picture([Panel("x", curves)], "x"))
    drawn = [*root.iter(f"{SVG}polyline")]
    faint = [e for e in drawn if e.get("stroke-opacity")]
    bold = {(e.get("stroke"), e.get("stroke-dasharray")) for e in drawn if not e.get("stroke-opacity")}
    assert (len(drawn), len(faint), len(bold)) == (12, 6, 6)
    words = [e.text for e in root.iter(f"{SVG}text")]
    assert [w for w in words if w and w.startswith("run-")] == [f"run-{i} 2" for i in range(6)]


def test_strips_tell_values():
    """Pointing at a place names the nearest value of each curve there; a curve that ended before has none."""
    curves = [Curve("long", [(i, float(i)) for i in range(101)]), Curve("short", [(0, 1.0), (10, 2.0)], 1)]
    root = ET.fromstring(picture([Panel("x", curves)], "x"))
    told = [e.find(f"{SVG}title").text for e in root.iter(f"{SVG}rect")]
    assert told[0] == "long: 1 at step 1\nshort: 1 at step 0"
    assert told[-1] == "long: 99 at step 99"
    assert "rect" not in picture([Panel("x", curves)], "x", hover=False)


def test_names_cannot_break_the_picture():
    """Markup, quotes, control characters and halves of surrogate pairs in a name leave XML that parses."""
    name = "<script>alert(1)</script>\"'&\x00\x1b\ud800]]>"
    svg = picture([Panel(name, [Curve(name, [(0, 1.0), (1, 2.0)])])], name)
    svg.encode("utf-8")
    root = ET.fromstring(svg)
    assert not list(root.iter("script")) and not list(root.iter(f"{SVG}script"))
    assert "<script>alert(1)</script>\"'&\ufffd\ufffd\ufffd]]>" in [e.text for e in root.iter(f"{SVG}title")]


def test_those_who_do_not_see_it_are_told():
    """role, title and a description with the figures."""
    root = ET.fromstring(loss_svg(ROWS, "poems"))
    assert root.get("role") == "img"
    ids = {e.get("id"): e.text for e in root if e.get("id")}
    assert root.get("aria-labelledby").split() == list(ids)
    assert "training from 8 to 3, lowest 3" in " ".join(ids.values())


def luminance(colour):
    """Relative luminance (WCAG 2.2) of a colour such as #0072B2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("page", ["#ffffff", "#15171a"])
def test_colours_stand_out_on_light_and_dark(colour, page):
    """Graphics need a contrast of 3 : 1 (WCAG 2.2, 1.4.11)."""
    dark, light = sorted((luminance(colour), luminance(page)))
    assert round((light + 0.05) / (dark + 0.05), 1) >= 3


@given(st.lists(st.one_of(st.none(), st.floats(width=32)), max_size=30), st.booleans())
def test_any_log_can_be_drawn(values, log):
    """Whatever a run logged, drawing it does not fail: the trainer draws in the middle of saving."""
    rows = [{"step": i + 1, "loss": v} for i, v in enumerate(values)]
    panel = Panel("x", [Curve("a", series(rows, "loss"))], log=log)
    svg = picture([panel], "x")
    ET.fromstring(svg)
    assert "nan" not in svg.replace("NaN", "nan").split("</desc>")[1]
    assert all(-1 <= y <= 1000 for line in lines(svg) for _, y in line)
