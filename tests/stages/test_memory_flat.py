"""A run takes no more memory as it goes on: the resident set after 200 steps is that after 50."""

import subprocess
import sys

import pytest

from tests.stages import killing
from tests.stages.short_run import FLAGS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MB = 10**6

# Tells the resident set, in bytes, with every log row.
TOLD = """
import os, sys
from minigpt.core.train.run import Run
log = Run.log
def told(self, row, name="metrics"):
    log(self, row, name)
    if name == "metrics":
        with open("/proc/self/statm") as f:
            print(row["step"], int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE"), file=sys.stderr)
Run.log = told
from minigpt.cli.app import main
sys.exit(main())
"""


def resident(home, out, *flags) -> dict[int, int]:
    """Log step → bytes, of 200 steps with all that comes between them: logging, evaluation, samples, checkpoints."""
    pace = ["--steps", "200", "--log-every", "10", "--eval-every", "45", "--save-every", "25", "--batch-size", "7"]
    args = ["pretrain", "-d", home / "text.jsonl", "-t", home / "tok", "-o", out, *FLAGS, *pace, "--quiet", *flags]
    command = [sys.executable, "-c", TOLD, *map(str, args)]
    done = subprocess.run(command, env=killing.environment(home / "cache"), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {int(step): int(size) for step, size in (line.split() for line in done.stderr.splitlines())}


def test_memory_is_flat_in_float32(home, tmp_path):
    """Within 1 MB from step 50 on: a step that kept its rows of tokens would take 2."""
    sizes = resident(home, tmp_path / "run", "--dtype", "float32")
    assert sizes[190] - sizes[50] < 1 * MB, sizes


@pytest.mark.slow
def test_memory_is_flat_in_bfloat16_once_every_length_has_been_met(home, tmp_path):
    """The CPU library makes a kernel for each length of document (--max-len 48 of them) and keeps it: that is all."""
    sizes = resident(home, tmp_path / "run", "--dtype", "bfloat16", "--steps", "600")
    assert sizes[200] - sizes[50] < 0.1 * sizes[50] and sizes[590] - sizes[400] < 1 * MB, sizes


@pytest.mark.parametrize("flags", [
    pytest.param(["--optimizer", "muon"], marks=pytest.mark.slow),
    pytest.param(["--grad-checkpoint"], marks=pytest.mark.exam),
    pytest.param(["--pack", "pad"], marks=pytest.mark.exam),
])  # fmt: skip
def test_memory_is_flat_in_other_ways_to_train(home, tmp_path, flags):
    sizes = resident(home, tmp_path / "run", "--dtype", "float32", *flags)
    assert sizes[190] - sizes[50] < 1 * MB, sizes
