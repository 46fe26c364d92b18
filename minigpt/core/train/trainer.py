"""The loop, and nothing but the loop: batches in, optimizer steps, log rows, checkpoints out.

It knows neither the loss nor the data nor the model: a stage hands it `step(model, batch) -> StepOutput`, a source of
batches and callbacks. Every loss is a sum, divided once by the loss units of the whole optimizer step over all
processes, so neither the size of a micro-batch nor their number changes a gradient. Every decision depends on the step
number, on saved state and on what all processes agreed on: that makes resume exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minigpt.core import runtime as rt
from minigpt.core.data.batch import Batch
from minigpt.core.errors import DataError, Diverged, Stopped, is_out_of_memory
from minigpt.core.files import quoted, write_atomic
from minigpt.core.report import Progress, Report
from minigpt.core.train import checkpoint, guard
from minigpt.core.train.losses import Step
from minigpt.core.train.metrics import Clock, Counters, Window, figures
from minigpt.core.train.optim import Masters, Optimizer
from minigpt.core.train.parallel import Alone
from minigpt.core.train.plot import loss_svg
from minigpt.core.train.run import Run
from minigpt.core.train.schedule import Schedule
from minigpt.core.train.sharded import whole
from minigpt.core.train.signals import StopRequest
from minigpt.core.train.track import Tracker


class Source(Protocol):
    """Where batches come from. Its state is a cursor, so that resuming costs nothing."""

    micro_rows: int  # rows a micro-batch; lowered when memory runs out

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step, in order."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Pace:
    """How often to do what, in optimizer steps."""

    total: int
    log: int
    eval: int
    save: int
    keep: int = 3
    clip: float = 1.0  # 0 = never
    flat: int | None = None  # last step before the way down: kept, so that a longer run can go on from it
    max_seconds: float | None = None
    spike: float = 0.0  # leave out steps that leap by so many standard deviations; 0 = take them
    patient: bool = False  # go on when a checkpoint cannot be written, and try again at the next one


@dataclass
class Hooks:
    """What the stage adds. Each may be left out."""

    write_model: Callable[[Path, dict[str, Tensor]], None]  # fills a step directory with the model of these weights
    evaluate: Callable[[], dict[str, float]] | None = None  # → {"val_loss": …}
    on_eval: Callable[[int], list[dict[str, Any]]] | None = None  # → rows of samples.jsonl
    first_loss: Callable[[float], None] | None = None  # mean loss of the very first step, before any update
    state: dict[str, Any] = field(default_factory=dict)  # saved in state.json (fingerprints)
    tracker: Tracker = field(default_factory=Tracker)  # sees every log row and sample
    flops: Callable[[Batch], float] | None = None  # operations of a micro-batch, where they are measured against …
    peak_flops: float = math.inf  # … those that one device could do in a second


class Trainer:
    def __init__(
        self,
        *,
        model: nn.Module,
        masters: Masters,
        optimizer: Optimizer,
        schedule: Schedule,
        source: Source,
        step: Step,
        run: Run,
        runtime: rt.Runtime,
        parallel: Alone,
        pace: Pace,
        hooks: Hooks,
        report: Report,
    ):
        self.model = model
        self.masters = masters
        self.optimizer = optimizer
        self.schedule = schedule
        self.source = source
        self.step_fn = step
        self.run = run
        self.runtime = runtime
        self.parallel = parallel
        self.world = parallel.world
        self.pace = pace
        self.hooks = hooks
        self.report = report
        self.counters = Counters()
        self.clock = Clock()
        self.saved_step: int | None = None
        self._stop_agreed = False  # by all processes, with the newest step
        self._shrunk = False  # micro-batches have been halved for want of memory
        self._norm = math.nan  # of the newest gradient
        self._figures = ""  # of the newest log row

    # ---------------------------------------------------------------------------------------------- loop

    def fit(self) -> Path:
        """Train to the end. Returns the last step directory.

        Stopped (exit 75) after a signal or the time limit, with a checkpoint saved; Diverged (exit 6).
        """
        c, pace = self.counters, self.pace
        with (
            StopRequest(pace.max_seconds) as stop,
            self.report.progress(pace.total, start=c.step, label="train") as bar,
        ):
            while c.step < pace.total:
                if self._stop_agreed or (self.world.size == 1 and stop):
                    self._stop(stop)
                self.advance(stop)
                self._after(bar)
        if self.saved_step != c.step:  # a run that is resumed after its last step has nothing to do
            self.save(must=True)
        return checkpoint.step_dir(self.run.path, c.step)

    def advance(self, stop: StopRequest | None = None) -> None:
        """One optimizer step. stop: whether this process was asked to end; all hear of it with the step's loss."""
        self.clock.start()
        before = self.source.state_dict()
        batches = self.source.next_step()
        flops = sum(self.hooks.flops(b) for b in batches) if self.hooks.flops else 0.0
        tokens = self._update(batches, before, stop)
        self.counters.step += 1
        self.clock.stop(tokens, flops)

    def _after(self, bar: Progress) -> None:
        c, pace = self.counters, self.pace
        last = c.step == pace.total
        saving = last or c.step % pace.save == 0 or c.step == pace.flat
        evaluating = self.hooks.evaluate is not None and (last or c.step % pace.eval == 0)
        if evaluating or last or c.step % pace.log == 0:
            row = self._row()
            if evaluating:
                with self.clock.pause("evaluation"):
                    row.update(self._evaluate())
            self.run.log(row)
            self.hooks.tracker.log(row, c.step)
            barred = self.report.interactive  # a bar has an estimate of its own
            self._figures = figures(row, None if barred else self._eta(), c if barred else None)
            bar.update(c.step, self._figures, line=True)
        else:
            bar.update(c.step, self._figures)
        if evaluating and self.hooks.on_eval:
            with self.clock.pause("samples"):
                samples = self.hooks.on_eval(c.step)
            for sample in samples:
                self.run.log({"step": c.step, **sample}, "samples")
            self.hooks.tracker.samples(samples, c.step)
        if saving:
            with self.clock.pause("save"):
                self.save(val=self.counters.last_val.get("val_loss") if evaluating else None, must=last)

    def _eta(self) -> float:
        """Seconds until the run ends, from the moment at which a step is logged: its save is still to come."""
        done, pace = self.counters.step, self.pace
        validations = pace.total // pace.eval - done // pace.eval + (pace.total % pace.eval > 0 and done < pace.total)
        saves = pace.total // pace.save - (done - 1) // pace.save + (pace.total % pace.save > 0)
        return self.clock.eta(pace.total - done, evaluation=validations, samples=validations, save=saves)

    # ---------------------------------------------------------------------------------------------- one step

    def _update(self, batches: list[Batch], before: dict[str, Any], stop: StopRequest | None) -> int:
        """Gradients of all micro-batches, then one step. Returns the tokens it trained on, over all processes."""
        c = self.counters
        [units] = self.world.sum([sum(b.units for b in batches)])
        half = self.runtime.scales_loss
        scale = c.loss_scale if half else 1.0
        factor = scale / max(units, 1.0)
        try:
            loss = self._backward(batches, factor)
        except (MemoryError, RuntimeError) as e:
            if not is_out_of_memory(e) or self.world.size > 1:
                raise
            batches = self._smaller(before, e)
            loss = self._backward(batches, factor)
        loss, stops = self.world.sum([loss, float(bool(stop))])
        self._stop_agreed = stops > 0
        self.parallel.reduce()
        norm = self._clip(scale)
        good = guard.finite(loss, norm)
        if good and guard.leaps(c.history, loss / max(units, 1.0), norm, self.pace.spike):
            self._leave_out(batches, f"loss {loss / max(units, 1.0):.3g}, gradient norm {norm:.3g}: a leap")
        elif good:
            self.optimizer.step(self.schedule(c.step))
            self.masters.publish()
            c.streak = 0
            c.tokens += int(units)
            c.window.loss += loss
            c.window.units += units
        elif half and math.isfinite(loss) and c.loss_scale > 1:
            c.loss_scale, c.good_steps = c.loss_scale / 2, 0  # an overflow of the scaled gradient, not of the model
        else:
            self._bad_step(batches, loss, norm)
        if good and self.pace.spike:
            c.history.add(loss / max(units, 1.0), norm)
        if half and c.streak == 0:
            self._grow_scale()
        self.masters.zero_grad()
        self._norm = norm
        if c.step == 0 and self.hooks.first_loss and units:
            self.hooks.first_loss(loss / units)
        return int(units)

    def _backward(self, batches: list[Batch], factor: float) -> float:
        """Add every micro-batch's gradient, times `factor`. Returns the summed loss of this process."""
        sums = []
        for i, batch in enumerate(batches):
            self.parallel.before_backward(last=i == len(batches) - 1)
            out = self.step_fn(self.model, batch.to(self.runtime.device))
            sums.append(out.sum_loss.detach())
            (out.sum_loss * (factor * self.parallel.loss_factor)).backward()
        return math.fsum(s.item() for s in sums)  # read once, after all the work is queued

    def _smaller(self, before: dict[str, Any], fault: BaseException) -> list[Batch]:
        """The same rows in micro-batches half as large, once what the failed attempt held is freed."""
        tried = self.source.micro_rows
        fault.__traceback__ = None  # its frames hold the half-built graph
        self.masters.zero_grad()
        rt.free_after_failure()
        if self._shrunk or tried == 1:
            raise fault
        self._shrunk = True
        self.source.micro_rows = rows = max(1, tried // 2)
        self.source.load_state_dict(before)
        text = f"step {self.counters.step + 1} ran out of memory with {tried} rows at once: going on with {rows}"
        self.report.warn(text, fix=f"--batch-size {rows} begins with that")
        self.run.event("memory", text, self.counters.step + 1)
        return self.source.next_step()

    def _clip(self, scale: float) -> float:
        """Undo the loss scale, clip, and return the gradient's norm before clipping."""
        gradients = self.masters.gradients()
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        norm: float = whole(torch.nn.utils.get_total_norm(gradients)).item()
        if self.pace.clip and math.isfinite(norm) and norm > self.pace.clip:
            torch._foreach_mul_(gradients, self.pace.clip / (norm + 1e-6))
        return norm

    def _grow_scale(self) -> None:
        """Dynamic loss scaling (Micikevicius et al., 2018, arXiv:1710.03740): double after 2,000 good steps."""
        c = self.counters
        c.good_steps += 1
        if c.good_steps >= 2000:
            c.loss_scale, c.good_steps = min(c.loss_scale * 2, 2.0**24), 0

    def _bad_step(self, batches: list[Batch], loss: float, norm: float) -> None:
        """Leave a step out because its loss or gradient is not a number; end the run after three in a row."""
        c = self.counters
        c.streak += 1
        what = self._leave_out(
            batches, f"loss {loss:g}, gradient norm {norm:g}", quiet=c.streak >= guard.MOST_BAD_STEPS
        )
        if c.streak < guard.MOST_BAD_STEPS:
            return
        newest = checkpoint.pointer(self.run.path, "latest")
        which = (
            "the gradient is not a number, though the loss is," if math.isfinite(loss) else "the loss is not a number"
        )
        raise Diverged(
            f"{which} in {guard.MOST_BAD_STEPS} steps in a row (step {c.step + 1})",
            found=what,
            fix=f"lower --lr (it is {self.schedule.peak:g})"
            + (f"; the last good checkpoint is {self.run.path / newest}" if newest else ""),
        )

    def _leave_out(self, batches: list[Batch], why: str, quiet: bool = False) -> str:
        """Count a step that is not taken. Returns what was wrong with it and on which data rows."""
        c = self.counters
        c.skipped += 1
        c.window.skipped += 1
        rows = [r for b in batches for r in b.rows]
        what = f"{why} on data rows {min(rows):,} to {max(rows):,}" if rows else f"{why} on this batch"
        if not quiet:
            self.report.warn(f"step {c.step + 1} left out: {what}")
            self.run.event("skipped", what, c.step + 1)
        return what

    # ---------------------------------------------------------------------------------------------- log, save

    def _row(self) -> dict[str, Any]:
        c, speed = self.counters, self.clock.rates()
        row = {
            "step": c.step,
            "tokens": c.tokens,
            "epoch": round(self.source.epoch, 4),
            "loss": c.window.mean,
            "lr": self.schedule(c.step - 1),
            "grad_norm": self._norm if math.isfinite(self._norm) else None,
            "tok_s": round(speed.tokens, 1),
            "mem_gb": round(self.runtime.memory_gb(), 3),
        }
        if self.hooks.flops:
            row["mfu"] = round(speed.flops / self.hooks.peak_flops, 4)
        if c.window.skipped:
            row["skipped"] = c.window.skipped
        c.window = Window()
        rt.release_memory()
        return row

    def _evaluate(self) -> dict[str, float]:
        assert self.hooks.evaluate is not None
        self.model.eval()
        scores = self.hooks.evaluate()
        self.model.train()
        self.counters.last_val, self.counters.val_step = scores, self.counters.step
        return scores

    def save(self, val: float | None = None, must: bool = False) -> None:
        """Write a step directory. val: validation loss of this very step, to keep the best one.

        must: a failure ends the run also when it may go on without saving.
        """
        c = self.counters
        best = val is not None and math.isfinite(val) and (c.best is None or val < c.best)
        if best:
            c.best, c.best_step = val, c.step
        weights = self.parallel.whole_state(dict(self.masters.named))
        optim = self.parallel.whole_state(self.optimizer.state_dict())
        rng = rt.all_rng_states(self.world)
        if self.world.share(lambda: self._write(weights, optim, rng, must)):
            self.saved_step = c.step

    def _write(self, weights: dict[str, Tensor], optim: dict[str, Tensor], rng: dict[str, Tensor], must: bool) -> bool:
        """Rank 0's part of `save`. False when the disk refused and the run goes on without."""
        c = self.counters
        state = {
            "counters": c.state_dict(),
            "source": self.source.state_dict(),
            "total": self.pace.total,
            "flat": self.pace.flat,
            "world_size": self.world.size,
            **self.hooks.state,
        }
        try:
            self.run.sync_logs()
            path = checkpoint.save(
                self.run.path, c.step, lambda work: self.hooks.write_model(work, weights), optim, rng, state
            )
            self._point_to_best()
            if c.step == self.pace.flat:
                write_atomic(self.run.path / "flat", path.name + "\n")
            checkpoint.prune(self.run.path, self.pace.keep)
            write_atomic(self.run.path / "loss.svg", loss_svg(self.run.rows(), self.run.path.name))
        except DataError as e:
            if must or not self.pace.patient:
                raise
            self.report.warn(f"step {c.step:,} is not saved: {e.message}", fix="make room: the next save tries again")
            self.run.event("not saved", e.message, c.step)
            return False
        return True

    def _point_to_best(self) -> None:
        """Let `best` name the best step. Derived from saved counters, so a crash cannot leave the two apart."""
        c = self.counters
        if c.best_step is not None:
            best = checkpoint.step_dir(self.run.path, c.best_step)
            if best.is_dir():
                write_atomic(self.run.path / "best", best.name + "\n")
                return
            c.best = c.best_step = None  # gone back to a step whose best has been pruned since
        (self.run.path / "best").unlink(missing_ok=True)

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Take up where `saved` left off."""
        self.masters.load(saved.weights)
        self.optimizer.load_state_dict(saved.optim)
        self.source.load_state_dict(saved.state["source"])
        self.counters = Counters.from_state(saved.state["counters"])
        rt.restore_rng(saved.rng, self.world.rank)
        self.saved_step = saved.step
        if self.world.leads:
            self.run.cut_logs(saved.step)
            write_atomic(self.run.path / "latest", saved.path.name + "\n")
            self._point_to_best()

    def _stop(self, stop: StopRequest) -> None:
        c = self.counters
        if self.saved_step != c.step:
            self.save(must=True)
        raise Stopped(
            f"stopped by {stop.reason or 'a signal to another process'} after step {c.step:,} of "
            f"{self.pace.total:,}; saved {checkpoint.step_dir(self.run.path, c.step)}",
            fix=f"go on with --resume {quoted(self.run.path)}",
        )
