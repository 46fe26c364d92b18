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
from glob import glob
from pathlib import Path
from typing import Any

import minigpt
from minigpt.core.config import group, opt
from minigpt.core.errors import DataError, UsageError
from minigpt.core.files import write_atomic
from minigpt.core.groups import CommonConfig
from minigpt.core.report import Context, Report, Result
from minigpt.core.train import plot_text
from minigpt.core.train.curves import AMOUNTS, OVER, TITLES, Curve, Panel, metrics, series, smooth
from minigpt.core.train.plot import LOSSES, picture
from minigpt.core.train.record import Record, last
from minigpt.core.train.report_page import heading, report_page
from minigpt.core.train.run import is_run

EXAMPLES = (
    "minigpt plot runs/poems",
    "minigpt plot runs/a runs/b --x tokens --y val_loss --log",
    "minigpt plot runs/a runs/b -o report.html",
)
KINDS = (".svg", ".html")
TOLD_OTHERWISE = ("val_ppl", "skipped")  # not drawn unasked: the one is exp(val_loss), the other stands in the summary
QUIET = ("lr", "mem_gb", "epoch")  # like validation, whose rows are the same each time, without noise to average out
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
    smooth: int = opt(
        0, "points to average noisy curves over, exponentially; validation stays as it is", panel="Output", low=0
    )
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
        since = f" from --from-step {cfg.from_step} on" if cfg.from_step else ""
        raise UsageError(
            f"nothing to draw: {', '.join(names)} over {cfg.x} has no number{since}",
            fix="choose other --y or --x" + (", or an earlier step" if since else ""),
        )
    tell_missing(cfg, panels, records, context.report)
    data = {"metrics": names, "runs": [told(record, names) for record in records]}
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
    paths = [path for text in given for path in _matches(Path(os.path.abspath(Path(text).expanduser())))]
    return list(dict.fromkeys(run for path in paths for run in _runs(path)))


def _matches(path: Path) -> list[Path]:
    """The path, or what it stands for as a pattern: not every shell resolves them."""
    return [path] if path.exists() else [Path(hit) for hit in sorted(glob(str(path)))] or [path]


def _runs(path: Path) -> list[Path]:
    if is_run(path):
        return [path]
    if path.name.startswith("step-") and is_run(path.parent):
        return [path.parent]
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
    if len(records) == 1 and not cfg.y and {*LOSSES} <= {*names}:
        both = [curve(cfg, records[0], key, LOSSES[key], slot) for slot, key in enumerate(LOSSES)]
        panels, names = [finished(cfg, "Loss", both)], [name for name in names if name not in LOSSES]
    else:
        panels = []
    for name in names:
        curves = [curve(cfg, record, name, record.name, slot) for slot, record in enumerate(records)]
        panels.append(finished(cfg, TITLES.get(name, name), curves, from_zero=name in AMOUNTS))
    return panels


def curve(cfg: Config, record: Record, metric: str, label: str, slot: int) -> Curve:
    """One metric of one run, averaged where it is noisy."""
    points = series(record.rows, metric, cfg.x, cfg.from_step)
    if cfg.smooth < 2 or metric in QUIET or metric.startswith("val_"):
        return Curve(label, points, slot)
    return Curve(label, smooth(points, cfg.smooth), slot, points)


def finished(cfg: Config, title: str, curves: Sequence[Curve], from_zero: bool = False) -> Panel:
    """The panel of those curves that have something to show."""
    shown = [c for c in curves if c.last is not None]
    note = f"averaged over {cfg.smooth} points" if any(c.raw for c in shown) else ""
    start = min((c.points[0][0] for c in shown), default=0.0) if cfg.from_step else 0.0
    positive = any(y > 0 for c in shown for _, y in c.points)
    return Panel(title, shown, cfg.x, cfg.log and positive, start, note, from_zero)


def tell_missing(cfg: Config, panels: Sequence[Panel], records: Sequence[Record], report: Report) -> None:
    """Say what was asked for and is not in the picture."""
    for panel in panels:
        drawn = {c.slot for c in panel.curves}
        absent = [r.name for slot, r in enumerate(records) if slot not in drawn]
        if absent and len(records) > 1:
            report.warn(f"{panel.title}: nothing measured in {', '.join(absent)}")
        if cfg.log and not panel.log:
            report.warn(f"{panel.title} has no value above zero: its axis stays linear")


def told(record: Record, names: Sequence[str]) -> dict[str, Any]:
    """A run in the --json object: where it is and the newest value of what is drawn."""
    newest = {name: last(record.rows, name) for name in ("step", *names)}
    return {"name": record.name, "run_dir": str(record.path), "last": newest}


# ---------------------------------------------------------------------------------------------- where to


def document(out: Path, records: Sequence[Record], panels: Sequence[Panel]) -> str:
    """The text of the file."""
    if out.suffix.lower() == ".svg":
        return picture(panels, heading([r.name for r in records]))
    made = f"Drawn by minigpt {minigpt.__version__}, {time.strftime('%Y-%m-%d %H:%M')}"
    return report_page(records, panels, made)


def show(panels: Sequence[Panel], report: Report) -> str | None:
    """The panels as text for stdout; None once they stand there already, in colour."""
    plain, colour = not _holds(plot_text.NEEDED), report.colours
    terminal = sys.stdout is not None and sys.stdout.isatty()
    columns, lines = shutil.get_terminal_size(PIPE) if terminal else PIPE
    height = max(LOWEST, min(TALLEST, (lines - 1) // len(panels)))
    drawn = [plot_text.draw(p, columns, height, colour=colour and not plain, plain=plain) for p in panels]
    words = "\n\n".join("\n".join(lines) for lines in drawn)
    if not colour:
        return words
    report.picture(words)
    return None


def _holds(characters: str) -> bool:
    """True when stdout's encoding has them."""
    try:
        characters.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True
