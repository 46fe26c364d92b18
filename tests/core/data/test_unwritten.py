"""What a row holds and the chat template does not write is counted, by kind, with its first place."""

import pytest

from minigpt.core.data import chat
from minigpt.core.data.formats import normalise
from minigpt.core.data.remarks import PLACEHOLDERS, UNREAD, UNWRITTEN, Remarks
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.data.unwritten import unwritten

TEXTS = ["the quick brown fox"] * 20
FOREIGN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # the reasoning of the last turn alone; names of calls; no ids
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PICKY = "{% for m in messages %}{{ m.content }}{{ m.tool_calls[0].id | upper if m.tool_calls }}<|im_end|>{% endfor %}"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
Q = {"role": "user", "content": "What is 2+3?"}
A = {"role": "assistant", "content": "It is 5."}
THINKS = {**A, "reasoning_content": "Two and three make five."}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "x1"}]}
RESULT = {"role": "tool", "content": "5", "tool_call_id": "x1", "name": "add"}


@pytest.mark.parametrize(
    ("template", "row", "lost"),
    [
        (chat.template(), {"messages": [Q, A]}, []),
        (chat.template(), {"messages": [Q, THINKS]}, ["reasoning"]),
        (chat.template(), {"messages": [Q, {**A, "reasoning_content": "It is 5."}]}, ["reasoning"]),
        (chat.template(True), {"messages": [Q, THINKS]}, []),
        (chat.template(), {"messages": [Q, THINKS, Q, A]}, ["reasoning of earlier turns"]),
        (QWEN3, {"messages": [Q, THINKS, Q, THINKS]}, ["reasoning of earlier turns"]),
        (QWEN3, {"messages": [Q, THINKS]}, []),
        (chat.template(), {"messages": [Q, CALLS, RESULT, A], "tools": [TOOL]},
         ["ids of tool calls", "names", "ids of results"]),
        (QWEN3, {"messages": [Q, CALLS, RESULT, A], "tools": [TOOL]},
         ["ids of tool calls", "names", "ids of results", "tools"]),
        (FOREIGN, {"messages": [Q, CALLS, A]}, ["tool calls", "ids of tool calls"]),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}",
         {"system": "Be kind.", "messages": [Q, A]}, ["system messages"]),
        (PICKY, {"messages": [Q, CALLS, A]}, []),
        (FOREIGN.replace("m.content", "m.content | upper"), {"messages": [Q, A]}, []),
    ],
)  # fmt: skip
def test_parts_that_are_not_written(template, row, lost):
    """By trial, not by name: a part is lost when the text is the same without it."""
    tokenizer = Tokenizer.train(TEXTS, 330)
    tokenizer.chat_template = template
    record = normalise(row)
    assert unwritten(tokenizer, record, chat.prepare(tokenizer, record.messages, record.tools or None)) == lost


def test_remarks_are_sentences_with_counts_and_first_places():
    """One sentence for each file's columns, one for each other kind; empty ones are not said."""
    remarks = Remarks()
    assert list(remarks.sentences(["a.jsonl"])) == []
    for n in (3, 4):
        remarks.add(UNREAD, ["passage"], 0, f":{n}")
        remarks.add(UNWRITTEN, ["reasoning", "names"][: n - 2], 1, f":{n}")
        remarks.add(PLACEHOLDERS, ["{{name}}"], 0, f":{n}")
    remarks.add(UNREAD, [], 1, ":9")
    assert list(Remarks(remarks.counts).sentences(["a.jsonl", "b.jsonl"])) == [
        "a.jsonl: not read: passage (2 rows)",
        "the chat template does not write, so nobody learns: reasoning (2 rows, first b.jsonl:3), "
        "names (1 row, first b.jsonl:4); sft and pack write reasoning with --thinking on",
        "2 rows hold placeholders such as {{name}} (first a.jsonl:3): learnt as they stand; --fill name=… fills them",
    ]
