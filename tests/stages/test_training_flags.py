"""Every training flag does what its help says: seen from outside, in what a short run leaves behind."""

import json

import pytest
import torch
from safetensors.torch import load_file

from minigpt.core import runtime
from tests.conftest import run_cli

TINY = [
    "--set",
    "model.hidden_size=32",
    "--set",
    "model.num_hidden_layers=1",
    "--set",
    "model.intermediate_size=48",
    "--set",
    "model.num_attention_heads=2",
    "--size",
    "1m",
    "--max-len",
    "32",
    "--batch-tokens",
    "128",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    rows = [{"text": f"row {i} " + "the quick brown fox " * (i % 5)} for i in range(120)]
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "v.jsonl").write_text("".join(json.dumps({"text": f"held out {i}"}) + "\n" for i in range(9)))
    (folder / "bad.jsonl").write_text((folder / "a.jsonl").read_text() + '{"text": null}\n{oops\n')
    (folder / "book.txt").write_text("one line\nanother line\n\nnext paragraph\n")
    assert run_cli("tokenize", "train", "-d", folder / "a.jsonl", "--vocab-size", "350", "-o", folder / "tok")[0] == 0
    return folder


@pytest.fixture
def train(home, tmp_path):
    """Run pretrain with a ready tokenizer. Returns (run directory, stderr, exit code)."""

    def go(*flags, steps=4, data="a.jsonl", out="run", tokenizer=True):
        args = ["pretrain", "-d", home / data, *TINY, "-o", tmp_path / out, *flags]
        args += ["--steps", steps] if steps else []
        args += ["-t", home / "tok"] if tokenizer else []
        code, _, err = run_cli(*args)
        return tmp_path / out, err, code

    return go


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return load_file(run / (run / "latest").read_text().strip() / "model.safetensors")


def step_names(run):
    return sorted(p.name for p in run.glob("step-*"))


def test_pad_puts_one_document_in_a_row(train):
    _, err, code = train("--pack", "pad")
    assert code == 0 and "one to a row: 114 rows" in err


def test_val_data_names_the_held_out_documents(train, home):
    run, err, code = train("--val-data", home / "v.jsonl")
    assert code == 0 and "120 documents →" in err and "9 documents held out" in err
    assert "val_loss" in metrics(run)[-1]


def test_val_split_zero_holds_nothing_out(train):
    run, err, _ = train("--val-split", "0")
    assert "0 documents held out" in err and "val_loss" not in metrics(run)[-1] and not (run / "best").exists()


def test_bad_rows_stop_or_are_counted(train):
    _, err, code = train(data="bad.jsonl")
    assert code == 3 and "bad.jsonl:121" in err and "--max-bad" in err
    _, err, code = train(
        "--max-bad", "2", data="bad.jsonl"
    )  # into the same --out: nothing of the failure is in the way
    assert code == 0 and "2 rows" in err and "skipped" in err


@pytest.mark.parametrize(("how", "documents"), [("blank", 2), ("line", 3), ("file", 1)])
def test_split_docs_cuts_plain_text(train, how, documents):
    _, err, code = train("--split-docs", how, "--val-split", "0", data="book.txt", steps=1)
    assert code == 0 and f"data   {documents} documents" in err


def test_long_documents(train):
    assert "were left out" in train("--long", "drop", "--max-len", "12", out="d")[1]
    assert "were cut" in train("--long", "truncate", "--max-len", "12", out="t")[1]
    _, err, code = train("--long", "error", "--max-len", "12", out="e")
    assert code == 3 and "more than --max-len 12" in err


def test_vocab_size_is_what_the_trained_tokenizer_gets(train):
    run, err, _ = train("--vocab-size", "330", tokenizer=False, steps=1)
    assert "330 BPE trained here" in err and weights(run)["model.embed_tokens.weight"].shape[0] == 330


def test_lengths(train):
    assert metrics(train("--log-every", "1")[0])[-1]["step"] == 4
    assert metrics(train("--epochs", "2", steps=None, out="e")[0])[-1]["epoch"] == pytest.approx(2, abs=0.2)
    tokens = metrics(train("--tokens", "600", steps=None, out="t")[0])[-1]["tokens"]
    assert 550 <= tokens <= 750


