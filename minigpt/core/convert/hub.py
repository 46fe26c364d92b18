"""Models of a hub by name: `hf:org/name` (Hugging Face) and `ms:org/name` (ModelScope), perhaps with `@revision`.

The hubs' own clients fetch the files and keep them in their own caches, where other programs find them too; their
variables hold here as well (HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, MODELSCOPE_CACHE).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.core.errors import DataError, MissingError, UsageError
from minigpt.core.report import Report

WANTED = ["*.json", "*.jinja", "README.md"]
WEIGHTS = ["*.safetensors"]
# of other programs: copies in subdirectories, and whole copies in the layout of a model's author
UNWANTED = ["*/*", "consolidated*.safetensors"]
HUBS = {"hf": "huggingface_hub", "ms": "modelscope"}
_SPEC = re.compile(r"(?P<hub>hf|ms):(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")


class Fetched(NamedTuple):
    """path: the folder. origin: `hf:org/name@revision`, the revision as a commit where the hub tells it."""

    path: Path
    origin: str


def is_spec(named: str) -> bool:
    """Whether this names a model of a hub rather than a path."""
    return named.startswith(tuple(f"{hub}:" for hub in HUBS)) and not Path(named).exists()


def fetch(spec: str, report: Report | None = None, *, weights: bool = True) -> Fetched:
    """The local folder of a hub's model, downloaded when it is not there yet.

    weights: without them there are its configuration, tokenizer and card.
    UsageError: not of the form `hf:org/name`. MissingError: the hub's client is not installed.
    DataError: the hub does not have it, does not give it, or cannot be reached.
    """
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise UsageError(
            "this is no name of a model on a hub", found=spec, fix="write hf:org/name or ms:org/name@revision"
        )
    hub, name, revision = found["hub"], found["name"], found["revision"]
    download = _client(hub)
    (report or Report()).note("fetch", spec)
    wanted = WANTED + WEIGHTS if weights else WANTED
    options: dict[str, Any] = {"revision": revision, "allow_patterns": wanted, "ignore_patterns": UNWANTED}
    offline = os.environ.get("MINIGPT_OFFLINE", "") not in ("", "0")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # a client that talks there would spoil a result
            path = Path(download(name, local_files_only=offline, **options))
    except Exception as e:  # the clients' errors have no base in common
        raise DataError(f"{spec} cannot be fetched", found=_reason(e), fix=_fix(e, hub, name, offline)) from None
    commit = path.name if path.parent.name == "snapshots" else revision  # Hugging Face's cache names the commit
    return Fetched(path, f"{hub}:{name}" + (f"@{commit}" if commit else ""))


def _client(hub: str) -> Any:
    try:
        return importlib.import_module(HUBS[hub]).snapshot_download
    except ImportError:
        raise MissingError(
            f"models of {hub}: are fetched by a package that is not installed",
            found=HUBS[hub],
            fix=f"pip install {HUBS[hub]}",
        ) from None


def _reason(e: Exception) -> str:
    text = " ".join(str(e).split())
    return f"{type(e).__name__}: {text}" if text else type(e).__name__


def _fix(e: Exception, hub: str, name: str, offline: bool) -> str:
    kind = type(e).__name__
    if offline:
        return "MINIGPT_OFFLINE is set, and only what was fetched before can be used: unset it"
    if kind == "GatedRepoError":
        return f"accept the terms on https://huggingface.co/{name} and log in with: hf auth login"
    if kind in ("RepositoryNotFoundError", "NotExistError"):
        return "look at the name; for a private model log in first"
    if kind in ("RevisionNotFoundError", "NoValidRevisionError"):
        return "look at what stands behind the @"
    mirror = ", or name a mirror with HF_ENDPOINT" if hub == "hf" else ""
    return f"look at the connection{mirror}; a folder that was copied here works as well"
