"""minigpt data: what is in a file, and what is wrong with it."""

from __future__ import annotations

import json

import pytest

from tests.conftest import run_cli

CHAT = [
    {"messages": [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."}]},
    {"instruction": "Say hi", "output": "Hi!"},
]
BAD = ['{"messages": [{"role": "user", "content": "alone"}]}', "{not json", '{"messages": []}']


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "good.jsonl", CHAT)


@pytest.fixture
def bad(tmp_path):
    return write(tmp_path / "bad.jsonl", [CHAT[0], BAD[0], CHAT[1], BAD[1], BAD[2]])


# ---------------------------------------------------------------------------------------------- check


def test_good_data_passes(good):
    code, out, err = run_cli("data", "check", good)
    assert (code, out) == (0, "2 rows, all good\n") and "to fine-tune on (messages 1, Alpaca 1)" in err
    told = json.loads(run_cli("data", "check", good, "--json")[1])
    assert told["rows"] == 2 and told["files"][0]["shapes"] == {"messages": 1, "Alpaca": 1}


def test_every_bad_row_is_listed_with_its_line(bad):
    """Exit 7; stdout lists the rows as file:line, the error counts them by reason."""
    code, out, err = run_cli("data", "check", bad)
    assert code == 7
    assert [line.split(": ")[0] for line in out.splitlines()] == [f"{bad}:{n}" for n in (2, 4, 5)]
    assert "no assistant message" in out and "invalid JSON" in out
    assert "error: 3 of 5 rows are bad: 1 with" in err and "--max-bad" in err


def test_findings_as_json(bad):
    code, out, _ = run_cli("data", "check", bad, "--json")
    told = json.loads(out)
    assert (code, told["code"], told["status"], told["kind"]) == (7, 7, "error", "check")
    assert [f["where"] for f in told["findings"]] == [f"{bad}:{n}" for n in (2, 4, 5)]
    assert sum(told["files"][0]["reasons"].values()) == 3


def test_the_list_has_a_limit_and_the_counts_have_none(bad):
    code, out, err = run_cli("data", "check", bad, "--limit", "1")
    assert code == 7 and out.count("\n") == 1 and "3 of 5 rows" in err and "2 more are not listed" in err
    assert run_cli("data", "check", bad, "--limit", "0")[1].count("\n") == 3


def test_what_cannot_be_read_is_exit_3(tmp_path, bad):
    """A damaged archive or a binary file is another matter than bad rows."""
    (tmp_path / "x.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00broken")
    code, _, err = run_cli("data", "check", tmp_path / "x.jsonl.gz")
    assert code == 3 and "x.jsonl.gz" in err
    (tmp_path / "empty.jsonl").touch()
    assert run_cli("data", "check", tmp_path / "empty.jsonl")[0] == 3
    code, _, err = run_cli("data", "check", tmp_path / "none.jsonl")
    assert code == 2 and "does not exist" in err
    assert run_cli("data", "check")[0] == 2


def test_the_kind_can_be_set(tmp_path):
    """Text is no conversation; checked as text it is fine. auto goes by the first row."""
    text = write(tmp_path / "t.jsonl", [{"text": "one"}, {"text": "two"}])
    assert run_cli("data", "check", text)[0] == run_cli("data", "check", text, "--kind", "text")[0] == 0
    code, out, err = run_cli("data", "check", text, "--kind", "chat")
    assert code == 7 and "text but no conversation" in out and "minigpt pretrain" in err


def test_several_files_and_stdin(good, bad):
    code, _, err = run_cli("data", "check", good, bad)
    assert code == 7 and "3 of 7 rows" in err and str(good) in err
    assert run_cli("data", "check", "-", stdin="some text\n\nmore\n")[0] == 0


# ---------------------------------------------------------------------------------------------- preview


def test_preview_shows_what_is_learnt(good):
    """Shape, rows, tokens, and samples with the answer in brackets, each with its file and line."""
    code, out, _ = run_cli("data", "preview", good)
    assert code == 0 and "2 rows to fine-tune on" in out and f"{good}:1: " in out and f"{good}:2: " in out
    assert "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\n⟦Paris.<|im_end|>⟧" in out
    assert "⟦Hi!<|im_end|>⟧" in out


def test_preview_of_text(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "春風"}, {"text": "two"}])
    out = run_cli("data", "preview", path, "-n", "1")[1]
    assert "2 rows to pretrain on (text)" in out and "<|endoftext|>⟦春風<|endoftext|>⟧" in out and ":2:" not in out


