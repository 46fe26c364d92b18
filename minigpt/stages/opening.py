"""How a training run begins: what can be refused at once is, the run directory is taken, an earlier session looked up.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from minigpt.core.errors import MinigptError, UsageError
from minigpt.core.files import RunLock
from minigpt.core.report import Context, Report
from minigpt.core.train import resume, track
from minigpt.core.train.run import make, refuse_or_clear
from minigpt.core.world import World


def first_look(stage: str, cfg: Any) -> None:
    """Refuse what can be refused before any process is started: paths, and where the run is to be."""
    place = resume.place(stage, cfg.train.out, cfg.train.resume)
    preflight(cfg, place.resuming, Report())
    if cfg.train.out is not None:
        make(place.path)


def resumed(stage: str, cfg: Any, origins: dict[str, str]) -> tuple[Any, dict[str, str]]:
    """The options that a command with --resume goes on with, and where each came from. Changes nothing."""
    place = resume.place(stage, cfg.train.out, cfg.train.resume)
    if not place.resuming:
        return cfg, origins
    return resume.merge(cfg, origins, place.path, cfg.train.allow_changes)[:2]


def open_run(
    stage: str, cfg: Any, context: Context, world: World, held: ExitStack
) -> tuple[Any, dict[str, str], resume.Place, str | None]:
    """Check what was asked for, take the run directory, and find out what an earlier session was asked for.

    held: what must stay open as long as the run: the directory's lock.
    Returns the options, where each came from, the place, and what --model was made of when that is not a folder.
    """
    origins = dict(context.origins)
    path, resuming, step = world.share(lambda: _place(stage, cfg.train, held).to_json())
    place = resume.Place(Path(path), resuming, step)
    made_of = world.first(lambda: preflight(cfg, resuming, context.report if world.leads else Report()))
    world.first(lambda: _claim(place.path, world, held))
    changes: list[str] = []
    if resuming:
        cfg, origins, changes = world.together(
            lambda: resume.merge(cfg, origins, place.path, cfg.train.allow_changes)  # before rank 0 writes it anew
        )
    elif world.leads:
        world.together(lambda: refuse_or_clear(place.path, cfg.train.overwrite))
    else:
        world.together(lambda: None)
    for line in changes if world.leads else ():
        context.report.note("change", line)
    if not cfg.data.data:
        raise UsageError(f"{stage} needs data", fix="name a file, a directory or - with --data")
    return cfg, origins, place, made_of


def _place(stage: str, t: Any, held: ExitStack) -> resume.Place:
    """Where the run is to be; for --dry-run a place of its own, after a look at the real one."""
    place = resume.place(stage, t.out, t.resume)
    if not t.dry_run:
        return place
    if place.resuming:
        raise UsageError("--dry-run looks at a new run", fix="leave --resume away, or name another --out")
    if place.path.exists() and not t.overwrite:
        refuse_or_clear(place.path, overwrite=False)
    return resume.Place(Path(held.enter_context(tempfile.TemporaryDirectory(prefix="minigpt-"))), False)


def _claim(path: Path, world: World, held: ExitStack) -> None:
    """Rank 0 makes and locks the run directory; the others look whether they see it."""
    if world.leads:
        make(path)
        held.enter_context(RunLock(path))
    elif not (path / ".lock").exists():
        raise UsageError(f"{path} is not seen by every machine", fix="put --out on a disk that all machines share")


def preflight(cfg: Any, resuming: bool, report: Report) -> str | None:
    """What can be refused before torch is imported: paths that are not there. Makes paths absolute on the way.

    A resumed run needs its parent model no more, so that one may be gone.
    Returns what the model was unpacked or fetched from: a file, or `hf:org/name@commit`; None for a folder.
    """
    from minigpt.core.convert.hub import is_spec
    from minigpt.core.convert.open import is_pth, open_model
    from minigpt.core.data.reader import anchored, expand

    track.check(cfg.train.track)
    if (cfg.data.data + cfg.data.val_data).count("-") > 1:
        raise UsageError("stdin can be read once, and - is named twice", fix="put one of them into a file")
    for key in ("data", "val_data"):
        paths = [anchored(p) for p in getattr(cfg.data, key)]
        try:
            expand([p for p in paths if p != "-"])
        except UsageError as e:
            raise UsageError(e.message.replace("--data", f"--{key.replace('_', '-')}"), fix=e.fix) from None
        setattr(cfg.data, key, paths)
    if cfg.data.tokenizer is not None and not is_spec(cfg.data.tokenizer):
        cfg.data.tokenizer = absolute(cfg.data.tokenizer)
    made_of = None
    if cfg.model is not None:
        with contextlib.suppress(*([MinigptError] if resuming else [])):
            raw = is_pth(cfg.model)
            opened = open_model(cfg.model, report, tokenizer=cfg.data.tokenizer if raw else None)
            made_of = opened.origin if opened.origin != cfg.model else absolute(cfg.model) if raw else None
            cfg.model = absolute(str(opened.path))
    return made_of


def absolute(path: str) -> str:
    """One spelling for one place: a run compares paths when it is resumed."""
    return os.path.abspath(os.path.expanduser(path))
