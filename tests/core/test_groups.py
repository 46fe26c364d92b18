"""Options that several stages share."""

import pytest

from minigpt.core.groups import number_or_auto


@pytest.mark.parametrize(("typed", "meant"), [("auto", 0), ("8", 8), (8, 8), ("1k", 1000), ("4.0", 4)])
def test_a_number_or_auto(typed, meant):
    assert number_or_auto(typed) == meant


@pytest.mark.parametrize("typed", ["many", "2.5", 2.5, "inf", "nan", "", True])
def test_neither_a_number_nor_auto(typed):
    with pytest.raises(ValueError, match="neither a whole number nor auto"):
        number_or_auto(typed)
