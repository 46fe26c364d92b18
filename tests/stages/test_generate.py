"""`minigpt generate` and how it asks a model: order, arrival, forms, 8 bits, a longer context."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from minigpt.core.data import chat as templates
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.infer.engine import Engine
from minigpt.core.models import folder
from tests.conftest import run_cli, tiny

request = Engine.request


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs/{base,chat}: random weights, without and with a chat template."""
    place = tmp_path_factory.mktemp("runs")
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog 0123456789", "春風又綠江南岸"] * 20, 400)
    model = tiny("llama", vocab_size=400, max_position_embeddings=128)
    with torch.no_grad():
        model.head_weight[tokenizer.eos_ids] = 0
    for name, template in (("base", None), ("chat", templates.template())):
        folder.write(place / name, model, model.config, eos_token_id=tokenizer.eos_ids, pad_token_id=0)
        tokenizer.chat_template = template
        tokenizer.save(place / name)
    return place


def rows(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_order_and_samples(runs):
    """More prompts than are computed at once, each with several answers: in order, and as each alone."""
    prompts = [f"the fox {i}" for i in range(7)]
    args = ["generate", "-m", runs / "base", "--max-tokens", "12", "--n", "3"]
    code, out, _ = run_cli(*args, "--batch-size", "4", stdin="\n".join(prompts))
    assert code == 0
    found = rows(out)
    assert [row["prompt"] for row in found] == [p for p in prompts for _ in range(3)]
    assert len({row["text"] for row in found}) > 15
    code, out, _ = run_cli(*args, "-p", prompts[5])
    assert rows(out) == found[15:18]


def test_each_line_is_answered_when_it_comes(runs):
    """A program on the other end of a pipe may wait for each answer before it asks again."""
    command = [sys.executable, "-m", "minigpt", "generate", "-m", str(runs / "base"), "--max-tokens", "4"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as running:  # fmt: skip
        for prompt in ("the", "fox"):
            running.stdin.write(prompt + "\n")
            running.stdin.flush()
            assert json.loads(running.stdout.readline())["prompt"] == prompt
        running.stdin.write('{"nothing": 1}\n')
        running.stdin.flush()
        assert "stdin:3 has neither" in json.loads(running.stdout.readline())["error"]
        running.stdin.close()
        assert running.wait(timeout=60) == 3
        assert running.stderr.read().startswith("error: stdin:3 has neither")


def test_a_row_without_an_answer_does_not_end_the_job(runs):
    """Too long, no prompt, no text: an error row each in its place, the rest as ever, and 3 in the end."""
    long = "the quick brown fox " * 60
    lines = ["the", long, '{"question": "?"}', '{"prompt": "a\\ud800"}', "fox"]
    args = ["generate", "-m", runs / "base", "--max-tokens", "3"]
    code, out, err = run_cli(*args, "--n", "2", stdin="\n".join(lines))
    assert code == 3 and "stdin:2" in err and "3 of 7 answers failed" in err
    found = rows(out)
    assert [("error" in row) for row in found] == [False, False, True, True, True, False, False]
    assert found[2]["prompt"] == long and "context is 128" in found[2]["error"] and "text" not in found[2]
    assert "stdin:3" in found[3]["error"] and "half a character" in found[4]["error"]
    assert found[:2] + found[5:] == rows(run_cli(*args, "--n", "2", stdin="the\nfox")[1])
    code, out, _ = run_cli(*args, "--json", stdin="\n".join(lines))
    told = json.loads(out)
    assert (code, told["status"], told["code"], len(told["completions"])) == (3, "error", 3, 5)


@pytest.mark.parametrize("given", ["", "\n \n", "\ufeff\n"])
def test_an_empty_stdin_is_told(runs, given):
    """Somebody forgot the prompts, or the file is empty: no success without a word."""
    code, out, err = run_cli("generate", "-m", runs / "base", stdin=given)
    assert (code, out) == (2, "") and "stdin is empty" in err


def test_a_byte_order_mark_is_no_text(runs):
    """Windows' programs put it before a file, and joined files have it before any line."""
    args = ["generate", "-m", runs / "base", "--max-tokens", "3"]
    want = run_cli(*args, stdin='{"prompt": "fox"}\nfox\n')[1]
    assert run_cli(*args, stdin='\ufeff{"prompt": "fox"}\n\ufefffox\n')[1] == want


def test_control_reads_markers(runs, monkeypatch):
    """--raw spells special tokens as letters, and says so; --control reads them as `tokenize encode` does."""
    asked = []
    monkeypatch.setattr(Engine, "request", lambda self, ids, *a, **k: asked.append(ids) or request(self, ids, *a, **k))
    text = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"
    args = ["generate", "-m", runs / "chat", "-p", text, "--max-tokens", "2"]
    code, _, err = run_cli(*args, "--raw")
    assert code == 0 and "read as letters" in err and "--control" in err
    code, _, err = run_cli(*args, "--raw", "--control")
    assert code == 0 and "read as letters" not in err
    assert run_cli("generate", "-m", runs / "chat", "-p", "fox", "--max-tokens", "2")[0] == 0
    letters, markers, rendered = asked
    tokenizer = Tokenizer.load(runs / "chat")
    assert not tokenizer.special_ids & set(letters[1:])
    assert markers == [0, *tokenizer.encode_template(text)] and markers[1:] == rendered
    asked.clear()
    assert run_cli("generate", "-m", runs / "base", "-p", "<|endoftext|>fox", "--control", "--max-tokens", "2")[0] == 0
    assert asked == [[0, *tokenizer.encode("fox")]]
    code, _, err = run_cli("generate", "-m", runs / "chat", "-p", "fox", "--control")
    assert code == 2 and "--raw" in err


def test_logits_that_are_no_numbers(runs, tmp_path):
    """Damaged weights are told as such by `generate`, `chat` and `eval`, at temperature 0 as well."""
    model, _ = folder.load(runs / "chat")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    folder.write(tmp_path, model, model.config, eos_token_id=[2, 0], pad_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((runs / "chat" / name).read_bytes())
    (tmp_path / "q.jsonl").write_text(
        json.dumps(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "b"}
        )
    )
    for temperature in ("0", "1e-38", "1"):
        code, out, err = run_cli("generate", "-m", tmp_path, "-p", "fox", "--temperature", temperature)
        assert code == 6 and "not numbers" in err and "fault of minigpt" not in err and "error" in rows(out)[0]
    assert run_cli("chat", "-m", tmp_path, "-p", "fox", "--temperature", "0")[0] == 6
    for more in ([], ["--answers"]):
        code, out, err = run_cli("eval", "-m", tmp_path, "-d", tmp_path / "q.jsonl", *more)
        assert code == 6 and "not numbers" in err and out == ""


@pytest.mark.parametrize("form, whole", [
    ("choice:yes|no", {"yes", "no"}),
    ("regex:[0-9]{3}", {f"{i:03}" for i in range(1000)}),
])  # fmt: skip
def test_forms(runs, form, whole):
    """A model that knows nothing answers in the form, in a chat and as text."""
    pytest.importorskip("llguidance")
    for model in ("base", "chat"):
        code, out, _ = run_cli("generate", "-m", runs / model, "-p", "fox", "--form", form, "--n", "5")
        assert code == 0
        assert {row["text"] for row in rows(out)} <= whole
        assert {row["finish_reason"] for row in rows(out)} == {"stop"}


def test_form_and_thought(runs):
    code, _, err = run_cli("generate", "-m", runs / "chat", "-p", "fox", "--form", "json", "--think")
    assert code == 2
    assert "--form and --think" in err


def test_quant_and_scaling(runs):
    """Fewer bits answer; a longer context takes a longer prompt; wrong values exit with 2 and name the flag."""
    long = "the quick brown fox " * 60
    for quant in ("int8", "fp16"):
        code, answer, _ = run_cli("generate", "-m", runs / "base", "-p", "the", "--quant", quant, "--temperature", "0")
        assert code == 0 and rows(answer)[0]["tokens"] > 0
    code, _, err = run_cli("generate", "-m", runs / "base", "-p", long)
    assert code == 3 and "context is 128" in err
    code, out, _ = run_cli("generate", "-m", runs / "base", "-p", long, "--rope-scaling", "yarn:8", "--max-tokens", "3")
    assert code == 0 and rows(out)[0]["tokens"] == 3
    for flag, value in (("--rope-scaling", "yarn"), ("--quant", "int4"), ("--form", "xml")):
        code, _, err = run_cli("generate", "-m", runs / "base", "-p", "the", flag, value)
        assert code == 2 and flag in err


def test_penalties_reach_the_engine(runs):
    """A frequency penalty makes greedy answers repeat themselves less."""
    args = ["generate", "-m", runs / "base", "-p", "the fox", "--temperature", "0", "--max-tokens", "60", "--json"]
    words = []
    for more in ([], ["--frequency-penalty", "2", "--presence-penalty", "2"]):
        code, out, _ = run_cli(*args, *more)
        assert code == 0
        text = json.loads(out)["completions"][0]["text"]
        words.append(len(set(text)) / len(text))
    assert words[1] > words[0]


def test_eval_in_8_bits_and_stretched(runs, tmp_path):
    """The loss changes a little with 8 bits; a row may be longer with a longer context."""
    data = tmp_path / "text.jsonl"
    data.write_text("\n".join(json.dumps({"text": "the quick brown fox " * 40}) for _ in range(4)))
    losses = {}
    for name, more in {
        "plain": [], "int8": ["--quant", "int8"], "longer": ["--rope-scaling", "yarn:4", "--max-len", "512"]
    }.items():  # fmt: skip
        code, out, err = run_cli("eval", "-m", runs / "base", "-d", data, "--json", *more)
        assert code == 0, err
        losses[name] = json.loads(out)["metrics"]["loss"]
    assert 0 < abs(losses["int8"] - losses["plain"]) < 0.05
    assert losses["longer"] != losses["plain"]
    assert run_cli("eval", "-m", runs / "base", "-d", data, "--compile")[0] == 2
