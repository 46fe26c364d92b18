"""A disk that refuses: said in a sentence with exit 3, and nothing that was saved before is lost."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from minigpt.core.train import checkpoint, losses
from tests.conftest import run_cli
from tests.stages import killing
from tests.stages.short_run import LAST, answered_at_once, begin, contents, finish, pretrain

resource = pytest.importorskip("resource")  # POSIX


def size(home: Path, name: str) -> int:
    return (home / "straight" / LAST / name).stat().st_size


@contextlib.contextmanager
def files_up_to(limit: int):
    """No file grows beyond `limit` bytes: a write takes what fits and then answers EFBIG, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores the signal that comes with it
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_steps_are_whole(run: Path) -> None:
    for _, folder in checkpoint.steps(run):
        assert checkpoint.fault(folder) is None


# ------------------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("name", ["trainer/optim.safetensors", "model.safetensors"])
def test_a_file_that_does_not_fit(home, tmp_path, name):
    """The message names the step, what it needs and what there is; the step before stays, and the run goes on."""
    run = tmp_path / "run"
    begin(home, run)
    before = contents(run / "step-0000000")
    with files_up_to(size(home, name) - 1):
        code, out, err = run_cli(*pretrain(home, run))
    assert (code, out) == (3, "") and "Traceback" not in err
    assert f"error: could not write {run / 'step-0000004'}: File too large" in err and "--resume" in err
    assert f"it needs {sum(map(len, before.values())):,} bytes, as step-0000000 does" in err and "bytes free" in err
    assert contents(run / "step-0000000") == before and (run / "latest").read_text() == "step-0000000\n"
    assert checkpoint.steps(run) == [(0, run / "step-0000000")]
    assert not list(run.glob(".*.tmp"))  # what was half written takes no room
    assert "resume step 0 of 14" in finish(home, run)


def test_the_very_first_checkpoint_does_not_fit(home, tmp_path):
    """What it needs is then told from the tensors at hand. The same command begins anew, and says so."""
    run = tmp_path / "run"
    with files_up_to(size(home, "trainer/optim.safetensors") - 1):
        code, _, err = run_cli(*pretrain(home, run))
    assert code == 3 and "it needs more than 2" in err and checkpoint.steps(run) == []
    assert "has no checkpoint yet: starting at step 0" in finish(home, run)


def test_a_disk_that_is_full_from_the_start_leaves_no_trace(home, tmp_path, monkeypatch):
    """Neither in --out nor in the cache: once there is room the same command works."""
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "cache"))
    for limit in (0, 100, 3000):
        with files_up_to(limit):
            code, _, err = run_cli(*pretrain(home, tmp_path / "run"))
        assert code == 3 and "File too large" in err and "Traceback" not in err, err
        assert contents(tmp_path / "run") == {}
        assert not [name for name in contents(tmp_path) if ".tmp" in name]
    finish(home, tmp_path / "run")


