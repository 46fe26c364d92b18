"""core.files: whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.core import files
from minigpt.core.errors import DataError, UsageError


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_sha256(tmp_path):
    data = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_write_atomic_replaces_and_makes_parents(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.write_atomic(path, "one")
    files.write_atomic(path, b"zwei")
    assert path.read_bytes() == b"zwei" and leftovers(path.parent) == []


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    """A full disk in the middle leaves the old text, no rubbish, and an error that names the path."""
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DataError, match=r"a\.txt: No space left") as e:
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and leftovers(tmp_path) == [] and "free some space" in e.value.fix


def test_json_round_trip_and_faults(tmp_path):
    files.write_json(tmp_path / "a.json", {"é": [1, None]})
    assert files.read_json(tmp_path / "a.json") == {"é": [1, None]}
    (tmp_path / "b.json").write_text('{"a": 1,\n oops}')
    with pytest.raises(DataError, match=r"b\.json is not valid JSON") as e:
        files.read_json(tmp_path / "b.json")
    assert "line 2" in e.value.found
    with pytest.raises(DataError, match="is missing"):
        files.read_json(tmp_path / "c.json")
    with pytest.raises(DataError, match="cannot be read"):
        files.read_json(tmp_path)


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path))
    assert files.cache_dir() == tmp_path
    monkeypatch.delenv("MINIGPT_CACHE")
    if os.name != "nt":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
        assert files.cache_dir() == tmp_path / "x" / "minigpt"


def test_a_hash_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    """By its place, size and time; a damaged memory is made again."""
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a"
    path.write_bytes(b"one")
    first = files.remembered_sha256(path)
    monkeypatch.setattr(files, "sha256", lambda _: "read again")
    assert files.remembered_sha256(path) == first == hashlib.sha256(b"one").hexdigest()
    [memo] = (tmp_path / "cache").rglob("*.json")
    memo.write_text("{")
    assert files.remembered_sha256(path) == files.remembered_sha256(path) == "read again"
    monkeypatch.undo()
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "cache"))
    path.write_bytes(b"three")
    assert files.remembered_sha256(path) == hashlib.sha256(b"three").hexdigest()


def test_new_file_appears_whole(tmp_path):
    """Under its own name elsewhere until the block ends; what else was put there goes."""
    path = tmp_path / "deep" / "a.bin"
    with files.new_file(path) as work:
        assert work.name == "a.bin" and not work.exists()
        work.write_bytes(b"x")
        (work.parent / "beside").mkdir()
        assert not path.exists()
    assert path.read_bytes() == b"x" and [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_new_file_keeps_the_old_one_when_it_fails(tmp_path):
    """Whether the block or the disk fails."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    for error, told in ((ValueError("no"), ValueError), (OSError(errno.ENOSPC, "No space left on device"), DataError)):
        with pytest.raises(told), files.new_file(path) as work:
            work.write_bytes(b"half")
            raise error
        assert path.read_bytes() == b"old" and leftovers(tmp_path) == []


def test_new_dir_appears_whole(tmp_path):
    """The directory has its name only when the block has ended."""
    path = tmp_path / "deep" / "d"
    with files.new_dir(path) as work:
        (work / "sub").mkdir()
        (work / "sub" / "f").write_text("x")
        assert not path.exists()
    assert (path / "sub" / "f").read_text() == "x" and leftovers(path.parent) == []


def test_new_dir_replaces_a_directory(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").touch()
    with files.new_dir(tmp_path / "d") as work:
        (work / "new").touch()
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["new"] and leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_new_dir_leaves_nothing_when_its_block_fails(tmp_path, error):
    with pytest.raises(type(error)), files.new_dir(tmp_path / "d") as work:
        (work / "f").touch()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_new_dir_puts_the_old_directory_back_when_the_rename_fails(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").touch()
    replace = os.replace

    def fail_on_work(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail_on_work)
    with pytest.raises(DataError, match="Input/output error"), files.new_dir(tmp_path / "d"):
        pass
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["old"] and leftovers(tmp_path) == []


def test_new_dir_names_a_place_that_cannot_be(tmp_path):
    """A file where a directory must be: DataError with a way out, before any work."""
    (tmp_path / "file").touch()
    with pytest.raises(DataError) as e, files.new_dir(tmp_path / "file" / "d"):
        pytest.fail("the block must not run")
    assert str(tmp_path / "file" / "d") in e.value.message and "--out" in e.value.fix


HOLD = """
import sys, time
from pathlib import Path
from minigpt.core.files import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_run_lock_names_its_owner_and_dies_with_it(tmp_path):
    """A second process is refused with the owner's number; kill -9 of the owner frees the directory."""
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"in use by process {owner.pid}"), files.RunLock(tmp_path):
            pytest.fail("locked twice")
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    with files.RunLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_run_lock_can_be_taken_again(tmp_path):
    for _ in range(2):
        with files.RunLock(tmp_path):
            pass
    with pytest.raises(DataError, match="could not write"), files.RunLock(tmp_path / "none"):
        pass


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("runs/a-1", "runs/a-1"),
        ("runs/诗/step-0000001", "runs/诗/step-0000001"),
        ("my runs/a", "'my runs/a'"),
        ("a'b", """'a'"'"'b'"""),
        ("$HOME", "'$HOME'"),
        ("", "''"),
    ],
)
def test_a_suggested_path_survives_the_shell(path, text):
    """What is printed as part of a command is one word of it, and reads plainly when it can."""
    assert files.quoted(path) == text and shlex.split(text) == [path]
