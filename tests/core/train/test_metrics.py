"""Counters survive JSON exactly; figures read as people write them."""

import json
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from minigpt.core.train.metrics import Clock, Counters, Window, counted, figures, short, spell_time
from minigpt.core.train.plot import loss_svg, ticks


@given(st.floats(allow_nan=False), st.floats(allow_nan=False, allow_infinity=False))
def test_counters_round_trip_exactly(loss, units):
    c = Counters(step=3, tokens=7, best=1.5, last_val={"val_loss": 0.1 + 0.2}, window=Window(loss, units, 1))
    assert Counters.from_state(json.loads(json.dumps(c.state_dict()))) == c


def test_spelling():
    assert [short(v) for v in (12.9e3, 999, 3.2e6, 150e3, 0.5)] == ["12.9k", "999", "3.2M", "150k", "0.5"]
    assert [spell_time(s) for s in (7, 207, 4000)] == ["0:07", "3:27", "1:06:40"]


def test_one_is_no_plural():
    said = [counted(1, "step"), counted(1200, "step"), counted(1.0, "epoch"), counted(0.999999, "epoch")]
    assert said == ["1 step", "1,200 steps", "1 epoch", "1 epoch"] and counted(2.5, "epoch") == "2.5 epochs"


ROW = {"loss": 5.0, "tok_s": 100.0, "mem_gb": 1.0}


def test_a_validation_loss_is_told_once():
    """A line has it when it is new; a bar, which is drawn over, keeps it with the step it belongs to."""
    c = Counters(step=30, last_val={"val_loss": 4.5, "val_bpb": 2.0}, val_step=20)
    assert "val" not in figures(ROW, 60.0) and "ETA 1:00" in figures(ROW, 60.0)
    assert "val 4.400  100 tok/s" in figures({**ROW, "val_loss": 4.4}, None, c)
    assert "val 4.500 (2.00 bits/byte) at step 20" in figures(ROW, None, c)
    assert "val" not in figures(ROW, None, Counters())


def test_the_time_left_counts_what_lies_between_steps(monkeypatch):
    """Two seconds a step, three a validation, five a save: each as often as it is still to come."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()
    for _ in range(4):
        clock.start()
        now[0] += 2
        clock.stop(10)
    assert clock.eta(10, evaluation=2, save=1) == 20
    for kind, seconds in (("evaluation", 3), ("save", 4), ("save", 6)):
        with clock.pause(kind):
            now[0] += seconds
    assert clock.eta(10, evaluation=2, save=1) == 31 and clock.rates().tokens == 5


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
