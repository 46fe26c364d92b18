"""Two processes that are killed, stopped or broken: all of them end, nothing saved is lost, and the run that goes on
ends with the same bits as one that was not disturbed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from minigpt.core.files import RunLock
from tests.conftest import run_cli, trials
from tests.stages.killing import assert_same_run, rows, size
from tests.stages.ranks import finish, launched, prepare, pretrain

pytestmark = pytest.mark.dist

STEPS = 56
# 7 rows a step, on each rank over 2 micro-batches; two passes; logs fall on other steps than saves
PACE = ["--batch-tokens", "336", "--batch-size", "2", "--steps", str(STEPS), "--log-every", "3", "--eval-every", "8",
        "--save-every", "4", "--seed", "7"]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def straight(home):
    """The undisturbed run on two ranks. Every step is kept: a run that stops anywhere finds its equal here."""
    out = home / "straight"
    told, _ = finish(command(home, out, "--save-every", "1", "--keep", str(STEPS)), home / "cache")
    assert told == f"{out}/step-{STEPS:07d}\n"
    return out


@pytest.fixture(scope="module")
def patience():
    """Seconds in which all must be gone: ten where torch is imported in two, more where this machine is as busy."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return 10 * max(1.0, (time.monotonic() - began) / 2)


def command(home, out, *flags):
    return pretrain(home, out, *PACE, *flags)


def newest(out):
    return out / (out / "latest").read_text().strip()


def assert_stopped_well(straight, out):
    """Saved where it stopped, not before the last logged step, with the bits that the undisturbed run had there."""
    folder = newest(out)
    logged = rows(out)
    assert int(folder.name[5:]) >= max((row["step"] for row in logged), default=0)
    for name in ("model.safetensors", "trainer/optim.safetensors", "trainer/rng.safetensors", "trainer/state.json"):
        assert (folder / name).read_bytes() == (straight / folder.name / name).read_bytes(), name
    assert logged == rows(straight)[: len(logged)]
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"


def has_begun(launch, out):
    """Wait until the run has logged one step more."""
    before = size(out)
    launch.wait_for(lambda: size(out) > before)


# ---------------------------------------------------------------------------------------------- the same bits


def test_the_same_command_under_torchrun_gives_the_same_bits(home, straight, tmp_path):
    told, _ = finish(command(home, tmp_path / "run"), home / "cache", torchrun=True)
    assert told == f"{tmp_path}/run/step-{STEPS:07d}\n"
    assert_same_run(straight, tmp_path / "run")


def kill_three_times(home, straight, out, rng, nproc=2):
    """kill -9 to the launcher and all ranks at once."""
    for _ in range(3):
        with launched(command(home, out), home / "cache", nproc=nproc) as launch:
            has_begun(launch, out)
            time.sleep(rng.uniform(0, 0.6))
            launch.kill_all()
    finish(command(home, out), home / "cache", nproc=nproc)
    assert_same_run(straight, out)


def test_killed_at_random_moments(home, straight, tmp_path):
    kill_three_times(home, straight, tmp_path / "run", random.Random(1))


# Rank 0 kills all, itself included, at its n-th file-system step inside of checkpoint writes.
DOOMED = """
import os, signal, sys
if os.environ.get("RANK") == "0":
    left = {n}
    mark = "MINIGPT_TEST_MARK=" + os.environ["MINIGPT_TEST_MARK"]
    def doomed(real):
        def call(*args, **kwargs):
            global left
            path = os.readlink(f"/proc/self/fd/{{args[0]}}") if isinstance(args[0], int) else str(args[0])
            if ".step-" in path or "/.latest" in path:
                left -= 1
                if left == 0:
                    kill_all()
            return real(*args, **kwargs)
        return call
    def kill_all():
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{{pid}}/environ") as f:
                    ours = mark in f.read().split("\\0") and int(pid) != os.getpid()
            except OSError:
                continue
            if ours:
                os.kill(int(pid), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace, os.fsync, os.mkdir = doomed(os.replace), doomed(os.fsync), doomed(os.mkdir)
"""


def kill_inside_writes(home, straight, out, numbers, startup):
    for n in numbers:
        (startup / "sitecustomize.py").write_text(DOOMED.format(n=n))
        with launched(command(home, out), home / "cache", startup=startup) as launch:
            code, _, err = launch.end()
            assert code == -signal.SIGKILL, err
        whole = sorted(p.name for p in out.glob("step-*"))
        named = (out / "latest").read_text().strip() if (out / "latest").exists() else None
        assert list(out.glob(".step-*")) or named != whole[-1], "not inside a write"
    finish(command(home, out), home / "cache")
    assert_same_run(straight, out)


def test_killed_inside_a_checkpoint_write(home, straight, tmp_path):
    """The first write has 30 steps: with half a directory, and with a whole one that `latest` does not name yet."""
    kill_inside_writes(home, straight, tmp_path / "run", [19, 30], tmp_path)


