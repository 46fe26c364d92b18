"""The first lines of a training run: what is trained, on what, for how long."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from minigpt.core.models.flops import mean_context
from minigpt.core.train.memory import estimate
from minigpt.core.train.metrics import short

if TYPE_CHECKING:
    from minigpt.stages.supervised import Session

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon + AdamW"}


def title(session: Session) -> None:
    s = session
    kind = s.model.config.model_type
    if not s.cfg.model and getattr(s.cfg, "size", None):
        kind += f", {s.cfg.size}"
    size = short(s.model.num_parameters())
    s.report.title(f"minigpt {s.job.stage} · {size} parameters ({kind}) · {s.runtime.name} · {s.path}")


def plan(session: Session) -> None:
    """Data and its packing, what was left out of it, steps and learning rate; with --verbose the rest."""
    s, cfg = session, session.cfg
    s.report.note("data", data_line(s))
    for line in [*s.store.notes, *s.plan.notes]:
        s.report.warn(line)
    seen = s.epochs or s.rows_per_step * s.total / s.rows_per_epoch
    shape = cfg.optim.schedule.upper() if cfg.optim.schedule == "wsd" else cfg.optim.schedule
    s.report.note(
        "plan",
        f"{seen:.3g} epochs = {s.total:,} steps × {s.rows_per_step * cfg.data.max_len:,} tokens"
        f" · {OPTIMIZERS[cfg.optim.optimizer]} lr {cfg.optim.lr:g}, {shape}",
    )
    memory(s)
    s.report.detail(f"store  {s.store.path}")
    s.report.detail(f"model  {json.dumps(s.model.config.to_hf())}")
    s.report.detail(
        f"pace   {s.micro_rows} of {s.rows_per_step} rows at once · warm-up {s.schedule.warmup_steps} steps"
        f" · way down from step {s.schedule.decay_start} · eval every {s.pace.eval}, save every {s.pace.save}"
    )


def memory(session: Session) -> None:
    """What a step will take, and, when that is more than there is, the flag to change."""
    s, cfg = session, session.cfg
    lengths = s.store.positions(s.store.indices("train")).clip(max=cfg.data.max_len)
    need = estimate(
        s.model.config,
        s.micro_rows,
        cfg.data.max_len,
        str(s.runtime.dtype).removeprefix("torch."),
        cfg.optim.optimizer,
        s.runtime.device.type,
        cfg.train.grad_checkpoint,
        mean_context(lengths) if cfg.data.pack == "pack" else None,
    )
    room = s.runtime.free_memory()
    s.report.note("memory", need.line(room))
    if room is not None and (advice := need.advice(room, sized=not cfg.model)):
        s.report.warn("this may not fit into memory", fix=advice)


def data_line(session: Session) -> str:
    s = session
    train = s.store.indices("train")
    tokens = int(s.store.positions(train).sum())
    note = f" ({s.tokenizer_note})" if s.tokenizer_note else ""
    held = len(s.val_store.indices(s.val_split))
    how = f"packed into {len(s.plan):,} rows" if s.cfg.data.pack == "pack" else f"one to a row: {len(s.plan):,} rows"
    return (
        f"{len(train):,} documents → {short(tokens)} tokens{note} · {how} of {s.cfg.data.max_len:,}, "
        f"{s.plan.fill:.1%} full · {held:,} documents held out"
    )