def refuse_from(monkeypatch, n: int, code: int) -> None:
    """The n-th and every later file-system step of the kinds that a checkpoint is made of answers with `code`."""
    left = n

    def refusing(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left <= 0:
                raise OSError(code, os.strerror(code), *(a for a in args[:1] if not isinstance(a, int)))
            return real(*args, **kwargs)

        return call

    for name in ("mkdir", "fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


def refused_at(home, run, n, code) -> bool:
    """Whether the run met its n-th file-system step. If so: exit 3, steps whole, and the same bits in the end."""
    begin(home, run)
    with pytest.MonkeyPatch.context() as patch:
        refuse_from(patch, n, code)
        answer, _, err = run_cli(*pretrain(home, run))
    if answer == 0:
        return False
    assert answer == 3 and os.strerror(code) in err and str(run) in err and "Traceback" not in err, err
    assert ".tmp" not in err
    assert_steps_are_whole(run)
    finish(home, run)
    return True


CODES = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS]


@pytest.mark.parametrize(("n", "code"), [(20, errno.ENOSPC), (47, errno.EROFS)])
def test_a_disk_that_refuses_from_some_moment_on(home, tmp_path, n, code):
    assert refused_at(home, tmp_path / "run", n, code)


@pytest.mark.exam
def test_a_disk_that_refuses_from_any_moment_on(home, tmp_path):
    """Every fifth of the run's file-system steps, with each kind of refusal in turn."""
    n = 1
    while refused_at(home, tmp_path / str(n), n, CODES[n % 4]):
        n += 5
    assert n > 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a file system of one's own")
def test_a_real_disk_that_is_full(home, tmp_path):
    """A file system with room for two checkpoints: the third does not fit. Then it grows, and the run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"{sys.executable} -m minigpt " + " ".join(pretrain(home, disk / "run"))
    script = f"""
        mount -t tmpfs -o size=1m tmpfs {disk} || exit 99
        {command} 2> {tmp_path}/error; echo $? > {tmp_path}/code
        cp -r {disk}/run {tmp_path}/full; mount -o remount,size=64m {disk}
        {command} && cp -r {disk}/run {tmp_path}/final
    """
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    try:
        done = subprocess.run(command, env=killing.environment(tmp_path / "cache"), capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode in (1, 99) and not (tmp_path / "code").exists():
        pytest.skip(f"no file system may be mounted here: {done.stderr}")
    err = (tmp_path / "error").read_text()
    assert (tmp_path / "code").read_text() == "3\n", err
    assert f"could not write {disk / 'run' / 'step-0000012'}: No space left on device" in err and "Traceback" not in err
    assert "bytes, as step-0000008 does; the disk has" in err
    assert_steps_are_whole(tmp_path / "full")
    assert [n for n, _ in checkpoint.steps(tmp_path / "full")] == [8, 4]
    assert done.returncode == 0, done.stderr
    killing.assert_same_run(home / "straight", tmp_path / "final")


# ------------------------------------------------------------------------------------------- going on without saving


@pytest.fixture
def full_between(home, monkeypatch):
    """full_between(first, last, limit): while these steps are trained and saved, no file grows beyond `limit` bytes."""

    def set_up(first, last, limit):
        calls, real = 0, losses.next_token
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def next_token(model, batch):
            nonlocal calls
            calls += model.training
            if model.training and calls % 3 == 1:  # three micro-batches a step
                step = calls // 3 + 1
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit if first <= step <= last else soft, hard))
            return real(model, batch)

        monkeypatch.setattr(losses, "next_token", next_token)

    with files_up_to(resource.getrlimit(resource.RLIMIT_FSIZE)[0]):  # whatever happens, the old limit comes back
        yield set_up


@pytest.mark.parametrize("limit", [200_000, 600])
def test_training_goes_on_without_saving_when_told_to(home, tmp_path, full_between, limit):
    """Checkpoints of steps 4 and 8 do not fit, at 600 bytes nor do log rows. Then there is room, and nothing is lost:
    the same weights, and every row once."""
    run = tmp_path / "run"
    full_between(3, 10, limit)
    code, _, err = run_cli(*pretrain(home, run, "--save-failure", "warn"))
    assert code == 0, err
    assert [int(n) for n in re.findall(r"warning: step (\d+) is not saved: ", err)] == [4, 8]
    assert [n for n, _ in checkpoint.steps(run)] == [14, 12]
    killing.assert_same_run(home / "straight", run)


def test_a_run_whose_end_cannot_be_saved_is_no_success(home, tmp_path, full_between):
    """Told to go on without saving, it still ends with exit 3, and resumes from what there was."""
    run = tmp_path / "run"
    full_between(9, 14, 200_000)
    code, _, err = run_cli(*pretrain(home, run, "--save-failure", "warn"))
    assert code == 3 and "warning: step 12 is not saved" in err and f"error: could not write {run / LAST}" in err
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert "resume step 8 of 14" in finish(home, run)


# --------------------------------------------------------------------------------------- no place for a run directory


def test_out_is_a_file_or_below_one(home, tmp_path):
    """Exit 3 at once, with one sentence and what to do."""
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        code, result, err = answered_at_once(pretrain(home, out), tmp_path / "cache")
        assert (code, result) == (3, "") and err.startswith(f"error: could not write {out}: ") and "--out" in err
        assert len(err.splitlines()) == 2
    assert (tmp_path / "file").read_text() == "precious"


@contextlib.contextmanager
def as_somebody():
    """Without the rights of root, who may write anywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_one_may_not_write_to(home, tmp_path):
    """A new run, and one that goes on: one sentence, and nothing is changed."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        base.chmod(0o755)
        shutil.copy(home / "text.jsonl", base)
        shutil.copytree(home / "tok", base / "tok")
        begin(base, base / "run")
        (base / "run").chmod(0o555)
        (base / "empty").mkdir(mode=0o555)
        before = contents(base)
        for out in (base / "run", base / "empty", base / "empty" / "new"):
            with as_somebody():
                code, _, err = run_cli(*pretrain(base, out))
            assert code == 3 and f"error: could not write {out}: Permission denied" in err and "--out" in err
            assert len(err.splitlines()) == 2 and contents(base) == before


def test_a_cache_that_cannot_be(home, tmp_path, monkeypatch):
    """It is named, with its own way out, and the run directory is as if nothing had been."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "file" / "cache"))
    code, _, err = run_cli(*pretrain(home, tmp_path / "run"))
    assert code == 3 and str(tmp_path / "file" / "cache") in err and "MINIGPT_CACHE" in err
    assert contents(tmp_path / "run") == {}
