"""Learning-rate shapes, against closed forms and transformers' own schedules."""

import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from minigpt.core.train.schedule import Schedule


def test_warmup_rises_evenly_to_the_peak():
    s = Schedule(peak=1.0, total=100, shape="constant", warmup=4)
    assert [s(i) for i in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(
    ("shape", "theirs"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_equals_transformers_after_warmup(shape, theirs):
    """Without warm-up (ours never starts at 0), the decaying part is the same curve."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    reference = theirs(optimizer, num_warmup_steps=0, num_training_steps=50)
    ours = Schedule(peak=0.3, total=50, shape=shape)
    for step in range(50):
        assert ours(step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_wsd_is_flat_then_linear_to_the_floor():
    s = Schedule(peak=2.0, total=100, shape="wsd", decay=0.4, floor=0.1)
    assert {s(i) for i in range(60)} == {2.0}
    assert s(80) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert s(99) == pytest.approx(2.0 * (0.1 + 0.9 * 1 / 40))


def test_longer_wsd_run_shares_the_flat_part():
    """What makes it possible to go on from a checkpoint of the flat part with more steps."""
    short, long = (Schedule(peak=1e-3, total=t, shape="wsd", warmup=10, decay=0.2) for t in (100, 300))
    assert [short(i) for i in range(short.decay_start)] == [long(i) for i in range(short.decay_start)]
    assert short(short.decay_start + 5) < long(short.decay_start + 5)


@pytest.mark.parametrize("shape", ["cosine", "wsd", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 17])
def test_every_step_has_a_positive_rate(shape, total):
    s = Schedule(peak=1.0, total=total, shape=shape, warmup=0.1)
    assert all(0 < s(i) <= 1 and math.isfinite(s(i)) for i in range(total))


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (
            {"total": 6, "warmup": 100},
            "a warm-up of 100 steps does not fit into 6: it takes 5, and the rate never falls",
        ),
        ({"total": 6, "warmup": 100, "shape": "constant"}, "a warm-up of 100 steps does not fit into 6: it takes 5"),
        ({"total": 60, "warmup": 50}, "the decay begins at step 50, not at 36"),
        ({"total": 60, "warmup": 20}, None),
        ({"total": 60, "warmup": 50, "shape": "cosine"}, None),
        ({"total": 1}, None),
    ],
)
def test_a_wish_that_does_not_fit_is_told(wish, said):
    """What the schedule changes of --warmup and --decay for want of steps, it can say."""
    found = Schedule(peak=1.0, **wish).bent
    assert found == said if said is None else said in found


@pytest.mark.parametrize("total", [1, 2, 3, 17, 1000])
@pytest.mark.parametrize("shape", ["cosine", "wsd", "linear", "constant"])
def test_defaults_always_fit(shape, total):
    assert Schedule(peak=1.0, total=total, shape=shape, warmup=0.02).bent is None


def test_a_stretched_curve_leaps_and_a_flat_one_does_not():
    """A cosine run of 20 steps that goes on to 40 jumps up; a wsd run goes on from its flat part as if planned so."""
    short, long = (Schedule(peak=2e-3, total=t, shape="cosine") for t in (20, 40))
    before, after = long.leap(short, 15)
    assert before == short(14) and after == long(15) > 1.5 * before
    assert short.leap(long, 15)[1] < long(14)  # and down, when a run is shortened
    short, long = (Schedule(peak=2e-3, total=t, warmup=2) for t in (20, 40))
    assert long.leap(short, short.decay_start) is None and long.leap(short, 20)[1] == 2e-3
    assert long.leap(short, 0) is None
