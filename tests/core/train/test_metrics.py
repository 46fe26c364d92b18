"""Counters survive JSON exactly; figures read as people write them."""

import json
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from minigpt.core.train.metrics import Counters, Window, short, spell_time
from minigpt.core.train.plot import loss_svg, ticks


@given(st.floats(allow_nan=False), st.floats(allow_nan=False, allow_infinity=False))
def test_counters_round_trip_exactly(loss, units):
    c = Counters(step=3, tokens=7, best=1.5, last_val={"val_loss": 0.1 + 0.2}, window=Window(loss, units, 1))
    assert Counters.from_state(json.loads(json.dumps(c.state_dict()))) == c


def test_spelling():
    assert [short(v) for v in (12.9e3, 999, 3.2e6, 150e3, 0.5)] == ["12.9k", "999", "3.2M", "150k", "0.5"]
    assert [spell_time(s) for s in (7, 207, 4000)] == ["0:07", "3:27", "1:06:40"]


def test_svg_is_well_formed_and_holds_every_point():
    rows = [{"step": i, "loss": 5 / i, **({"val_loss": 6 / i} if i % 2 else {})} for i in range(1, 10)]
    root = ET.fromstring(loss_svg(rows, "a <run> & more"))
    lines = [e.get("points").split() for e in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in lines] == [9, 5]


def test_svg_without_rows_or_with_nan_still_draws():
    for rows in ([], [{"step": 1, "loss": float("nan")}], [{"step": 1, "loss": 2.0}]):
        ET.fromstring(loss_svg(rows, "x"))


@given(st.floats(0, 1e6), st.floats(1e-3, 1e6))
def test_ticks_lie_inside(low, span):
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 12
    assert all(low - 1e-6 * span - 1e-9 <= t <= low + span * (1 + 1e-6) + 1e-9 for t in found)
