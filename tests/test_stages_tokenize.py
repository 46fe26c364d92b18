"""minigpt tokenize: every verb, with files and with pipes."""

from __future__ import annotations

import json

import pytest

from minigpt.core.data.store import Store
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.models import folder
from tests.conftest import run_cli, tiny

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "春風又綠江南岸，明月何時照我還。",
    "say <|im_end|> to end a turn",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in LINES * 30), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tok(corpus):
    out = corpus.parent / "tok"
    code, stdout, err = run_cli("tokenize", "train", "-d", corpus, "--vocab-size", "340", "-o", out)
    assert (code, stdout) == (0, f"{out}\n"), err
    return out


def test_train_writes_a_tokenizer(tok, corpus):
    """The folder opens here and in transformers, and its vocabulary is the one asked for."""
    assert Tokenizer.load(tok).vocab_size == 340
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tok))
    assert theirs(LINES[1], add_special_tokens=False)["input_ids"] == Tokenizer.load(tok).encode(LINES[1])


def test_train_from_a_pipe_and_as_json(tmp_path):
    code, out, _ = run_cli("tokenize", "train", "-d", "-", "-o", tmp_path / "t", "--json", stdin="some text\n" * 50)
    told = json.loads(out)
    assert code == 0 and told["texts"] == 50 and told["bytes"] == 450
    assert told["fingerprint"] == Tokenizer.load(tmp_path / "t").fingerprint


