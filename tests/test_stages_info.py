"""minigpt info: what lies on disk, told without loading it."""

from __future__ import annotations

import json
import os
import time

import pytest

from minigpt.core.data import chat
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.files import write_json
from minigpt.core.models import folder
from minigpt.stages import run_list
from tests.conftest import run_cli, tiny

TEXT = ["the quick brown fox jumps over the lazy dog", "春風又綠江南岸"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer.train(TEXT, 320)
    made.chat_template = chat.template(thinking=False)
    return made


@pytest.fixture
def model(tmp_path, tokenizer):
    decoder = tiny("qwen3")
    folder.write(tmp_path / "m", decoder, decoder.config, eos_token_id=2, pad_token_id=0)
    tokenizer.save(tmp_path / "m")
    return tmp_path / "m", decoder


def info(path):
    code, out, err = run_cli("info", path, "--json")
    assert code == 0, out
    assert err == ""
    return json.loads(out)


def test_a_model_folder(model):
    """Parameters are counted from the file's header and equal the model's own; tied embeddings are counted once."""
    path, decoder = model
    told = info(path)
    assert told["kind"] == "model" and told["model"]["model_type"] == "qwen3"
    assert told["model"]["parameters"] == decoder.num_parameters() == sum(p.numel() for p in decoder.parameters())
    assert told["model"]["embeddings"] == 320 * 48 and told["model"]["dtype"] == "float32"
    assert told["model"]["head_dim"] == 16 and told["model"]["rope_type"] == "default"
    code, out, _ = run_cli("info", path)
    assert code == 0 and out.startswith(f"{path} is a model folder\n")
    assert f"{decoder.num_parameters():,}" in out and "(tied)" in out and "float32" in out


def test_a_tokenizer(model):
    """Roles come from the tokenizer's own files."""
    path, _ = model
    for place in (path / "tokenizer.json", path):
        told = info(place)["tokenizer"]
        assert (told["vocab_size"], told["special_tokens"], told["chat_template"]) == (320, 36, True)
        assert told["document"] == {"id": 0, "text": "<|endoftext|>"} and told["turn_end"]["text"] == "<|im_end|>"
    (path / "config.json").unlink()
    assert info(path)["kind"] == "tokenizer"
    assert "turns end with <|im_end|> (2)" in run_cli("info", path)[1]


@pytest.fixture
def a_run(tmp_path, model):
    run = tmp_path / "run"
    step = run / "step-0000020"
    run.mkdir()
    model[0].rename(step)
    (step / "trainer").mkdir()
    (run / "latest").write_text("step-0000020\n")
    write_json(
        run / "run.json",
        {
            "stage": "pretrain", "status": "stopped", "device": "cpu fp32, 2 threads", "seed": 42, "steps": 40,
            "sessions": [{"started": "2025-01-01T00:00:00+0000", "ended": "2025-01-01T00:09:00+0000"}],
            "data": [{"path": "poems.jsonl", "rows": 3}], "parent": None,
        },
    )  # fmt: skip
    rows = [
        {"step": 10, "loss": 6.0, "tokens": 1000, "val_loss": 5.5, "val_bpb": 2.5},
        {"step": 20, "loss": 5.0, "tokens": 2000, "val_loss": 5.75, "val_bpb": 2.6},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 21, "lo')
    return run


def test_a_run(a_run):
    """Status, losses, best step, data and the newest checkpoint's model; a line cut short by a crash is not read."""
    told = info(a_run)
    run = told["run"]
    assert (told["kind"], run["stage"], run["status"], run["step"], run["steps"]) == (
        "run",
        "pretrain",
        "stopped",
        20,
        40,
    )
    assert (run["loss"], run["val_loss"], run["best"]) == (5.0, 5.75, {"step": 10, "val_loss": 5.5})
    assert run["data"] == ["poems.jsonl"] and run["checkpoints"] == ["step-0000020"]
    assert told["model"]["parameters"] > 0 and told["tokenizer"]["vocab_size"] == 320
    out = run_cli("info", a_run)[1]
    assert "20 of 40, 2k tokens" in out and "5.7500, 2.6000 bits/byte; best 5.5000 at step 10" in out


def test_a_step_of_a_run(a_run):
    assert info(a_run / "step-0000020")["kind"] == "step"


def test_a_run_without_a_checkpoint(tmp_path):
    """A run that has just begun is a run, not an error."""
    write_json(tmp_path / "run.json", {"stage": "sft", "status": "running"})
    told = info(tmp_path)
    assert told["run"]["checkpoints"] == [] and "model" not in told
    assert "none yet" in run_cli("info", tmp_path)[1]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda raw: raw[:-7], "does not end where"),
        (lambda raw: raw + b"x", "does not end where"),
        (lambda raw: b"\xff" * 8 + raw[8:], "longer than the file"),
        (lambda raw: raw[:4], "error"),
        (lambda raw: raw.replace(b"[320,48]", b"[320,49]"), "shape does not fit"),
        (lambda raw: raw.replace(b'"F32"', b'"F99"'), "KeyError"),
    ],
)
def test_a_damaged_weights_file_is_named(model, damage, found):
    path = model[0] / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    for place in (path, model[0]):
        code, out, err = run_cli("info", place)
        assert (code, out) == (3, "") and "model.safetensors is not a whole safetensors file" in err and found in err


