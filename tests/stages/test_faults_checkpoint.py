"""A damaged checkpoint costs steps, never the run: from outside, on the files of a finished run."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt.core.train import checkpoint
from tests.conftest import run_cli
from tests.stages.short_run import BEFORE, FLAGS, LAST, contents, finish, pretrain

FILES = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "trainer/optim.safetensors", "trainer/rng.safetensors", "trainer/state.json", "MANIFEST.json"]  # fmt: skip


def flipped(data: bytes) -> bytes:
    at = random.Random(len(data)).randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE = {
    "truncated": lambda data: data[:-1],
    "halved": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "deleted": lambda data: None,
    "bit-flipped": flipped,
    "zero-tailed": lambda data: data[: len(data) // 2].ljust(len(data), b"\0"),
    "garbage": lambda data: random.Random(0).randbytes(len(data)),
}


@pytest.fixture
def run(home, tmp_path):
    """A finished run of one's own."""
    shutil.copytree(home / "straight", tmp_path / "run")
    return tmp_path / "run"


def damage(path: Path, how: str) -> None:
    data = DAMAGE[how](path.read_bytes())
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


def falls_back(home, run, name, how):
    damage(run / LAST / name, how)
    err = finish(home, run)
    assert err.count("is damaged") == 1 and f"{LAST} is damaged: {name}" in err and "resume step 12 of 14" in err


def test_the_files_are_all_there_are(home):
    assert sorted(contents(home / "straight" / LAST)) == sorted(FILES)


@pytest.mark.parametrize(("name", "how"), [*zip(FILES, [*DAMAGE, *DAMAGE], strict=False)])
def test_a_damaged_file_costs_the_steps_since_the_checkpoint_before(home, run, name, how):
    """One warning that names the file, then the bits of the straight run. Each file in one of the ways."""
    falls_back(home, run, name, how)


@pytest.mark.exam
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_costs_the_steps_since_the_checkpoint_before_63_ways(home, run, name, how):
    falls_back(home, run, name, how)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_bit_counts(run, name):
    """Forty flips of one bit each, anywhere in the file: none goes unseen."""
    path = run / LAST / name
    data, rng = path.read_bytes(), random.Random(name)
    for _ in range(40):
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        assert name in (checkpoint.fault(run / LAST) or ""), at


def test_two_damaged_checkpoints_cost_the_steps_of_both(home, run):
    damage(run / LAST / "model.safetensors", "bit-flipped")
    damage(run / BEFORE / "trainer/optim.safetensors", "truncated")
    err = finish(home, run)
    assert err.count("is damaged") == 2 and "resume step 8 of 14" in err


def test_a_half_deleted_and_a_wholly_deleted_checkpoint(home, run):
    shutil.rmtree(run / LAST / "trainer")
    assert f"{LAST} is damaged: trainer/" in finish(home, run)
    shutil.rmtree(run / LAST)
    err = finish(home, run)
    assert f"{run / LAST} is gone" in err and "resume step 12 of 14" in err


@pytest.mark.parametrize("text", [None, b"", b"step-0000099\n", b"\xff\xfe", b"../../.."])
def test_the_newest_checkpoint_is_found_without_the_file_that_names_it(home, run, text):
    (run / "latest").unlink()
    if text is not None:
        (run / "latest").write_bytes(text)
    assert "resume step 14 of 14" in finish(home, run)


def test_what_a_crash_leaves_at_the_end_of_a_log_is_dropped(home, run):
    """Zeros of a block that was never written, a stray number, half a row."""
    for name in ("metrics", "samples"):
        with open(run / f"{name}.jsonl", "ab") as f:
            f.write(bytes(50) + b'\n12\n\xff\xfe\n{"step": 14, "lo')
    falls_back(home, run, "model.safetensors", "halved")


def test_a_damaged_checkpoint_never_displaces_a_good_one(home, run):
    """It has the highest number, and one is kept: that is the one written since."""
    damage(run / LAST / "model.safetensors", "bit-flipped")
    code, _, err = run_cli(*pretrain(home, run, "--steps", "13", "--keep", "1"))
    assert code == 0, err
    assert checkpoint.fault(run / "step-0000013") is None and checkpoint.pointer(run, "latest") == "step-0000013"
    assert [n for n, _ in checkpoint.steps(run) if n > 13] == [] and f"damaged-{LAST}" in err


def test_all_damaged_is_an_error_and_nothing_is_touched(home, run):
    """Exit 3 with each step and file named; never a run from zero."""
    ways = [*zip(checkpoint.steps(run), FILES, DAMAGE, strict=False)]
    assert len(ways) == 3
    for (_, folder), name, how in ways:
        damage(folder / name, how)
    before = contents(run)
    code, out, err = run_cli(*pretrain(home, run))
    assert (code, out) == (3, "") and "every checkpoint of" in err
    for (_, folder), name, _ in ways:
        assert f"{folder} is damaged: {name}" in err
    assert contents(run) == before


# ------------------------------------------------------------------------------------------------ nothing is unpickled


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """The directory that a payload makes. It does: the test's own unpickling shows it."""
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(mark)))  # noqa: S301
    mark.rmdir()
    yield mark
    assert not mark.exists()


def pickled(path: Path, mark: Path, how: str) -> None:
    """Put a payload in the place of a file: as torch saves it, or as a plain pickle."""
    if how == "torch":
        torch.save({"model": Payload(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(mark)))


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_under_a_manifest_of_its_own_is_refused(home, run, mark, name, how):
    """Whoever can forge the manifest still gets nothing executed: exit 3 with the file named, and the run as it was."""
    pickled(run / LAST / name, mark, how)
    checkpoint.seal(run / LAST)
    before = contents(run)
    code, _, err = run_cli(*pretrain(home, run))
    assert code == 3 and str(run / LAST / name) in err and "Traceback" not in err
    assert contents(run) == before


def test_a_pickle_in_a_checkpoint_is_damage(home, run, mark):
    for name in ("model", "trainer/optim", "trainer/rng"):
        pickled(run / LAST / f"{name}.safetensors", mark, "torch")
    finish(home, run)


@pytest.mark.parametrize("command", [["generate", "-p", "山"], ["sft", "-d", "chat.jsonl", "-o", "sft"], ["info"]])
def test_a_pickle_in_the_place_of_weights_is_refused(run, mark, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chat.jsonl").write_text(json.dumps({"prompt": "1+1?", "completion": "2"}) + "\n")
    pickled(run / LAST / "model.safetensors", mark, "torch")
    code, _, err = run_cli(*command, *(["-m"] if command[0] != "info" else []), run)
    assert code == 3 and "model.safetensors" in err and "Traceback" not in err


def test_a_pickle_in_a_token_store_is_never_read(home, run, mark):
    """In the cache such a store is made again; named as data it is refused."""
    store = Path(json.loads((run / "run.json").read_text())["store"])
    np.save(store / "docs.npy", np.array([Payload(mark)], dtype=object), allow_pickle=True)
    code, _, err = run_cli("pretrain", "-d", store, "-t", home / "tok", "-o", run.with_name("other"), *FLAGS)
    assert code == 3 and "docs.npy" in err and "Traceback" not in err
    damage(run / LAST / "config.json", "deleted")
    finish(home, run)
