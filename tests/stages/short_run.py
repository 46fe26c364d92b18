"""One short pretraining that the fault tests disturb: 14 steps, saved after 4, 8, 12 and 14, run in this process."""

import json
import random
import subprocess
import sys
from pathlib import Path

from tests.conftest import run_cli
from tests.stages import killing

STEPS = 14
LAST, BEFORE = "step-0000014", "step-0000012"  # its two newest checkpoints
# 7 rows a step over 3 micro-batches; saves, logs and evaluations fall on different steps
FLAGS = ["--size", "1m", "--set", "model.hidden_size=32", "--set", "model.num_hidden_layers=2",
         "--set", "model.intermediate_size=48", "--set", "model.num_attention_heads=2", "--max-len", "48",
         "--batch-tokens", "336", "--batch-size", "3", "--steps", str(STEPS), "--save-every", "4", "--log-every", "3",
         "--eval-every", "9", "--val-split", "0.1"]  # fmt: skip


def prepare(base: Path) -> Path:
    """Data, a tokenizer, and the straight run that all others are compared with."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in "山水風月花鳥" for b in "白青明清遠高"]
    rows = [{"text": "，".join(rng.choices(words, k=rng.randint(3, 40)))} for _ in range(220)]
    (base / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, _, err = run_cli("tokenize", "train", "-d", base / "text.jsonl", "--vocab-size", "400", "-o", base / "tok")
    assert code == 0, err
    code, out, err = run_cli(*pretrain(base, base / "straight"))
    assert code == 0 and out == f"{base / 'straight' / LAST}\n", err
    return base


def pretrain(home: Path, out: Path, *flags: object) -> list[str]:
    """The command of the run: started when `out` is empty, else continued."""
    given = ["-d", home / "text.jsonl", "-t", home / "tok", "-o", out, "--resume", "auto", *FLAGS, *flags]
    return ["pretrain", *map(str, given)]


def begin(home: Path, out: Path) -> None:
    """Stop the run before its first step, with a checkpoint of step 0: what follows goes on from there."""
    code, _, err = run_cli(*pretrain(home, out, "--max-time", "0.000001s"))
    assert code == 75 and (out / "latest").read_text() == "step-0000000\n", err


def finish(home: Path, out: Path) -> str:
    """The same command again: it ends well, with the bits of the straight run, and without litter. Returns stderr."""
    code, _, err = run_cli(*pretrain(home, out))
    assert code == 0, err
    killing.assert_same_run(home / "straight", out)
    return err


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a directory, the lock excepted."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def answered_at_once(args: list[str], cache: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a child process that must answer without importing torch.

    That import takes more than a second and all the rest half of one; unlike a clock it does not depend on what else
    the machine does.
    """
    environment = {**killing.environment(cache), "PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, "-m", "minigpt", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    imports = [line for line in done.stderr.splitlines(keepends=True) if line.startswith("import time:")]
    modules = {line.split("|")[-1].strip() for line in imports}
    assert "minigpt.cli.app" in modules and "torch" not in modules
    return done.returncode, done.stdout, "".join(x for x in done.stderr.splitlines(keepends=True) if x not in imports)
