"""Continuing a run: its own options first, explicit ones on top, and nothing that changes the maths by accident.

Free of torch, so that a refused resume answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minigpt.core.config import REPLACED, Layer, build, options, spelled, yaml_layer
from minigpt.core.errors import UsageError
from minigpt.core.train.run import default_out, is_run

T = TypeVar("T")

# May differ at resume without a word: they change neither the data nor the arithmetic.
FREE = {
    "device", "batch_size", "save_every", "keep", "log_every", "eval_every", "eval_rows", "sample_prompt", "max_time",
    "compile", "grad_checkpoint", "out", "resume", "overwrite", "allow_changes", "config", "json", "quiet", "verbose",
    "show_config", "track", "nproc", "nnodes", "rdzv", "parallel", "rank_timeout", "save_failure", "dry_run",
}  # fmt: skip
# May differ, and the difference is printed: the run becomes longer or shorter, or a file has moved. Whether what was
# trained on is still the same is decided by its content (`compare`).
TOLD = {"steps", "epochs", "tokens", "data", "val_data", "tokenizer", "model"}


@dataclass(frozen=True)
class Place:
    """Where a run lives and whether it goes on."""

    path: Path
    resuming: bool
    from_step: int | None = None  # a step directory was named: go on from there

    def to_json(self) -> tuple[str, bool, int | None]:
        """The fields in order, for other processes."""
        return str(self.path), self.resuming, self.from_step


def place(stage: str, out: str | None, resume: str | None) -> Place:
    """Read --out and --resume. UsageError when they contradict each other or name nothing."""
    if resume is None:
        return Place(Path(out) if out else default_out(stage), resuming=False)
    if resume == "auto":
        if not out:
            raise UsageError(
                "--resume auto needs --out to know which run", fix="add --out DIR, or name it: --resume DIR"
            )
        return Place(Path(out), resuming=is_run(Path(out)))
    path = Path(resume)
    step = None
    if path.name.startswith("step-") and path.name[5:].isdigit() and is_run(path.parent):
        path, step = path.parent, int(path.name[5:])
    if not is_run(path):
        raise UsageError(
            f"--resume {resume} is not a run directory",
            fix="name a directory that holds run.json; to start from a model's weights use --model",
        )
    if out and Path(out).resolve() != path.resolve():
        raise UsageError("--resume and --out name different runs", found=f"{resume}, {out}", fix="leave --out away")
    return Place(path, resuming=True, from_step=step)


def merge(cfg: T, origins: Mapping[str, str], run: Path, allow_changes: bool) -> tuple[T, dict[str, str], list[str]]:
    """The saved config of `run` with this command's explicit options on top.

    Returns config, origins and the lines that describe changes. UsageError lists changes of anything but the run's
    length or its housekeeping, unless `allow_changes`.
    """
    saved_path = run / "config.yaml"
    if not saved_path.exists():  # killed before its first write: nothing to hold on to
        return cfg, dict(origins), []
    saved = yaml_layer(saved_path)
    given = {
        o.name: spelled(o, value_of(cfg, o.path))
        for o in options(type(cfg))
        if (origin := origins.get(o.name, "default")) != "default"
        and not origin.startswith("preset:")
        and REPLACED not in origin
    }
    merged, merged_origins = build(type(cfg), [Layer("command line", given), saved])
    before, _ = build(type(cfg), [saved])
    changes, refused = [], []
    for o in options(type(cfg)):
        old, new = value_of(before, o.path), value_of(merged, o.path)
        if old == new or o.name in FREE or REPLACED in merged_origins[o.name]:
            continue  # what replaces an option is told itself
        line = f"{o.flag}: {old} → {new}"
        changes.append(line)
        if o.name not in TOLD:
            refused.append(line)
    if refused and not allow_changes:
        raise UsageError(
            f"--resume {run} would change the run",
            found="; ".join(refused),
            fix="leave these options away, start a new run with another --out, or pass --allow-changes",
        )
    return merged, merged_origins, changes


def value_of(cfg: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        cfg = getattr(cfg, part)
    return cfg


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], allow_changes: bool) -> list[str]:
    """Fingerprints of model, data and tokenizer, saved and now. UsageError lists the differing ones."""
    different = [f"{k}: {saved[k]} → {now.get(k)}" for k in saved if saved[k] != now.get(k)]
    if different and not allow_changes:
        raise UsageError(
            "what this run was trained on has changed: " + ", ".join(d.split(":")[0] for d in different),
            found="; ".join(different),
            fix="put the old files back, start a new run with another --out, or pass --allow-changes",
        )
    return different
