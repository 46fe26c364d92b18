"""One function for every `--model`: what each form opens as, and what is done once only."""

from __future__ import annotations

import fnmatch
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from minigpt.core.convert import gguf_write
from minigpt.core.convert.open import is_pth, open_model, open_tokenizer
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError, MinigptError, UsageError
from minigpt.core.models import folder
from tests.core.convert.test_minimind import save, state_dict
from tests.core.convert.test_to_hf import own


@pytest.fixture
def source(tmp_path) -> Path:
    return own(tmp_path / "m")


def test_folders_are_themselves(tmp_path, source):
    """A model's folder and a run's newest step; the origin is what was typed."""
    assert open_model(source) == (source, str(source))
    run = tmp_path / "run"
    shutil.copytree(source, run / "step-0000004")
    assert open_model(str(run)) == (run / "step-0000004", str(run))
    with pytest.raises(UsageError, match="does not exist"):
        open_model(tmp_path / "none")


def test_gguf(tmp_path, source):
    """Unpacked once, and again when the file is another one."""
    file = tmp_path / "m.gguf"
    gguf_write.write(source, file, quant="f32")
    opened = open_model(file)
    assert opened.origin == str(file)
    before, after = folder.load(source)[0].state_dict(), folder.load(opened.path)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    made = (opened.path / "config.json").stat().st_mtime_ns
    assert open_model(shutil.copy(file, tmp_path / "moved.gguf")).path == opened.path
    assert (opened.path / "config.json").stat().st_mtime_ns == made
    gguf_write.write(source, file, quant="f16")
    assert open_model(file).path != opened.path


def test_pth_is_unpacked_by_all_that_decides_it(tmp_path, source):
    """The same file with other heads, or another tokenizer, is another model."""
    path = save(tmp_path / "x" / "m.pth", state_dict(2))
    plain = open_model(path, tokenizer=source).path
    assert open_model(path, tokenizer=source).path == plain
    assert open_model(path, tokenizer=source, overrides={"num_attention_heads": 4}).path != plain
    assert open_model(path, tokenizer=own(tmp_path / "other")).path == plain
    shutil.copy(source / "tokenizer.json", tmp_path / "x")
    assert open_model(path).path != plain  # without its configuration and template it is not


def test_a_killed_unpacking_is_done_again(tmp_path, source):
    """Only a whole folder counts as unpacked."""
    path = save(tmp_path / "m.pth", state_dict(2))
    place = open_model(path, tokenizer=source).path
    (place / folder.WEIGHTS).unlink()
    assert folder.is_complete(open_model(path, tokenizer=source).path)


def test_hub(tmp_path, source, monkeypatch):
    """A hub's model is its folder; the origin names the revision."""
    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=lambda *a, **k: str(source)))
    assert open_model("ms:org/name@v2") == (source, "ms:org/name@v2")
    monkeypatch.setitem(
        sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=lambda *a, **k: str(tmp_path))
    )
    with pytest.raises((DataError, UsageError)):
        open_model("ms:org/name")


def test_tokenizers_of_every_form(tmp_path, source, monkeypatch):
    """Of a folder, its file, a GGUF file, a .pth file and a hub's name; no weights are unpacked or fetched."""
    asked: list[str] = []

    def fetch(_name: str, allow_patterns: list[str], **_: object) -> str:
        asked.extend(allow_patterns)
        return str(source)

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=fetch))
    gguf_write.write(source, tmp_path / "m.gguf")
    save(tmp_path / "out" / "m.pth", state_dict(2))
    shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "cache"))
    own = Tokenizer.load(source)
    for named in (source, source / "tokenizer.json", tmp_path / "m.gguf", tmp_path / "out" / "m.pth", "ms:org/name"):
        found = open_tokenizer(named)
        assert found.encode("春風 again, and 12!") == own.encode("春風 again, and 12!") and found.eos_ids == own.eos_ids
        assert found.fingerprint == own.fingerprint or named == tmp_path / "m.gguf"
    fetched = [n for n in ("tokenizer.json", "m.safetensors") if any(fnmatch.fnmatch(n, pattern) for pattern in asked)]
    assert fetched == ["tokenizer.json"]
    assert not (tmp_path / "cache").exists()
    unpacked = Tokenizer.load(open_model(tmp_path / "m.gguf").path)
    assert open_tokenizer(tmp_path / "m.gguf").fingerprint == unpacked.fingerprint
    for name in ("none", "none.gguf", "none.pth"):
        with pytest.raises(MinigptError, match="does not exist"):
            open_tokenizer(tmp_path / name)


@pytest.mark.parametrize("flag", ["overrides", "tokenizer"])
def test_what_nothing_would_read_is_refused(source, flag):
    """Flags for .pth files, with another model."""
    with pytest.raises(UsageError, match=r"\.pth"):
        open_model(source, **{flag: {"num_attention_heads": 4} if flag == "overrides" else "t"})


@pytest.mark.parametrize("name", ["m.pth", "m.pt", "m.gguf"])
def test_a_file_that_is_not_there(tmp_path, name):
    """A plain error, for every form of a file."""
    with pytest.raises(UsageError, match="does not exist"):
        open_model(tmp_path / name)


def test_a_directory_may_be_called_like_a_file(tmp_path, source):
    """`x.pth/` with a model in it is a model."""
    shutil.move(source, tmp_path / "x.pth")
    assert not is_pth(tmp_path / "x.pth")
    assert open_model(tmp_path / "x.pth").path == tmp_path / "x.pth"