def test_preview_counts_as_a_store_does(good, tmp_path):
    """tokens and mask are those that training will see with the same tokenizer."""
    from minigpt.core.data.store import Store

    run_cli("tokenize", "train", "-d", good, "-o", tmp_path / "tok")
    told = json.loads(run_cli("data", "preview", good, "-t", tmp_path / "tok", "--json")[1])["files"][0]
    run_cli("tokenize", "pack", "-d", good, "-t", tmp_path / "tok", "--kind", "chat", "-o", tmp_path / "st")
    store = Store.load(tmp_path / "st")
    assert told["tokens"] == store.meta["tokens"] and told["exact"]
    for i, sample in enumerate(told["samples"]):
        ids, learnt = store.piece(i, 0, int(store.docs["length"][i]))
        assert (sample["ids"], sample["learnt"]) == (ids.tolist(), learnt.tolist())


def test_preview_with_reasoning_has_think_blocks(tmp_path):
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>add</think>4"}]
    out = run_cli("data", "preview", write(tmp_path / "r.jsonl", [*CHAT, {"messages": turns}]), "-n", "3")[1]
    assert "<think>\n⟦add\n</think>\n\n4<|im_end|>⟧" in out and "<think>\n\n</think>\n\n⟦Paris." in out


def test_preview_mentions_bad_rows_and_goes_on(bad):
    code, out, err = run_cli("data", "preview", bad)
    assert code == 0 and "3 bad" in out and f"{bad}:2: no assistant message" in err and "data check" in err


def test_preview_without_one_good_row(tmp_path):
    code, _, err = run_cli("data", "preview", write(tmp_path / "b.jsonl", BAD))
    assert code == 3 and "no row that can be used" in err


def test_long_parts_are_shortened_in_the_middle(tmp_path):
    """The answer stays in sight behind a question of any length."""
    row = {"instruction": "begin " + "x" * 5000 + " end", "output": "y" * 5000}
    out = run_cli("data", "preview", write(tmp_path / "l.jsonl", [row]))[1]
    assert "begin xxx" in out and " end<|im_end|>\n<|im_start|>assistant\n⟦yyy" in out and len(out) < 2000


def test_a_store_is_told_from_data(good, tmp_path):
    run_cli("tokenize", "train", "-d", good, "-o", tmp_path / "tok")
    run_cli("tokenize", "pack", "-d", good, "-t", tmp_path / "tok", "--kind", "chat", "-o", tmp_path / "st")
    code, _, err = run_cli("data", "preview", tmp_path / "st")
    assert code == 2 and f"minigpt info {tmp_path / 'st'}" in err


# ---------------------------------------------------------------------------------------------- demo


def test_demo_writes_every_part_and_overwrites_only_when_told(tmp_path):
    out_dir = tmp_path / "demo"
    code, out, err = run_cli("data", "demo", "-o", out_dir, "--lang", "en")
    assert (code, out) == (0, f"{out_dir}\n"), err
    assert {"text.jsonl", "chat.jsonl", "eval.jsonl", "rl-eval.jsonl"} <= {p.name for p in out_dir.iterdir()}
    before = (out_dir / "chat.jsonl").read_bytes()
    code, _, err = run_cli("data", "demo", "-o", out_dir, "--seed", "1")
    assert code == 2 and "--overwrite" in err and (out_dir / "chat.jsonl").read_bytes() == before
    assert run_cli("data", "demo", "-o", out_dir, "--seed", "1", "--overwrite")[0] == 0
    assert (out_dir / "chat.jsonl").read_bytes() != before
    assert run_cli("data", "check", out_dir / "chat.jsonl", out_dir / "think.jsonl", out_dir / "text.jsonl")[0] == 0


def test_demo_asks_for_a_place():
    code, _, err = run_cli("data", "demo")
    assert code == 2 and "--out" in err


# ---------------------------------------------------------------------------------------------- how it is read


def test_letters_and_token_look_different_in_a_preview(tmp_path):
    """<|endoftext|> in a text is letters and stands behind a backslash; the token around the document does not."""
    (tmp_path / "t.txt").write_text("One day.\n<|endoftext|>\nTwo days, and <think> is a word.\n", encoding="utf-8")
    code, out, err = run_cli("data", "preview", tmp_path / "t.txt", "--split-docs", "file")
    assert code == 0 and "stand in 1 document and are learnt as letters: --split-docs endoftext" in " ".join(
        err.split()
    )
    sample = out[out.index("⟦") :]
    assert sample.count("<|endoftext|>") == 2 and sample.count("\\<|endoftext|>") == 1 and "\\<think>" in sample
    code, out, err = run_cli("data", "preview", tmp_path / "t.txt", "--split-docs", "endoftext")
    assert code == 0 and "\\<|endoftext|>" not in out and "learnt as letters" not in err and "t.txt:3" in out