@pytest.mark.parametrize("trial", trials(5, in_ci=1))
def test_killed_at_random_moments_5_times(trial, home, straight, tmp_path):
    kill_three_times(home, straight, tmp_path / "run", random.Random(100 + trial))


@pytest.mark.parametrize("trial", trials(5, in_ci=1))
def test_killed_inside_writes_5_times(trial, home, straight, tmp_path):
    rng = random.Random(trial)
    kill_inside_writes(home, straight, tmp_path / "run", [rng.randint(1, 60) for _ in range(3)], tmp_path)


@pytest.mark.slow
def test_four_ranks_killed_at_random_moments(home, tmp_path):
    finish(command(home, tmp_path / "straight"), home / "cache", nproc=4)
    kill_three_times(home, tmp_path / "straight", tmp_path / "run", random.Random(4), nproc=4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_shards_killed_at_random_moments(optimizer, home, tmp_path):
    flags = ["--parallel", "fsdp", "--optimizer", optimizer]
    finish(command(home, tmp_path / "straight", *flags), home / "cache")
    with launched(command(home, tmp_path / "run", *flags), home / "cache") as launch:
        has_begun(launch, tmp_path / "run")
        launch.kill_all()
    finish(command(home, tmp_path / "run", *flags), home / "cache")
    assert_same_run(tmp_path / "straight", tmp_path / "run")


# ---------------------------------------------------------------------------------------------- asked to stop


def stopped_by(home, straight, out, act, patience, *flags, expect=75, **how):
    """Start, act once a step is logged, and see that all end. Returns (stdout, stderr)."""
    with launched(command(home, out, *flags), home / "cache", **how) as launch:
        has_begun(launch, out)
        act(launch)
        launch.all_gone(patience)
        code, told, err = launch.end()
    assert code == expect, err
    assert_stopped_well(straight, out)
    return told, err


def test_sigterm_to_the_launcher_saves_and_the_run_goes_on_to_the_same_bits(home, straight, patience, tmp_path):
    out = tmp_path / "run"
    told, err = stopped_by(home, straight, out, lambda launch: launch.child.terminate(), patience)
    assert told == "" and err.count("stopped:") == 1 and f"--resume {out}" in err
    finish(command(home, out), home / "cache")
    assert_same_run(straight, out)


def test_sigint_to_one_rank_stops_all(home, straight, patience, tmp_path):
    _, err = stopped_by(
        home, straight, tmp_path / "run", lambda launch: os.kill(launch.rank(1), signal.SIGINT), patience
    )
    assert err.count("stopped:") == 1


def test_max_time_stops_all_and_tells_one_object(home, straight, tmp_path):
    out = tmp_path / "run"
    with launched(command(home, out, "--max-time", "0.3s", "--json"), home / "cache") as launch:
        code, told, err = launch.end()
    answer = json.loads(told)
    assert (code, answer["status"], answer["code"], answer["kind"]) == (75, "error", 75, "stopped"), err
    assert "--max-time" in answer["message"] and "stopped:" not in err
    assert_stopped_well(straight, out)


def test_sigterm_to_torchrun_saves(home, straight, patience, tmp_path):
    """torchrun hands it on to all ranks, which save and end; its own exit code is always 1."""
    stopped_by(
        home, straight, tmp_path / "run", lambda launch: launch.child.terminate(), patience, expect=1, torchrun=True
    )


def test_ranks_whose_launcher_is_killed_save_and_end(home, straight, patience, tmp_path):
    stopped_by(home, straight, tmp_path / "run", lambda launch: launch.child.kill(), patience, expect=-signal.SIGKILL)


def test_ranks_whose_launcher_is_killed_before_the_first_step_end_too(home, patience, tmp_path):
    """They hold the lock of the run by then; it is free again once they have gone."""
    out = tmp_path / "run"
    with launched(command(home, out), home / "cache") as launch:
        launch.wait_for((out / ".lock").exists)
        launch.child.kill()
        launch.all_gone(2 * patience)
        launch.end()
    assert rows(out) == []
    with RunLock(out):
        pass


# Every checkpoint takes a minute, unless something interrupts it.
SLOW_DISK = """
import os, time
if os.environ.get("RANK") == "0":
    from minigpt.core.train import checkpoint
    real = checkpoint.save
    def save(run, *args):
        (run / "saving").touch()
        time.sleep(60)
        return real(run, *args)
    checkpoint.save = save
"""


def test_a_second_signal_ends_all_at_once(home, patience, tmp_path):
    """The first asks to save, which takes long; the second does not wait for it. Exit code 130, told once."""
    out = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    with launched(command(home, out, "--save-every", "1000"), home / "cache", startup=tmp_path) as launch:
        has_begun(launch, out)
        launch.child.terminate()
        launch.wait_for((out / "saving").exists)
        launch.child.terminate()
        launch.all_gone(patience)
        code, told, err = launch.end()
    assert (code, told) == (130, "") and err.count("stopped:") == 1 and "at once" in err
    assert not list(out.glob("step-*"))


# ---------------------------------------------------------------------------------------------- a rank is lost


def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(home, straight, patience, tmp_path):
    """Once rank 1, once rank 0: exit code 4, one error that says what to do, and then the same bits."""
    out = tmp_path / "run"
    for victim in (1, 0):
        with launched(command(home, out), home / "cache") as launch:
            has_begun(launch, out)
            os.kill(launch.rank(victim), signal.SIGKILL)
            launch.all_gone(patience)
            code, told, err = launch.end()
        assert (code, told) == (4, "") and err.count("error:") == 1 and "--resume" in err, err
        assert "Traceback" not in err
    assert "rank 0 was killed by SIGKILL" in err
    finish(command(home, out), home / "cache")
    assert_same_run(straight, out)


def test_a_rank_that_hangs_ends_the_others_within_the_timeout(home, patience, tmp_path):
    """A stopped process answers nothing: rank 0 gives up after --rank-timeout. torchrun would kill the stopped one 30
    seconds later, the test does so at once.
    """
    out = tmp_path / "run"
    with launched(command(home, out, "--rank-timeout", "5s"), home / "cache") as launch:
        has_begun(launch, out)
        hanging = launch.rank(1)
        os.kill(hanging, signal.SIGSTOP)
        launch.all_gone(5 + patience, but=(hanging, launch.child.pid))
        os.kill(hanging, signal.SIGKILL)
        code, _, err = launch.end()
    assert code == 4 and err.count("error:") == 1 and "does not answer" in err and "--resume" in err, err
    assert json.loads((out / "run.json").read_text())["status"] == "failed"


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [(["-d", "nowhere.jsonl"], 2, "nowhere.jsonl"), (["--resume", "nowhere"], 2, "nowhere"),
     (["--nproc", "x"], 2, "nproc")],
)  # fmt: skip
def test_what_is_wrong_from_the_start_is_told_before_any_process(flags, code, words, home, tmp_path):
    began = time.monotonic()
    found, told, err = run_cli("pretrain", "-d", home / "text.jsonl", "-o", tmp_path / "run", "--nproc", "2", *flags)
    assert (found, told) == (code, "") and err.count("error:") == 1 and words in err
    assert time.monotonic() - began < 1


