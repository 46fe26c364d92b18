"""Whatever a user calls a model, as a model folder: one function for every `--model`, one for every `--tokenizer`.

A run, a step and a Hugging Face folder are there already. `.pth` and `.gguf` files are unpacked once into the cache,
under a name made of their content and of all that decides how they are read; models of a hub are fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.core.convert import hub
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError, MissingError, UsageError
from minigpt.core.files import cache_dir, new_dir, remembered_sha256
from minigpt.core.models import folder
from minigpt.core.report import Report

READER = 2  # raised when files are unpacked in another way than before, so that old copies are not used


class Opened(NamedTuple):
    """path: a model folder. origin: what it was made from, for a run's record: `hf:org/name@commit`, or a path."""

    path: Path
    origin: str


def is_pth(named: str | Path) -> bool:
    """Whether this names a raw file of weights, which tells neither the number of heads nor its tokenizer."""
    return not hub.is_spec(str(named)) and Path(named).suffix.lower() in (".pth", ".pt") and not Path(named).is_dir()


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def open_model(
    named: str | Path,
    report: Report | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
) -> Opened:
    """The model folder that `named` means: a run, a step, a folder, `.pth`, `.gguf`, `hf:org/name`, `ms:org/name`.

    overrides: config keys that a `.pth` file cannot tell (`num_attention_heads`). tokenizer: its directory, when it is
    not beside the file. Both belong to `.pth` files alone (UsageError).
    Raises what `folder.resolve`, `hub.fetch`, `minimind.unpack` and `gguf_read.unpack` raise.
    """
    report = report or Report()
    text = str(named)
    path = Path(text).expanduser()
    if is_pth(path):
        return _unpack_pth(path, report, overrides or {}, tokenizer)
    for flag, value in (("--set", overrides), ("--tokenizer", tokenizer)):
        if value:
            raise UsageError(f"{flag} says what a .pth file does not tell, and {text} is none", found=str(value))
    if hub.is_spec(text):
        fetched = hub.fetch(text, report)
        return Opened(folder.resolve(fetched.path), fetched.origin)
    if is_gguf(path):
        return _unpack_gguf(path, report)
    return Opened(folder.resolve(path), text)


def open_tokenizer(named: str | Path, report: Report | None = None) -> Tokenizer:
    """The tokenizer that `named` means: its own directory or file, or that of any model that `open_model` takes.

    No more of a model is read than this needs: nothing is unpacked, no weights are fetched.
    Raises what `Tokenizer.load`, `hub.fetch`, `minimind.find_tokenizer` and `gguf_read.read` raise.
    """
    text = str(named)
    path = Path(text).expanduser()
    if hub.is_spec(text):
        return Tokenizer.load(hub.fetch(text, report, weights=False).path)
    if is_pth(path):
        from minigpt.core.convert import minimind

        return Tokenizer.load(minimind.find_tokenizer(_present(path)))
    if is_gguf(path):
        _present(path)
        need_gguf()
        from minigpt.core.convert import gguf_read

        return gguf_read.read(path).tokenizer
    return Tokenizer.load(path)


def _unpack_pth(path: Path, report: Report, overrides: Mapping[str, Any], named: str | Path | None) -> Opened:
    from minigpt.core.convert import minimind

    digest = _digest(path)
    tokenizer = open_tokenizer(named if named is not None else minimind.find_tokenizer(path), report)
    target = _place("pth", digest, tokenizer.fingerprint, tokenizer.config, dict(overrides))
    if not folder.is_complete(target):
        report.note("unpack", f"{path.name} → {target}")
        with new_dir(target) as work:
            minimind.unpack(path, work, tokenizer, overrides)
    return Opened(target, str(path))


def _unpack_gguf(path: Path, report: Report) -> Opened:
    target = _place("gguf", _digest(path))
    if not folder.is_complete(target):
        need_gguf()
        from minigpt.core.convert import gguf_read

        report.note("unpack", f"{path.name} → {target}")
        gguf_read.unpack(path, target)
    return Opened(target, str(path))


def need_gguf() -> None:
    """MissingError when the package that knows the format is not here."""
    if find_spec("gguf") is None:
        raise MissingError(
            "GGUF files need a package that is not installed", found="gguf", fix="pip install 'minigpt-lm[gguf]'"
        )


def _present(file: Path) -> Path:
    if not file.is_file():
        raise UsageError(f"{file} does not exist", fix="name a run, a folder, a .pth or .gguf file, or hf:org/name")
    return file


def _digest(path: Path) -> str:
    try:
        return remembered_sha256(_present(path))
    except OSError as e:
        raise DataError(f"{path} cannot be read", found=e.strerror or str(e)) from None


def _place(kind: str, *facts: Any) -> Path:
    """Where something unpacked is kept: named by all that decides its content."""
    key = hashlib.sha256(json.dumps([READER, kind, *facts], sort_keys=True).encode()).hexdigest()
    return cache_dir() / "models" / f"{kind}-{key[:32]}"
