"""The runs of a folder, a line each, the newest first. Logs are read from their end: there may be many long ones."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minigpt.core.errors import DataError
from minigpt.core.files import read_json
from minigpt.core.train.metrics import short

TAIL = 1 << 16  # bytes at the end of a log: more than a hundred rows
COLUMNS = ("run", "stage", "parameters", "steps", "loss", "val", "status", "age")
WORDS = ("run", "stage", "status")  # columns that begin at the left


def listed(paths: Sequence[Path], base: Path) -> list[dict[str, Any]]:
    """What the runs tell of themselves, the newest sign of life first. name: below `base`. seconds: since that sign."""
    return sorted((entry(path, base) for path in paths), key=lambda known: known["seconds"])


def entry(path: Path, base: Path) -> dict[str, Any]:
    """One run. A run.json that cannot be read is its status: the others are worth listing all the same."""
    try:
        info = read_json(path / "run.json") if (path / "run.json").is_file() else {}
    except DataError:
        info = {"status": "run.json is broken"}
    info = info if isinstance(info, dict) else {"status": "run.json is broken"}
    rows = tail(path / "metrics.jsonl")
    return {
        "name": path.relative_to(base).as_posix(),
        "path": str(path),
        **{key: info.get(key) for key in ("stage", "status", "parameters", "steps")},
        "step": newest(rows, "step") or 0,
        "loss": newest(rows, "loss"),
        "val_loss": newest(rows, "val_loss"),
        "seconds": max(0.0, time.time() - last_sign(path)),
    }


def last_sign(path: Path) -> float:
    """When a run wrote last: seconds since the epoch."""
    times = [0.0]
    for name in ("metrics.jsonl", "run.json", "config.yaml"):
        with suppress(OSError):
            times.append((path / name).stat().st_mtime)
    return max(times)


def tail(path: Path) -> list[dict[str, Any]]:
    """The last rows of a log, in order; the first, which the window may have cut, and a last one cut short left out."""
    try:
        with open(path, "rb") as f:
            start = max(0, f.seek(0, os.SEEK_END) - TAIL)
            f.seek(start)
            lines = f.read().splitlines()[bool(start) :]
    except OSError:
        return []
    rows = []
    for line in lines:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def newest(rows: Sequence[dict[str, Any]], key: str) -> Any:
    """The last value that is there."""
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Aligned lines with a head."""
    rows = [COLUMNS, *(cells(known) for known in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return [
        "  ".join(
            cell.ljust(width) if head in WORDS else cell.rjust(width)
            for head, cell, width in zip(COLUMNS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def cells(known: dict[str, Any]) -> tuple[str, ...]:
    planned = f"/{known['steps']:,}" if known["steps"] else ""
    losses = ("" if value is None else f"{value:.3f}" for value in (known["loss"], known["val_loss"]))
    return (
        known["name"],
        known["stage"] or "unknown",
        short(known["parameters"]) if known["parameters"] else "",
        f"{known['step']:,}{planned}",
        *losses,
        known["status"] or "unknown",
        age(known["seconds"]),
    )


def age(seconds: float) -> str:
    """Of a run, to one unit: 40 s, 12 min, 5 h, 3 days."""
    for size, word in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {word}"
    return f"{seconds:.0f} s"
