"""--dry-run, --batch-size auto and what happens when memory runs out: from outside."""

import json
import resource
import subprocess
import sys

import pytest

from tests.conftest import run_cli
from tests.stages.killing import environment
from tests.stages.test_training_flags import TINY, home, metrics, train, weights  # noqa: F401  (home, train: fixtures)

CHAT = [{"conversations": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
        for i in range(40)]  # fmt: skip


def test_dry_run_tells_all_and_leaves_nothing(home, tmp_path):  # noqa: F811
    code, out, err = run_cli(
        "pretrain", "-d", home / "a.jsonl", *TINY, "-t", home / "tok", "-o", tmp_path / "run", "--steps", 7, "--dry-run"
    )
    assert code == 0 and not (tmp_path / "run").exists() and list(tmp_path.iterdir()) == []
    assert "dry run" in err and "7 steps × 128 tokens" in err and "memory about" in err
    assert "time   about 0:0" in err and "7 steps of" in err
    assert out.startswith("the first row, ")
    row = out.split("marked:\n")[1]
    assert row.startswith("<|endoftext|>") or "⟦" in row
    assert "quick brown fox" in row


def test_dry_run_marks_what_a_chat_model_learns(home, train, tmp_path):  # noqa: F811
    base, _, _ = train()
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHAT))
    command = ["sft", "-m", base, "-d", tmp_path / "chat.jsonl", "--max-len", 32, "--steps", 9, "--dry-run"]
    code, out, _ = run_cli(*command)
    assert code == 0
    row = out.split("marked:\n")[1]
    assert "user\nsay" in row and "⟦it is" in row  # the answer is learnt, the question is not
    assert "steps: 9  # flag" in run_cli(*command, "--verbose")[1]
    code, out, _ = run_cli(*command, "--json")
    found = json.loads(out)
    assert code == 0 and found["status"] == "ok" and found["steps"] == 9 and found["config"]["max_len"] == 32
    assert found["eta_seconds"] == pytest.approx(9 * found["seconds_per_step"])
    assert len(found["sample"]["ids"]) == len(found["sample"]["learnt"]) and any(found["sample"]["learnt"])


def test_dry_run_refuses_what_the_run_would_refuse(train):  # noqa: F811
    run, _, _ = train()
    before = sorted(p.name for p in run.iterdir())
    _, err, code = train("--dry-run")
    assert code == 2 and "already holds a run" in err
    _, err, code = train("--dry-run", "--resume", "auto")
    assert code == 2 and "--dry-run looks at a new run" in err
    assert train("--dry-run", "--overwrite")[2] == 0
    assert sorted(p.name for p in run.iterdir()) == before


def test_batch_size_auto_is_tried_and_recorded(train):  # noqa: F811
    run, err, code = train("--batch-size", "auto", "--batch-tokens", "256", "--dtype", "float32")
    assert code == 0 and "tok/s by rows at once: 1: " in err and "→ --batch-size" in err
    chosen = int(err.split("→ --batch-size ")[1].split()[0])
    assert f"batch_size: {chosen}  # auto, by trying" in (run / "config.yaml").read_text()
    fixed, _, _ = train("--batch-size", str(chosen), "--batch-tokens", "256", "--dtype", "float32", out="fixed")
    for name, weight in weights(run).items():
        assert weight.equal(weights(fixed)[name]), name  # the trials have left no trace


def limited(gigabytes):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 1e9),) * 2)

    return limit


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_out_of_memory_under_a_limit_on_address_space(home, tmp_path):  # noqa: F811
    """Half the rows fit: the run goes on, with the losses of a run that began so. None fit: exit 5 in five lines."""
    data = tmp_path / "long.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"row {i} " + "the quick brown fox " * 200}) + "\n" for i in range(300))
    )
    command = [sys.executable, "-m", "minigpt", "pretrain", "-d", str(data), "-t", str(home / "tok")]
    command += ["--size", "3m", "--max-len", "512", "--steps", "2", "--batch-tokens", "65536", "--eval-rows", "2"]
    command += ["--dtype", "float32", "--device", "cpu"]
    env = environment(tmp_path / "cache")

    def go(out, rows, gigabytes=None):
        limit = limited(gigabytes) if gigabytes else None
        args = [*command, "-o", str(tmp_path / out), "--batch-size", str(rows)]
        return subprocess.run(args, env=env, capture_output=True, text=True, preexec_fn=limit, timeout=300)

    free = go("free", 64)
    assert free.returncode == 0, free.stderr
    tight = go("tight", 128, 7.0)
    assert tight.returncode == 0, tight.stderr
    assert "ran out of memory with 128 rows at once: going on with 64" in tight.stderr
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("free", "tight")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    none = go("none", 128, 3.0)
    assert none.returncode == 5, none.stderr
    fault = none.stderr[none.stderr.index("error:") :].splitlines()
    assert len(fault) <= 5 and "a step needs about" in fault[0] and "--batch-size 32" in none.stderr
    assert not list((tmp_path / "none").glob("step-*"))
