"""Bad rows: strict unless told otherwise, and then every one is counted."""

import pytest

from minigpt.core.data.schema import BadRow, BadRows, WrongStage, reasons
from minigpt.core.errors import DataError, UsageError

NO_ANSWER = BadRow("no assistant message", ", so there is nothing to learn from it", fix="add the answer")
ROW = {"conversations": [{"from": "human", "value": "你好"}]}


def test_the_first_bad_row_stops_the_run_and_reads_as_promised():
    """The error of the style guide: place, sentence, the row itself, the two ways out."""
    with pytest.raises(DataError) as caught:
        BadRows().add("sft.jsonl:17", NO_ANSWER, ROW)
    assert caught.value.message == "sft.jsonl:17 has no assistant message, so there is nothing to learn from it"
    assert caught.value.found == '{"conversations": [{"from": "human", "value": "你好"}]}'
    assert caught.value.fix == "add the answer, or pass --max-bad 1% to skip and count such rows"


def test_another_stage_s_row_is_not_offered_to_be_skipped():
    with pytest.raises(DataError) as caught:
        BadRows().add("a.jsonl:1", WrongStage("text", fix="use minigpt pretrain"), "x")
    assert caught.value.fix == "use minigpt pretrain"


def test_a_number_allows_exactly_so_many():
    bad = BadRows("2")
    bad.add("a:1", NO_ANSWER, ROW)
    bad.add("a:2", BadRow("invalid JSON"), "{")
    bad.finish(2)
    assert bad.counts == {"no assistant message": 1, "invalid JSON": 1} and bad.total == 2
    with pytest.raises(DataError) as caught:
        bad.add("a:3", NO_ANSWER, ROW)
    assert "3 rows are bad, more than --max-bad 2 allows" in caught.value.message
    assert "2 with no assistant message, 1 with invalid JSON" in caught.value.message
    assert "a:1 has no assistant message" in caught.value.message


@pytest.mark.parametrize(("rows", "passes"), [(200, True), (199, False)])
def test_a_share_is_judged_at_the_end(rows, passes):
    """Two bad rows are 1 % of 200 rows; of 199 they are more."""
    bad = BadRows("1%")
    for i in range(2):
        bad.add(f"a:{i}", NO_ANSWER, ROW)
    if passes:
        bad.finish(rows)
    else:
        with pytest.raises(DataError, match=r"2 of 199 rows are bad \(1.01%\)"):
            bad.finish(rows)


def test_nothing_bad_passes_every_limit_even_of_no_rows():
    for limit in ("0", "0%", "3", "1%"):
        BadRows(limit).finish(0)


def test_no_share_is_strict():
    with pytest.raises(DataError):
        BadRows("0%").add("a:1", NO_ANSWER, ROW)


@pytest.mark.parametrize("limit", ["", "x", "-1", "1.5", "101%", "-1%", "%", "nan%"])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(UsageError) as caught:
        BadRows(limit)
    assert "--max-bad" in caught.value.message and caught.value.found == limit


def test_a_long_row_is_cut():
    with pytest.raises(DataError) as caught:
        BadRows().add("a:1", NO_ANSWER, {"text": "x" * 10_000})
    assert len(caught.value.found) < 2100


def test_reasons_are_ordered_by_number():
    assert reasons({"b": 1, "a": 1, "c": 2000}) == "2,000 with c, 1 with a, 1 with b"
