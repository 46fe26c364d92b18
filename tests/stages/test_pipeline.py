"""From text to answers through the command line, in process: every stage's output feeds the next."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import minigpt
from minigpt.core.data.batch import Batch
from minigpt.core.errors import UsageError
from minigpt.stages.conversation import remembered
from tests.conftest import run_cli

SMALL = ["--set", "model.hidden_size=48", "--set", "model.num_hidden_layers=2", "--set", "model.intermediate_size=64",
         "--set", "model.num_attention_heads=2", "--size", "1m", "--max-len", "64"]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    rng = random.Random(0)
    with open(folder / "text.jsonl", "w") as f:
        for _ in range(400):
            f.write(
                json.dumps({"text": f"The {rng.choice(['cat', 'dog', 'fox'])} has {rng.randint(0, 99)} 花."}) + "\n"
            )
    rows = [
        {"instruction": f"Say {w}", "input": "", "output": f"{w}!"} for w in ("cat", "dog", "fox") for _ in range(60)
    ]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def pretrained(base):
    code, out, err = run_cli(
        "pretrain", "-d", base / "text.jsonl", *SMALL, "--epochs", "6", "--batch-tokens", "256", "--vocab-size", "400",
        "--lr", "5e-3", "-o", base / "pt",
    )  # fmt: skip
    assert code == 0, err
    return out, err


@pytest.fixture(scope="module")
def tuned(base, pretrained):
    code, out, err = run_cli(
        "sft", "-m", base / "pt", "-d", base / "alpaca.json", "--val-data", base / "alpaca.json", "--epochs", "40",
        "--lr", "4e-3", "-o", base / "sft", "--json", "--sample-prompt", "Say fox", "--batch-tokens", "512",
    )  # fmt: skip
    assert code == 0, out
    return json.loads(out), err


def test_stdout_is_the_last_step_and_talk_goes_to_stderr(base, pretrained):
    out, err = pretrained
    assert out.count("\n") == 1 and out.strip() == str(base / "pt" / (base / "pt" / "latest").read_text().strip())
    for word in ("400 BPE trained here", "ln(400) = 5.99: as it should be", "bits/byte", "saved", "next", "sample"):
        assert word in err, word


def test_loss_falls_on_held_out_text(base, pretrained):
    rows = [json.loads(line) for line in (base / "pt" / "metrics.jsonl").read_text().splitlines()]
    values = [r["val_loss"] for r in rows if "val_loss" in r]
    assert len(values) >= 8 and values[-1] < 0.6 * values[0]
    assert {"step", "tokens", "epoch", "loss", "lr", "grad_norm", "tok_s", "mem_gb", "val_bpb"} <= set(rows[-1])


def test_run_directory_is_as_documented(base, pretrained):
    run = base / "pt"
    names = {p.name for p in run.iterdir()} - {p.name for p in run.glob("step-*")}
    assert names == {"config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "loss.svg", "latest", "best", "flat",
                     "tokenizer", ".lock"}  # fmt: skip
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "done" and info["data"][0]["rows"] == 400 and info["versions"]["torch"]
    step = run / (run / "latest").read_text().strip()
    names = {p.name for p in step.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"generation_config.json", "MANIFEST.json", "trainer"}
    assert not (step / "chat_template.jinja").exists()


@pytest.mark.parametrize("run", ["pt", "sft"])
def test_result_opens_in_transformers_with_equal_logits(base, tuned, run):
    model = minigpt.load(base / run, device="cpu", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(model.path)
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    ids = torch.tensor([tokenizer("The dog has 7 花. <|im_end|>")["input_ids"]])
    assert ids[0].tolist() == model.tokenizer.encode_template("The dog has 7 花. <|im_end|>")
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        ours = model.decoder(Batch(ids, ids, positions, positions * 0, units=1.0), want=("logits",)).logits
        torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-5, rtol=0)
    assert theirs.generation_config.eos_token_id == [2, 0]


def test_tuned_model_answers_and_stops(base, tuned):
    code, out, _ = run_cli("generate", "-m", base / "sft", "--temperature", "0", "-p", "Say fox", "-p", "Say cat")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(r["prompt"], r["text"], r["finish_reason"]) for r in rows] == [
        ("Say fox", "fox!", "stop"), ("Say cat", "cat!", "stop")]  # fmt: skip


def test_json_result_of_training(base, tuned):
    result, err = tuned
    assert result["status"] == "ok" and result["run_dir"] == str(base / "sft") and result["metrics"]["val_loss"] < 1
    assert "Say fox → fox!" in err


def test_generate_reads_lines_and_jsonl_from_a_pipe_in_order(base, tuned):
    stdin = (
        'Say dog\n\n{"prompt": "Say fox"}\n{"messages": [{"role": "user", "content": "Say cat"}]}\n"Say dog"\n{ brace\n'
    )
    args = ["generate", "-m", base / "sft", "--temperature", "0", "--max-tokens", "8"]
    code, out, _ = run_cli(*args, stdin=stdin)
    rows = [json.loads(line) for line in out.splitlines()]
    words = ["dog", "fox", "cat", "dog"]
    _, alone, _ = run_cli(*args, *(x for w in words for x in ("-p", f"Say {w}")))
    expected = [json.loads(line)["text"] for line in alone.splitlines()]
    assert code == 0 and [r["text"] for r in rows[:4]] == expected and expected[1:3] == ["fox!", "cat!"]
    assert rows[2]["messages"][0]["content"] == "Say cat" and rows[4]["prompt"] == "{ brace"
    code, _, err = run_cli("generate", "-m", base / "sft", stdin='{"question": "x"}\n')
    assert code == 3 and "stdin:1" in err


def test_generate_raw_continues_text_and_n_gives_samples(base, tuned):
    code, out, _ = run_cli("generate", "-m", base / "pt", "-p", "The", "--n", "3", "--max-tokens", "12", "--json")
    result = json.loads(out)
    assert (
        code == 0
        and result["count"] == 3
        and all(r["text"].startswith((" cat", " dog", " fox")) for r in result["completions"])
    )


def test_chat_holds_a_conversation_in_a_pipe(base, tuned):
    code, out, err = run_cli(
        "chat", "-m", base / "sft", "--temperature", "0", stdin="Say fox\n/reset\nSay cat\n/exit\nSay dog\n"
    )
    assert (code, out) == (0, "fox!\ncat!\n")
    code, out, err = run_cli("chat", "-m", base / "pt", "-p", "The", "--max-tokens", "3")
    assert code == 0 and "base model" in err


def test_eval_scores_text_and_answers(base, tuned):
    code, out, _ = run_cli("eval", "-m", base / "sft", "-d", base / "alpaca.json", "--json", "--dtype", "float32")
    metrics = json.loads(out)["metrics"]
    assert code == 0 and metrics["kind"] == "chat" and metrics["loss"] < 0.5 and metrics["documents"] == 180
    code, out, _ = run_cli("eval", "-m", base / "pt", "-d", base / "text.jsonl")
    assert code == 0 and "bits per byte" in out and "1-64" in out


def test_eval_loss_equals_transformers(base, tuned):
    """Mean cross-entropy of one document, computed by transformers on the same ids."""
    (base / "one.txt").write_text("The fox has 12 花. The dog has 3 花.")
    _code, out, _ = run_cli("eval", "-m", base / "pt", "-d", base / "one.txt", "--dtype", "float32", "--json")
    model = minigpt.load(base / "pt", device="cpu", dtype="float32")
    ids = torch.tensor([[0, *model.tokenizer.encode("The fox has 12 花. The dog has 3 花."), 0]])
    theirs = AutoModelForCausalLM.from_pretrained(model.path)(ids, labels=ids).loss.item()
    assert json.loads(out)["metrics"]["loss"] == pytest.approx(theirs, abs=1e-5)


def test_sft_needs_a_model_and_the_right_data(base, tuned):
    assert run_cli("sft", "-d", base / "alpaca.json")[0] == 2
    code, _, err = run_cli("sft", "-m", base / "pt", "-d", base / "text.jsonl", "-o", base / "wrong")
    assert code == 3 and "text.jsonl:1" in err and "minigpt pretrain" in err
    code, _, err = run_cli("sft", "-m", base / "nowhere", "-d", base / "alpaca.json")
    assert code == 2 and "nowhere does not exist" in err


def test_saved_config_reruns_the_run(base, pretrained):
    code, _out, err = run_cli("pretrain", "-c", base / "pt" / "config.yaml", "-o", base / "again")
    assert code == 0, err
    first, second = (
        (base / r / (base / r / "latest").read_text().strip() / "model.safetensors") for r in ("pt", "again")
    )
    assert first.read_bytes() == second.read_bytes()


def test_longer_run_goes_on_from_the_flat_part(base, pretrained):
    run = base / "longer"
    args = ["pretrain", "-c", base / "pt" / "config.yaml", "-o", run]
    assert run_cli(*args, "--epochs", "1")[0] == 0
    flat = (run / "flat").read_text().strip()
    code, _, err = run_cli("pretrain", "--resume", run, "--epochs", "2")
    assert code == 0 and "--epochs: 1.0 → 2.0" in err and f"step {int(flat[5:]):,} of" in err
    assert any(p.name.startswith("aside-step") for p in run.iterdir())
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_pipe_as_training_data_resumes_from_the_store(base):
    out = base / "piped"
    text = (base / "text.jsonl").read_text()
    args = ["pretrain", "-d", "-", *SMALL, "--vocab-size", "400", "--batch-tokens", "256", "--epochs", "1", "-o", out]
    assert run_cli(*args, "--max-time", "0.2s", stdin=text)[0] == 75
    code, _, err = run_cli("pretrain", "--resume", out)
    assert code == 0, err


def test_python_api_does_the_same(base, pretrained):
    heard = minigpt.train("pretrain", data=[str(base / "text.jsonl")], size="1m", max_len=64, vocab_size=400, steps=3,
                          out=str(base / "api"), set=["model.num_hidden_layers=1"])  # fmt: skip
    model = minigpt.load(heard["model"])
    assert model.decoder.config.num_hidden_layers == 1 and not model.is_chat
    assert isinstance(minigpt.Engine(model).complete("The"), str)
    with pytest.raises(UsageError, match="unknown key `datta`") as e:
        minigpt.train("pretrain", datta=["x"])
    assert e.value.fix == "did you mean `data`?"


def test_bad_prompts_are_named_and_the_others_answered(base, tuned):
    """A prompt beyond the context, messages of a wrong form: file:line and exit 3, the other rows are answered."""
    args = ["generate", "-m", base / "sft", "--max-tokens", "3"]
    code, out, err = run_cli(*args, stdin="Say fox\n" + "long " * 9000 + "\nSay cat\n")
    assert code == 3 and "stdin:2" in err and ["error" in line for line in out.splitlines()] == [False, True, False]
    for row in ('{"messages": []}', '{"messages": [{"role": "bogus", "content": "x"}]}', '{"messages": 3}',
                '{"messages": [{"role": "user", "content": null}]}'):  # fmt: skip
        code, _, err = run_cli(*args, stdin=row + "\n")
        assert code == 3 and "stdin:1" in err, (row, err)
    parts = '{"messages": [{"role": "user", "content": [{"type": "text", "text": "Say fox"}]}]}\n'
    assert run_cli(*args, stdin=parts)[0] == 0


def test_chat_that_outgrows_the_context_forgets_aloud(base, tuned):
    lines = "".join(f"Say fox {'word ' * 300}\n" for _ in range(4)) + "long " * 9000 + "\nSay cat\n"
    code, out, err = run_cli("chat", "-m", base / "sft", "--temperature", "0", "--max-tokens", "4", stdin=lines)
    assert code == 0 and "oldest" in err and "left out" in err and out.count("\n") >= 5


def test_chat_remembers_thinking_apart_from_the_answer():
    assert remembered("because\n</think>\n\nyes") == {
        "role": "assistant", "content": "yes", "reasoning_content": "because"}  # fmt: skip
    assert remembered("yes") == {"role": "assistant", "content": "yes"}
