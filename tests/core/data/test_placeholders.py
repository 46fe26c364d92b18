"""`{{name}}` in shared data is noticed and filled, never half."""

import json
from pathlib import Path

import pytest

from minigpt.core.data import chat
from minigpt.core.data.formats import normalise, texts_for_training
from minigpt.core.data.placeholders import filled, parse_fill, placeholders
from minigpt.core.data.schema import BadRow, Document
from minigpt.core.data.store import build
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError, UsageError

ROW = {"instruction": "Who are you?", "output": "I am {{name}} of {{author}}, {{name}}!"}
TOOLS = {
    "messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": ["{{name}}"]}}]}],
    "tools": [{"name": "f", "description": "for {{who}}"}],
}


def test_placeholders_are_names_in_double_braces_alone():
    """Code has double braces with other things in them."""
    assert placeholders(normalise(ROW)) == ["{{name}}", "{{author}}"]
    assert placeholders(normalise(TOOLS)) == ["{{name}}", "{{who}}"]
    for code in ("{{ . }}", "style={{ width: 3 }}", "{name}", "{{...}}", "{{ name }}", "{{}}"):
        assert placeholders(Document(code)) == []


def test_every_place_of_a_record_is_filled():
    record = filled(normalise(TOOLS), {"name": "Ada", "who": "all"})
    assert record.messages[0]["tool_calls"][0]["function"]["arguments"] == {"x": ["Ada"]}
    assert record.tools[0]["function"]["description"] == "for all"
    assert filled(Document("{{a}}{{a}} {{ a }}"), {"a": "{{b}}"}) == Document("{{b}}{{b}} {{ a }}")
    with pytest.raises(BadRow, match=r"a placeholder without a text: \{\{author\}\}") as caught:
        filled(normalise(ROW), {"name": "Ada"})
    assert caught.value.fix == "add --fill author=…"


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ([], {}),
        (["name=Ada", "author=Anna, of Rome"], {"name": "Ada", "author": "Anna, of Rome"}),
        (["name=Ada, Eve,author=a=b,x="], {"name": "Ada, Eve", "author": "a=b", "x": ""}),
        (["a=1", "a=1"], {"a": "1"}),
    ],
)
def test_options(options, values):
    assert parse_fill(options) == values


@pytest.mark.parametrize("options", [["name"], ["=x"], ["a b=x"], [""], ["a=1", "a=2"]])
def test_options_that_are_none(options):
    with pytest.raises(UsageError, match="--fill"):
        parse_fill(options)


def test_a_store_is_filled_and_named_by_what_fills_it(tmp_path, monkeypatch):
    """The words are learnt, another name makes another store, and a key that lacks its text is a bad row."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(json.dumps(ROW) + "\n")
    tokenizer = Tokenizer.train(["I am Ada of Anna"], 330)
    tokenizer.chat_template = chat.template()

    def learnt(**fill):
        made = build(["a.jsonl"], tokenizer, kind="chat", fill=fill)
        tokens, mask = made.piece(0, 0, int(made.docs["length"][0]))
        return tokenizer.decode(tokens[mask].tolist()), made.notes

    assert learnt(name="Ada", author="Anna") == ("I am Ada of Anna, Ada!", [])
    assert learnt(name="Eve", author="Anna") == ("I am Eve of Anna, Eve!", [])
    text, notes = learnt()
    assert "{{name}}" in text and "--fill name=… fills them" in notes[0]
    with pytest.raises(DataError, match=r"a\.jsonl:1 has a placeholder without a text: \{\{author\}\}"):
        learnt(name="Ada")
    assert "I am Ada of Anna, Ada!" in list(texts_for_training(["a.jsonl"], fill={"name": "Ada", "author": "Anna"}))
