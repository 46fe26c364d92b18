"""Step directories: whole or absent, and damage is found whatever its form."""

import errno
import json
import random

import pytest
import torch

from minigpt.core.errors import DataError
from minigpt.core.report import Report
from minigpt.core.train import checkpoint


class Ears(Report):
    def __init__(self):
        self.heard = []

    def warn(self, text, *, fix=None):
        self.heard.append(text)


def write_model(folder):
    from safetensors.torch import save_file

    save_file({"w": torch.arange(6.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def save(run, step):
    return checkpoint.save(
        run,
        step,
        write_model,
        {"w/exp_avg": torch.full((6,), float(step))},
        {"torch": torch.get_rng_state()},
        {"a": step},
    )


def test_round_trip(tmp_path):
    path = save(tmp_path, 7)
    assert path.name == "step-0000007" and checkpoint.pointer(tmp_path, "latest") == path.name
    back = checkpoint.load_newest(tmp_path, Report())
    assert back.step == 7 and back.state["a"] == 7
    assert torch.equal(back.weights["w"], torch.arange(6.0))
    assert torch.equal(back.optim["w/exp_avg"], torch.full((6,), 7.0))
    assert torch.equal(back.rng["torch"], torch.get_rng_state())


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def damage(path, how):
    data = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        at = random.Random(0).randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif how == "zero-tailed":
        path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    else:
        path.write_bytes(b"garbage")


@pytest.mark.parametrize("how", ["deleted", "emptied", "truncated", "flipped", "zero-tailed", "garbage"])
def test_any_damaged_file_falls_back_to_the_step_before(tmp_path, how):
    """Every file in turn, the manifest too: one warning that names the file."""
    save(tmp_path, 1)
    names = [p.relative_to(save(tmp_path, 2)) for p in files(save(tmp_path, 2))]
    assert len(names) == 6
    for name in names:
        folder = save(tmp_path, 2)
        damage(folder / name, how)
        ears = Ears()
        assert checkpoint.load_newest(tmp_path, ears).step == 1
        assert len(ears.heard) == 1 and str(name.name) in ears.heard[0], (name, ears.heard)


def test_all_damaged_is_an_error_and_never_a_fresh_start(tmp_path):
    damage(save(tmp_path, 1) / "model.safetensors", "flipped")
    damage(save(tmp_path, 2) / "trainer" / "state.json", "deleted")
    with pytest.raises(DataError, match="every checkpoint") as e:
        checkpoint.load_newest(tmp_path, Report())
    assert "model.safetensors" in e.value.found and "state.json" in e.value.found


def test_no_step_yet_is_none(tmp_path):
    assert checkpoint.load_newest(tmp_path, Report()) is None


def test_unfinished_writes_are_cleared_and_never_read(tmp_path):
    save(tmp_path, 1)
    leftover = tmp_path / ".step-0000002.abc.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert checkpoint.load_newest(tmp_path, Report()).step == 1
    assert not leftover.exists()


def test_failed_write_leaves_the_earlier_step_and_no_litter(tmp_path):
    save(tmp_path, 1)

    def full(folder):
        write_model(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match="No space left") as e:
        checkpoint.save(tmp_path, 2, full, {}, {}, {})
    assert "--resume" in e.value.fix
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-0000001"]
    assert checkpoint.load_newest(tmp_path, Report()).step == 1


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "best").write_text("step-0000002\n")
    checkpoint.prune(tmp_path, keep=2)
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [5, 4, 2]
    assert not list(tmp_path.glob(".*"))


def test_newer_format_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    state = json.loads((folder / "trainer" / "state.json").read_text())
    (folder / "trainer" / "state.json").write_text(json.dumps({**state, "format": 99}))
    checkpoint.seal(folder)
    with pytest.raises(DataError, match="format 99"):
        checkpoint.load_newest(tmp_path, Report())


def test_no_pickle_anywhere(tmp_path):
    for path in files(save(tmp_path, 1)):
        assert path.suffix in (".safetensors", ".json")
        assert path.read_bytes()[:2] != b"\x80\x04"
