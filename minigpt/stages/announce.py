"""The first lines of a training run: what is trained, on what, for how long."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from minigpt.core.errors import OutOfMemory
from minigpt.core.files import quoted
from minigpt.core.models.flops import mean_context, peak_flops, train_flops
from minigpt.core.train.memory import Estimate, estimate
from minigpt.core.train.metrics import counted, short
from minigpt.core.train.schedule import Schedule

if TYPE_CHECKING:
    from minigpt.core.data.batch import Batch
    from minigpt.stages.supervised import Session

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon + AdamW"}


def title(session: Session) -> None:
    s = session
    kind = s.model.config.model_type
    if not s.cfg.model and getattr(s.cfg, "size", None):
        kind += f", {s.cfg.size}"
    size = short(s.parameters)
    many = f" × {s.world.size} ({s.cfg.train.parallel})" if s.world.size > 1 else ""
    where = "dry run" if s.cfg.train.dry_run else s.path
    s.report.title(f"minigpt {s.job.stage} · {size} parameters ({kind}) · {s.runtime.name}{many} · {where}")
    if told := s.runtime.emulation:
        s.report.warn(told)


def plan(session: Session) -> None:
    """Data and its packing, what was left out of it, steps and learning rate; with --verbose the rest."""
    s, cfg, p = session, session.cfg, session.pacing
    s.report.note("data", data_line(s))
    for line in [*s.corpus.store.notes, *s.corpus.plan.notes]:
        s.report.warn(line)
    seen = p.epochs or p.rows_per_step * p.total / s.corpus.rows_per_epoch
    shape = cfg.optim.schedule.upper() if cfg.optim.schedule == "wsd" else cfg.optim.schedule
    s.report.note(
        "plan",
        f"{counted(seen, 'epoch')} = {counted(p.total, 'step')} × {p.rows_per_step * cfg.data.max_len:,} tokens"
        f" · {OPTIMIZERS[cfg.optim.optimizer]} lr {cfg.optim.lr:g}, {shape}: {course(p.schedule)}",
    )
    memory(s)
    s.report.detail(f"store  {s.corpus.store.path}")
    s.report.detail(f"model  {json.dumps(s.model.config.to_hf())}")
    s.report.detail(
        f"pace   {p.micro_rows} of {p.rows_per_step} rows at once · eval every {p.pace.eval}, save every {p.pace.save}"
    )


def course(schedule: Schedule) -> str:
    """When the learning rate rises and falls, in steps."""
    falls = f"decay from step {schedule.decay_start:,}" if schedule.decay_start < schedule.total else "no decay"
    rises = f"warm-up {counted(schedule.warmup_steps, 'step')}" if schedule.warmup_steps else "no warm-up"
    return f"{rises}, {falls}"


def memory(session: Session) -> None:
    """What a step will take, and, when that is more than there is, the flag to change."""
    s = session
    need, room = needed(s), s.runtime.free_memory()
    if room is not None and s.runtime.device.type == "cpu":
        room //= s.world.neighbours
    s.report.note("memory", need.line(room))
    if room is not None and (advice := need.advice(room, sized=not s.cfg.model)):
        s.report.warn("this may not fit into memory", fix=advice)


def needed(session: Session, rows: int | None = None) -> Estimate:
    """rows: computed at once; the run's own when None."""
    from minigpt.core.runtime import tolerant_dtype

    s, cfg = session, session.cfg
    return estimate(
        s.model.config,
        s.pacing.micro_rows if rows is None else rows,
        s.corpus.longest_row,
        str(s.runtime.dtype).removeprefix("torch."),
        cfg.optim.optimizer,
        s.runtime.device.type,
        cfg.train.grad_checkpoint,
        document_context(s) if cfg.data.pack == "pack" else None,
        s.world.size if cfg.train.parallel == "fsdp" else 1,
        str(tolerant_dtype(s.runtime.device)),
    )


def document_context(session: Session) -> float:
    """Length of the document that the average token of the training rows is in."""
    store = session.corpus.store
    return mean_context(store.positions(store.indices("train")).clip(max=session.cfg.data.max_len))


def out_of_memory(session: Session, e: BaseException) -> OutOfMemory:
    """What took the memory, and the one flag to change, with its value."""
    if not hasattr(session, "pacing"):
        return OutOfMemory("out of memory before the first step", found=_asked(e), fix="choose a smaller --size")
    rows, length = session.rows_at_once, session.cfg.data.max_len
    need = needed(session, rows)
    smaller = f"--batch-size {max(1, rows // 2)}" if rows > 1 else "--grad-checkpoint"
    if rows == 1 and session.cfg.train.grad_checkpoint:
        smaller = f"--max-len {max(2, length // 2)}"
    return OutOfMemory(
        f"out of memory with {rows} row{'s' * (rows != 1)} of {length:,} tokens at once: a step needs {need.line()}",
        found=_asked(e),
        fix=f"continue with {smaller} and --resume {quoted(session.path)}"
        if (session.path / "latest").exists()
        else f"try {smaller}",
    )


def _asked(e: BaseException) -> str:
    """The allocator's own words, on one line."""
    return " ".join(str(e).split())[-150:] or type(e).__name__


def operations(session: Session) -> tuple[Callable[[Batch], float] | None, float]:
    """How many operations a micro-batch takes, and what the device could do in a second: the two sides of MFU.

    (None, inf) where the device's best is not known, as on any processor.
    """
    import torch

    s = session
    name = torch.cuda.get_device_name(s.runtime.device) if s.runtime.device.type == "cuda" else s.runtime.device.type
    peak = peak_flops(name, str(s.runtime.dtype))
    if peak is None:
        return None, math.inf
    context = document_context(s)

    def count(batch: Batch) -> float:
        positions = int((batch.segments >= 0).sum())
        if not positions:
            return 0.0
        return positions * train_flops(s.model.config, context, labelled=batch.units / positions)

    return count, peak


def data_line(session: Session) -> str:
    s, c = session, session.corpus
    train = c.store.indices("train")
    tokens = int(c.store.positions(train).sum())
    note = f" ({s.tokenizer_note})" if s.tokenizer_note else ""
    held = len(c.val_store.indices(c.val_split))
    how = f"packed into {len(c.plan):,} rows" if s.cfg.data.pack == "pack" else f"one to a row: {len(c.plan):,} rows"
    return (
        f"{len(train):,} documents → {short(tokens)} tokens{note} · {how} of {s.cfg.data.max_len:,}, "
        f"{c.plan.fill:.1%} full · {held:,} documents held out"
    )
