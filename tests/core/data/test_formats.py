"""Every row shape of the ecosystem becomes one canonical form; what does not fit is named, never guessed."""

import contextlib
import json

import jinja2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt.core.data.formats import detect, normalise, read, texts, texts_for_training
from minigpt.core.data.schema import ROLES, BadRow, Conversation, Document, WrongStage
from minigpt.core.errors import DataError, UsageError

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WRITTEN = {"name": "add", "arguments": '{"a": 1}'}
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def s(text):
    return {"role": "system", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


# row, shape, messages, tools
CHATS = {
    "messages": ({"messages": [s("be kind"), U, A], "id": 7}, "messages", [s("be kind"), U, A], []),
    "messages with extra keys": (
        {"messages": [{**U, "name": "x", "loss": 1}, {**A, "tool_calls": None, "reasoning_content": ""}]},
        "messages",
        [{**U, "name": "x"}, A],
        [],
    ),
    "messages with tools as a list": (
        {"messages": [U, {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "1"}]}], "tools": [TOOL]},
        "messages",
        [U, {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "1"}]}],
        [TOOL],
    ),
    "arguments as JSON text": (
        {
            "messages": [
                U,
                {"role": "assistant", "content": "", "tool_calls": [{"function": WRITTEN}]},
                {"role": "tool", "content": "", "tool_call_id": "1"},
                A,
            ]
        },
        "messages",
        [
            U,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "", "tool_call_id": "1"},
            A,
        ],
        [],
    ),
    "old function_call": (
        {"messages": [U, {"role": "assistant", "content": None, "function_call": WRITTEN}]},
        "messages",
        [U, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        [],
    ),
    "MiniMind": ({"conversations": [U, A]}, "MiniMind conversations", [U, A], []),
    "MiniMind with tools": (
        {
            "conversations": [
                {"role": "system", "content": "# Tools …", "tools": json.dumps([TOOL]), "reasoning_content": ""},
                {**U, "tools": "", "tool_calls": ""},
                {"role": "assistant", "content": "", "tool_calls": '[{"name": "add", "arguments": {"a": 1}}]'},
                {"role": "tool", "content": '{"sum": 1}'},
                {**A, "reasoning_content": "hm", "tool_calls": "[]"},
            ],
            "gt": ["1"],
        },
        "MiniMind conversations",
        [
            s("# Tools …"),
            U,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"sum": 1}'},
            {**A, "reasoning_content": "hm"},
        ],
        [TOOL],
    ),
    "MiniMind v2 functions, empty system": (
        {"conversations": [{**s(""), "functions": json.dumps([TOOL["function"]])}, U, A]},
        "MiniMind conversations",
        [U, A],
        [TOOL],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "ShareGPT",
        [U, A],
        [],
    ),
    "ShareGPT with tools and system": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ],
            "system": "be kind",
            "tools": json.dumps([TOOL["function"]]),
        },
        "ShareGPT",
        [
            s("be kind"),
            U,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
            A,
        ],
        [TOOL],
    ),
    "ShareGPT without tools": (
        {"conversations": [{"from": "system", "value": "x"}, {"from": "gpt", "value": "a"}], "tools": ""},
        "ShareGPT",
        [s("x"), A],
        [],
    ),
    "Alpaca": ({"instruction": "q", "input": "", "output": "a"}, "Alpaca", [U, A], []),
    "Alpaca with input": (
        {"instruction": "add", "input": "1 2", "output": "a"},
        "Alpaca",
        [{"role": "user", "content": "add\n1 2"}, A],
        [],
    ),
    "Alpaca without instruction": ({"instruction": None, "input": "q", "output": "a"}, "Alpaca", [U, A], []),
    "Alpaca with history and system": (
        {"instruction": "q", "output": "a", "system": "x", "history": [["q0", "a0"]]},
        "Alpaca",
        [s("x"), {"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}, U, A],
        [],
    ),
    "Alpaca with a text column": ({"instruction": "q", "output": "a", "text": "### q a"}, "Alpaca", [U, A], []),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, "prompt and answer", [U, A], []),
    "prompt and response": (
        {"prompt": "q", "response": "a", "thinking": "hm"},
        "prompt and answer",
        [U, {**A, "reasoning_content": "hm"}],
        [],
    ),
    "prompt and completion as messages": ({"prompt": [U], "completion": [A]}, "prompt and answer", [U, A], []),
    "question and answer": ({"question": "q", "answer": "a"}, "question and answer", [U, A], []),
    "problem and solution": ({"problem": "q", "solution": "a", "level": 1}, "question and answer", [U, A], []),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "hm"},
                        {"type": "text", "value": "a"},
                        {"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                    ],
                },
            ],
            "tools": json.dumps([TOOL]),
        },
        "messages",
        [U, {**A, "reasoning_content": "hm", "tool_calls": [CALL]}],
        [TOOL],
    ),
    "think tags": (
        {"messages": [U, {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}]},
        "messages",
        [U, {**A, "reasoning_content": "hm"}],
        [],
    ),
    "empty think tags": (
        {"messages": [U, {"role": "assistant", "content": "<think>\n\n</think>\n\na"}]},
        "messages",
        [U, A],
        [],
    ),
    "think tags that are not at the start, or not closed": (
        {"messages": [says("a <think>b</think>"), says("<think>b")]},
        "messages",
        [says("a <think>b</think>"), says("<think>b")],
        [],
    ),
    "think tags of a user": (
        {"messages": [{"role": "user", "content": "<think>x</think>q"}, A]},
        "messages",
        [{"role": "user", "content": "<think>x</think>q"}, A],
        [],
    ),
    "masked by weight, loss, train or loss_mask": (
        {
            "messages": [
                {**U, "weight": 0},
                {**A, "weight": 0},
                {**A, "weight": 0.0},
                {**A, "loss": False},
                {**A, "train": False},
                {**A, "loss_mask": 0},
                {**A, "weight": 1, "loss": False},
                {**A, "weight": 1, "loss": True, "train": None, "loss_mask": 1.0},
            ]
        },
        "messages",
        [U, *[{**A, "weight": 0}] * 6, A],
        [],
    ),
    "masked in ShareGPT": (
        {"conversations": [{"from": "gpt", "value": "a", "weight": 0}, {"from": "gpt", "value": "a", "weight": 1}]},
        "ShareGPT",
        [{**A, "weight": 0}, A],
        [],
    ),
    "names and ids": (
        {
            "messages": [
                {**U, "name": "Anna"},
                {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "abcdefghi"}]},
                {"role": "function", "content": "1", "name": "add", "tool_call_id": "abcdefghi"},
                {**A, "name": " ", "tool_call_id": "not a tool's"},
            ]
        },
        "messages",
        [
            {**U, "name": "Anna"},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", **CALL}]},
            {"role": "tool", "content": "1", "name": "add", "tool_call_id": "abcdefghi"},
            A,
        ],
        [],
    ),
    "a thought without the tag that begins it": (
        {"messages": [U, says("hm\n</think>\n\na"), says("</think>a"), says("hm</think>a</think>b")]},
        "messages",
        [U, {**A, "reasoning_content": "hm"}, A, {**says("a</think>b"), "reasoning_content": "hm"}],
        [],
    ),
    "other names of reasoning": (
        {"messages": [{**A, "reasoning": "hm"}, {**A, "thinking": "hm", "reasoning_content": ""}]},
        "messages",
        [{**A, "reasoning_content": "hm"}] * 2,
        [],
    ),
    "null columns of a pair": ({"messages": [U, A], "chosen": None, "rejected": None}, "messages", [U, A], []),
    "null messages": ({"messages": None, "instruction": "q", "output": "a"}, "Alpaca", [U, A], []),
    "null text, system, tools and history": (
        {"text": None, "system": None, "tools": None, "history": None, "instruction": "q", "output": "a"},
        "Alpaca",
        [U, A],
        [],
    ),
    "null among other names": (
        {"prompt": "q", "completion": None, "response": "a", "input_ids": None, "conversations": None},
        "prompt and answer",
        [U, A],
        [],
    ),
    "nulls inside messages": (
        {
            "messages": [
                {"role": None, "from": "human", "content": None, "value": "q"},
                {"role": "assistant", "content": [{"type": "text", "text": None, "value": "a"}]},
                {**says(""), "tool_calls": [{"function": None, **CALL["function"], "id": None}]},
            ]
        },
        "messages",
        [U, A, {**says(""), "tool_calls": [CALL]}],
        [],
    ),
    "question with context": (
        {"question": "q", "context": "It is so.", "answer": "a"},
        "question and answer",
        [{"role": "user", "content": "It is so.\n\nq"}, A],
        [],
    ),
    "Dolly": (
        {"instruction": "q", "context": "It is so.", "response": "a", "category": "qa"},
        "Alpaca",
        [{"role": "user", "content": "It is so.\n\nq"}, A],
        [],
    ),
    "prompt with input, context and system prompt": (
        {"system_prompt": "be kind", "context": "It is so.", "prompt": "q", "input": "1 2", "completion": "a"},
        "prompt and answer",
        [s("be kind"), {"role": "user", "content": "It is so.\n\nq\n1 2"}, A],
        [],
    ),
    "a system message that is there already": (
        {"system_prompt": "be kind", "messages": [s("be kind"), U, A]},
        "messages",
        [s("be kind"), U, A],
        [],
    ),
    "other names of roles": (
        {"messages": [{**s("x"), "role": "developer"}, {**U, "role": "Human"}, {**A, "role": "model"}]},
        "messages",
        [s("x"), U, A],
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n, (row, *_) in CHATS.items() for k in ("chat", "text") if k == "chat" or "text" not in row],
)
def test_conversations(name, kind):
    """The same canonical messages whatever the stage, and the row that was read is left as it was."""
    row, shape, messages, tools = CHATS[name]
    before = json.dumps(row)
    assert normalise(row, kind) == Conversation(messages, tools)
    assert detect(row, kind) == shape
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    "row", [{"text": " t\n"}, {"content": " t\n"}, {"document": " t\n", "url": "x"}, {"raw_content": " t\n", "id": 1}]
)
def test_documents_keep_their_text_as_it_is(row):
    assert read(row, "text")[:2] == (Document(" t\n"), "text")


