"""Run the command line in child processes that die at chosen or random moments, and compare what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WALL_CLOCK = {"tok_s", "mem_gb", "mfu"}
# Dies by SIGKILL at the n-th file-system step of the kind a checkpoint is made of: between any two of them.
DOOMED = """
import os, signal, sys
left = int(sys.argv.pop(1))
def doomed(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
os.replace, os.fsync, os.mkdir = doomed(os.replace), doomed(os.fsync), doomed(os.mkdir)
from minigpt.cli.app import main
sys.exit(main())
"""


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "MINIGPT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(args: list[str], cache: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "minigpt", *args]
    return subprocess.run(command, env=environment(cache), capture_output=True, text=True, timeout=timeout)


def run_until_file_step(args: list[str], cache: Path, step: int) -> int:
    """The exit code: -SIGKILL when the run had that many file-system steps, else its own."""
    command = [sys.executable, "-c", DOOMED, str(step), *args]
    return subprocess.run(command, env=environment(cache), capture_output=True, timeout=120).returncode


def run_and_signal(args: list[str], cache: Path, delay: float, number: int, out: Path) -> int:
    """Start, wait until the run has logged something and `delay` seconds more, send the signal. The exit code."""
    child = subprocess.Popen(
        [sys.executable, "-m", "minigpt", *args], env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    before = size(out)
    deadline = time.monotonic() + 60
    while child.poll() is None and size(out) == before and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    child.send_signal(number)
    child.communicate(timeout=60)
    return child.returncode


def size(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def rows(out: Path, name: str = "metrics") -> list[dict]:
    path = out / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Two finished runs hold the same bits: weights, optimizer, generators, counters, cursor, and every logged row."""
    last_a, last_b = ((d / "latest").read_text().strip() for d in (a, b))
    assert last_a == last_b
    files = ["model.safetensors", "config.json", "tokenizer.json"]
    files += [f"trainer/{f}" for f in ("optim.safetensors", "rng.safetensors", "state.json")]
    for name in files:
        assert (a / last_a / name).read_bytes() == (b / last_b / name).read_bytes(), name
    for name in ("metrics", "samples"):
        assert rows(a, name) == rows(b, name), name
    assert not [p for p in b.iterdir() if p.name.endswith((".tmp", ".old"))]


SIGKILL = -signal.SIGKILL
