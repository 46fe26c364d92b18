"""Step directories: a complete model folder plus everything needed to go on as if nothing had happened.

    step-0000500/  model.safetensors config.json tokenizer… MANIFEST.json
                   trainer/{optim.safetensors, rng.safetensors, state.json}

Written under a temporary name, synced, then renamed: a crash at any moment leaves the step absent or complete.
The manifest holds the sha256 of every file; a damaged step is named, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt.core.errors import DataError, Diverged, UsageError
from minigpt.core.files import FULL, disk_error, new_dir, read_json, sha256, write_atomic, write_json
from minigpt.core.report import Report

FORMAT = 1  # of trainer/state.json; an older reader must refuse a newer one
MANIFEST = "MANIFEST.json"
_STEP = re.compile(r"step-(\d{7,})")


@dataclass
class Checkpoint:
    """What a step directory holds, in memory."""

    step: int
    path: Path
    weights: dict[str, Tensor]  # float32, by parameter name
    optim: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any]  # JSON: source cursor, counters, open log window, fingerprints


def step_dir(run: Path, step: int) -> Path:
    return run / f"step-{step:07d}"


def steps(run: Path) -> list[tuple[int, Path]]:
    """Step directories of a run, newest first. Unfinished writes have other names and don't count."""
    found = [(int(m[1]), p) for p in run.glob("step-*") if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
    return sorted(found, reverse=True)


def save(
    run: Path,
    step: int,
    write_model: Callable[[Path], None],
    optim: dict[str, Tensor],
    rng: dict[str, Tensor],
    state: dict[str, Any],
) -> Path:
    """Write one step directory and make it the run's `latest`. Returns its path.

    write_model: fills a directory with the model folder (weights, config, tokenizer).
    DataError (exit 3) when the disk refuses, with the bytes it was to take; Diverged (exit 6) when a weight or a moment
    of the optimizer is not a number. Earlier steps are untouched then.
    """
    path = step_dir(run, step)
    try:
        with new_dir(path) as work:
            write_model(work)
            for tensors in [optim, *(_tensors(file) for file in work.glob("*.safetensors"))]:
                _refuse_non_finite(run, step, tensors)
            trainer = work / "trainer"
            trainer.mkdir()
            save_file(contiguous(optim), trainer / "optim.safetensors")
            save_file(contiguous(rng), trainer / "rng.safetensors")
            text = json.dumps({"format": FORMAT, "step": step, **state}, ensure_ascii=False, indent=2)
            (trainer / "state.json").write_text(text + "\n", encoding="utf-8")
            seal(work)
        write_atomic(run / "latest", path.name + "\n")
    except (OSError, SafetensorError, DataError) as e:
        cause = _refusal(e)
        if cause is None:
            raise
        error = disk_error(cause, path)
        if cause.errno in FULL:
            error.found = _room(run, [*optim.values(), *rng.values()])
        raise error from e
    return path


def _refuse_non_finite(run: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """A loss and a gradient may be finite and the step that they lead to not."""
    for name, tensor in tensors.items():
        low, high = (b.item() for b in tensor.aminmax()) if tensor.numel() else (0, 0)  # one pass; NaN comes through
        if not (math.isfinite(low) and math.isfinite(high)):
            newest = pointer(run, "latest")
            raise Diverged(
                f"`{name}` is not a number after step {step}, which is therefore not saved",
                found=f"from {low:g} to {high:g}",
                fix="lower --lr" + (f"; the last good checkpoint is {run / newest}" if newest else ""),
            )


def _refusal(e: BaseException) -> OSError | None:
    """What the system answered, whichever way it reached us: bare, as one of our errors, or as text of safetensors."""
    if isinstance(e, SafetensorError) and (found := re.search(r"([^:]+) \(os error (\d+)\)", str(e))):
        code = int(found[2])
        return OSError(code, found[1].strip(), None, code)  # Windows counts its own way, and reads the last one
    if isinstance(e, DataError):
        e = e.__cause__ or e
    return e if isinstance(e, OSError) else None


def _room(run: Path, tensors: list[Tensor]) -> str:
    """How much a step takes, by the newest one or else by what is known of it, and how much the disk has left."""
    for _, folder in steps(run):
        need = f"{sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()):,} bytes, as {folder.name} does"
        break
    else:
        need = f"more than {sum(t.nbytes for t in tensors):,} bytes"
    return f"it needs {need}; the disk has {shutil.disk_usage(run).free:,} bytes free"


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


def seal(folder: Path) -> None:
    """Write the manifest: sha256 and size of every file, and a digest over the list itself."""
    files = {
        p.relative_to(folder).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"files": files, "digest": _digest(files)})


def _digest(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def fault(folder: Path) -> str | None:
    """What is wrong with a step directory, naming the file; None when every byte is as written."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = manifest["files"]
        if manifest["digest"] != _digest(files):
            return f"{MANIFEST} does not match its own digest"
        if not (folder / MANIFEST).read_bytes().endswith(b"\n"):  # all that JSON itself would not miss
            return f"{MANIFEST} is cut short"
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, {entry['bytes']:,} were written"
            if sha256(path) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except DataError as e:
        return e.message.replace(f"{folder}/", "")
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    except OSError as e:
        return f"{e.filename}: {e.strerror}"
    return None


def load(folder: Path) -> Checkpoint:
    """Read a step directory whose manifest holds.

    DataError when the format is newer than this program, and for a file that is no safetensors file, such as a pickle:
    whoever put it there under a manifest of its own meant it to be read, so no older step takes its place.
    """
    state = read_json(folder / "trainer" / "state.json")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise DataError(
            f"{folder} has checkpoint format {found}; this version reads {FORMAT}",
            fix="resume with the version of minigpt that wrote it (see run.json)",
        )
    return Checkpoint(
        step=state["step"],
        path=folder,
        weights=_tensors(folder / "model.safetensors"),
        optim=_tensors(folder / "trainer" / "optim.safetensors"),
        rng=_tensors(folder / "trainer" / "rng.safetensors"),
        state=state,
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise DataError(f"{path} is not a safetensors file", found=str(e), fix="nothing else is ever read") from e


def load_newest(run: Path, report: Report, at: int | None = None) -> Checkpoint | None:
    """The newest undamaged step of a run, or None when it has no step yet.

    at: go back to this step (UsageError when it is not there) or, when it is damaged, to the one before.
    A damaged step is named in a warning and the one before it is used. All damaged or gone: DataError, never from zero.
    """
    clear_unfinished(run)
    named = pointer(run, "latest")
    damaged = []
    if at is not None and not step_dir(run, at).is_dir():
        have = ", ".join(str(s) for s, _ in reversed(steps(run)))
        raise UsageError(f"{run} has no checkpoint of step {at}", fix=f"it has steps {have}" if have else None)
    if not steps(run) and named:
        raise DataError(
            f"the checkpoints of {run} are gone", found=f"`latest` names {named}", fix="start again with --overwrite"
        )
    if at is None and named and _STEP.fullmatch(named) and not (run / named).is_dir():
        report.warn(f"{run / named} is gone", fix="using the step before it")
    for number, folder in steps(run):
        if at is not None and number > at:
            continue
        wrong = fault(folder)
        if wrong is None:
            return load(folder)
        damaged.append(f"{folder.name}: {wrong}")
        report.warn(f"{folder} is damaged: {wrong}", fix="using the step before it")
    if damaged:
        raise DataError(
            f"every checkpoint of {run} is damaged",
            found="; ".join(damaged),
            fix="restore one from a backup, or start again with --overwrite",
        )
    return None


def clear_unfinished(run: Path) -> None:
    """Remove what a killed write left behind. The caller holds the run's lock."""
    for leftover in _unfinished(run):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _unfinished(run: Path) -> Iterator[Path]:
    for pattern in (".*.tmp", ".*.old"):
        yield from run.glob(pattern)


def set_aside(run: Path, step: int, report: Report) -> None:
    """Take the steps after `step` out of the run's line, so that it goes on from there.

    They stay as `aside-step-…`, damaged ones as `damaged-step-…`: left in the line, a damaged one would count as the
    newest, and `prune` would delete good ones for it.
    """
    later = [folder for number, folder in steps(run) if number > step]
    if later:
        write_atomic(run / "latest", step_dir(run, step).name + "\n")
        for folder in later:
            target = folder.with_name(f"{'damaged' if fault(folder) else 'aside'}-{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
            report.note("aside", f"{folder.name} is kept as {target}")


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` steps, the best and the last flat one. Called after `latest` is in place."""
    kept = {pointer(run, "best"), pointer(run, "flat")}
    for _, folder in steps(run)[keep:]:
        if folder.name not in kept:
            gone = folder.with_name(f".{folder.name}.old")
            try:
                folder.rename(gone)  # first out of sight, so that a crash leaves no half step
            except OSError as e:
                raise disk_error(e, folder) from e
            shutil.rmtree(gone, ignore_errors=True)


def pointer(run: Path, name: str) -> str | None:
    """The step directory name in the text file `latest`, `best` or `flat`."""
    try:
        return (run / name).read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None
