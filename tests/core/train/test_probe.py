"""How many rows at once: the fewest of those that are about as fast as any."""

import pytest

from minigpt.core.train.probe import fastest_rows

OOM = RuntimeError("DefaultCPUAllocator: can't allocate memory")


def search(speeds, most=64, fits=lambda rows: True):
    """speeds: of 1, 2, 4, … rows; an exception is raised."""
    found = iter(speeds)
    asked = []

    def speed(rows):
        asked.append(rows)
        value = next(found)
        if isinstance(value, Exception):
            raise value
        return value

    best, tried = fastest_rows(speed, most, fits)
    assert list(tried) == [n for n in asked if n in tried]
    return best, asked


def test_takes_the_fewest_that_are_near_the_best():
    assert search([10, 20, 39, 40, 40.5, 40.5, 40.6]) == (8, [1, 2, 4, 8, 16, 32, 64])


def test_stops_when_it_gets_slower():
    assert search([10, 20, 15, 99]) == (2, [1, 2, 4])


def test_out_of_memory_ends_the_search():
    assert search([10, 20, 30, OOM, 99]) == (4, [1, 2, 4, 8])


def test_what_cannot_fit_is_not_tried():
    assert search([10, 20, 30], fits=lambda rows: rows < 8) == (4, [1, 2, 4])


def test_never_more_than_a_step_has():
    assert search([10, 20], most=3) == (2, [1, 2])


def test_not_even_one_row_and_other_faults_are_raised():
    with pytest.raises(RuntimeError, match="allocate"):
        search([OOM])
    with pytest.raises(RuntimeError, match="shapes"):
        search([10, RuntimeError("shapes")])
