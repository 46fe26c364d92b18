"""Thought, speech and calls of tools told apart in an answer, wherever it is cut."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt.core.data import chat, formats
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.infer.reply import Reply, ReplyParser, Text, ToolCall, parse

TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
SUM = '<tool_call>\n{"name": "sum", "arguments": {"a": 1, "b": [2, null]}}\n</tool_call>'
AS_TEXT = '{"a": 1, "b": [2, null]}'
CALL_TIME, CALL_SUM = ToolCall("time", {}), ToolCall("sum", {"a": 1, "b": [2, None]})


def streamed(pieces, opened=False):
    """The parts of a stream, each emitted as soon as it is final, and the faults found."""
    parser = ReplyParser(opened)
    parts = [part for piece in pieces for part in parser.add(piece)] + parser.finish()
    return parts, parser.faults


# ---------------------------------------------------------------------------------------------- whole answers


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", Reply()),
        ("yes", Reply(content="yes")),
        (" \n", Reply(content=" \n")),
        (TIME, Reply(tool_calls=[CALL_TIME])),
        (f"\n{TIME}\n", Reply(tool_calls=[CALL_TIME])),
        (f"Wait.\n{TIME}\n{SUM}", Reply(content="Wait.", tool_calls=[CALL_TIME, CALL_SUM])),
        (f"a\n\n{TIME}", Reply(content="a\n", tool_calls=[CALL_TIME])),
        (f"{TIME}{SUM}", Reply(tool_calls=[CALL_TIME, CALL_SUM])),
        (f"a\n{TIME}\nb\n{SUM}", Reply(content="a\nb", tool_calls=[CALL_TIME, CALL_SUM])),
        (f"<think>\nhm\n</think>\n\n{TIME}", Reply("hm", "", [CALL_TIME])),
        (f"<think>\n{TIME}\n</think>\n\nok", Reply(TIME, "ok")),  # considered, not called
        (f"hm\n</think>\n\nok\n{TIME}", Reply("hm", "ok", [CALL_TIME])),  # the tag that begins the thought is missing
        ('<tool_call>{"name": "time"}</tool_call>', Reply(tool_calls=[CALL_TIME])),
        ('<tool_call>{"name": "time", "arguments": null}</tool_call>', Reply(tool_calls=[CALL_TIME])),
        ('<tool_call>{"name": "time", "arguments": ""}</tool_call>', Reply(tool_calls=[CALL_TIME])),
        (f'<tool_call>{{"name": "sum", "arguments": {json.dumps(AS_TEXT)}}}</tool_call>', Reply(tool_calls=[CALL_SUM])),
        ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', Reply(tool_calls=[ToolCall("f", {"a": 1})])),
        (TIME.removesuffix("</tool_call>"), Reply(tool_calls=[CALL_TIME])),  # the answer ended too early
        (TIME.removesuffix("</tool_call>") + SUM, Reply(tool_calls=[CALL_TIME, CALL_SUM])),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call><tool_call>\\""}}</tool_call>',
            Reply(tool_calls=[ToolCall("f", {"a": '</tool_call><tool_call>"'})]),
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "</think>"}}</tool_call>',
            Reply(tool_calls=[ToolCall("f", {"a": "</think>"})]),
        ),
        ("a < b, <tool and </tool_call>", Reply(content="a < b, <tool and </tool_call>")),
    ],
)  # fmt: skip
def test_parse(text, wanted):
    assert parse(text) == wanted


def test_parse_inside_a_thought():
    assert parse(f"hm\n</think>\n\n{TIME}", opened=True) == Reply("hm", "", [CALL_TIME])
    assert parse(TIME, opened=True) == Reply(TIME)


@pytest.mark.parametrize("cut", [f"ok\n{TIME}"[:n] for n in range(2, 5 + len(TIME))])
def test_an_answer_that_was_interrupted_has_no_half_call(cut):
    """Wherever it stopped: the words stay, a call is whole or not there."""
    assert parse(cut, whole=False) == Reply("", "ok", [CALL_TIME] if cut.endswith("</tool_call>") else [])


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("", "is not a JSON object"),
        ("\n", "is not a JSON object"),
        ("time()", "is not a JSON object"),
        ('[{"name": "time"}]', "is not a JSON object"),
        ('{"name": "time"', "not valid JSON"),
        ("{'name': 'time'}", "not valid JSON"),
        ('{"name": "time}', "not valid JSON"),
        ('{"name": "time}\n', "not valid JSON"),
        ('{"name": "t", "arguments": {"x": NaN}}', "not valid JSON"),
        ('{"name": "t", "arguments": {"x": 1e999}}', "not valid JSON"),
        ('{"name": "t", "arguments": {"x": "\\ud800"}}', "not valid JSON"),
        ('{"name": "t", "arguments": ' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON"),
        ('{"name": "t", "arguments": {"x": ' + "9" * 10_000 + "}}", "not valid JSON"),
        ('{"arguments": {}}', "without a name"),
        ('{"name": " "}', "without a name"),
        ('{"name": 1}', "without a name"),
        ('{"name": "t", "arguments": [1]}', "arguments that are not a JSON object"),
        ('{"name": "t", "arguments": "[1]"}', "arguments that are not a JSON object"),
        ('{"name": "t", "arguments": "a=1"}', "arguments that are not valid JSON"),
    ],
)
@pytest.mark.parametrize("close", ["</tool_call>", ""])
def test_a_broken_call_stays_text_and_is_told(body, told, close):
    """The text is whole, and calls around the broken one count."""
    text = f"a\n<tool_call>{body}{close}"
    reply = parse(text)
    assert (reply.content, reply.tool_calls) == (text, [])
    assert len(reply.faults) == 1 and told in reply.faults[0]
    around = parse(f"{SUM}\n<tool_call>{body}{close}\n{TIME}")
    assert around.tool_calls == [CALL_SUM, CALL_TIME] and around.content == f"\n<tool_call>{body}{close}"


def test_message_is_one_that_training_reads():
    """As `formats` makes of a row of MiniMind's or OpenAI's, so what is remembered can be saved and learnt."""
    message = parse(f"<think>\nhm\n</think>\n\nok\n{SUM}").message()
    row = {"messages": [{"role": "user", "content": "?"}, message]}
    assert formats.normalise(row).messages[1] == message
    assert parse("yes").message() == {"role": "assistant", "content": "yes"}


# ---------------------------------------------------------------------------------------------- streams

PIECES = st.sampled_from(
    [
        TIME, SUM, "<tool_call>", "</tool_call>", "<tool", "_call>", "</", '{"name": "f"', '"', "\\", "}", "{", "[",
        '{"name": "f", "arguments": {"a": "</tool_call>"}}', "<think>", "</think>", "\n", "\n\n", " ",
        "a", "想", "<", ">",
    ]
)  # fmt: skip


@given(st.lists(PIECES, max_size=12), st.booleans(), st.data())
@example(["a", "\n", "<tool_call>", '{"name": "f"', "}"], False, None)
@example(["<tool_call>", "\n", '"', "{", '"', "\n", "<tool_call>", SUM], False, None)
def test_a_cut_changes_nothing(pieces, opened, data):
    """Split at any places, the parts put together are those of the whole text, faults included."""
    text = "".join(pieces)
    unbegun = "</think>" in text.partition("<tool_call>")[0] and not text.lstrip().startswith("<think>")
    whole = parse(text, opened)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8))) if data else []
    for parts in ([text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)], list(text)):
        found, faults = streamed(parts, opened or unbegun)
        assert all(part.text for part in found if isinstance(part, Text))
        assert Reply.of(found, faults) == whole


@given(st.lists(PIECES, max_size=12))
def test_nothing_is_lost(pieces):
    """Without thoughts: calls written again, and all white space aside, speech and calls make the text."""
    text = "".join(p for p in pieces if "think" not in p and p not in (TIME, SUM)) + TIME
    written = "".join(
        part.text if isinstance(part, Text) else "<tool_call>" + json.dumps(asdict(part)) + "</tool_call>"
        for part in streamed([text])[0]
    )

    def bare(words):
        return "".join(words.split()).replace('"name":"f"}', '"name":"f","arguments":{}}').replace("</tool_call>", "")

    assert bare(written) == bare(text)


def test_text_is_not_held_back_longer_than_a_tag_could_be():
    """Speech comes at once, a call when it is whole; a tag without an object behind it is speech again."""
    parser = ReplyParser()
    pieces = [
        "I",
        " look\n",
        "\n",
        "<tool",
        "_call>",
        '\n{"name": "time"',
        "}\n</tool_call",
        ">",
        "\n",
        "so",
        "<tool_call>",
        " is",
    ]
    heard = [parser.add(piece) for piece in pieces]  # fmt: skip
    assert heard == [
        [Text("I")], [Text(" look")], [Text("\n")], [], [], [], [], [CALL_TIME], [], [Text("\nso")],
        [], [Text("<tool_call>"), Text(" is")],
    ]  # fmt: skip


def test_a_long_argument_is_read_once():
    """60,000 pieces of one string take a second at most; read again at each piece they would take a minute."""
    begun = time.process_time()
    parser = ReplyParser()
    parts = [p for piece in ['<tool_call>{"name": "f", "arguments": {"a": "', *["xy"] * 60_000, '"}}</tool_call>']
             for p in parser.add(piece)]  # fmt: skip
    assert parts == [ToolCall("f", {"a": "xy" * 60_000})]
    assert time.process_time() - begun < 5


# ---------------------------------------------------------------------------------------------- templates


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(['{"name": "f", "arguments": {"a": 1}} 春風 the fox'] * 5, 340)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TAGS = st.sampled_from(["</tool_call>", "<tool_call>", '"', "\\", "</think>", "\n"])
CALLS = st.builds(
    ToolCall,
    st.text(min_size=1, max_size=8).filter(str.strip),
    st.dictionaries(st.text(max_size=5), VALUES | TAGS, max_size=3),
)
SPEECH = st.lists(st.text(max_size=5) | st.sampled_from(["\n", "<", "</tool_call>", "想"]), max_size=5).map("".join)
THOUGHT = SPEECH.map(lambda text: text.strip("\n"))


@given(THOUGHT, SPEECH, st.lists(CALLS, max_size=3), st.booleans())
def test_what_the_template_writes_is_read_again(tokenizer, reasoning, content, calls, thinking):
    """An assistant's turn through the template, its ids and back: the same message. White space that tells nothing
    aside: speech of nothing else, and newlines between thought and speech."""
    tokenizer.chat_template = chat.template(thinking)
    reasoning = reasoning if thinking else ""
    content = content.lstrip("\n") if reasoning else content
    reply = Reply(reasoning, content if content.strip() else "", calls)
    asked = [{"role": "user", "content": "?"}]
    rendered = chat.render(tokenizer, [*asked, reply.message()])
    answer = tokenizer.decode([id for id, learnt in zip(*rendered, strict=True) if learnt], skip_special=False)
    prompt = tokenizer.decode(chat.render(tokenizer, asked, generation_prompt=True, thinking=bool(reasoning)).ids)
    opened = prompt.rstrip().endswith("<think>")
    assert parse(answer.removesuffix("<|im_end|>"), opened) == reply
