"""The body that pretraining and fine-tuning share: data, model and trainer put together from one config.

Only the kind of data, the start of the weights and a few defaults differ, and `Job` names those.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt.core.config import assignments, dump, options
from minigpt.core.errors import Aborted, DataError, MinigptError, Stopped, UsageError
from minigpt.core.files import RunLock, read_json, sha256
from minigpt.core.report import Context, Result
from minigpt.core.train import resume, track
from minigpt.core.train.defaults import suggested_batch, suggested_lr, suggested_rows, warn_lr
from minigpt.core.train.run import Run, make, refuse_or_clear
from minigpt.core.train.schedule import Schedule
from minigpt.stages import announce
from minigpt.stages.tokenizer_choice import choose


@dataclass
class Job:
    """One supervised training run. kind: `text` (every token is learnt) or `chat` (the answers are)."""

    stage: str
    kind: str
    cfg: Any
    context: Context


def train(job: Job) -> Result:
    """Run a job to its end. Result: the last step directory, and the run's figures."""
    cfg, origins = job.cfg, dict(job.context.origins)
    place = resume.place(job.stage, cfg.train.out, cfg.train.resume)
    preflight(cfg, place.resuming)
    make(place.path)
    with RunLock(place.path):
        if place.resuming:
            cfg, origins, changes = resume.merge(cfg, origins, place.path, cfg.train.allow_changes)
            for line in changes:
                job.context.report.note("change", line)
        else:
            refuse_or_clear(place.path, cfg.train.overwrite)
        if not cfg.data.data:
            raise UsageError(f"{job.stage} needs data", fix="name a file, a directory or - with --data")
        return Session(job, cfg, origins, place).run()


def preflight(cfg: Any, resuming: bool) -> None:
    """What can be refused before torch is imported: paths that are not there. Makes paths absolute on the way.

    A resumed run needs its parent model no more, so that one may be gone.
    """
    from minigpt.core.data.reader import anchored, expand
    from minigpt.core.models.folder import resolve

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
    if cfg.model is not None:
        with contextlib.suppress(*([MinigptError] if resuming else [])):
            cfg.model = absolute(str(resolve(cfg.model)))
    if cfg.data.tokenizer is not None:
        cfg.data.tokenizer = absolute(cfg.data.tokenizer)


def absolute(path: str) -> str:
    """One spelling for one place: a run compares paths when it is resumed."""
    return os.path.abspath(os.path.expanduser(path))


