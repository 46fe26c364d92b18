"""Continuing a run: its own options first, explicit ones on top, and nothing that changes the maths by accident.

Free of torch, so that a refused resume answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minigpt.core.config import REPLACED, Layer, build, options, spelled, yaml_layer
from minigpt.core.errors import UsageError
from minigpt.core.files import quoted, read_json
from minigpt.core.train.run import default_out, is_run

T = TypeVar("T")
MOST_NAMED = 5  # changed data files in an error

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
        return Place(Path(out), resuming=_is_run_of(stage, Path(out)))
    path = Path(resume)
    step = None
    if path.name.startswith("step-") and path.name[5:].isdigit() and is_run(path.parent):
        path, step = path.parent, int(path.name[5:])
    if not _is_run_of(stage, path):
        raise UsageError(
            f"--resume {resume} is not a run directory",
            fix="name a directory that holds run.json; to start from a model's weights use --model",
        )
    if out and Path(out).resolve() != path.resolve():
        raise UsageError("--resume and --out name different runs", found=f"{resume}, {out}", fix="leave --out away")
    return Place(path, resuming=True, from_step=step)


def _is_run_of(stage: str, path: Path) -> bool:
    """Whether a run lies there. UsageError when it is one of another stage, which alone can go on with it."""
    if not is_run(path):
        return False
    began = read_json(path / "run.json").get("stage", stage) if (path / "run.json").exists() else stage
    if began != stage:
        raise UsageError(
            f"{path} is a run of {began}, not of {stage}",
            fix=f"go on with it: minigpt {began} --resume {quoted(path)}; start {stage} from its weights: "
            f"minigpt {stage} -m {quoted(path)}",
        )
    return True


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


def compare(
    saved: Mapping[str, Any], now: Mapping[str, Any], allow_changes: bool, files: Mapping[str, str] | None = None
) -> list[str]:
    """Fingerprints of model, data and tokenizer, saved and now. UsageError lists the differing ones.

    files: what became of each data file that is not as it was (`changed_files`).
    """
    different = {k: f"{k}: {saved[k]} → {now.get(k)}" for k in saved if saved[k] != now.get(k)}
    names = list(different)
    if "data" in different and files:
        shown = [*list(files)[:MOST_NAMED], *([f"{len(files) - MOST_NAMED} more"] if len(files) > MOST_NAMED else [])]
        names[names.index("data")] = f"data ({', '.join(shown)})"
        different["data"] = "; ".join(f"{name} {what}" for name, what in list(files.items())[:MOST_NAMED])
    if different and not allow_changes:
        raise UsageError(
            "what this run was trained on has changed: " + ", ".join(names),
            found="; ".join(different.values()),
            fix="put the old files back, start a new run with another --out, or pass --allow-changes",
        )
    return list(different.values())


def changed_files(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Data files that were read and are not any more, or are other ones, by path, with what became of them.

    before, now: `sources` of a store: path, sha256, rows. A file that only moved has not changed.
    """
    same = {s["sha256"] for s in before} & {s["sha256"] for s in now}
    old, new = ({s["path"]: s for s in side if s["sha256"] not in same} for side in (before, now))
    changes = {}
    for path in dict.fromkeys([*old, *new]):
        if path not in new:
            changes[path] = "is not read any more"
        elif path not in old:
            changes[path] = "was not read before"
        else:
            had, has = old[path]["rows"], new[path]["rows"]
            changes[path] = f"had {had:,} rows and has {has:,}" if had != has else "has as many rows, and other ones"
    return changes
