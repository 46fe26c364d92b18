"""Text while it comes: never half a character, never any of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.infer.text import BROKEN, Detokenizer, StopText


class Bytes:
    """One id a byte: every character of several bytes is split."""

    def decode(self, ids, skip_special=True):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """Learned on text whose characters share bytes, so that tokens cross character borders."""
    text = ["春風十里不如你 🎉🎊🎈 naïve café", "春眠不覺曉，處處聞啼鳥。👩‍👩‍👧 ok ok", "한국어 日本語 العربية"]
    return Tokenizer.train(text * 5, 420)


MIXED = st.text(
    st.one_of(
        st.characters(min_codepoint=32, max_codepoint=126),
        st.sampled_from("春風🎉👩‍👧é한\u0301ا\n \ufffd𝒳"),
        st.characters(exclude_categories=("Cs",)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(text=MIXED)
def test_pieces_join_to_the_text(trained, text):
    """Pieces are whole characters, in order, and joined they are the decoding of all ids; one id a byte included."""
    for tokenizer, ids in ((Bytes(), list(text.encode())), (trained, trained.encode(text))):
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.add(i) for i in ids]
        if BROKEN not in text:
            assert not any(BROKEN in p for p in pieces)
        assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=40))
def test_broken_bytes_lose_nothing(ids):
    """A model may produce bytes that are no UTF-8: the pieces still join to what decoding everything gives."""
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.add(i) for i in ids]
    assert "".join(pieces) + detokenizer.finish() == Bytes().decode(ids)


def test_text_comes_as_soon_as_it_is_whole():
    """A character is out with its last byte, half a one only at the end, as U+FFFD."""
    detokenizer = Detokenizer(Bytes())
    assert [detokenizer.add(b) for b in "a春b".encode()] == ["a", "", "", "春", "b"]
    assert [detokenizer.add(b) for b in "風".encode()[:2]] == ["", ""]
    assert detokenizer.finish() == BROKEN


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.text("ab<|>春", max_size=4), max_size=12),
    stops=st.lists(st.text("ab<|>春", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_across_pieces(pieces, stops):
    """However the text is cut into pieces, what comes out is the text before the first stop string."""
    whole = "".join(pieces)
    places = [whole.find(s) for s in stops if s in whole]
    stop = StopText(stops)
    out = []
    for piece in pieces:
        out.append(stop.add(piece))
        if stop.hit:
            break
    out.append(stop.finish())
    got = "".join(out)
    assert stop.hit == bool(places)
    if not places:
        assert got == whole
    else:
        assert whole.startswith(got)
        assert not any(s in got for s in stops)
        assert any(whole[len(got) :].startswith(s) for s in stops)


def test_only_a_possible_beginning_is_held_back():
    """Text that cannot become a stop string is out at once."""
    stop = StopText(["<end>"])
    assert [stop.add(p) for p in ("hello", " <", "b", "<en", "d", ">x")] == ["hello", " ", "<b", "", "", ""]
    assert stop.hit
    assert stop.finish() == ""
