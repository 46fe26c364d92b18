"""core.eval.tokenizer_fit: counts that add up."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.eval.tokenizer_fit import SCRIPTS, Fit, script_of

TEXTS = [
    "The quick brown fox, 42 times.",
    "春風又綠江南岸，明月何時照我還。",
    "Straße und 日本語 mixed",
    "🙂 émoji ☕",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the quick brown fox jumps", "春風又綠江南岸"] * 30, 380)


def test_totals(tokenizer):
    """Bytes, characters and tokens are Python's own counts; scripts share them out without loss."""
    fit = Fit(tokenizer)
    fit.add(TEXTS)
    told = fit.figures()
    assert told["bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert told["characters"] == sum(map(len, TEXTS)) == sum(p["characters"] for p in told["scripts"].values())
    assert told["tokens"] == sum(len(tokenizer.encode(t)) for t in TEXTS)
    assert told["tokens"] == sum(p["tokens"] for p in told["scripts"].values())
    assert (told["texts"], told["changed"]) == (5, 0)
    assert told["bytes_per_token"] == told["bytes"] / told["tokens"]


def test_scripts(tokenizer):
    """Letters are told apart; a token belongs to the script of most of its letters, its space notwithstanding."""
    names = [SCRIPTS[i] for i in script_of(np.array([ord(c) for c in "aß春のハ한1 ,я🙂"], dtype=np.uint32))]
    assert names == ["Latin", "Latin", "CJK", "CJK", "CJK", "CJK", "other", "other", "other", "other", "other"]
    fit = Fit(tokenizer)
    fit.add([" quick quick"])
    scripts = fit.figures()["scripts"]
    assert scripts["Latin"]["tokens"] == len(tokenizer.encode(" quick quick")) and scripts["other"]["tokens"] == 0


def test_fallback_counts_single_bytes(tokenizer):
    """A character that the vocabulary lacks is three tokens of one byte; ASCII bytes are characters of their own."""
    fit = Fit(tokenizer)
    fit.add(["龍"])
    assert len(tokenizer.encode("龍")) == 3 and fit.figures()["fallback"] == 1.0
    fit = Fit(tokenizer)
    fit.add(["zZ#"])
    assert fit.figures()["fallback"] == 0.0


def test_a_tokenizer_that_rewrites_text_is_found_out(tokenizer):
    """A lower-casing tokenizer does not give back what it was given."""
    import json

    raw = dict(tokenizer._json, normalizer={"type": "Lowercase"})
    fit = Fit(Tokenizer(json.dumps(raw), tokenizer.config))
    fit.add(["same", "Not The Same"])
    assert fit.figures()["changed"] == 1 and fit.first_changed == "Not The Same"


def test_nothing_is_nothing(tokenizer):
    assert Fit(tokenizer).figures()["tokens_per_character"] == 0
