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
from minigpt.core.models import folder
from tests.conftest import run_cli, tiny


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
        assert running.wait(timeout=60) == 3  # although the pipe is still open
        assert running.stderr.read().startswith("error: stdin:3 has neither")


def test_rows_before_a_fault_are_answered(runs):
    lines = ["the", '{"prompt": "fox"}', '{"question": "?"}', "dog"]
    code, out, err = run_cli("generate", "-m", runs / "base", "--max-tokens", "3", stdin="\n".join(lines))
    assert (code, [row["prompt"] for row in rows(out)]) == (3, ["the", "fox"])
    assert "stdin:3" in err


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
