"""core.errors: exit codes are a promise to scripts."""

from __future__ import annotations

import pytest

from minigpt.core import errors
from minigpt.core.errors import Exit, MinigptError

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MinigptError)]


def test_codes_are_those_that_scripts_rely_on():
    assert {e.name: e.value for e in Exit} == {
        "OK": 0, "BUG": 1, "USAGE": 2, "DATA": 3, "MISSING": 4, "OUT_OF_MEMORY": 5, "DIVERGED": 6, "CHECK_FAILED": 7,
        "STOPPED": 75, "ABORTED": 130,
    }  # fmt: skip


def test_every_code_has_one_error_class():
    """Each way to fail has its own class, code and kind; the two faults of other processes borrow a code."""
    borrowed = {errors.RankLost: Exit.MISSING, errors.Elsewhere: Exit.BUG}
    assert sorted(c.code for c in CLASSES if c not in borrowed) == sorted(e for e in Exit if e is not Exit.OK)
    assert {c: c.code for c in CLASSES if c in borrowed} == borrowed
    assert len({c.kind for c in CLASSES}) == len(CLASSES)


def test_a_fault_of_another_process_brings_its_code():
    assert errors.Elsewhere("rank 1: no", code=Exit.DATA).code == Exit.DATA and errors.Elsewhere.code == Exit.BUG


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_carries_its_parts(cls):
    e = cls("a.jsonl:3 is odd", found="{}", fix="mend it")
    assert (str(e), e.message, e.found, e.fix) == ("a.jsonl:3 is odd", "a.jsonl:3 is odd", "{}", "mend it")
