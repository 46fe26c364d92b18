"""What rows hold reaches a chat model: through sft and eval, its template included."""

import json

import pytest

from minigpt.core.data.chat import template
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.models import folder
from tests.conftest import run_cli, tiny

STRICT = (  # refuses system messages, as Gemma's template does, and knows no reasoning
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = {"instruction": "What is 1+1?", "output": "It is 2."}
THINKS = {"instruction": "What is 2+3?", "output": "<think>\nTwo and three make five.\n</think>\n\nIt is 5."}
SYSTEM = {**PLAIN, "system": "Be kind."}


@pytest.fixture
def model(tmp_path):
    """model(template) is a tiny chat model's directory."""

    def make(source):
        tokenizer = Tokenizer.train(["What is two and three? It is five."] * 9, 320)
        tokenizer.chat_template = source
        decoder = tiny("llama")
        path = tmp_path / "model"
        folder.write(path, decoder, decoder.config, eos_token_id=2, pad_token_id=0)
        tokenizer.save(path)
        return path

    return make


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sft(model, data, *more):
    """(exit code, row as --dry-run shows it, stderr in one line)."""
    code, out, err = run_cli("sft", "-m", model, "-d", data, "--max-len", 256, "--steps", 1, "--dry-run", *more)
    return code, out.partition("marked:\n")[2], " ".join(err.split())


def test_reasoning_is_learnt_with_the_block_that_thinking_auto_promises(model, tmp_path):
    """A model with our template without think blocks gets them with the first reasoning, and only then."""
    path = model(template())
    code, row, err = sft(path, write(tmp_path / "think.jsonl", THINKS))
    assert code == 0 and "<think>\n⟦Two and three make five.\n</think>\n\nIt is 5.<|im_end|>⟧" in row
    assert "nobody learns" not in err
    code, row, _ = sft(path, write(tmp_path / "plain.jsonl", PLAIN))
    assert code == 0 and "<think>" not in row
    code, row, err = sft(path, tmp_path / "think.jsonl", "--thinking", "off")
    assert code == 0 and "⟦It is 5.<|im_end|>⟧" in row and "nobody learns: reasoning (1 row" in err


def test_reasoning_that_a_model_s_own_template_leaves_out_is_told(model, tmp_path):
    """Counted, with the first row and the way to have it; eval tells it too."""
    path, data = model(STRICT), write(tmp_path / "think.jsonl", PLAIN, THINKS)
    code, _, err = sft(path, data)
    assert code == 0 and f"nobody learns: reasoning (1 row, first {data}:2)" in err and "--thinking on" in err
    code, _, err = sft(path, data, "--thinking", "on")
    assert code == 0 and "nobody learns" not in err
    code, _, err = run_cli("eval", "-m", path, "-d", data)
    assert code == 0 and "nobody learns: reasoning (1 row" in " ".join(err.split())


@pytest.mark.parametrize("command", ["sft", "eval"])
def test_a_row_that_the_template_refuses_is_named_and_can_be_skipped(model, tmp_path, command):
    path, data = model(STRICT), write(tmp_path / "strict.jsonl", PLAIN, SYSTEM, PLAIN)
    more = ("--max-len", 64, "--steps", 1, "--dry-run") if command == "sft" else ()
    code, _, err = run_cli(command, "-m", path, "-d", data, *more)
    assert code == 3 and f"{data}:2 has a conversation that the chat template does not accept" in " ".join(err.split())
    code, _, err = run_cli(command, "-m", path, "-d", data, "--max-bad", 3, *more)
    assert code == 0 and "1 row skipped: 1 with a conversation that the chat template does not accept" in err


def test_placeholders_and_columns_are_told_before_training(model, tmp_path):
    row = {"instruction": "Who are you?", "output": "I am {{name}}.", "passage": "A tale."}
    data = write(tmp_path / "identity.jsonl", row, row)
    code, _, err = sft(model(template()), data)
    assert code == 0 and f"2 rows hold placeholders such as {{{{name}}}} (first {data}:1)" in err
    assert f"{data}: not read: passage (2 rows)" in err


def test_fill_is_learnt_and_what_it_lacks_is_named(model, tmp_path):
    """--fill in sft and pack: the words stand in the row; a placeholder without a text is an error with its key."""
    path, data = model(template()), write(tmp_path / "identity.jsonl", {**PLAIN, "output": "{{name}} of {{author}}."})
    code, row, err = sft(path, data, "--fill", "name=Ada", "--fill", "author=Anna")
    assert code == 0 and "⟦Ada of Anna.<|im_end|>⟧" in row and "placeholders" not in err
    code, _, err = sft(path, data, "--fill", "name=Ada")
    assert code == 3 and f"{data}:1 has a placeholder without a text: {{{{author}}}}" in err and "--fill author=" in err
    code, _, err = sft(path, data, "--fill", "Ada")
    assert code == 2 and "--fill takes key=text" in err
    pack = ("tokenize", "pack", "-d", data, "-t", path, "--kind", "chat", "-o", tmp_path / "store")
    assert run_cli(*pack, "--fill", "name=Ada,author=Anna")[0] == 0
    code, _, err = sft(path, tmp_path / "store", "--fill", "name=Ada")
    assert code == 2 and "--fill is for rows" in err
    assert sft(path, tmp_path / "store")[0] == 0


def test_a_question_that_the_template_refuses_is_named(model, tmp_path):
    """eval --answers: the row's file and line, and the template's own words."""
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1?"}]
    row = {"messages": [*asked, {"role": "assistant", "content": "2"}], "answer": "2"}
    data = write(tmp_path / "asked.jsonl", {**row, "messages": row["messages"][1:]}, row)
    code, _, err = run_cli("eval", "-m", model(STRICT), "-d", data, "--answers")
    assert (
        code == 3 and f"{data}:2: the chat template does not accept" in " ".join(err.split()) and "System role" in err
    )