def test_batch_size_changes_no_row_and_batch_tokens_does(train):
    one = metrics(train("--dtype", "float32", "--batch-size", "1", out="1")[0])
    four = metrics(train("--dtype", "float32", "--batch-size", "4", out="4")[0])
    assert [r["tokens"] for r in one] == [r["tokens"] for r in four]
    assert one[-1]["loss"] == pytest.approx(four[-1]["loss"], abs=1e-5)
    assert metrics(train("--batch-tokens", "64", out="b")[0])[-1]["tokens"] < one[-1]["tokens"]


def test_learning_rate_flags(train):
    rates = [
        r["lr"]
        for r in metrics(
            train("--lr", "1e-3", "--schedule", "linear", "--warmup", "2", "--min-lr", "0.5", "--log-every", "1")[0]
        )
    ]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 0.75e-3])
    flat = [
        r["lr"]
        for r in metrics(
            train("--lr", "1e-3", "--schedule", "constant", "--warmup", "0", "--log-every", "1", out="c")[0]
        )
    ]
    assert flat == [1e-3] * 4
    wsd = [
        r["lr"]
        for r in metrics(train("--lr", "1e-3", "--decay", "0.5", "--warmup", "0", "--log-every", "1", out="w")[0])
    ]
    assert wsd == pytest.approx([1e-3, 1e-3, 1e-3, 0.5e-3])


def test_the_plan_names_the_course_of_the_rate(train):
    _, err, _ = train("--warmup", "1", "--epochs", "1", steps=None)
    assert "plan   1 epoch = " in err and "WSD: warm-up 1 step, decay from step " in err and "warning" not in err
    _, err, _ = train("--warmup", "100", steps=6, out="w")
    assert err.count("warning: a warm-up of 100 steps does not fit into 6") == 1
    assert "warm-up 5 steps, decay from step 5" in err


def test_a_rate_that_leaps_at_resume_is_told_once(train):
    """Lengthening a cosine run; one that is only gone on with says nothing."""
    run, _, _ = train("--schedule", "cosine", "--lr", "2e-3", "--warmup", "0", steps=6)
    assert "learning rate goes" not in run_cli("pretrain", "--resume", run)[2]
    _, _, err = run_cli("pretrain", "--resume", run, "--steps", "12", "--max-time", "0.000001s")
    assert err.count("the learning rate goes from 0.000134 to 0.001 at step 6: cosine over 12 steps") == 1


def test_less_than_a_row_is_no_batch(train):
    _, err, code = train("--batch-tokens", "10")
    assert code == 2 and "--batch-tokens 10 is less than one row of 32 tokens" in err and "at least 32" in err


def test_a_config_of_a_run_runs_again(train, home):
    """What does not act is not recorded, so the file a run leaves behind names one length and one model."""
    run, _, _ = train()
    saved = (run / "config.yaml").read_text()
    assert "epochs: null  # replaced by --steps" in saved and 'size: "1m"  # flag' in saved
    more = run.parent / "more"
    given = ["-d", home / "a.jsonl", "--max-len", "32", "--batch-tokens", "128", "--steps", "1"]
    assert run_cli("pretrain", "-m", run, *given, "-o", more)[0] == 0
    assert "size: null  # replaced by --model" in (more / "config.yaml").read_text()
    code, _, err = run_cli("pretrain", "-c", more / "config.yaml", "-o", run.parent / "again")
    assert code == 0 and "unused" not in err, err
    code, _, err = run_cli("pretrain", "-c", more / "config.yaml", "--epochs", "0.1", "-o", run.parent / "third")
    assert code == 0 and f"unused --steps ({more / 'config.yaml'}, replaced by --epochs)" in err


def test_a_rate_far_off_is_warned_about(train):
    assert "far below the usual" in train("--lr", "1e-5")[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "muon"],
        ["--weight-decay", "0.9"],
        ["--clip", "0.01"],
        ["--beta1", "0.1"],
        ["--beta2", "0.5"],
        ["--eps", "0.1"],
        ["--seed", "1"],
        ["--dtype", "float32"],
        ["--dtype", "float16"],
    ],
)
def test_optimisation_flags_change_the_weights(train, flags):
    base, other = train("--dtype", "bfloat16")[0], train("--dtype", "bfloat16", *flags, out="other")
    assert other[2] == 0, other[1]
    name = "model.layers.0.mlp.up_proj.weight"
    assert weights(other[0])[name].dtype == torch.float32 and not torch.equal(
        weights(base)[name], weights(other[0])[name]
    )


