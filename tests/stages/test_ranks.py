"""One process or several, whole models or shards: the same rows, the same losses, one checkpoint format."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_cli
from tests.stages.killing import rows, size
from tests.stages.ranks import ends, finish, launched, prepare, pretrain, temporary

pytestmark = pytest.mark.dist

STEPS = 200
PART = 20  # steps of a run that goes on with another number of processes
# 8 rows a step, more than eight passes over the data; the learning rate does not depend on the length of the run
PACE = ["--batch-tokens", "384", "--schedule", "constant", "--warmup", "10", "--log-every", "1", "--eval-every", "100",
        "--save-every", "100"]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that are started
    with pytest.MonkeyPatch.context() as patch:
        home = prepare(tmp_path_factory.mktemp("ranks"))
        patch.setenv("MINIGPT_CACHE", str(home / "cache"))
        yield home
    torch.set_num_threads(before)


def train(home, out, ranks, *flags, steps=STEPS):
    """Train up to a step, from the start or from where `out` is; one rank alone runs in this process."""
    command = pretrain(home, out, *PACE, "--steps", steps, *flags)
    if ranks > 1:
        assert finish(command, home / "cache", nproc=ranks)[0] == f"{last(out, steps)}\n"
        return
    code, told, err = run_cli(*command)
    assert (code, told) == (0, f"{last(out, steps)}\n"), err


def last(out, step):
    return out / f"step-{step:07d}"


@pytest.fixture(scope="module")
def alone(home):
    """The run in one process and one micro-batch a step: all others are compared with it."""
    train(home, home / "alone", 1, "--batch-size", "8")
    return home / "alone"


def compare(a, b, tolerance, first=1e-6, steps=STEPS):
    """Each step's loss, and what tells which rows it was made of: tokens and passes so far."""
    one, other = rows(a)[:steps], rows(b)
    assert [(r["step"], r["tokens"], r["epoch"]) for r in one] == [(r["step"], r["tokens"], r["epoch"]) for r in other]
    assert [r["step"] for r in other] == list(range(1, steps + 1))
    apart = [abs(x["loss"] - y["loss"]) for x, y in zip(one, other, strict=True)]
    norms = [abs(x["grad_norm"] / y["grad_norm"] - 1) for x, y in zip(one, other, strict=True)]
    print(f"\n{b.name}: first step {apart[0]:.1e}, largest {max(apart):.1e}, norms {norms[0]:.1e} {max(norms):.1e}")
    assert apart[0] <= first
    assert max(apart) <= tolerance
    assert norms[0] <= 1e-6  # neither Adam nor Muon would notice a gradient that is a multiple of the right one
    assert one[0]["loss"] - one[-1]["loss"] > 1  # something was learnt: equal losses of an idle model say nothing


def test_four_micro_batches_of_2_are_one_of_8(home, alone):
    train(home, home / "4x2", 1, "--batch-size", "2")
    compare(alone, home / "4x2", 1e-5)


def same_losses(home, alone, ranks):
    """Every step's loss, both validations, the cursor of rows and what run.json says; nothing temporary is left."""
    out = home / f"ranks-{ranks}"
    train(home, out, ranks, "--batch-size", "2")
    assert not list(temporary(home / "cache").iterdir())
    compare(alone, out, 1e-5)
    for a, b in zip(rows(alone), rows(out), strict=True):
        assert ("val_loss" in a) is ("val_loss" in b) is (a["step"] % 100 == 0)
        assert a.get("val_loss") == pytest.approx(b.get("val_loss"), abs=1e-5)
        assert a.get("val_bpb") == pytest.approx(b.get("val_bpb"), abs=1e-5)
    one, several = (json.loads((last(d, STEPS) / "trainer" / "state.json").read_text()) for d in (alone, out))
    assert several["source"] == one["source"] == {"row": 8 * STEPS}
    assert (several["world_size"], several["fingerprints"]) == (ranks, one["fingerprints"])
    info = json.loads((out / "run.json").read_text())
    assert (info["status"], info["world_size"], len(info["sessions"])) == ("done", ranks, 1)


