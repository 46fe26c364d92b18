"""What a run refuses: to go on as another run, to share its directory, to step on or to save what is not a number."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minigpt.core.train import checkpoint, losses
from tests.conftest import run_cli
from tests.stages import killing
from tests.stages.short_run import LAST, answered_at_once, begin, contents, finish, pretrain


@pytest.fixture
def run(home, tmp_path):
    """A finished run of one's own."""
    shutil.copytree(home / "straight", tmp_path / "run")
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------- going on as another run


MATHS = [("--lr", "1e-4"), ("--batch-tokens", "672"), ("--seed", "7"), ("--max-len", "32"), ("--size", "3m"),
         ("--optimizer", "muon"), ("--schedule", "cosine"), ("--warmup", "5"), ("--decay", "0.1"), ("--min-lr", "0.2"),
         ("--weight-decay", "0"), ("--beta1", "0.8"), ("--beta2", "0.9"), ("--eps", "1e-6"), ("--clip", "0.5"),
         ("--dtype", "float32"), ("--pack", "pad"), ("--long", "drop"), ("--val-split", "0.2"),
         ("--set", "model.rope_theta=5e5")]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), MATHS)
def test_an_option_that_changes_the_maths_is_refused(home, run, flag, value):
    """Exit 2 with this one difference, old and new, and the run as it was."""
    before = contents(run)
    code, out, err = run_cli(*pretrain(home, run, flag, value))
    assert (code, out) == (2, "") and f"--resume {run} would change the run" in err and "--allow-changes" in err
    (line,) = [line for line in err.splitlines() if line.startswith("  found")]
    assert line.startswith(f"  found  {flag}: ") and line.count("→") == 1
    assert contents(run) == before


def test_what_leaves_the_maths_alone_may_change(home, tmp_path):
    """Cadences, device and number of kept steps: the same weights, moments and generators."""
    begin(home, tmp_path / "run")
    flags = ["--save-every", "5", "--log-every", "1", "--eval-every", "7", "--keep", "9", "--device", "cpu"]
    code, _, err = run_cli(*pretrain(home, tmp_path / "run", *flags))
    assert code == 0 and "→" not in err.split("data ")[0], err
    assert [n for n, _ in checkpoint.steps(tmp_path / "run")] == [14, 10, 8, 5, 0]
    for name in ("model", "trainer/optim", "trainer/rng"):
        a, b = (folder / LAST / f"{name}.safetensors" for folder in (home / "straight", tmp_path / "run"))
        assert a.read_bytes() == b.read_bytes(), name


def test_a_longer_run_is_told(home, run):
    code, _, err = run_cli(*pretrain(home, run, "--steps", "16"))
    assert code == 0 and "--steps: 14 → 16" in err and (run / "latest").read_text() == "step-0000016\n"


def edited(file: Path, old: str, new: str) -> None:
    """Change a file of a checkpoint, and its manifest as if it had been written so."""
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    checkpoint.seal(file.parent)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("config.json", '"rope_theta": 10000.0', '"rope_theta": 500000.0', "trained on has changed: model\n"),
        ("tokenizer.json", '"!": ', '"¬": ', "tok is not the one that this run was trained with\n"),
    ],
)
def test_another_model_or_tokenizer_of_the_same_size_is_refused(home, run, file, old, new, said):
    """Exit 2 naming which, before anything is touched; --allow-changes goes on with it."""
    edited(run / LAST / file, old, new)
    before = contents(run)
    code, _, err = run_cli(*pretrain(home, run))
    assert code == 2 and said in err and "found" in err, err
    assert contents(run) == before
    code, _, err = run_cli(*pretrain(home, run, "--allow-changes"))
    assert code == 0, err


# ----------------------------------------------------------------------------------------------- sharing a directory