def test_pace_flags(train):
    run, _, _ = train(
        "--save-every",
        "2",
        "--keep",
        "1",
        "--eval-every",
        "3",
        "--log-every",
        "2",
        "--schedule",
        "cosine",
        "--eval-rows",
        "1",
        steps=7,
    )
    assert [r["step"] for r in metrics(run)] == [2, 3, 4, 6, 7]
    assert [r["step"] for r in metrics(run) if "val_loss" in r] == [3, 6, 7]
    best = (run / "best").read_text().strip()
    assert step_names(run) == sorted({best, "step-0000007"})


def test_sample_prompts_are_answered_at_every_evaluation(train):
    run, err, _ = train("--sample-prompt", "the quick", "--sample-prompt", "row", "--eval-every", "2")
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(r["step"], r["prompt"]) for r in rows] == [(s, p) for s in (2, 4) for p in ("the quick", "row")]
    assert err.count("sample the quick →") == 2


def test_run_directory_flags(train):
    run, _, code = train()
    assert code == 0
    first = weights(run)
    assert train("--seed", "9")[2] == 2  # a run is there
    assert train("--seed", "9", "--overwrite")[2] == 0
    assert not torch.equal(first["model.norm.weight"], weights(run)["model.norm.weight"])
    _, err, code = train("--resume", "auto", "--lr", "9e-4")
    assert code == 2 and "--lr:" in err and "--seed: 9 → 42" not in err
    _, err, code = train("--resume", "auto", "--lr", "9e-4", "--allow-changes", steps=6)
    assert code == 0 and "--steps: 4 → 6" in err and metrics(run)[-1]["step"] == 6


def test_max_time_saves_and_answers_75(train):
    run, err, code = train("--max-time", "0.000001s")
    assert code == 75 and "--resume" in err and json.loads((run / "run.json").read_text())["status"] == "stopped"


def test_a_step_can_be_named_to_go_back_to(train):
    run, _, _ = train("--save-every", "1", "--keep", "9", "--lr", "1e-3", steps=4)
    before = weights(run)
    code, _, err = run_cli("pretrain", "--resume", run / "step-0000002")
    assert code == 0 and "aside-step-0000004" in err
    assert all(torch.equal(a, before[n]) for n, a in weights(run).items())


def test_starting_from_weights(train, home):
    run, _, _ = train()
    code, out, err = run_cli(
        "pretrain",
        "-m",
        run,
        "-d",
        home / "v.jsonl",
        "--steps",
        "1",
        "--lr",
        "1e-9",
        "--max-len",
        "16",
        "-o",
        run.parent / "more",
    )
    assert code == 0 and "step 0" not in err.split("train")[0]
    for name, tensor in load_file(f"{out.strip()}/model.safetensors").items():
        torch.testing.assert_close(tensor, weights(run)[name], atol=1e-6, rtol=0)
    assert json.loads((run.parent / "more" / "run.json").read_text())["parent"]["sha256"]
    code, _, err = run_cli(
        "pretrain", "-m", run, "-d", home / "v.jsonl", "--set", "model.hidden_size=64", "-o", run.parent / "x"
    )
    assert code == 2 and "--set" in err


def test_unknown_model_key_names_the_nearest(train):
    _, err, code = train("--set", "model.num_hiden_layers=2")
    assert code == 2 and "num_hidden_layers" in err


def test_quiet_verbose_and_compile(train):
    assert train("--quiet", out="q")[1] == ""
    assert "pace " in train("--verbose", out="v")[1]
    _, err, code = train("--compile", "--device", "cpu", out="c")
    assert code == 0 and "--compile is for CUDA" in err


def test_emulated_precision_is_told(train, monkeypatch):
    """Once, with the better choice; a native one without a word."""
    assert "is emulated" not in train("--dtype", "float32", out="a")[1]
    monkeypatch.setattr(runtime, "is_native", lambda dtype, device: dtype == torch.float32)
    _, err, code = train("--dtype", "bf16", out="b")
    assert code == 0 and err.count("bfloat16 is emulated") == 1 and "--dtype float32" in err


