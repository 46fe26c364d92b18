"""A run's directory: who owns it, what it was asked to do, what it measured.

config.yaml  run.json  metrics.jsonl  samples.jsonl  loss.svg  step-*/  latest  best
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from minigpt.core.errors import DataError, UsageError
from minigpt.core.files import FULL, disk_error, quoted, read_json, write_atomic, write_json
from minigpt.core.models.folder import resolve


@dataclass
class Run:
    """An open run directory. Rows of the logs are appended and flushed one at a time.

    patient: a row that a full disk refuses is kept, and written before the next one once there is room again.
    """

    path: Path
    info: dict[str, Any] = field(default_factory=dict)
    patient: bool = False
    _sessions: list[dict[str, Any]] = field(default_factory=list)
    _events: list[dict[str, Any]] = field(default_factory=list)
    _waiting: dict[str, list[str]] = field(default_factory=dict)  # lines of each log that are not on the disk yet

    # ---- lifecycle

    def start(self, config: str, info: dict[str, Any]) -> None:
        """Write config.yaml and run.json. info: fields of run.json beside the machine's own, and `argv`.

        Called first with the options as given, so that a run killed at any later moment is known as one, and again
        once everything that was left open is decided.
        """
        write_atomic(self.path / "config.yaml", config)
        if not self.info:
            old = read_json(self.path / "run.json") if (self.path / "run.json").exists() else {}
            self._sessions = [*old.get("sessions", []), {"started": now(), "argv": info["argv"]}]
            self._events = [*old.get("events", []), *self._events]
        facts = {k: v for k, v in info.items() if k != "argv"}
        self.info = {**machine(), **facts, "status": "running", "sessions": self._sessions, "events": self._events}
        write_json(self.path / "run.json", self.info)

    def finish(self, status: str, **facts: Any) -> None:
        """status: done, stopped or failed. A run that failed has its own error to tell: no other one is raised then."""
        self.info.update(status=status, **facts)
        self._sessions[-1]["ended"] = now()
        with contextlib.suppress(*([DataError] if status == "failed" else [])):
            write_json(self.path / "run.json", self.info)
            for name in self._waiting:
                self._write_waiting(name)

    def event(self, kind: str, text: str, step: int | None = None) -> None:
        """Note in run.json, for good, what befell the run. kind: one word. step: optimizer step, None = outside of one.

        Never an error: what the disk refuses now goes with the next event, or with `finish`.
        """
        self._events.append({"time": now(), "kind": kind, "step": step, "text": text})
        if self.info:  # before `start` there is nothing to write it into
            with contextlib.suppress(DataError):
                write_json(self.path / "run.json", self.info)

    def abandon(self) -> None:
        """Take back a run that ended before its first step."""
        _clear(self.path)
        self.info = {}

    # ---- logs

    def log(self, row: dict[str, Any], name: str = "metrics") -> None:
        """Append one JSON line to `<name>.jsonl`. DataError when the disk refuses it, unless the run is patient."""
        self._waiting.setdefault(name, []).append(json.dumps(row, ensure_ascii=False) + "\n")
        try:
            self._write_waiting(name)
        except DataError as e:
            if not (self.patient and isinstance(e.__cause__, OSError) and e.__cause__.errno in FULL):
                raise

    def _write_waiting(self, name: str) -> None:
        if not self._waiting.get(name):
            return
        path = self.path / f"{name}.jsonl"
        try:
            append(path, "".join(self._waiting[name]))
        except OSError as e:
            raise disk_error(e, path) from e
        self._waiting[name] = []

    def sync_logs(self) -> None:
        """Make logged rows durable: called before a checkpoint claims their steps. DataError when the disk refuses."""
        for name in ("metrics", "samples"):
            self._write_waiting(name)
            path = self.path / f"{name}.jsonl"
            if path.exists():
                try:
                    with open(path, "rb+") as f:
                        os.fsync(f.fileno())
                except OSError as e:
                    raise disk_error(e, path) from e

    def rows(self, name: str = "metrics") -> list[dict[str, Any]]:
        """Complete rows of a log, in order. A line cut short by a crash, or of what a disk left there, is left out."""
        path = self.path / f"{name}.jsonl"
        if not path.exists():
            return []
        rows = []
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
        return rows

    def cut_logs(self, step: int) -> None:
        """Drop rows after `step`: the resumed run writes them again, once."""
        for name in ("metrics", "samples"):
            path = self.path / f"{name}.jsonl"
            if path.exists():
                kept = [row for row in self.rows(name) if row.get("step", 0) <= step]
                write_atomic(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))


def append(path: Path, text: str) -> None:
    """Write at the end of a file: all of it, or, when OSError is raised, nothing."""
    with open(path, "ab", buffering=0) as f:
        size, data = f.seek(0, os.SEEK_END), memoryview(text.encode("utf-8"))
        try:
            while data:
                data = data[f.write(data) :]  # a disk that fills up takes a part first
        except OSError:
            with contextlib.suppress(OSError):
                f.truncate(size)
            raise


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def machine() -> dict[str, Any]:
    """Versions and host, for run.json."""
    versions = {"python": platform.python_version()}
    for package in ("minigpt-lm", "torch", "transformers", "tokenizers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return {"versions": versions, "host": platform.node(), "platform": sys.platform, "cpus": os.cpu_count()}


def default_out(stage: str) -> Path:
    """`runs/<stage>-<date>-<time>`, below $MINIGPT_RUNS or ./runs, with a number when that is taken."""
    base = runs_folder()
    stem = f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, n = base / stem, 1
    while path.exists():
        n += 1
        path = base / f"{stem}-{n}"
    return path


def runs_folder() -> Path:
    """Where runs are made that nobody names a place for."""
    return Path(os.environ.get("MINIGPT_RUNS", "runs"))


def runs_below(folder: Path) -> list[Path]:
    """The runs in a folder and one level deeper, where a command that makes several puts them, by name."""
    return sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_dir() and is_run(path))


def newest_run() -> Path | None:
    """The run whose newest complete step was saved last, below $MINIGPT_RUNS or ./runs; None when there is none."""
    base = runs_folder()
    found = []
    for run in {step.parent for pattern in ("*/step-*", "*/*/step-*") for step in base.glob(pattern)}:
        with contextlib.suppress(UsageError, DataError, OSError):  # no complete step, or just being removed
            found.append((resolve(run).stat().st_mtime, run))
    return max(found, default=(0.0, None))[1]


def is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / "config.yaml").is_file()


def make(path: Path) -> None:
    """Create the run directory. DataError within the first second when that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # nameless: several machines may look at once
            pass
    except OSError as e:
        raise disk_error(e, path) from e


def refuse_or_clear(path: Path, overwrite: bool) -> None:
    """A new run needs an empty place: never overwrite another one silently. The caller holds the lock."""
    for leftover in path.glob(".*.tmp"):  # of a process killed in its first moments
        leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
    old = [p for p in path.iterdir() if p.name != ".lock"]
    if not old:
        return
    if not is_run(path):
        raise UsageError(f"--out {path} is not empty and not a run", fix="choose another --out")
    if not overwrite:
        raise UsageError(
            f"--out {path} already holds a run",
            fix=f"continue it with --resume {quoted(path)}, replace it with --overwrite, or choose another --out",
        )
    _clear(path)


def _clear(path: Path) -> None:
    """Empty a run directory, its lock excepted."""
    try:
        for p in [p for p in path.iterdir() if p.name != ".lock"]:
            shutil.rmtree(p) if p.is_dir() else p.unlink()
    except OSError as e:
        raise DataError(f"could not clear {path}: {e.strerror}") from e
