"""Draw the curves of one run or several.

In the terminal, or as a file: curves.svg is a picture, report.html a page that explains itself to a colleague.
"""

from __future__ import annotations

import difflib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from minigpt.core.config import group, opt
from minigpt.core.errors import DataError, UsageError
from minigpt.core.files import write_atomic
from minigpt.core.groups import CommonConfig
from minigpt.core.report import Context, Report, Result
from minigpt.core.train import plot_text
from minigpt.core.train.curves import COUNTERS, OVER, TITLES, Curve, Panel, Point, metrics, series, smooth
from minigpt.core.train.plot import loss_panel, picture
from minigpt.core.train.record import Record, facts
from minigpt.core.train.report_page import heading, report_page
from minigpt.core.train.run import is_run

EXAMPLES = (
    "minigpt plot runs/poems",
    "minigpt plot runs/a runs/b --x tokens --y val_loss --log",
    "minigpt plot runs/a runs/b -o report.html",
)
KINDS = (".svg", ".html")
LOSSES = ("loss", "val_loss")
TOLD_OTHERWISE = ("val_ppl", "skipped")  # not drawn unasked: the one is exp(val_loss), the other stands in the summary
PIPE = (100, 25)  # columns and lines where there is no terminal
TALLEST, LOWEST = 32, 12  # lines of a panel


@dataclass
class Config:
    runs: list[str] = opt([], "run, or directory of several runs", argument=True, metavar="RUN")
    y: list[str] = opt(
        [],
        "metrics to draw, such as loss,val_loss; each gets a panel",
        panel="Output",
        metavar="NAMES",
        shown="loss,val_loss; in a report all",
    )
    x: str = opt(
        "step", "over steps, tokens (fair between batch sizes) or training time", panel="Output", choices=tuple(OVER)
    )
    smooth: int = opt(0, "points to average over, exponentially; validation stays as it is", panel="Output", low=0)
    log: bool = opt(False, "logarithmic y axis", panel="Output")
    from_step: int = opt(0, "leave out what came before this step", panel="Output", low=0)
    out: str | None = opt(None, "write curves.svg or report.html instead", short="-o", panel="Output", metavar="FILE")
    overwrite: bool = opt(False, "replace the file in --out", panel="Output")
    common: CommonConfig = group(CommonConfig)


def run(cfg: Config, context: Context) -> Result:
    """Draw. Reads logs only; a run that is still going on is drawn as far as it has come."""
    out = target(cfg)
    records = measured([Record.load(path, name) for path, name in named(find(cfg.runs))], context.report)
    names = wanted(cfg, records)
    panels = [panel for panel in choose(cfg, records, names) if panel.curves]
    if not panels:
        raise UsageError(f"--from-step {cfg.from_step} leaves nothing to draw", fix="choose an earlier step")
    tell_missing(panels, records, context.report)
    data = {"runs": [{"name": r.name, "path": str(r.path), "facts": facts(r)} for r in records], "metrics": names}
    if out is None:
        return Result(show(panels, context.report), data)
    write_atomic(out, document(out, records, panels))
    return Result(str(out), {**data, "path": str(out)})


# ---------------------------------------------------------------------------------------------- what to draw


def target(cfg: Config) -> Path | None:
    """The file to write, checked before anything is read."""
    if cfg.out is None:
        return None
    path = Path(cfg.out).expanduser()
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"--out {path} names no kind of file", fix="end it with .svg (a picture) or .html (a report)")
    if path.exists() and not cfg.overwrite:
        raise UsageError(f"--out {path} is already there", fix="replace it with --overwrite, or choose another name")
    return path


def find(given: Sequence[str]) -> list[Path]:
    """The runs meant: each argument is a run, a step of one, a directory of several, or a pattern."""
    if not given:
        raise UsageError("no run to draw", fix="name one or several: minigpt plot runs/poems")
    paths = [Path(hit) for text in given for hit in (sorted(glob(str(Path(text).expanduser()))) or [text])]
    return list(dict.fromkeys(run.resolve() for path in paths for run in _runs(path.expanduser())))


def _runs(path: Path) -> list[Path]:
    if is_run(path):
        return [path]
    if path.name.startswith("step-") and is_run(path.resolve().parent):
        return [path.resolve().parent]
    if not path.is_dir():
        raise UsageError(f"{path} {'is a file, not a run' if path.exists() else 'does not exist'}", fix="give a run")
    inside = sorted(p for p in path.iterdir() if is_run(p))
    if not inside:
        raise UsageError(
            f"{path} is not a run and holds none",
            found="looked for run.json and config.yaml there and one level below",
            fix="give the directory that a training command wrote, or the one above several",
        )
    return inside


def named(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Each path with the shortest end that tells it from the others: of a run's place no more is shown."""
    return [(path, _shortest(path, [p for p in paths if p != path])) for path in paths]


def _shortest(path: Path, others: Sequence[Path]) -> str:
    size = 1
    while size < len(path.parts) and any(p.parts[-size:] == path.parts[-size:] for p in others):
        size += 1
    return "/".join(path.parts[-size:])


def measured(records: Sequence[Record], report: Report) -> list[Record]:
    """The runs that have rows; a warning for each that has none yet, an error when that is all of them."""
    empty = [record for record in records if not metrics(record.rows)]
    if len(empty) == len(records):
        names = ", ".join(record.name for record in empty)
        raise DataError(
            f"no metrics yet in {names}",
            found=f"metrics.jsonl has no row; status: {empty[0].info.get('status', 'unknown')}",
            fix="the first row comes after --log-every steps",
        )
    for record in empty:
        report.warn(f"{record.name} has no metrics yet and is left out")
    return [record for record in records if record not in empty]


def wanted(cfg: Config, records: Sequence[Record]) -> list[str]:
    """The metrics to draw. UsageError, with the nearest name, for one that no run has."""
    known = metrics(row for record in records for row in record.rows)
    asked = list(dict.fromkeys(name.strip() for text in cfg.y for name in text.split(",") if name.strip()))
    allowed = [*known, "epoch"]
    for name in asked:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            raise UsageError(
                f"--y {name}: no run measures that",
                fix=(f"did you mean {near[0]}? " if near else "") + f"there is {', '.join(known)}",
            )
    if asked:
        return asked
    if cfg.out and Path(cfg.out).suffix.lower() == ".html":
        return [name for name in known if name not in TOLD_OTHERWISE]
    return [name for name in known if name in LOSSES] or known[:1]


def choose(cfg: Config, records: Sequence[Record], names: Sequence[str]) -> list[Panel]:
    """A panel for each metric; of a single run that nobody asked otherwise for, both losses in one."""
    rest = list(names)
    panels = []
    if len(records) == 1 and not cfg.y and set(LOSSES) <= set(names):
        rest = [name for name in names if name not in LOSSES]
        both = loss_panel(records[0].rows, records[0].name, partial(points, cfg))
        panels.append(Panel(f"Loss of {records[0].name}", [smoothed(cfg, curve) for curve in both.curves]))
    for name in rest:
        curves = [Curve(r.name, points(cfg, r.rows, name), slot) for slot, r in enumerate(records)]
        ready = [curve if name.startswith("val_") else smoothed(cfg, curve) for curve in curves]
        panels.append(Panel(TITLES.get(name, name), [curve for curve in ready if curve.last is not None]))
    return [finished(cfg, panel) for panel in panels]