def test_a_tokenizer_of_other_tokens_is_refused(train, home, tmp_path):
    """-t beside -m: what counts is which tokens, not how many; the same ones may lie in other files."""
    run, _, _ = train("--vocab-size", "330", tokenizer=False, steps=1)
    line = ["pretrain", "-m", run, "-d", home / "a.jsonl", "--steps", "1", "--max-len", "16"]
    code, _, err = run_cli(*line, "-t", home / "tok", "-o", tmp_path / "x")
    assert code == 2 and "other tokens than the model" in err and "350 tokens" in err
    own = next(run.glob("step-*"))
    raw = json.loads((own / "tokenizer.json").read_text())
    for name, merges in (("same", raw["model"]["merges"]), ("other", raw["model"]["merges"][::-1])):
        written = {**raw, "model": {**raw["model"], "merges": [" ".join(pair) for pair in merges]}}  # an older spelling
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(written))
        (tmp_path / name / "tokenizer_config.json").write_bytes((own / "tokenizer_config.json").read_bytes())
        code, _, err = run_cli(*line, "-t", tmp_path / name, "-o", tmp_path / f"run-{name}")
        assert code == (0 if name == "same" else 2), err


def test_weights_of_a_mix(home, tmp_path):
    code, _, err = run_cli(
        "pretrain",
        "-d",
        f"{home}/a.jsonl:0.5",
        "-d",
        f"{home}/v.jsonl:3",
        *TINY,
        "-t",
        home / "tok",
        "--val-split",
        "0",
        "--epochs",
        "1",
        "-o",
        tmp_path / "mix",
        "--log-every",
        "1",
    )
    assert code == 0, err
    one = sum(len(json.loads(line)["text"]) for line in (home / "a.jsonl").read_text().splitlines())
    assert metrics(tmp_path / "mix")[-1]["epoch"] == 1.0 and one


