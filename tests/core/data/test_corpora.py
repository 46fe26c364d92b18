"""Published corpora, exactly as their publishers wrote them: every row is understood and nothing of it is lost.

They are looked for in $MINIGPT_TEST_DATA, else in shared/data beside the repository, and skipped where they are not.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from minigpt.core.data import chat, reader
from minigpt.core.data.formats import detect, normalise, read
from minigpt.core.data.store import build
from minigpt.core.data.tokenizer import Tokenizer

REAL = Path(os.environ.get("MINIGPT_TEST_DATA") or Path(__file__).parents[3].parent / "shared" / "data")

CORPORA = {  # file: (kind, rows, shape)
    "alpaca_en_demo.json": ("chat", 999, "Alpaca"),
    "alpaca_zh_demo.json": ("chat", 1000, "Alpaca"),
    "identity.json": ("chat", 91, "Alpaca"),
    "sft_alpaca_roleplay_en.jsonl": ("chat", 3146, "Alpaca"),
    "glaive_toolcall_en_demo.json": ("chat", 300, "ShareGPT"),
    "glaive_toolcall_zh_demo.json": ("chat", 300, "ShareGPT"),
    "reason_tool_use_demo_50.jsonl": ("chat", 50, "messages"),
    "gsm8k_train.jsonl": ("chat", 7473, "question and answer"),
    "pretrain_zh_poetry.jsonl": ("text", 60_000, "text"),
    "pretrain_en_wikitext.jsonl": ("text", 60, "text"),
    "c4_demo.jsonl": ("text", 300, "text"),
    "wiki_demo.txt": ("text", 30, "plain text"),
    "tinyshakespeare.txt": ("text", 288, "plain text"),
}


def real(name):
    if not (REAL / name).is_file():
        pytest.skip(f"{REAL / name} is not here")
    return str(REAL / name)


@pytest.mark.parametrize("name", CORPORA)
def test_corpora_are_read_whole(name):
    """Every row of every published file is understood."""
    kind, count, shape = CORPORA[name]
    (source,) = reader.expand([real(name)])
    found = [read(row.value, kind) for row in reader.rows(source)]
    assert len(found) == count
    assert {reading.shape for reading in found} == {shape}


def test_tool_corpora_keep_calls_results_and_tools():
    """As counted in the files themselves."""
    for name, calls, results in (
        ("glaive_toolcall_en_demo.json", 211, 211),
        ("glaive_toolcall_zh_demo.json", 216, 218),
    ):
        rows = json.loads(Path(real(name)).read_text(encoding="utf-8"))
        found = [normalise(row) for row in rows]
        messages = [m for c in found for m in c.messages]
        assert sum("tool_calls" in m for m in messages) == calls
        assert sum(m["role"] == "tool" for m in messages) == results
        for row, record in zip(rows, found, strict=True):
            assert [t["function"] for t in record.tools] == json.loads(row["tools"] or "[]")


def test_the_reasoning_corpus_keeps_reasoning():
    (source,) = reader.expand([real("reason_tool_use_demo_50.jsonl")])
    messages = [m for row in reader.rows(source) for m in normalise(row.value).messages if m["role"] == "assistant"]
    assert len(messages) == 112 and all(m["reasoning_content"] for m in messages)
    assert sum(len(m.get("tool_calls", ())) for m in messages) == 68


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "dpo_zh_demo.json", "hh_harmless_test.jsonl.gz"])
def test_preference_corpora_are_told_apart(name):
    (source,) = reader.expand([real(name)])
    assert {detect(row.value) for row in reader.rows(source)} == {"preference pairs"}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the quick brown fox, 春風"], 330)


def test_a_text_store_decodes_to_the_text(tokenizer):
    """Nothing is lost or added but white space between documents."""
    file = real("tinyshakespeare.txt")
    made = build([file], tokenizer)
    tokens = np.concatenate([made.piece(d, 0, int(made.docs["length"][d]))[0] for d in made.indices("all")])
    assert "".join(tokenizer.decode(tokens.tolist()).split()) == "".join(Path(file).read_text(encoding="utf-8").split())


@pytest.mark.parametrize("name", ["glaive_toolcall_zh_demo.json", "reason_tool_use_demo_50.jsonl", "identity.json"])
def test_every_conversation_is_stored_with_something_to_learn(tokenizer, name):
    tokenizer.chat_template = chat.template(True)
    made = build([real(name)], tokenizer, kind="chat")
    said = ["85 rows hold placeholders such as {{name}}, {{author}}"] if name == "identity.json" else []
    assert [note.partition(" (first")[0] for note in made.notes] == said
    assert made.meta["rows"] == made.meta["documents"] == len(made.docs) == CORPORA[name][1]
    assert (made.docs["supervised"] > 0).all()
    assert int(made.docs["supervised"].sum()) == made.meta["supervised"]