def test_a_run_that_is_in_use_is_refused_once(home, tmp_path):
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"), launched(command(home, tmp_path / "run"), home / "cache") as launch:
        code, told, err = launch.end()
    assert (code, told) == (2, "") and err.count("error:") == 1 and f"process {os.getpid()} on" in err, err
    assert "Traceback" not in err


def test_an_existing_run_is_refused_by_one_object(home, straight):
    again = [w for w in command(home, straight, "--json") if w not in ("--resume", "auto")]
    with launched(again, home / "cache") as launch:
        code, told, err = launch.end()
    answer = json.loads(told)
    assert (code, answer["status"], answer["code"], answer["kind"]) == (2, "error", 2, "usage"), err
    assert "already holds a run" in answer["message"] and "error:" not in err


# Rank 1, and no other, fails in its fifth step.
BROKEN = """
import os
if os.environ.get("RANK") == "1":
    from minigpt.core.data.source import PackedSource
    from minigpt.core.errors import DataError
    real, calls = PackedSource.next_step, []
    def next_step(self):
        calls.append(1)
        if len(calls) == 5:
            raise {error}
        return real(self)
    PackedSource.next_step = next_step
"""


def broken(home, tmp_path, error, *flags):
    (tmp_path / "sitecustomize.py").write_text(BROKEN.format(error=error))
    with launched(command(home, tmp_path / "run", *flags), home / "cache", startup=tmp_path) as launch:
        return launch.end()


def test_a_fault_of_one_rank_alone_is_told_once_with_its_number(home, tmp_path):
    code, told, err = broken(home, tmp_path, 'DataError("tokens.bin is cut short", fix="make it again")', "--json")
    answer = json.loads(told)
    assert (code, answer["code"], answer["kind"]) == (3, 3, "data"), err
    assert (answer["message"], answer["hint"]) == ("rank 1: tokens.bin is cut short", "make it again")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["status"], info["error"]) == ("failed", "rank 1: tokens.bin is cut short")


def test_a_bug_of_one_rank_alone_is_told_once_with_its_trace(home, tmp_path):
    code, told, err = broken(home, tmp_path, 'ZeroDivisionError("by zero")')
    assert (code, told) == (1, "")
    assert err.count("Traceback") == 1 and err.count("error: ") == 1 and "CONTRIBUTING.md" in err, err
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["status"], info["error"]) == ("failed", "rank 1: ZeroDivisionError: by zero")