def test_a_string_is_a_document():
    assert read("t", "text")[:2] == (Document("t"), "plain text")


def test_a_text_column_comes_first_for_text():
    assert read({"instruction": "q", "output": "a", "text": "both"}, "text")[:2] == (Document("both"), "text")


BAD = {
    "null": (None, "null where an object should be"),
    "number": (3, "a number where an object should be"),
    "list": ([U, A], "a list where an object should be"),
    "no keys": ({}, "no shape that is known"),
    "other keys": ({"body": "x"}, "no shape that is known"),
    "token ids": ({"input_ids": [1, 2]}, "token ids instead of text"),
    "no assistant": ({"messages": [U]}, "no assistant message"),
    "no messages": ({"messages": []}, "no messages"),
    "messages null": ({"messages": None}, "messages that are not a list"),
    "message a string": ({"messages": ["q"]}, "text where a message should be"),
    "unknown role": ({"messages": [{"role": "narrator", "content": "x"}, A]}, "a message without a known role"),
    "no role": ({"conversations": [{"content": "x"}, A]}, "a message without a known role"),
    "role a number": ({"messages": [{"role": 1, "content": "x"}, A]}, "a message without a known role"),
    "content missing": ({"messages": [{"role": "user"}, A]}, "a user message without content"),
    "content null": ({"messages": [U, {"role": "assistant", "content": None}]}, "an assistant message without content"),
    "content a number": (
        {"messages": [{"role": "user", "content": 3}, A]},
        "a number as the content of a user message",
    ),
    "content empty": ({"messages": [{"role": "user", "content": " "}, A]}, "an empty user message"),
    "answer empty": ({"messages": [U, {"role": "assistant", "content": ""}]}, "an empty assistant message"),
    "answer only empty tags": (
        {"messages": [U, {"role": "assistant", "content": "<think></think>"}]},
        "an empty assistant message",
    ),
    "reasoning a list": ({"messages": [U, {**A, "reasoning_content": [1]}]}, "a list as reasoning_content"),
    "tool call broken": (
        {"messages": [U, {"role": "assistant", "content": "", "tool_calls": "[{"}]},
        "invalid JSON in a tool call",
    ),
    "tool call without a name": (
        {"messages": [U, {**A, "tool_calls": [{"arguments": {}}]}]},
        "a tool call without a name",
    ),
    "tool call a string": ({"messages": [U, {**A, "tool_calls": ["x"]}]}, "a tool call without a name"),
    "arguments a list": (
        {"messages": [U, {**A, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        "tool call arguments that are not an object",
    ),
    "function_call empty": ({"conversations": [{"from": "function_call", "value": ""}]}, "an empty tool call"),
    "function_call text": (
        {"conversations": [{"from": "function_call", "value": "add(1)"}]},
        "invalid JSON in a tool call",
    ),
    "tools broken": ({"messages": [U, A], "tools": "[add]"}, "invalid JSON in tools"),
    "tools of strings": ({"messages": [U, A], "tools": '["add"]'}, "tools that are not a list of objects"),
    "tools a number": ({"messages": [U, A], "tools": 3}, "tools that are not a list of objects"),
    "image part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, A]},
        "a content part that is not text",
    ),
    "part a number": ({"messages": [{"role": "user", "content": [3]}, A]}, "a content part that is not text"),
    "Alpaca null output": ({"instruction": "q", "output": None}, "an assistant message without content"),
    "Alpaca empty output": ({"instruction": "q", "output": ""}, "an empty assistant message"),
    "Alpaca no question": ({"instruction": "", "input": "", "output": "a"}, "an empty user message"),
    "Alpaca history": ({"instruction": "q", "output": "a", "history": [["x"]]}, "a history that is not a list of"),
    "Alpaca input a list": ({"instruction": "q", "input": ["x"], "output": "a"}, "a list as input"),
    "prompt a number": ({"prompt": 3, "completion": "a"}, "a number as the content of a user message"),
    "weight between": ({"messages": [U, {**A, "weight": 0.5}]}, "a weight that is neither 0 nor 1"),
    "weight a word": ({"messages": [U, {**A, "loss": "no"}]}, "a loss that is neither 0 nor 1"),
    "all masked": ({"messages": [U, {**A, "weight": 0}]}, "no assistant message that is learnt"),
    "name a list": ({"messages": [{**U, "name": ["x"]}, A]}, "a list as name"),
    "call id an object": ({"messages": [{**A, "tool_calls": [{**CALL, "id": {}}]}]}, "an object as id"),
    "context beside messages": ({"prompt": [U], "context": "x", "completion": "a"}, "a context or an input beside"),
    "context a list": ({"question": "q", "context": ["x"], "answer": "a"}, "a list as context"),
    "half a character": ({"messages": [U, {"role": "assistant", "content": "x\ud800"}]}, "half a character"),
    "half a character in a tool": ({"messages": [U, A], "tools": [{"name": "\udc00"}]}, "half a character"),
    "half a character in arguments": (
        {"messages": [U, {**A, "tool_calls": [{"name": "f", "arguments": {"x": "\ud800"}}]}]},
        "half a character",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_say_what_is_wrong(name):
    row, reason = BAD[name]
    with pytest.raises(BadRow) as caught:
        normalise(row, "chat")
    assert caught.value.reason.startswith(reason) and caught.value.fix


def anything(words):
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(words) | st.text(max_size=3)
    return st.recursive(
        leaf,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(words), inner, max_size=5),
        max_leaves=25,
    )


WORDS = [
    "messages", "conversations", "role", "content", "from", "value", "user", "assistant", "gpt", "human", "tool",
    "system", "tools", "tool_calls", "function", "name", "arguments", "type", "text", "reasoning", "tool_call",
    "instruction", "input", "output", "history", "prompt", "completion", "response", "question", "answer",
    "reasoning_content", "id", "tool_call_id", "weight", "loss", "context", "system_prompt",
    "{}", "[]", "function_call", "[1]", "<think>", "</think>", "data", "functions", "thinking",
    "[{}]",
    '{"name": "f", "arguments": 1}', "<think>x</think>",
]  # fmt: skip


@given(anything(WORDS), st.sampled_from(["chat", "text"]))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_row_whatever_breaks_the_reader(row, kind):
    """Any JSON value is a canonical record or a BadRow with a reason and a way out; nothing else escapes."""
    try:
        record = normalise(row, kind)
    except BadRow as fault:
        assert fault.reason and fault.fix
        return
    if isinstance(record, Document):
        assert kind == "text" and record.text.strip()
        return
    assert any(m["role"] == "assistant" for m in record.messages)
    for m in record.messages:
        assert m["role"] in ROLES and isinstance(m["content"], str)
        assert set(m) <= {"role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id", "weight"}
        assert all(set(c) - {"id"} == {"type", "function"} for c in m.get("tool_calls", []))
        assert all(isinstance(c["function"]["arguments"], dict) for c in m.get("tool_calls", []))
    assert all("function" in t for t in record.tools)


@given(st.lists(st.dictionaries(st.sampled_from(WORDS), anything(WORDS), max_size=5), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_message_whatever_breaks_the_reader(turns):
    """As above, for what stands in the place of messages."""
    for row in ({"messages": turns}, {"messages": [{"role": "assistant", "content": turns}], "tools": turns}):
        with contextlib.suppress(BadRow):
            list(texts(normalise(row)))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None}, "null as text"),
        ({"text": 3}, "a number as text"),
        ({"text": ["a"]}, "a list as text"),
        ({"text": " \n"}, "an empty text"),
        ({"content": {}}, "an object as content"),
        ({"text": "\udfff"}, "half a character"),
        ({"text": True}, "true or false as text"),
    ],
)
def test_bad_text(row, reason):
    with pytest.raises(BadRow) as caught:
        normalise(row, "text")
    assert caught.value.reason.startswith(reason)


@pytest.mark.parametrize(
    ("row", "kind", "unread", "beside"),
    [
        ({"question": "q", "answer": "a", "passage": "a text", "source": "a book", "n": 3}, "chat",
         ("passage",), ("source", "n")),
        ({"messages": [U, A], "choices": ["A", "yes"], "scores": [1, 2], "note": " "}, "chat",
         ("choices",), ("scores", "note")),
        ({"messages": [U, says("It is Paris.")], "answer": "Paris", "kind": "fact"}, "chat", (), ("answer", "kind")),
        ({"instruction": "q", "output": "a", "text": "### q\n### a"}, "chat", (), ("text",)),
        ({"instruction": "q", "output": "a", "text": "### q\n### a"}, "text", (), ("instruction", "output")),
        ({"text": "a tale", "title": "Of Ann"}, "text", ("title",), ()),
        ({"messages": [{**U, "hint": "look", "id": "m1"}, {**A, "hint": "", "refusal": None}], "id": 1}, "chat",
         ("messages.hint",), ("id", "messages.id")),
        ({"conversations": [{"from": "human", "value": "q", "tools": ""}, {**A, "tools": "", "plan": "a"}]}, "chat",
         (), ("messages.plan",)),
        ({"system": "x", "system_prompt": "y", "prompt": "q", "response": "a", "completion": None}, "chat",
         ("system_prompt",), ()),
    ],
)  # fmt: skip
def test_columns_that_are_not_read_are_told(row, kind, unread, beside):
    """Text that is nowhere in the record apart from what only tells about the row: ids, sources, scores."""
    reading = read(row, kind)
    assert (reading.unread, reading.beside) == (unread, beside)


def test_a_masked_conversation_is_text_all_the_same():
    """Running text learns every token, so a mask of all answers takes nothing from it."""
    row = {"messages": [U, {**A, "weight": 0}]}
    assert read(row, "text").record == Conversation([U, {**A, "weight": 0}])


def test_thoughts_are_cut_as_qwen3_cuts_them():
    """Qwen3's template, its own lines: reasoning up to the closing tag, line breaks at the seam removed."""
    lines = (
        "{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}"
        "{{- reasoning }}|{{ content.split('</think>')[-1].lstrip('\\n') -}}"
    )
    for content in ("hm\n</think>\n\na", "\n hm </think> a\n", "<think>\nhm\n</think>\n\na", "</think>\na"):
        message = normalise({"messages": [says(content)]}).messages[0]
        theirs = jinja2.Template(lines).render(content=content)
        assert f"{message.get('reasoning_content', '')}|{message['content']}" == theirs


def test_the_right_stage_is_named():
    """Text under sft: pretrain. A preference pair: what to keep of it."""
    for row in ({"text": "t"}, "t"):
        with pytest.raises(WrongStage) as caught:
            normalise(row, "chat")
        assert "minigpt pretrain" in caught.value.fix
    for row in ({"chosen": "a", "rejected": "b"}, {"conversations": [U], "chosen": A, "rejected": A}):
        for kind in ("chat", "text"):
            with pytest.raises(WrongStage, match="preference pair"):
                normalise(row, kind)


def test_texts_hold_everything_that_will_be_tokenised():
    row, *_ = CHATS["parts"]
    assert set(texts(normalise(row))) >= {"hm", "q", "a", json.dumps(TOOL), json.dumps(CALL["function"])}
    assert list(texts(Document("t"))) == ["t"]


# ------------------------------------------------------------------------------------------------ tokenizer training


def test_texts_for_training_are_all_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"messages": [{"role": "assistant", "content": "two"}]}\n')
    (tmp_path / "b.txt").write_text("three\nfour\n")
    assert list(texts_for_training([str(tmp_path)])) == ["one", "two", "three", "four"]