def test_train_says_when_the_text_is_too_small(tmp_path):
    """Fewer tokens than asked for is a warning with a way out, not a surprise at training."""
    code, _, err = run_cli("tokenize", "train", "-d", "-", "--vocab-size", "5000", "-o", tmp_path / "t", stdin="ab\n")
    assert code == 0 and "5,000 were asked for" in err


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["train", "-d", "x.txt"], 2, "needs a place to write to"),
        (["train", "-o", "t"], 2, "needs data"),
        (["train", "-d", "nowhere.txt", "-o", "t"], 2, "nowhere.txt does not exist"),
        (["train", "-d", "-", "-o", "t", "--vocab-size", "100"], 2, "too small"),
        (["train", "-d", "-", "-o", "."], 2, "already exists"),
        (["encode", "hi"], 2, "needs a tokenizer"),
        (["encode", "hi", "-t", "nowhere"], 3, "nowhere does not exist"),
        (["stats", "-d", "-"], 2, "needs a tokenizer"),
    ],
)
def test_what_is_missing_is_asked_for(tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("text")
    got, out, err = run_cli("tokenize", *args, stdin="some text\n")
    assert (got, out) == (code, "") and message in err and "fix" in err


def test_encode_and_decode_are_inverse(tok):
    """ids of encode, piped into decode, give the text back; a special token in content stays text."""
    code, ids, _ = run_cli("tokenize", "encode", "-t", tok, stdin="\n".join(LINES) + "\n")
    assert code == 0 and ids.count("\n") == 3 and "2" not in ids.split("\n")[2].split()
    assert run_cli("tokenize", "decode", "-t", tok, stdin=ids) == (0, "\n".join(LINES) + "\n", "")


def test_encode_from_the_command_line(tok):
    tokenizer = Tokenizer.load(tok)
    out = run_cli("tokenize", "encode", "-t", tok, "the fox", "春")[1]
    assert out == "".join(" ".join(map(str, tokenizer.encode(t))) + "\n" for t in ("the fox", "春"))
    assert run_cli("tokenize", "encode", "-t", tok, "--control", "a<|im_end|>")[1].split()[-1] == "2"
    assert run_cli("tokenize", "encode", "-t", tok / "tokenizer.json", "the fox")[1] == out.split("\n")[0] + "\n"


def test_a_model_in_any_form_has_a_tokenizer(tok, tmp_path):
    """--tokenizer takes what --model takes, here and in `data preview`."""
    gguf_write = pytest.importorskip("minigpt.core.convert.gguf_write")
    model = tiny("llama", vocab_size=340)
    folder.write(tmp_path / "m", model, model.config)
    Tokenizer.load(tok).save(tmp_path / "m")
    gguf_write.write(tmp_path / "m", tmp_path / "m.gguf")
    assert run_cli("tokenize", "encode", "-t", tmp_path / "m.gguf", LINES[1]) == run_cli(
        "tokenize", "encode", "-t", tok, LINES[1]
    )
    (tmp_path / "a.jsonl").write_text('{"text": "fox"}\n')
    shown = run_cli("data", "preview", "-t", tmp_path / "m.gguf", tmp_path / "a.jsonl")
    assert shown[0] == 0 and "340 tokens in the vocabulary" in shown[1], shown
    code, _, err = run_cli("tokenize", "decode", "-t", "hf:org", "1")
    assert code == 2 and "hf:org/name" in err


def test_pieces_show_text_and_bytes(tok):
    """Each piece reads as text; a byte of an unknown character is spelled."""
    pieces = json.loads(run_cli("tokenize", "encode", "-t", tok, "--pieces", "the é龍")[1])
    assert "".join(pieces) == "the \\xc3\\xa9\\xe9\\xbe\\x8d"
    told = json.loads(run_cli("tokenize", "encode", "-t", tok, "--json", "the")[1])
    assert told["rows"][0]["text"] == "the" and "".join(told["rows"][0]["pieces"]) == "the"


@pytest.mark.parametrize("row", ["2 3", "[2, 3]", "2,3"])
def test_decode_reads_any_writing_of_a_row(tok, row):
    assert run_cli("tokenize", "decode", "-t", tok, stdin=row + "\n")[1] == "<|im_end|><|object_ref_start|>\n"
    assert run_cli("tokenize", "decode", "-t", tok, "--no-special", "-", stdin=row + "\n")[1] == "\n"
    assert run_cli("tokenize", "decode", "-t", tok, "2", "3")[1] == "<|im_end|><|object_ref_start|>\n"


@pytest.mark.parametrize(
    ("stdin", "message"),
    [("1\n2 x\n", "stdin:2 is not a row"), ("1\n9999\n", "stdin:2 has a number that is no token"), ("-1\n", "stdin:1")],
)
def test_decode_names_a_bad_row(tok, stdin, message):
    code, _, err = run_cli("tokenize", "decode", "-t", tok, stdin=stdin)
    assert code == 3 and message in err


def test_stdin_that_is_not_text_is_named(tok):
    code, _, err = run_cli("tokenize", "encode", "-t", tok, stdin=b"ok\n\xff\n")
    assert code == 3 and "stdin:2 is not UTF-8" in err


def test_pack_makes_the_store_that_training_reads(tok, corpus, tmp_path):
    """Documents framed by the document token, in a directory that opens as a store."""
    code, out, _ = run_cli("tokenize", "pack", "-d", corpus, "-t", tok, "-o", tmp_path / "st", "--json")
    told = json.loads(out)
    assert code == 0 and told["store"] == str(tmp_path / "st") and told["documents"] == 90
    store, tokenizer = Store.load(tmp_path / "st"), Tokenizer.load(tok)
    ids, _ = store.piece(0, 0, int(store.docs["length"][0]))
    assert ids.tolist() == [0, *tokenizer.encode(LINES[0]), 0]
    shown = run_cli("info", tmp_path / "st")[1]
    assert "90 from 90 rows" in shown and "a.jsonl, 90 rows" in shown


def test_pack_of_conversations_learns_the_answers(tok, tmp_path):
    chats = tmp_path / "c.jsonl"
    chats.write_text('{"instruction": "hi", "output": "hello"}\n' * 3 + '{"instruction": "hi"}\n')
    args = ["tokenize", "pack", "-d", chats, "-t", tok, "--kind", "chat", "-o", tmp_path / "st"]
    code, _, err = run_cli(*args)
    assert code == 3 and f"{chats}:4" in err and not (tmp_path / "st").exists()
    code, _, err = run_cli(*args, "--max-bad", "1")
    assert code == 0 and "1 row skipped" in err
    store = Store.load(tmp_path / "st")
    ids, learnt = store.piece(0, 0, int(store.docs["length"][0]))
    assert Tokenizer.load(tok).decode(ids[learnt], skip_special=False) == "hello<|im_end|>"


def test_stats_measure_the_fit(tok, corpus):
    code, out, err = run_cli("tokenize", "stats", "-t", tok, "-d", corpus)
    assert (code, err) == (0, "") and "every text comes back the same" in out and "CJK" in out
    told = json.loads(run_cli("tokenize", "stats", "-t", tok, "-d", corpus, "--json")[1])
    assert told["characters"] == 30 * sum(map(len, LINES)) and told["changed"] == 0
    assert told["tokens"] == 30 * sum(len(Tokenizer.load(tok).encode(t)) for t in LINES)