@dataclass
class Session:
    """One process's work on a run: the pieces are made in order, then `fit`."""

    job: Job
    cfg: Any
    origins: dict[str, str]
    place: resume.Place
    started: float = field(default_factory=time.perf_counter)

    def run(self) -> Result:
        self.report = self.job.context.report
        self.path = self.place.path
        self.log = Run(self.path)
        self.saved: Any = None
        self.tracker = track.Tracker()
        self.tracked: dict[str, Any] = {}  # what run.json says of an earlier session's trackers
        self.logged = 0  # last step in metrics.jsonl before this session
        try:
            self._prepare()
        except BaseException:
            self.tracker.finish("failed")
            if not self.place.resuming:
                self.log.abandon()  # nothing was trained: the same command may be tried again
            raise
        status = "failed"
        try:
            result = self._fit()
            status = "done"
            return result
        except Stopped:
            status = "stopped"
            self.log.finish("stopped")
            raise
        except Aborted as e:
            self.log.finish("failed", error=e.message)
            self.tracker.finish("failed", seconds=2)  # asked twice to stop: no long wait for a network
            raise
        except MinigptError as e:
            self.log.finish("failed", error=e.message)
            raise
        except BaseException as e:
            self.log.finish("failed", error=f"{type(e).__name__}: {e}")
            raise
        finally:
            self.tracker.finish(status)

    def _prepare(self) -> None:
        """Everything up to the first step."""
        if self.place.resuming:
            self._open_checkpoint()
        else:
            facts = {"argv": self.job.context.argv, "stage": self.job.stage, "seed": self.cfg.device.seed}
            self.log.start(dump(self.cfg, self.origins), facts)
        self.tokenizer, self.tokenizer_note = choose(
            self.job.kind, self.cfg, self.origins, self.path, self.saved.path if self.saved else None, self.report
        )
        self._data()
        self._model()
        self._length()
        if self.saved is not None:
            self._check_resume()
        self._record()

    # ------------------------------------------------------------------------------------------ pieces

    def _open_checkpoint(self) -> None:
        from minigpt.core.train import checkpoint

        if (self.path / "run.json").exists():
            old = read_json(self.path / "run.json")
            self.tracked = {k: old[k] for k in ("trackers", "tracked") if k in old}
        self.logged = max((row["step"] for row in self.log.rows()), default=0)
        self.saved = checkpoint.load_newest(self.path, self.report, self.place.from_step)
        if self.saved is None:
            self.log.cut_logs(0)
            self.report.note("resume", f"{self.path} has no checkpoint yet: starting at step 0")

    def _data(self) -> None:
        """Token stores, the packing plan, and the figures of both."""
        from minigpt.core.data import store
        from minigpt.core.data.source import Order, plan_rows

        cfg, data = self.cfg, self.cfg.data
        if data.max_len is None:
            data.max_len = self._default_max_len()
            self.origins["max_len"] = "auto"
        options = {"kind": self.job.kind, "max_bad": data.max_bad, "split_docs": data.split_docs, "report": self.report}
        share = 0.0 if data.val_data else data.val_split
        if self.place.resuming and "-" in data.data:  # what came through the pipe is in the store
            kept = Path(read_json(self.path / "run.json")["store"])
            if not (kept / "meta.json").is_file():
                raise DataError(f"the tokens of what came through the pipe are gone from {kept}", fix=PIPE_AGAIN)
            self.store = store.Store.load(kept, share)
        else:
            self.store = store.build(data.data, self.tokenizer, val_share=share, **options)
        self.val_store, self.val_split = self.store, "val"
        if data.val_data:
            self.val_store, self.val_split = store.build(data.val_data, self.tokenizer, val_share=0.0, **options), "all"
        weighted = any(w != 1.0 for w in self.store.weights.values())
        self.plan = plan_rows(self.store, "train", data.max_len, mode=data.pack, long=data.long, by_source=weighted)
        self.rows_per_epoch = Order(self.plan.group, self.store.weights, cfg.device.seed).rows_per_epoch
        if not len(self.plan):
            why = "; ".join([*self.store.notes, *self.plan.notes])
            raise DataError(
                "there is nothing to train on",
                found=why or f"{len(self.store.docs):,} documents",
                fix="raise --max-len",
            )

    def _default_max_len(self) -> int:
        from minigpt.core.models.folder import read_config
        from minigpt.core.models.presets import PRESETS

        if not self.cfg.model:
            return int(PRESETS[self.cfg.size]["max_len"])
        config, _ = read_config(Path(self.cfg.model))
        return min(config.max_position_embeddings, 512)

    def _model(self) -> None:
        """Weights: from --model, or new ones from the seed. Then float32 masters behind the compute precision."""
        from minigpt.core import runtime as rt
        from minigpt.core.infer.model import check_fit
        from minigpt.core.models import folder
        from minigpt.core.models.decoder import Decoder
        from minigpt.core.train.optim import Masters

        cfg = self.cfg
        self.runtime = rt.Runtime.open(cfg.device.device, cfg.device.dtype)
        rt.seed_all(cfg.device.seed)
        overrides = assignments(getattr(cfg, "set", []))
        if cfg.model and self.saved is None:
            if overrides:
                raise UsageError(
                    "--set model.… shapes a new model, and --model brings its own shape", found=str(overrides)
                )
            self.model, _ = folder.load(cfg.model)
        elif self.saved is not None:
            config, _ = folder.read_config(self.saved.path)
            self.model = Decoder(config)  # filled by Trainer.load
        else:
            config = folder.create(cfg.size, self.tokenizer.vocab_size, overrides)
            self.model = Decoder(config)
        check_fit(self.model, self.tokenizer, cfg.model or self.path)
        context = self.model.config.max_position_embeddings
        if cfg.data.max_len > context:
            raise UsageError(
                f"--max-len {cfg.data.max_len:,} is more than the model's context of {context:,} tokens",
                fix="lower --max-len"
                + ("" if cfg.model else f", or --set model.max_position_embeddings={cfg.data.max_len}"),
            )
        self.model.to(self.runtime.device)
        self.model.recompute = cfg.train.grad_checkpoint
        if cfg.train.compile:
            self._compile()
        self.masters = Masters(self.model, self.runtime.dtype)

    def _compile(self) -> None:
        """Compile each block in place: alike blocks share the work, and no name in the state dict changes."""
        if self.runtime.device.type != "cuda":
            self.report.warn(f"--compile is for CUDA; on {self.runtime.device.type} the model runs as it is")
            return
        for block in self.model.model.layers:
            block.compile()

    def _length(self) -> None:
        """Learning rate, batch, number of steps and pace: what was not given is chosen here and recorded."""
        from minigpt.core.train.trainer import Pace

        cfg, t = self.cfg, self.cfg.train
        size = self.model.num_parameters()
        rows, max_len = self.rows_per_epoch, cfg.data.max_len
        if t.batch_tokens is None:
            t.batch_tokens = suggested_batch(size, rows, max_len, self.job.stage)
            self.origins["batch_tokens"] = "auto"
        self.rows_per_step = max(1, round(t.batch_tokens / max_len))
        if cfg.optim.lr is None:
            cfg.optim.lr = suggested_lr(size, self.job.stage)
            self.origins["lr"] = "auto"
        else:
            warn_lr(cfg.optim.lr, size, self.job.stage, self.report)
        self.total = self._total()
        self._go_back_to_flat()
        self.micro_rows = min(t.batch_size or suggested_rows(max_len, self.runtime.device.type), self.rows_per_step)
        self.schedule = Schedule(
            cfg.optim.lr, self.total, cfg.optim.schedule, cfg.optim.warmup, cfg.optim.decay, cfg.optim.min_lr
        )
        cadence = -(-self.total // 10)  # ten times a run, the last one at its end
        self.pace = Pace(
            total=self.total,
            log=t.log_every,
            eval=t.eval_every or cadence,
            save=t.save_every or cadence,
            keep=t.keep,
            clip=cfg.optim.clip,
            flat=self.schedule.decay_start if cfg.optim.schedule == "wsd" else None,
            max_seconds=t.max_time,
        )

    def _total(self) -> int:
        """Steps of the whole run: those done, and those that the rest of the data or the budget takes."""
        t = self.cfg.train
        self.epochs = t.epochs if t.steps is None and t.tokens is None else None
        if t.steps is not None:
            return int(t.steps)
        if t.tokens is not None:
            tokens_per_row = self.plan.positions / len(self.plan)
            return max(1, math.ceil(t.tokens / (tokens_per_row * self.rows_per_step)))
        done, cursor = (self.saved.step, self.saved.state["source"]["row"]) if self.saved is not None else (0, 0)
        left = max(0, round(t.epochs * self.rows_per_epoch) - cursor)  # the batch may have been another one before
        return max(1, int(done) + math.ceil(left / self.rows_per_step))

    def _go_back_to_flat(self) -> None:
        """A lengthened wsd run goes on from its last flat step, where the learning rate had not yet fallen.

        Its last step may have been a short one, so the total is counted anew from there.
        """
        from minigpt.core.train import checkpoint

        if self.saved is None or self.total <= self.saved.state["total"]:
            return
        flat = self.saved.state.get("flat")
        if flat is None or flat >= self.saved.step:
            return
        if checkpoint.step_dir(self.path, flat).is_dir():
            self.saved = checkpoint.load_newest(self.path, self.report, flat)
            self.total = self._total()
        else:
            self.report.warn("the last step of the flat part is gone: the learning rate jumps up again")

    def _record(self) -> None:
        """The run's first lines on disk and on screen: from here on it can be resumed."""
        cfg = self.cfg
        facts = {
            "argv": self.job.context.argv,
            "stage": self.job.stage,
            "seed": cfg.device.seed,
            "device": self.runtime.name,
            "parameters": self.model.num_parameters(),
            "model_type": self.model.config.model_type,
            "size": getattr(cfg, "size", None),
            "parent": self._parent(),
            "data": self.store.meta["sources"],
            "store": str(self.store.path),
            "steps": self.total,
        }
        announce.title(self)
        self.tracker = track.open(
            cfg.train.track,
            self.path,
            {**facts, **self.tracked},
            {o.name: resume.value_of(cfg, o.path) for o in options(type(cfg)) if o.meta["save"]},
            report=self.report,
            step=self.saved.step if self.saved is not None else 0,
            logged=self.logged,
        )
        self.log.start(dump(cfg, self.origins), {**facts, **self.tracker.facts})
        announce.plan(self)

    def _parent(self) -> dict[str, str] | None:
        if not self.cfg.model:
            return None
        weights = Path(self.cfg.model) / "model.safetensors"
        return {"path": self.cfg.model, "sha256": sha256(weights) if weights.exists() else ""}

    # ------------------------------------------------------------------------------------------ the run

    def _fit(self) -> Result:
        from minigpt.core.data.source import PackedSource
        from minigpt.core.train.losses import next_token
        from minigpt.core.train.optim import Optimizer
        from minigpt.core.train.trainer import Hooks, Trainer
        from minigpt.stages.validation import Validation

        cfg = self.cfg
        source = PackedSource(
            self.store,
            self.plan,
            rows_per_step=self.rows_per_step,
            micro_rows=self.micro_rows,
            seed=cfg.device.seed,
            epochs=self.epochs,
            weights=self.store.weights,
            pad_id=self.tokenizer.pad_id,
        )
        validation = Validation(self)
        trainer = Trainer(
            model=self.model,
            masters=self.masters,
            optimizer=Optimizer(self.masters.named, cfg.optim),
            schedule=self.schedule,
            source=source,
            step=next_token,
            run=self.log,
            runtime=self.runtime,
            pace=self.pace,
            hooks=Hooks(
                self._write_model,
                validation.scores if validation.batches else None,
                validation.samples,
                self._check_first_loss,
                {"fingerprints": self._fingerprints(), "stage": self.job.stage},
                self.tracker,
            ),
            report=self.report,
        )
        if self.saved is not None:
            self._go_on(trainer)
        last = trainer.fit()
        return self._finish(last)

    def _fingerprints(self) -> dict[str, Any]:
        """What must be the same for a run to go on as itself."""
        shape = json.dumps(self.model.config.to_hf(), sort_keys=True)
        return {
            "data": self.store.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "model": hashlib.sha256(shape.encode()).hexdigest(),
            "rows_per_step": self.rows_per_step,
        }

    def _check_resume(self) -> None:
        """Refuse before anything of the run is touched."""
        resume.compare(self.saved.state["fingerprints"], self._fingerprints(), self.cfg.train.allow_changes)
        if self.total < self.saved.step:
            raise UsageError(
                f"the run is at step {self.saved.step:,} already, beyond the {self.total:,} asked for",
                fix="ask for more, or go back to an earlier step with --resume RUN/step-…",
            )

    def _go_on(self, trainer: Any) -> None:
        """Take up the checkpoint; later steps, if any, are kept aside."""
        from minigpt.core.train import checkpoint

        checkpoint.set_aside(self.path, self.saved.step, self.report)
        trainer.load(self.saved)
        self.report.note(
            "resume", f"step {self.saved.step:,} of {self.total:,}, lr {self.schedule(self.saved.step):.2g}"
        )

    def _write_model(self, target: Path) -> None:
        from minigpt.core.models import folder

        folder.write(
            target,
            self.masters.named,
            self.model.config,
            bos_token_id=self.tokenizer.document_id,
            eos_token_id=list(self.tokenizer.eos_ids),
            pad_token_id=self.tokenizer.pad_id,
        )
        self.tokenizer.save(target)

    def _check_first_loss(self, loss: float) -> None:
        """A new model predicts nothing, so its loss is that of guessing: ln(vocabulary)."""
        if self.cfg.model:
            return
        guess = math.log(self.model.config.vocab_size)
        text = f"loss at step 0 is {loss:.2f}; ln({self.model.config.vocab_size:,}) = {guess:.2f}"
        if abs(loss - guess) < 0.5:
            self.report.note("check", f"{text}: as it should be")
        else:
            self.report.warn(f"{text}: a new model should begin there", fix="check initializer_range and the data")

    def _finish(self, last: Path) -> Result:
        from minigpt.core.train.checkpoint import pointer

        rows = self.log.rows()
        metrics = {k: v for k, v in (rows[-1] if rows else {}).items() if k not in ("tok_s", "mem_gb")}
        self.log.finish("done", metrics=metrics)
        best = pointer(self.path, "best")
        mark = " (best)" if best == last.name else f" (best: {best})" if best else ""
        self.report.note("saved", f"{last}{mark} · loss.svg · metrics.jsonl")
        self.report.note("next", NEXT[self.job.stage].format(run=self.path))
        seconds = time.perf_counter() - self.started
        return Result(
            str(last), {"run_dir": str(self.path), "model": str(last), "metrics": metrics, "seconds": seconds}
        )


PIPE_AGAIN = "start a new run with another --out, and pipe the same data into it"
NEXT = {
    "pretrain": "minigpt sft -m {run} -d conversations.jsonl      minigpt generate -m {run} -p …",
    "sft": "minigpt chat -m {run}      minigpt eval -m {run} -d held-out.jsonl",
}