def test_a_second_process_is_refused_until_the_first_is_dead(home, tmp_path):
    """At once, naming process and host. After kill -9 the directory is free at once."""
    run = tmp_path / "run"
    command = pretrain(home, run)
    environment = killing.environment(tmp_path / "cache")
    first = subprocess.Popen(
        [sys.executable, "-m", "minigpt", *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        lock, deadline = run / ".lock", time.monotonic() + 30
        while not (lock.exists() and lock.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        code, _, err = answered_at_once(command, tmp_path / "cache")
        assert first.poll() is None
        assert code == 2 and f"{run} is in use by process {first.pid} on {socket.gethostname()}" in err
    finally:
        first.kill()
        first.communicate()
    finish(home, run)


# --------------------------------------------------------------------------------------------------- not a number


def nan_loss(loss):
    return loss * float("nan")


def infinite_loss(loss):
    return loss + float("inf")


def infinite_gradient(loss):
    loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss * 1.0


@pytest.fixture
def spoil(monkeypatch):
    """spoil({step: how}): the loss of that step's second micro-batch goes through `how`, once."""

    def set_up(bad, first=0, also=None):
        calls, left, real = 0, dict(bad), losses.next_token

        def next_token(model, batch):
            nonlocal calls
            out = real(model, batch)
            if not model.training:
                return out
            calls += 1
            step = first + -(-calls // 3)  # three micro-batches a step
            if step not in left or calls % 3 != 2:
                return out
            if also:
                also(step)
            return losses.StepOutput(left.pop(step)(out.sum_loss))

        monkeypatch.setattr(losses, "next_token", next_token)

    return set_up


def assert_finite(run: Path) -> None:
    for _, folder in checkpoint.steps(run):
        for file in ("model", "trainer/optim"):
            for name, tensor in load_file(folder / f"{file}.safetensors").items():
                assert tensor.isfinite().all(), (folder, name)


def test_a_bad_step_is_left_out_and_counted(home, tmp_path, spoil):
    """Weights and moments stay as the step before left them; the step is named with its rows, logged and counted."""
    run = tmp_path / "run"
    spoil({5: nan_loss, 7: infinite_loss, 8: infinite_gradient})
    code, _, err = run_cli(*pretrain(home, run, "--save-every", "1", "--keep", "99"))
    assert code == 0, err
    for step in (5, 7, 8):
        assert f"step {step} left out: " in err and f"on data rows {7 * step - 7} to {7 * step - 1}" in err
    assert err.count("left out") == 3
    for name in ("model", "trainer/optim"):
        saved = [(folder / f"{name}.safetensors").read_bytes() for _, folder in reversed(checkpoint.steps(run))]
        unchanged = [i + 1 for i in range(1, 14) if saved[i] == saved[i - 1]]
        assert unchanged == [5, 7, 8]
    assert {r["step"]: r["skipped"] for r in killing.rows(run) if "skipped" in r} == {6: 1, 9: 2}
    state = json.loads((run / LAST / "trainer/state.json").read_text())
    assert (state["counters"]["skipped"], state["counters"]["streak"]) == (3, 0)
    assert_finite(run)


def test_three_bad_steps_in_a_row_end_the_run(home, tmp_path, spoil):
    """Exit 6 naming the last good checkpoint. What was bad being over, the run goes on to the same bits."""
    run = tmp_path / "run"
    spoil({9: infinite_gradient, 10: nan_loss, 11: infinite_loss})
    code, out, err = run_cli(*pretrain(home, run))
    assert (code, out) == (6, "") and f"the last good checkpoint is {run / 'step-0000008'}" in err and "--lr" in err
    assert "the loss is not a number in 3 steps in a row (step 11)" in err and "data rows 70 to 76" in err
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert_finite(run)
    finish(home, run)


def test_a_gradient_that_is_not_a_number_is_called_so(home, tmp_path, spoil):
    spoil({9: nan_loss, 10: infinite_gradient, 11: infinite_gradient})
    code, _, err = run_cli(*pretrain(home, tmp_path / "run"))
    assert code == 6 and "the gradient is not a number, though the loss is, in 3 steps in a row (step 11)" in err


def test_a_row_of_bad_steps_is_counted_over_a_resume(home, tmp_path, spoil):
    """Two, a stop, and one more."""
    run = tmp_path / "run"
    spoil({5: nan_loss, 6: nan_loss}, also=lambda step: step == 6 and os.kill(os.getpid(), signal.SIGTERM))
    assert run_cli(*pretrain(home, run))[0] == 75
    assert (run / "latest").read_text() == "step-0000006\n"
    spoil({7: nan_loss}, first=6)
    code, _, err = run_cli(*pretrain(home, run))
    assert code == 6 and "(step 7)" in err, err


@pytest.mark.parametrize("flags", [["--lr", "1e25"], ["--lr", "1e38", "--dtype", "float32"]])
def test_a_run_that_explodes_saves_nothing_that_is_not_a_number(home, tmp_path, flags):
    """A learning rate without sense: exit 6, whether the loss shows it or only the weights do."""
    run = tmp_path / "run"
    flags = [*flags, "--warmup", "0", "--save-every", "1", "--keep", "99"]
    code, _, err = run_cli(*pretrain(home, run, *flags))
    assert code == 6 and "lower --lr" in err and "Traceback" not in err, err
    assert_finite(run)