def test_options_from_environment_and_yaml(train, home, tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("lr: 1e-5\nlog_every: 1\n")
    monkeypatch.setenv("MINIGPT_PRETRAIN_SCHEDULE", "constant")
    run, _, code = train("-c", tmp_path / "c.yaml", "--warmup", "0", "--log_every", "2", "--eval-every", "4")
    assert code == 0 and [(r["step"], r["lr"]) for r in metrics(run)] == [(2, 1e-5), (4, 1e-5)]
    saved = (run / "config.yaml").read_text()
    assert f"lr: 1e-05  # {tmp_path / 'c.yaml'}" in saved and 'schedule: "constant"  # environment' in saved


def test_a_nan_ends_the_run_with_code_6(train, monkeypatch):
    from minigpt.core.train import losses

    real = losses.next_token

    def poisoned(model, batch):
        out = real(model, batch)
        return losses.StepOutput(out.sum_loss * float("nan"))

    monkeypatch.setattr(losses, "next_token", poisoned)
    run, err, code = train()
    assert code == 6 and "data rows" in err and "--lr" in err
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


def test_packed_stores_train_as_their_files_do(train, home, tmp_path):
    """`tokenize pack` ahead of time, for text and for chats: the same weights as from the file itself."""
    chats = "".join(json.dumps({"prompt": f"say {i % 7}", "completion": f"{i % 7}!"}) + "\n" for i in range(60))
    (tmp_path / "chat.jsonl").write_text(chats)
    run, _, _ = train("--val-split", "0.1")
    assert run_cli("tokenize", "pack", "-d", home / "a.jsonl", "-t", home / "tok", "-o", tmp_path / "text")[0] == 0
    packed, err, code = train("--val-split", "0.1", data=tmp_path / "text", out="packed")
    assert code == 0, err
    assert all(torch.equal(a, weights(run)[n]) for n, a in weights(packed).items())
    code, _, err = run_cli(
        "tokenize", "pack", "--kind", "chat", "-d", tmp_path / "chat.jsonl", "-t", run, "-o", tmp_path / "chat"
    )
    assert code == 0, err
    for data in ("chat.jsonl", "chat"):
        code, _, err = run_cli("sft", "-m", run, "-d", tmp_path / data, "--steps", "2", "-o", tmp_path / f"sft-{data}")
        assert code == 0, err
    a, b = (weights(tmp_path / f"sft-{data}") for data in ("chat.jsonl", "chat"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_refused_resume_touches_nothing(train, home, tmp_path):
    """Too few steps, changed data, going back to a step with changed data: the run stays as it was, and resumable."""
    data = tmp_path / "own.jsonl"
    data.write_text((home / "a.jsonl").read_text())
    run, _, _ = train("--save-every", "1", "--keep", "9", data=data, steps=4)

    def state():
        return {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != ".lock"}, step_names(run)

    before = state()
    assert run_cli("pretrain", "--resume", run, "--steps", "2")[0] == 2
    data.write_text(data.read_text() + '{"text": "new"}\n')
    for target in (run, run / "step-0000002"):
        code, _, err = run_cli("pretrain", "--resume", target, "--steps", "6")
        assert code == 2 and f"data ({data})" in err and "had 120 rows and has 121" in err
    assert state() == before
    data.write_text((home / "a.jsonl").read_text())
    assert run_cli("pretrain", "--resume", run)[0] == 0


def test_moved_data_and_another_working_directory_resume(train, home, tmp_path, monkeypatch):
    data = tmp_path / "own.jsonl"
    data.write_text((home / "a.jsonl").read_text())
    run, _, _ = train("--schedule", "constant", data=data)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    code, _, err = run_cli("pretrain", "--resume", "auto", "-o", "../run", "-d", "../own.jsonl", "--steps", "5")
    assert code == 0 and "--data" not in err
    data.rename(tmp_path / "moved.jsonl")
    code, _, err = run_cli("pretrain", "--resume", "../run", "-d", "../moved.jsonl", "--steps", "6")
    assert code == 0 and "moved.jsonl" in err and metrics(run)[-1]["step"] == 6


# 3, 9 and 11 of 48 rows: the last two leave a short step
@pytest.mark.parametrize("batch", ["96", pytest.param("288", marks=pytest.mark.slow), "352"])
def test_lengthened_epochs_equal_a_run_planned_so(train, batch):
    """An epoch whose last step is short, then a second one: the same steps and weights as two epochs at once."""
    flags = ["--batch-tokens", batch, "--warmup", "0", "--log-every", "1"]
    straight, _, _ = train("--epochs", "2", *flags, steps=None, out="straight")
    run, _, _ = train("--epochs", "1", *flags, steps=None)
    code, _, err = run_cli("pretrain", "--resume", run, "--epochs", "2")
    assert code == 0, err
    assert [r["step"] for r in metrics(run)] == [r["step"] for r in metrics(straight)]
    assert all(torch.equal(a, weights(straight)[n]) for n, a in weights(run).items())


def test_another_batch_goes_on_to_the_end_of_the_data(train):
    run, _, code = train("--epochs", "1", "--max-time", "0.000001s", steps=None)
    assert code == 75
    code, _, err = run_cli("pretrain", "--resume", run, "--batch-tokens", "64", "--allow-changes")
    assert code == 0 and metrics(run)[-1]["epoch"] == 1.0, err


def test_best_never_names_a_step_that_is_gone(train):
    run, _, _ = train("--save-every", "5", "--eval-every", "5", "--keep", "1", steps=20)
    assert run_cli("pretrain", "--resume", run, "--steps", "40", "--max-time", "0.000001s")[0] == 75
    assert not (run / "best").exists() or (run / (run / "best").read_text().strip()).is_dir()


def test_steps_that_are_gone_never_start_from_zero_silently(train):
    import shutil

    run, _, _ = train()
    for step in run.glob("step-*"):
        shutil.rmtree(step)
    code, _, err = run_cli("pretrain", "--resume", run)
    assert code == 3 and "are gone" in err


def test_rows_longer_than_the_context_are_refused(train):
    _, err, code = train("--set", "model.max_position_embeddings=16")
    assert code == 2 and "--max-len 32" in err and "max_position_embeddings=32" in err


@pytest.mark.parametrize("flags", [["--beta1", "1"], ["--eps", "-1"], ["--warmup", "-1"], ["--decay", "2"]])
def test_impossible_numbers_are_refused(train, flags):
    _, err, code = train(*flags)
    assert code == 2 and flags[0] in err


def test_tokenize_train_never_replaces_what_is_no_tokenizer(home, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    for out in (precious, home / "book.txt"):
        code, _, err = run_cli(
            "tokenize", "train", "-d", home / "a.jsonl", "-o", out, "--overwrite", "--vocab-size", "320"
        )
        assert code == 2 and "not replaced" in err
    assert (precious / "thesis.txt").read_text() == "x" and (home / "book.txt").is_file()
