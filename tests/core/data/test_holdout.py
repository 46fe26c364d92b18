"""Validation documents: the share that was asked for, copies on one side, and nothing lost that is repeated."""

import numpy as np
import pytest

from minigpt.core.data.holdout import hold_out


def draws(distinct, seed):
    return np.random.default_rng(seed).integers(0, 2**64, distinct, dtype=np.uint64)


@pytest.mark.parametrize(
    ("documents", "low", "high"),
    [(400, 8, 36), (10_000, 150, 250), (200_000, 850, 1150), (3, 1, 2), (2, 1, 1), (1, 0, 0), (0, 0, 0)],
)
def test_the_automatic_share(documents, low, high):
    """200 documents, from 0.5 to 5 %, at least one on each side of two."""
    val, note = hold_out(draws(documents, 0), None)
    assert low <= val.sum() <= high and note is None


def test_each_side_has_a_document():
    low, high = np.array([5, 9, 7], dtype=np.uint64), np.array([2**64 - 9, 2**64 - 5], dtype=np.uint64)
    assert hold_out(low, 0.1).val.tolist() == [True, False, True]
    assert hold_out(high, 0.1).val.tolist() == [True, False]
    assert not hold_out(high, 0.0).val.any()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_where_nothing_is_repeated_a_hash_below_the_share_is_held_out(share):
    hashes = draws(3000, 1)
    assert (hold_out(hashes, share).val == (hashes < np.uint64(int(share * 2**64)))).all()


@pytest.mark.parametrize(("distinct", "copies"), [(2, 50), (12, 50), (1, 9), (100, 2), (3, 1000)])
def test_what_is_repeated_on_purpose_is_trained_on(distinct, copies):
    """12 facts in 50 copies: whatever their hashes, none is lost from training, and the missing validation is told."""
    for seed in range(40):
        val, note = hold_out(np.repeat(draws(distinct, seed), copies), None)
        assert not val.any()
    assert note is not None and f"{distinct * copies:,} documents are copies of {distinct}" in note
    assert "0 held out where" in note and "--val-data" in note


def test_copies_are_on_one_side():
    """Data in which each document stands a few times: about the share asked for, and none on both sides."""
    hashes = np.tile(draws(5000, 2), 3)
    val, note = hold_out(hashes, None)
    assert 75 < val.sum() < 400 and note is None
    assert not set(hashes[val]) & set(hashes[~val])


def test_a_repeated_document_stays_in_training_beside_many_others():
    """It would be a good part of the validation; the others are held out as if it were not there."""
    others = draws(5000, 3)
    val, note = hold_out(np.concatenate([others, np.repeat(np.uint64(7), 100)]), 0.05)
    assert not val[5000:].any() and note is None
    assert (val[:5000] == (others < np.uint64(int(0.05 * 2**64)))).all()
