"""Thought and speech told apart in a stream, wherever it is cut."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.core.infer.reply import parse
from minigpt.core.infer.thinking import ThinkSplitter


def streamed(pieces, opened=False):
    """The parts of a stream, each emitted as soon as it is final."""
    splitter = ThinkSplitter(opened)
    return [part for piece in pieces for part in splitter.add(piece)] + splitter.finish()


def joined(parts):
    return tuple("".join(text for text, thinking in parts if thinking is wanted) for wanted in (True, False))


def by_regex(text, opened):
    """The same split of a whole text, written another way."""
    if not opened:
        begun = re.match(r"\s*<think>", text)
        if not begun:
            return "", text
        text = text[begun.end() :]
    thought, _, said = text.partition("</think>")
    return thought.strip("\n"), said.lstrip("\n")


PIECES = st.sampled_from(
    ["<think>", "</think>", "<thi", "nk>", "</", "think>", "<", "\n", "\n\n", " ", "a", "想", "b c"]
)


@given(st.lists(PIECES, max_size=12), st.booleans(), st.data())
def test_a_cut_changes_nothing(pieces, opened, data):
    """Split at any places, the parts joined are those of the whole text, as a regular expression finds them."""
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert joined(streamed(parts, opened)) == by_regex(text, opened)
    assert joined(streamed(list(text), opened)) == by_regex(text, opened)


@given(st.lists(PIECES, max_size=12), st.booleans())
def test_every_part_has_text_and_thought_comes_first(pieces, opened):
    parts = streamed(list("".join(pieces)), opened)
    assert all(text for text, _ in parts)
    assert [thinking for _, thinking in parts] == sorted((thinking for _, thinking in parts), reverse=True)


def test_text_is_not_held_back_longer_than_a_tag_could_be():
    """Each word of a thought and of an answer appears at once; only what may be a tag or its newlines waits."""
    splitter = ThinkSplitter()
    heard = [
        splitter.add(piece) for piece in ("<thi", "nk>\nwhy", " not", "\n", "x </", "b", "\n</think", ">\n", "\nyes")
    ]
    assert heard == [
        [], [("why", True)], [(" not", True)], [], [("\nx ", True)], [("</b", True)], [], [], [("yes", False)],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "opened", "wanted"),
    [
        ("yes", False, ("", "yes")),
        ("<think>\nbecause\n</think>\n\nyes", False, ("because", "yes")),
        ("because\n</think>\n\nyes", True, ("because", "yes")),
        ("because\n</think>\n\nyes", False, ("because", "yes")),  # the opening tag was forgotten
        ("<think>\n\n</think>\n\nyes", False, ("", "yes")),
        ("<think>cut off </thi", False, ("cut off </thi", "")),
        ("cut off", True, ("cut off", "")),
        ("<think>a</think>write </think> to end", False, ("a", "write </think> to end")),
        ("write <think> to begin", False, ("", "write <think> to begin")),
        ("<thin", False, ("", "<thin")),
        ("", False, ("", "")),
    ],
)
def test_split_of_a_whole_answer(answer, opened, wanted):
    reply = parse(answer, opened)
    assert (reply.reasoning, reply.content) == wanted