def test_texts_for_training_are_spread_over_larger_data(tmp_path):
    """A tenth of the bytes: about a tenth of the rows, from all over the file."""
    file = tmp_path / "a.txt"
    file.write_text("".join(f"{i:09}\n" for i in range(10_000)))
    found = [int(t) for t in texts_for_training([str(file)], most_bytes=10_000)]
    assert len(found) == pytest.approx(1000, abs=2) and found == sorted(set(found))
    gaps = np.diff(found).tolist()
    assert found[0] < 10 and found[-1] > 9_980 and set(gaps) <= {9, 10, 11}


def test_texts_for_training_are_strict(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": null}\n{"text": "three"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2 has null as text"):
        list(texts_for_training([str(file)]))
    assert list(texts_for_training([str(file)], max_bad="1")) == ["one", "three"]
    assert list(texts_for_training([str(file)], max_bad="34%")) == ["one", "three"]
    with pytest.raises(DataError, match="1 of 3 rows are bad"):
        list(texts_for_training([str(file)], max_bad="33%"))


def test_a_tokenizer_is_not_trained_on_tokens(tmp_path):
    for name in ("meta.json", "tokens.bin"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError) as caught:
        list(texts_for_training([str(tmp_path)]))
    assert "--tokenizer" in caught.value.fix