def test_two_ranks_are_one_process(home, alone):
    same_losses(home, alone, 2)


@pytest.mark.slow
def test_four_ranks_are_one_process(home, alone):
    same_losses(home, alone, 4)


def test_shards_and_one_process_take_turns(home, alone):
    """fsdp on two ranks, one process, fsdp again: each goes on from the other's checkpoint, as if it were its own."""
    out = home / "turns"
    train(home, out, 2, "--parallel", "fsdp", "--batch-size", "2", steps=PART)
    compare(alone, out, 1e-5, steps=PART)
    by_shards = {name: load_file(last(out, PART) / name) for name in FILES}
    train(home, out, 1, "--batch-size", "3", steps=2 * PART)
    by_one = {name: load_file(last(out, 2 * PART) / name) for name in FILES}
    assert layout(by_shards) == layout(by_one)
    train(home, out, 2, "--parallel", "fsdp", steps=3 * PART)
    compare(alone, out, 1e-5, steps=3 * PART)


FILES = ("model.safetensors", "trainer/optim.safetensors")


def layout(files):
    return {(f, n): (tuple(t.shape), t.dtype) for f, tensors in files.items() for n, t in tensors.items()}


@pytest.mark.slow
def test_two_machines_are_one(home, alone):
    """The same command once on each (here: twice on one), told how many there are and where to meet. A signal to either
    stops both; run again, they go on. Only the machine of rank 0 speaks.
    """
    out = home / "machines"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    command = pretrain(home, out, *PACE, "--steps", STEPS, "--batch-size", "2", "--nnodes", "2", "--rdzv", where)

    def machine():
        return launched(command, home / "cache", nproc=1)

    with machine() as first, machine() as second:
        first.wait_for(lambda: size(out) > 0)
        second.child.terminate()
        ended = ends(first, second)
        assert [code for code, _, _ in ended] == [75, 75], ended
    with machine() as first, machine() as second:
        ended = ends(first, second)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert sorted(told for _, told, _ in ended) == ["", f"{last(out, STEPS)}\n"]
    assert sorted(len(err.splitlines()) > 1 for _, _, err in ended) == [False, True]  # each says that it waits
    compare(alone, out, 1e-5)


@pytest.mark.slow
def test_a_machine_that_stays_alone_says_so(home):
    """And not that it were a fault of ours."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    words = pretrain(home, home / "lonely", "--steps", "1", "--nnodes", "2", "--rdzv", where)
    program = "from minigpt.cli import app, launch; launch.MEETING = 2; raise SystemExit(app.main())"
    end = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120)
    assert (end.returncode, end.stdout) == (4, "")
    assert f"not all of 2 machines came to {where} within 2 seconds" in end.stderr
    assert "Traceback" not in end.stderr


@pytest.mark.slow
def test_the_number_of_ranks_may_change_on_resume(home, alone):
    """2, 1, 2, then 4 ranks: no row repeated or skipped, and the losses of the straight run."""
    out = home / "2-1-2-4"
    for turn, ranks in enumerate((2, 1, 2, 4), start=1):
        train(home, out, ranks, "--batch-size", "2", steps=STEPS * turn // 4)
    compare(alone, out, 1e-5)


@pytest.fixture(scope="module")
def alone_by_muon(home):
    train(home, home / "muon", 1, "--optimizer", "muon", steps=PART)
    return home / "muon"


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_muon_on_two_ranks(parallel, home, alone_by_muon):
    """Newton–Schulz runs in bfloat16, where the last bit of a gradient may become one part in 256 of an update."""
    out = home / f"muon-{parallel}"
    train(home, out, 2, "--optimizer", "muon", "--parallel", parallel, steps=PART)
    compare(alone_by_muon, out, 2e-4, steps=PART)  # measured: 5e-5
