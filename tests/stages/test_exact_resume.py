"""A run that was killed, stopped or broken ends with the same bits as one that was not. From outside, by command."""

import json
import random
import signal

import pytest

from tests.conftest import trials
from tests.stages.killing import SIGKILL, assert_same_run, rows, run, run_and_signal, run_until_file_step

TINY = ["--set", "model.hidden_size=32", "--set", "model.num_hidden_layers=2", "--set", "model.intermediate_size=48",
        "--set", "model.num_attention_heads=2", "--max-len", "48", "--size", "1m"]  # fmt: skip
# 7 rows a step over 3 micro-batches; saves, logs and evaluations fall on different steps; more than two epochs
PACE = ["--batch-tokens", "336", "--batch-size", "3", "--epochs", "2.5", "--save-every", "4", "--log-every", "3",
        "--eval-every", "6", "--vocab-size", "400", "--val-split", "0.1"]  # fmt: skip
QA = ["--batch-tokens", "240", "--epochs", "2", "--save-every", "4", "--log-every", "3", "--eval-every", "6",
      "--val-split", "0.1", "--max-len", "48"]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, a cache, and the straight runs that all others are compared with."""
    base = tmp_path_factory.mktemp("resume")
    rng = random.Random(0)
    words = [f"{a}{b}" for a in "山水風月花鳥" for b in "白青明清遠高"]
    with open(base / "text.jsonl", "w") as f:
        for _ in range(220):
            f.write(json.dumps({"text": "，".join(rng.choices(words, k=rng.randint(3, 40)))}) + "\n")
    with open(base / "chat.jsonl", "w") as f:
        for _ in range(160):
            a, b = rng.randint(0, 9), rng.randint(0, 9)
            f.write(json.dumps({"instruction": f"{a}+{b}?", "output": f"{a + b} {rng.choice(words)}"}) + "\n")
    return base


def pretrain(home, out):
    return ["pretrain", "-d", str(home / "text.jsonl"), *TINY, *PACE, "-o", str(out), "--resume", "auto"]


def sft(home, out):
    return [
        "sft",
        "-m",
        str(home / "pretrain"),
        "-d",
        str(home / "chat.jsonl"),
        *QA,
        "-o",
        str(out),
        "--resume",
        "auto",
    ]


STAGES = {"pretrain": pretrain, "sft": sft}


@pytest.fixture(scope="module")
def straight(home):
    """Each stage once, undisturbed."""
    for name, command in STAGES.items():
        done = run(command(home, home / name), home / "cache")
        assert done.returncode == 0, done.stderr
        assert done.stdout == (home / name / (home / name / "latest").read_text().strip()).as_posix() + "\n"
    return home


def finish(command, home, out):
    done = run(command, home / "cache")
    assert done.returncode == 0, done.stderr
    return done


def test_same_command_and_seed_same_run(straight, tmp_path):
    finish(pretrain(straight, tmp_path / "again"), straight, tmp_path)
    assert_same_run(straight / "pretrain", tmp_path / "again")


def test_metrics_hold_every_row_once(straight):
    steps = [r["step"] for r in rows(straight / "pretrain")]
    total = json.loads((straight / "pretrain" / "run.json").read_text())["steps"]
    assert steps == sorted({*range(3, total, 3), *range(6, total, 6), total})


def kill_three_times(stage, straight, out, rng):
    command = STAGES[stage](straight, out)
    for _ in range(3):
        code = run_and_signal(command, straight / "cache", rng.uniform(0, 0.4), signal.SIGKILL, out)
        assert code in (SIGKILL, 0)
    finish(command, straight, out)
    assert_same_run(straight / stage, out)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments(stage, straight, tmp_path):
    kill_three_times(stage, straight, tmp_path / "run", random.Random(1))


@pytest.mark.parametrize("trial", trials(20, in_ci=4))
def test_killed_at_random_moments_20_times(trial, straight, tmp_path):
    kill_three_times(list(STAGES)[trial % 2], straight, tmp_path / "run", random.Random(100 + trial))


def kill_inside_writes(straight, out, steps):
    """Die at the n-th file-system step of each attempt: before a rename, between two syncs, with half a directory."""
    command = pretrain(straight, out)
    for step in steps:
        assert run_until_file_step(command, straight / "cache", step) in (SIGKILL, 0)
    finish(command, straight, out)
    assert_same_run(straight / "pretrain", out)


def test_killed_inside_a_checkpoint_write(straight, tmp_path):
    kill_inside_writes(straight, tmp_path / "run", [4, 9, 30, 47])


@pytest.mark.parametrize("trial", trials(10, in_ci=2))
def test_killed_inside_writes_10_times(trial, straight, tmp_path):
    rng = random.Random(trial)
    kill_inside_writes(straight, tmp_path / "run", [rng.randint(1, 70) for _ in range(3)])


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP))]
)
def test_stopped_by_a_signal_saves_and_answers_75(number, straight, tmp_path):
    out = tmp_path / "run"
    command = pretrain(straight, out)
    assert run_and_signal(command, straight / "cache", 0.05, number, out) == 75
    info = json.loads((out / "run.json").read_text())
    assert info["status"] == "stopped" and (out / (out / "latest").read_text().strip() / "model.safetensors").exists()
    finish(command, straight, out)
    assert_same_run(straight / "pretrain", out)


def test_micro_batch_size_may_change_on_resume(straight, tmp_path):
    """Another --batch-size goes through the same rows: the same steps, losses equal to 1e-2 relative in bf16."""
    out = tmp_path / "run"
    command = pretrain(straight, out)
    assert run_and_signal(command, straight / "cache", 0.05, signal.SIGTERM, out) == 75
    finish([*command, "--batch-size", "7"], straight, out)
    a, b = rows(straight / "pretrain"), rows(out)
    assert [(r["step"], r["tokens"], r["epoch"]) for r in a] == [(r["step"], r["tokens"], r["epoch"]) for r in b]
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-2)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(straight, tmp_path):
    out = tmp_path / "run"
    command = pretrain(straight, out)
    assert run_and_signal(command, straight / "cache", 0.3, signal.SIGTERM, out) == 75
    newest = out / (out / "latest").read_text().strip()
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    done = finish(command, straight, out)
    assert done.stderr.count("is damaged") == 1 and "model.safetensors does not match its checksum" in done.stderr
    assert_same_run(straight / "pretrain", out)


def test_changed_data_is_refused_at_resume(straight, tmp_path):
    data, out = tmp_path / "text.jsonl", tmp_path / "run"
    data.write_text((straight / "text.jsonl").read_text())
    command = pretrain(straight, out)
    command[command.index("-d") + 1] = str(data)
    assert run_and_signal(command, straight / "cache", 0.05, signal.SIGTERM, out) == 75
    data.write_text(data.read_text() + '{"text": "新"}\n')
    done = run(command, straight / "cache")
    assert done.returncode == 2 and "data" in done.stderr and "--allow-changes" in done.stderr


def test_second_process_on_a_run_is_refused(straight, tmp_path):
    from minigpt.core.files import RunLock

    out = tmp_path / "run"
    out.mkdir()
    with RunLock(out):
        done = run(pretrain(straight, out), straight / "cache")
    assert done.returncode == 2 and "is in use by process" in done.stderr


def test_an_existing_run_is_never_overwritten_silently(straight, tmp_path):
    command = [a for a in pretrain(straight, straight / "pretrain") if a not in ("--resume", "auto")]
    done = run(command, straight / "cache")
    assert done.returncode == 2
    for way in ("--resume", "--overwrite", "--out"):
        assert way in done.stderr