def test_json_lines_in_a_text_file_are_told_when_looked_at(tmp_path):
    text = write(tmp_path / "poems.txt", [{"text": "one"}])
    for verb in ("check", "preview"):
        code, _, err = run_cli("data", verb, text)
        assert code == 0 and "holds JSON lines and is read as plain text" in " ".join(err.split())


def test_empty_rows_of_text_are_counted_and_not_bad(tmp_path):
    """As in wikitext, where every third row is."""
    text = write(tmp_path / "t.jsonl", [{"text": "= Title ="}, {"text": ""}, {"text": " \n"}])
    code, out, err = run_cli("data", "check", text)
    assert code == 0 and "all good" in out and "3 rows to pretrain on (text), 2 empty" in err
    told = json.loads(run_cli("data", "check", text, "--json")[1])["files"][0]
    assert (told["rows"], told["empty"], told["bad"]) == (3, 2, 0)


# ---------------------------------------------------------------------------------------------- told of good rows

STRICT = (  # refuses system messages, as Gemma's template does
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = {"messages": [CHAT[0]["messages"][0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nParis."}]}
ROWS = [CHAT[0], {**CHAT[1], "system": "Be kind."}, THINKS, {**CHAT[1], "passage": "A tale.", "id": "x"}]


@pytest.fixture
def strict(tmp_path):
    """A tokenizer with a template that refuses system messages and writes no reasoning."""
    from minigpt.core.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["Capital of France? Paris."] * 9, 330)
    tokenizer.chat_template = STRICT
    tokenizer.save(tmp_path / "strict")
    return tmp_path / "strict"


def test_check_tries_the_template_of_a_model(tmp_path, strict):
    """-t finds the row that the template refuses, exit 7, and counts what it leaves out of the others."""
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert run_cli("data", "check", path)[0] == 0
    code, out, err = run_cli("data", "check", path, "-t", strict)
    assert code == 7 and out.startswith(f"{path}:2: a conversation that the chat template does not accept: System role")
    assert (
        "1 of 4 rows are bad" in err and f"does not write, so nobody learns: reasoning (1 row, first {path}:3)" in err
    )
    told = json.loads(run_cli("data", "check", path, "-t", strict, "--json")[1])["files"][0]["told"]
    assert told == {"unwritten": {"reasoning": 1}, "unread": {"passage": 1}, "beside": {"id": 1}}


def test_check_and_preview_tell_columns_and_placeholders(tmp_path):
    """Columns with text are warned of once a file, ids and sources are a note; what nobody filled is counted."""
    rows = [{**ROWS[3], "output": "I am {{name}} of {{author}}."}] * 3
    path = write(tmp_path / "rows.jsonl", [CHAT[0], *rows])
    for command in ("check", "preview"):
        code, _, err = run_cli("data", command, path)
        assert code == 0 and err.count("not read: passage (3 rows)") == 1, err
        assert f"3 rows hold placeholders such as {{{{name}}}}, {{{{author}}}} (first {path}:2)" in " ".join(
            err.split()
        )
        assert f"{path}: columns that only tell about a row: id" in " ".join(err.split())


def test_preview_says_whose_template_it_shows(tmp_path, strict):
    """Without -t minigpt's own, with think blocks as sft gives it; with -t the model's, and what that leaves out."""
    path = write(tmp_path / "rows.jsonl", [THINKS])
    _, out, err = run_cli("data", "preview", path)
    assert "<think>\n⟦Hm.\n</think>" in out and "minigpt's own, with think blocks" in " ".join(err.split())
    _, out, err = run_cli("data", "preview", path, "-t", strict)
    assert "⟦Paris.<|im_end|>⟧" in out and "Hm." not in out
    assert "minigpt's own" not in err and "nobody learns: reasoning (1 row" in " ".join(err.split())


def test_pack_tells_what_is_not_written_and_skips_what_is_refused(tmp_path, strict):
    path = write(tmp_path / "rows.jsonl", ROWS)
    args = ("tokenize", "pack", "-d", path, "-t", strict, "--kind", "chat", "-o", tmp_path / "store")
    code, _, err = run_cli(*args)
    assert code == 3 and f"{path}:2 has a conversation that the chat template does not accept" in " ".join(err.split())
    code, _, err = run_cli(*args, "--max-bad", "1")
    assert code == 0 and "nobody learns: reasoning (1 row" in " ".join(err.split()) and "1 row skipped" in err
    code, _, err = run_cli(*args[:-1], tmp_path / "think", "--thinking", "on")
    assert code == 0 and "nobody learns" not in err
