"""What a run left behind, read back for people: its log, its facts, and how it differs from others.

The words are meant for others to read, so absolute paths of this machine are shortened: to what lies beside the run,
else to their last part.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from minigpt.core.files import read_json
from minigpt.core.train.curves import is_number, seconds
from minigpt.core.train.metrics import short, spell_time
from minigpt.core.train.run import Run

Row = dict[str, Any]
# A word that is a path of this machine: /a/b, ~/a, C:\a, \\server\a, ../../home/a
_ABSOLUTE = re.compile(r"(?:file:)?[/\\]+[^/\\]+[/\\]|~[^/\\]*[/\\]|[A-Za-z]:[/\\]|(?:\.\.?[/\\])+(?:home|Users)[/\\]")
# The same inside a sentence, where it ends at a space. Before it stands no letter (runs/a/b) and no slash (http://a/b).
_INSIDE = re.compile(r"(?<![\w.~/\\-])(?:~[\w.-]*[/\\]|[A-Za-z]:[/\\]|\\?[/\\][^\s/\\]+[/\\])[^\s\"'<>|;,]*")


@dataclass(frozen=True)
class Record:
    """A run as its directory tells it. name: how it is called among the others. path: absolute."""

    name: str
    path: Path
    rows: list[Row]
    samples: list[Row]
    info: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def load(cls, path: Path, name: str) -> Record:
        """Read a run that may still be going on. DataError when run.json is there and broken."""
        run = Run(path)
        info = read_json(path / "run.json") if (path / "run.json").is_file() else {}
        return cls(
            name,
            path,
            [row for row in run.rows() if isinstance(row, dict) and is_number(row.get("step"))],
            [row for row in run.rows("samples") if isinstance(row, dict) and isinstance(row.get("text"), str)],
            info if isinstance(info, dict) else {},
            _config(path / "config.yaml"),
        )

    @property
    def sessions(self) -> list[dict[str, Any]]:
        return _dicts(self.info.get("sessions"))

    def shorten(self, word: str) -> str:
        """A word (an argument, an option's value) without where it lies on this machine."""
        flag, sign, value = word.partition("=")
        if sign and flag.startswith("-"):
            return f"{flag}={self.shorten(value)}"
        glued = re.match(r"-[A-Za-z](?=[/~])", word)  # -d/data/poems.jsonl
        head, rest = (glued[0], word[glued.end() :]) if glued else ("", word)
        if not _ABSOLUTE.match(rest):
            return word
        beside = rest.removeprefix(f"{self.path.parent}/")
        return head + (beside if beside != rest else re.split(r"[/\\]", rest.rstrip("/\\"))[-1])

    def prose(self, sentence: str) -> str:
        """A sentence, such as an error's, without where things lie on this machine."""
        return _INSIDE.sub(lambda m: self.shorten(m[0]), sentence)


def _config(path: Path) -> dict[str, Any]:
    """The options of a run; nothing when they cannot be read: its curves are worth showing all the same."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


# ---------------------------------------------------------------------------------------------- facts


def facts(record: Record) -> dict[str, str]:
    """What there is to know about a run, by label, in reading order. What is not known is left out."""
    info, rows = record.info, record.rows
    found = {
        "Stage": info.get("stage"),
        "Status": _status(record),
        "Model": model(info),
        "Started from": _parent(record),
        "Data": "; ".join(_source(record, source) for source in _dicts(info.get("data"))),
        "Best validation loss": _best(rows),
        "Last validation loss": _text(last(rows, "val_loss"), "{:.4f}".format),
        "Last bits per byte": _text(last(rows, "val_bpb"), "{:.4f}".format),
        "Last training loss": _text(last(rows, "loss"), "{:.4f}".format),
        "Steps": _of(rows[-1]["step"], info.get("steps")) if rows else None,
        "Steps left out": _skipped(rows),
        "Survived": ", ".join(
            f"{count} × {kind}" for kind, count in Counter(e["kind"] for e in events(record)).items()
        ),
        "Tokens trained on": _text(last(rows, "tokens"), short),
        "Passes over the data": _text(last(rows, "epoch"), "{:.3g}".format),
        "Training time": _text(_longest(rows), spell_time),
        "Tokens a second, median": _text(median(_values(rows, "tok_s") or [math.nan]), short),
        "Model FLOPs utilisation, median": _text(median(_values(rows, "mfu") or [math.nan]), "{:.1%}".format),
        "Most memory": _text(max(_values(rows, "mem_gb"), default=None), "{:.2f} GB".format),
        "Sessions": str(len(record.sessions)) if len(record.sessions) > 1 else None,
        "Device": info.get("device"),
        "Seed": info.get("seed"),
        "Versions": _versions(info.get("versions")),
        "Started": when(record.sessions[0]) if record.sessions else None,
    }
    return {label: str(value) for label, value in found.items() if value not in (None, "")}


def events(record: Record) -> list[dict[str, Any]]:
    """What befell a run and did not end it, oldest first: kind, text, step and time of each."""
    return [event for event in _dicts(record.info.get("events")) if {"kind", "text"} <= event.keys()]


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [row[key] for row in rows if is_number(row.get(key)) and math.isfinite(row[key])]


def last(rows: Sequence[Row], key: str) -> float | None:
    """The newest value of a metric that is a number."""
    return next(reversed(_values(rows, key)), None)


def _text(value: float | None, spelled: Any) -> str | None:
    return None if value is None or math.isnan(value) else spelled(value)


def _count(value: Any) -> str | None:
    return f"{value:,}" if is_number(value) else None


def _of(done: Any, planned: Any) -> str:
    return f"{done:,}" + (f" of {planned:,}" if is_number(planned) else "")


def _status(record: Record) -> str | None:
    status, error = record.info.get("status"), record.info.get("error")
    return f"{status}: {record.prose(str(error))}" if error else status


def model(info: dict[str, Any]) -> str:
    """Architecture and size."""
    size = _count(info.get("parameters"))
    return ", ".join(filter(None, [str(info.get("model_type") or ""), size and f"{size} parameters"]))


def _parent(record: Record) -> str | None:
    parent = record.info.get("parent")
    return record.shorten(str(parent["path"])) if isinstance(parent, dict) and parent.get("path") else None


def _source(record: Record, source: dict[str, Any]) -> str:
    """A file by name, size and the beginning of its hash: the name alone does not say that two runs saw the same."""
    rows, digest = _count(source.get("rows")), source.get("sha256")
    details = ", ".join(filter(None, [rows and f"{rows} rows", digest and f"sha256 {str(digest)[:8]}…"]))
    return record.shorten(str(source.get("path", "unknown"))) + (f" ({details})" if details else "")


def _longest(rows: Sequence[Row]) -> float | None:
    return max((s for s in seconds(rows) if not math.isnan(s)), default=None)


def _best(rows: Sequence[Row]) -> str | None:
    checks = [(row["val_loss"], row["step"]) for row in rows if _values([row], "val_loss")]
    return f"{min(checks)[0]:.4f} at step {min(checks)[1]:,}" if checks else None


def _skipped(rows: Sequence[Row]) -> str | None:
    marked = [(row["step"], row["skipped"]) for row in rows if is_number(row.get("skipped")) and row["skipped"]]
    if not marked:
        return None
    places = ", ".join(f"{step:,}" for step, _ in marked[:5]) + (", …" if len(marked) > 5 else "")
    return f"{sum(count for _, count in marked):,} (logged at step {places})"


def _versions(versions: Any) -> str | None:
    if not isinstance(versions, dict):
        return None
    return ", ".join(f"{name.removesuffix('-lm')} {version}" for name, version in versions.items())


# ---------------------------------------------------------------------------------------------- configuration, commands


def differences(records: Sequence[Record]) -> dict[str, list[str]]:
    """Options in which the runs differ: key → each run's value. An option that a run does not have counts as null."""
    keys = dict.fromkeys(key for record in records for key in record.config)
    shown = {str(key): [_value(record, record.config.get(key)) for record in records] for key in keys}
    return {key: values for key, values in shown.items() if len(set(values)) > 1}


def _value(record: Record, value: Any) -> str:
    if isinstance(value, str):
        return record.shorten(value)
    if isinstance(value, list):
        return ", ".join(_value(record, item) for item in value) or "–"
    return "–" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def command(record: Record, session: dict[str, Any]) -> str:
    """What was typed, ready to be typed again."""
    words = session.get("argv")
    return shlex.join(record.shorten(str(word)) for word in words) if isinstance(words, list) else ""


def when(session: dict[str, Any]) -> str | None:
    """When a session began, to the minute, by the clock of its machine."""
    return str(session["started"]).replace("T", " ")[:16] if session.get("started") else None


def took(session: dict[str, Any]) -> str | None:
    """How long a session lasted by the clock; None when it was killed or goes on."""
    try:
        ended, started = (datetime.strptime(session[key], "%Y-%m-%dT%H:%M:%S%z") for key in ("ended", "started"))
    except (KeyError, TypeError, ValueError):
        return None
    return spell_time((ended - started).total_seconds())