def test_weights_alone(model):
    told = info(model[0] / "model.safetensors")
    assert told["kind"] == "weights" and told["model"]["parameters"] == model[1].num_parameters()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("none", "does not exist"), ("data.jsonl", "minigpt data preview"), ("empty", "looked for run.json")],
)
def test_what_it_does_not_know(tmp_path, name, hint):
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "empty").mkdir()
    code, out, err = run_cli("info", tmp_path / name)
    assert (code, out) == (2, "") and hint in err


def test_nothing_is_loaded(model):
    """info reads headers: it works without torch in the process."""
    import subprocess
    import sys

    code = "import sys; from minigpt.cli.app import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(model[0])], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "False"


def make_run(path, *, age, rows=(), config="max_len: 128\n", **facts):
    """A run directory without a model, that wrote last `age` seconds ago."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config)
    write_json(path / "run.json", {"stage": "pretrain", "status": "done", **facts})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in path.iterdir():
        os.utime(file, (time.time() - age,) * 2)
    return path


def test_a_folder_of_runs(tmp_path):
    """A line a run, the newest first, also those of a command that makes several; a broken one is no reason to stop."""
    rows = [{"step": 10, "loss": 3.25, "val_loss": 3.5}, {"step": 20, "loss": 3.0}]
    make_run(tmp_path / "poems", age=3 * 3600 + 60, rows=rows, parameters=1_500_000, steps=40, status="stopped")
    make_run(tmp_path / "quickstart" / "chat", age=5 * 86400, stage="sft")
    (make_run(tmp_path / "bad", age=90) / "run.json").write_text("{")
    (tmp_path / "notes").mkdir()
    told = info(tmp_path)
    assert told["kind"] == "runs"
    assert [run["name"] for run in told["runs"]] == ["bad", "poems", "quickstart/chat"]
    poems = told["runs"][1]
    assert (poems["step"], poems["loss"], poems["val_loss"], poems["parameters"]) == (20, 3.0, 3.5, 1_500_000)
    head, bad, line, chat = run_cli("info", tmp_path)[1].splitlines()[2:]
    assert head.split() == ["run", "stage", "parameters", "steps", "loss", "val", "status", "age"]
    assert line.split() == ["poems", "pretrain", "1.5M", "20/40", "3.000", "3.500", "stopped", "3", "h"]
    assert chat.split() == ["quickstart/chat", "sft", "0", "done", "5", "days"] and "run.json is broken" in bad


def test_a_long_log_is_read_from_its_end(tmp_path):
    """A listing of many runs does not read a million rows to know the last."""
    rows = [{"step": n, "loss": float(n)} for n in range(5000)]
    make_run(tmp_path / "long", age=1, rows=rows)
    found = run_list.tail(tmp_path / "long" / "metrics.jsonl")
    assert found[-1] == rows[-1] and 100 < len(found) < 5000 and found == rows[-len(found) :]


def test_without_a_path_the_newest_run(tmp_path, monkeypatch, a_run):
    """The one that wrote last, saved or not; where there is none, how to make one."""
    monkeypatch.setenv("MINIGPT_RUNS", str(tmp_path))
    newest = make_run(tmp_path / "new" / "chat", age=-60)
    code, out, _ = run_cli("info")
    assert code == 0 and out.startswith(f"{newest} is the newest run\n")
    monkeypatch.setenv("MINIGPT_RUNS", str(tmp_path / "none"))
    code, out, err = run_cli("info")
    assert (code, out) == (2, "") and "there is no run below" in err and "minigpt quickstart" in err


def test_the_length_a_model_was_trained_on(a_run, model):
    """Rows of the run's own options, in its description and its steps'; a folder that no run made has none."""
    assert info(a_run)["model"]["trained_length"] is None
    (a_run / "config.yaml").write_text("max_len: 128  # flag\n")
    for place in (a_run, a_run / "step-0000020"):
        assert info(place)["model"]["trained_length"] == 128
        assert "512 tokens, rope default, theta 10000.0; trained on rows of 128\n" in run_cli("info", place)[1]
