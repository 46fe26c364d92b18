"""Options that several stages share."""

import pytest

from minigpt.core.groups import meeting_point, number_or_auto


@pytest.mark.parametrize(("typed", "meant"), [("auto", 0), ("8", 8), (8, 8), ("1k", 1000), ("4.0", 4)])
def test_a_number_or_auto(typed, meant):
    assert number_or_auto(typed) == meant


@pytest.mark.parametrize("typed", ["many", "2.5", 2.5, "inf", "nan", "", True])
def test_neither_a_number_nor_auto(typed):
    with pytest.raises(ValueError, match="neither a whole number nor auto"):
        number_or_auto(typed)


@pytest.mark.parametrize("typed", ["node0:29400", "10.0.0.7:1", "train-0.train:65535", "[fe80::1]:29400"])
def test_a_host_and_a_port(typed):
    assert meeting_point(typed) == meeting_point(f" {typed} ") == typed


@pytest.mark.parametrize(
    "typed", ["node0", "node0:", ":29400", "node0:0", "node0:65536", "node0:x", "fe80::1:29400", "a b:1"]
)
def test_neither_a_host_nor_a_port(typed):
    with pytest.raises(ValueError, match="node0:29400"):
        meeting_point(typed)
