"""Runs of several processes, from outside: start them, find them, disturb them, and see that none is left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import run_cli
from tests.stages.killing import environment

SHAPE = ["--size", "1m", "--set", "model.hidden_size=32", "--set", "model.num_hidden_layers=2",
         "--set", "model.intermediate_size=48", "--set", "model.num_attention_heads=2", "--max-len", "48",
         "--dtype", "float32", "--val-split", "0.1"]  # fmt: skip
MARK = "MINIGPT_TEST_MARK"  # in the environment of all that a launch starts, so that orphans are found too
TORCHRUN = ("torch.distributed.run", "--standalone", "--local-addr=localhost")


def prepare(base: Path) -> Path:
    """Data and a tokenizer for all runs below `base`."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in "山水風月花鳥" for b in "白青明清遠高"]
    rows = [{"text": "，".join(rng.choices(words, k=rng.randint(3, 40)))} for _ in range(220)]
    (base / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, _, err = run_cli("tokenize", "train", "-d", base / "text.jsonl", "--vocab-size", "400", "-o", base / "tok")
    assert code == 0, err
    return base


def pretrain(home: Path, out: Path, *flags: object) -> list[str]:
    """The command of a run: started when `out` is empty, else continued."""
    given = ["-d", home / "text.jsonl", "-t", home / "tok", "-o", out, "--resume", "auto", *SHAPE, *flags]
    return ["pretrain", *map(str, given)]


def temporary(cache: Path) -> Path:
    """Where the processes of all launches put what is temporary."""
    folder = cache.parent / "temporary"
    folder.mkdir(exist_ok=True)
    return folder


class Launch:
    """One command line and all processes that come of it."""

    def __init__(self, words: list[str], cache: Path, program: tuple[str, ...], startup: Path | None):
        self.mark = uuid.uuid4().hex
        env = environment(cache) | {MARK: self.mark, "TMPDIR": str(temporary(cache))}
        if startup is not None:
            env["PYTHONPATH"] = str(startup)
        self.child = subprocess.Popen(
            [sys.executable, "-m", *program, *words],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def processes(self) -> dict[int, str | None]:
        """pid → RANK of every living process, None for those that are no rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                pairs = dict(e.split("=", 1) for e in (folder / "environ").read_text().split("\0") if "=" in e)
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except (OSError, UnicodeDecodeError):
                continue
            if pairs.get(MARK) == self.mark and state != "Z":
                found[int(folder.name)] = pairs.get("RANK")
        return found

    def rank(self, number: int) -> int:
        """The pid of a rank."""
        return next(pid for pid, rank in self.processes().items() if rank == str(number))

    def wait_for(self, reached: Callable[[], bool], timeout: float = 600) -> None:
        deadline = time.monotonic() + timeout
        while not reached():
            assert self.child.poll() is None, f"ended with {self.child.returncode}: {self.child.communicate()[1]}"
            assert time.monotonic() < deadline, "nothing came of it"
            time.sleep(0.005)

    def kill_all(self) -> None:
        """SIGKILL to every process, as a machine that loses power would."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def end(self, timeout: float = 600) -> tuple[int, str, str]:
        """(exit code, stdout, stderr), once the command has ended."""
        try:
            out, err = self.child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill_all()
            out, err = self.child.communicate()
            raise AssertionError(f"did not end, having said: {out}{err}") from None
        return self.child.returncode, out, err

    def all_gone(self, within: float, but: tuple[int, ...] = ()) -> None:
        """Wait until no process is left, orphans included."""
        deadline = time.monotonic() + within
        while left := {pid: rank for pid, rank in self.processes().items() if pid not in but}:
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.02)


def ends(*launches: Launch) -> list[tuple[int, str, str]]:
    """Each one's `end`. They need each other: once one has failed, the others are killed, and it is seen why."""
    deadline = time.monotonic() + 600
    while None in (codes := [launch.child.poll() for launch in launches]) and time.monotonic() < deadline:
        if not {*codes} <= {None, 0, 75}:
            for launch in launches:
                launch.kill_all()
        time.sleep(0.05)
    return [launch.end(1) for launch in launches]


@contextmanager
def launched(
    words: list[str], cache: Path, *, nproc: int = 2, torchrun: bool = False, startup: Path | None = None
) -> Iterator[Launch]:
    """`minigpt WORDS --nproc N`, or the same under torchrun. startup: directory of a sitecustomize.py.

    Whatever is left of it at the end is killed.
    """
    program = (*TORCHRUN, f"--nproc-per-node={nproc}", "-m", "minigpt") if torchrun else ("minigpt",)
    launch = Launch(words if torchrun else [*words, "--nproc", str(nproc)], cache, program, startup)
    try:
        yield launch
    finally:
        launch.kill_all()
        launch.child.communicate()


def finish(words: list[str], cache: Path, *, nproc: int = 2, torchrun: bool = False) -> tuple[str, str]:
    """Run to a good end. (stdout, stderr)"""
    with launched(words, cache, nproc=nproc, torchrun=torchrun) as launch:
        code, out, err = launch.end()
    assert code == 0, err
    return out, err
