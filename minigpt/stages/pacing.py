"""How long a supervised run is and how fast it goes: what was not given is chosen here, and recorded."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minigpt.core.errors import UsageError
from minigpt.core.train.defaults import suggested_batch, suggested_lr, suggested_rows, warn_lr
from minigpt.core.train.schedule import Schedule

if TYPE_CHECKING:
    from minigpt.core.train.trainer import Pace
    from minigpt.stages.supervised import Session


@dataclass(frozen=True)
class Pacing:
    """The run in numbers. epochs: None when steps or tokens were asked for."""

    rows_per_step: int
    micro_rows: int
    total: int
    epochs: float | None
    schedule: Schedule
    pace: Pace


def choose(session: Session) -> Pacing:
    """Fill in learning rate and batch, and count the steps. May take the session back to its last flat step."""
    from minigpt.core.train.trainer import Pace

    s, cfg, t = session, session.cfg, session.cfg.train
    size = s.model.num_parameters()
    rows, max_len = s.corpus.rows_per_epoch, cfg.data.max_len
    if t.batch_tokens is None:
        t.batch_tokens = suggested_batch(size, rows, max_len, s.job.stage)
        s.origins["batch_tokens"] = "auto"
    if t.batch_tokens < max_len:
        raise UsageError(
            f"--batch-tokens {t.batch_tokens:,} is less than one row of {max_len:,} tokens",
            fix=f"--batch-tokens takes at least {max_len}, or lower --max-len",
        )
    rows_per_step = max(1, round(t.batch_tokens / max_len))
    if cfg.optim.lr is None:
        cfg.optim.lr = suggested_lr(size, s.job.stage)
        s.origins["lr"] = "auto"
    else:
        warn_lr(cfg.optim.lr, size, s.job.stage, s.report)
    epochs = t.epochs if t.steps is None and t.tokens is None else None
    total = _total(s, rows_per_step)
    if _went_back_to_flat(s, total):
        total = _total(s, rows_per_step)
    schedule = Schedule(cfg.optim.lr, total, cfg.optim.schedule, cfg.optim.warmup, cfg.optim.decay, cfg.optim.min_lr)
    _warn_of_bends(s, schedule)
    cadence = -(-total // 10)  # ten times a run, the last one at its end
    pace = Pace(
        total=total,
        log=t.log_every,
        eval=t.eval_every or cadence,
        save=t.save_every or cadence,
        keep=t.keep,
        clip=cfg.optim.clip,
        flat=schedule.decay_start if cfg.optim.schedule == "wsd" else None,
        max_seconds=t.max_time,
        spike=cfg.optim.skip_spikes,
        patient=t.save_failure == "warn",
    )
    mine = -(-rows_per_step // s.world.size)
    if t.batch_size == 0:
        t.batch_size = s.world.share(lambda: _probed(s, mine))
        s.origins["batch_size"] = "auto, by trying"
    micro_rows = min(t.batch_size or suggested_rows(max_len, s.runtime.device.type), mine)
    return Pacing(rows_per_step, micro_rows, total, epochs, schedule, pace)


def _total(s: Session, rows_per_step: int) -> int:
    """Steps of the whole run: those done, and those that the rest of the data or the budget takes."""
    t, plan = s.cfg.train, s.corpus.plan
    if t.steps is not None:
        return int(t.steps)
    if t.tokens is not None:
        tokens_per_row = plan.positions / len(plan)
        return max(1, math.ceil(t.tokens / (tokens_per_row * rows_per_step)))
    done, cursor = (s.saved.step, s.saved.state["source"]["row"]) if s.saved is not None else (0, 0)
    left = max(0, round(t.epochs * s.corpus.rows_per_epoch) - cursor)  # the batch may have been another one before
    return max(1, int(done) + math.ceil(left / rows_per_step))


def _went_back_to_flat(s: Session, total: int) -> bool:
    """A lengthened wsd run goes on from its last flat step, where the learning rate had not yet fallen.

    Its last step may have been a short one, so the total is counted anew from there.
    """
    from minigpt.core.train import checkpoint

    if s.saved is None or total <= s.saved.state["total"]:
        return False
    flat = s.saved.state.get("flat")
    if flat is None or flat >= s.saved.step:
        return False
    if not checkpoint.step_dir(s.path, flat).is_dir():
        return False
    s.saved = checkpoint.load_newest(s.path, s.report, flat)
    return True


def _warn_of_bends(s: Session, schedule: Schedule) -> None:
    """Say so when the learning rate does not go as its flags say, or not on from where it was."""
    if schedule.bent:
        s.report.warn(schedule.bent, fix="lower --warmup or --decay, or train for longer")
    if s.saved is None or schedule.total == s.saved.state["total"]:
        return
    if leap := schedule.leap(replace(schedule, total=s.saved.state["total"]), s.saved.step):
        s.report.warn(
            f"the learning rate goes from {leap[0]:.3g} to {leap[1]:.3g} at step {s.saved.step:,}: "
            f"{schedule.shape} over {schedule.total:,} steps is another curve than over {s.saved.state['total']:,}",
            fix="plan the whole length at the start, or use --schedule wsd, which goes on from its last flat step "
            "as long as that is kept",
        )


def _probed(s: Session, most: int) -> int:
    """--batch-size auto: forward and backward of the run's own rows, more and more at once."""
    from minigpt.core.data.source import Order, RowReader
    from minigpt.core.runtime import synchronise
    from minigpt.core.train.losses import next_token
    from minigpt.core.train.metrics import short
    from minigpt.core.train.probe import fastest_rows
    from minigpt.stages.announce import needed

    if s.cfg.train.parallel == "fsdp" and s.world.size > 1:
        raise UsageError("--batch-size auto does not work with --parallel fsdp", fix="name a number of rows")
    order = Order(s.corpus.plan.group, s.corpus.store.weights, s.cfg.device.seed)
    reader = RowReader(s.corpus.store, s.corpus.plan, s.tokenizer.pad_id)
    room = s.runtime.free_memory()

    def speed(rows: int) -> float:
        batch = reader.batch([(k, order(k)) for k in range(rows)]).to(s.runtime.device)
        seconds = []
        for _ in range(3):  # the first one compiles and allocates
            began = time.perf_counter()
            next_token(s.model, batch).sum_loss.backward()
            s.masters.zero_grad()
            synchronise(s.runtime.device)
            seconds.append(time.perf_counter() - began)
        return rows * s.cfg.data.max_len / min(seconds[1:])

    best, tried = fastest_rows(speed, most, lambda rows: room is None or needed(s, rows).total < 0.9 * room)
    spelled = " · ".join(f"{rows}: {short(found)}" for rows, found in tried.items())
    s.report.note("rows", f"tok/s by rows at once: {spelled} → --batch-size {best}")
    return best
