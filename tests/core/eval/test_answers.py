"""Answers counted right and wrong."""

from __future__ import annotations

import pytest

from minigpt.core.data.chat import template
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.eval.answers import ask, is_right
from minigpt.core.infer.engine import Completion, Engine
from minigpt.core.infer.sampling import SamplingParams


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        ("15", "8 + 7 = 15.", True),
        ("15", "8 + 7 = 15", True),
        ("15", "15 is what I get for 8", False),  # the last number is the answer
        ("15", "8 + 7 = 115.", False),
        ("5", "1 + 4 = 15.", False),
        ("-3", "It is -3.", True),
        ("Rome", "The capital of Italy is Rome.", True),
        ("rome", "ROME!", True),
        ("Rome", "A chrome plate.", False),
        ("Rome", "Romeo", False),
        ("蓝色", "晴天的天空是蓝色的。", True),
        ("蓝色", "晴天的天空是绿色的。", False),
        ("a.c", "abc", False),  # an answer is a text, not a pattern
        ("[kimchi]", "[kimchi]", True),
        ("Paris", "", False),
    ],
)
def test_right_and_wrong(answer, said, right):
    assert is_right(answer, said) is right


class Parrot(Engine):
    """An engine that says what it is told to."""

    def __init__(self, tokenizer, said):
        self.tokenizer, self.said, self.rows, self.prompts = tokenizer, list(said), 2, []

    def generate(self, prompts, params, n=1, progress=None):
        self.prompts += [self.tokenizer.decode(ids, skip_special=False) for ids in prompts]
        return [Completion(i, [], *self.said.pop(0)) for i in range(len(prompts))]


def test_counts_by_kind_in_the_order_of_the_rows():
    """Questions are put without their answers; every count is of its own kind."""
    tokenizer = Tokenizer.train(["What is it? Blue. Three, four, five."] * 20, 300)
    tokenizer.chat_template = template(False)
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"It is {a}."}], "answer": a}
        | kind
        for q, a, kind in (
            ("one?", "blue", {"kind": "fact"}),
            ("two?", "3", {"kind": "sum"}),
            ("three?", "4", {"kind": "sum"}),
            ("four?", "x", {}),
        )
    ]
    parrot = Parrot(tokenizer, [("it is blue", "stop"), ("3", "length"), ("5", "stop"), ("x", "stop")])
    found = ask(parrot, rows, SamplingParams())
    assert (found.asked, found.right, found.stopped) == (4, 3, 3)
    assert {k: (c.asked, c.right, c.stopped) for k, c in found.by_kind.items()} == {
        "fact": (1, 1, 1), "sum": (2, 1, 1), "all": (1, 1, 1)
    }  # fmt: skip
    assert found.correct == [True, True, False, True]
    assert [c.text for c in found.said] == ["it is blue", "3", "5", "x"]
    assert all(
        q in p and "It is" not in p for q, p in zip(["one?", "two?", "three?", "four?"], parrot.prompts, strict=True)
    )
    assert found.by_kind["sum"].figures() == {"asked": 2, "right": 1, "accuracy": 0.5, "stops": 0.5}
