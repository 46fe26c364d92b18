"""The body that pretraining and fine-tuning share: data, model and trainer put together from one config.

Only the kind of data, the start of the weights and a few defaults differ, and `Job` names those.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.config import assignments, dump, options
from minigpt.core.errors import Aborted, MinigptError, Stopped, UsageError, is_out_of_memory
from minigpt.core.files import quoted, read_json, sha256
from minigpt.core.report import Context, Report, Result
from minigpt.core.train import resume, track
from minigpt.core.train.onlooker import Onlooker
from minigpt.core.train.run import Run
from minigpt.core.world import World
from minigpt.stages import announce, corpus, opening, pacing
from minigpt.stages.rehearsal import rehearse
from minigpt.stages.tokenizer_choice import choose

if TYPE_CHECKING:
    from torch import Tensor

    from minigpt.core.train.trainer import Trainer


@dataclass
class Job:
    """One supervised training run. kind: `text` (every token is learnt) or `chat` (the answers are)."""

    stage: str
    kind: str
    cfg: Any
    context: Context


def train(job: Job) -> Result:
    """Run a job to its end, alone or as one of several processes. Result: the last step directory, and figures."""
    if job.cfg.train.nproc != 1 and "RANK" not in os.environ:
        raise UsageError("--nproc is the command line's", fix="run minigpt, or torchrun -m minigpt, from a shell")
    with World.open(job.cfg.device.device, job.cfg.train.rank_timeout) as world, ExitStack() as held:
        cfg, origins, place, made_of = opening.open_run(job.stage, job.cfg, job.context, world, held)
        session = Session(job, cfg, origins, place, world, made_of)
        if not world.leads:
            session.job.context.report = Report()  # one process speaks
        return session.run()


@dataclass
class Session:
    """One process's work on a run: the pieces are made in order, then `fit`."""

    job: Job
    cfg: Any
    origins: dict[str, str]
    place: resume.Place
    world: World = field(default_factory=World)
    made_of: str | None = None  # the file or hub name that --model was made of
    started: float = field(default_factory=time.perf_counter)

    def run(self) -> Result:
        self.report = self.job.context.report
        self.path = self.place.path
        self.log = (Run if self.world.leads else Onlooker)(self.path, patient=self.cfg.train.save_failure == "warn")
        self.saved: Any = None
        self.tracker = track.Tracker()
        self.tracked: dict[str, Any] = {}  # what run.json says of an earlier session's trackers
        self.parent: dict[str, str] | None = None  # what run.json says of the model that an earlier session began with
        self.read_before: list[dict[str, Any]] = []  # the data files that an earlier session read
        self.logged = 0  # last step in metrics.jsonl before this session
        try:
            self._prepare()
        except BaseException as e:
            self.tracker.finish("failed")
            if not self.place.resuming:
                self.log.abandon()  # nothing was trained: the same command may be tried again
            if is_out_of_memory(e):
                raise announce.out_of_memory(self, e) from e
            raise
        if self.cfg.train.dry_run:
            return rehearse(self)
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
        except BaseException as e:
            fault = self.world.explain(e) or (announce.out_of_memory(self, e) if is_out_of_memory(e) else e)
            said = fault.message if isinstance(fault, MinigptError) else f"{type(e).__name__}: {e}"
            self.log.finish("failed", error=said)
            if fault is e:
                raise
            raise fault from e
        finally:
            self.tracker.finish(status)

    def _prepare(self) -> None:
        """Everything up to the first step. What lies on disk is made by rank 0 and read by the others."""
        if self.place.resuming:
            self._open_checkpoint()
        else:
            facts = {"argv": self.job.context.argv, "stage": self.job.stage, "seed": self.cfg.device.seed}
            self.log.start(dump(self.cfg, self.origins), facts)
        self._tokenizer()
        if self.cfg.data.max_len is None:
            self.cfg.data.max_len = corpus.default_max_len(self.cfg)
            self.origins["max_len"] = "auto"
        self._corpus()
        self.world.together(self._model)
        self.pacing = self.world.together(lambda: pacing.choose(self))
        if self.saved is not None:
            self.world.together(self._check_resume)
        self._record()

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch; fewer than planned once memory has run out."""
        return self.source.micro_rows if hasattr(self, "source") else self.pacing.micro_rows

    # ------------------------------------------------------------------------------------------ pieces

    def _open_checkpoint(self) -> None:
        """The newest whole step: found and checked by rank 0, read by all."""
        from minigpt.core.train import checkpoint

        def usable() -> int | None:
            if (self.path / "run.json").exists():
                old = read_json(self.path / "run.json")
                self.tracked = {k: old[k] for k in ("trackers", "tracked") if k in old}
                self.parent = old.get("parent")
                self.read_before = old.get("data", [])
            self.logged = max((row["step"] for row in self.log.rows()), default=0)
            self.saved = checkpoint.load_newest(self.path, self.report, self.place.from_step)
            if self.saved is None:
                self.log.cut_logs(0)
                self.report.note("resume", f"{self.path} has no checkpoint yet: starting at step 0")
            if self.saved is None:
                return None
            if self.place.from_step is None and (newest := checkpoint.steps(self.path)[0][1]) != self.saved.path:
                text = f"{newest.name} was damaged: went on from {self.saved.path.name}"
                self.log.event("damaged checkpoint", text, self.saved.step)
            return int(self.saved.step)

        step = self.world.share(usable)
        if step is not None and not self.world.leads:
            self.saved = checkpoint.load(checkpoint.step_dir(self.path, step))

    def _tokenizer(self) -> None:
        """Rank 0's choice; the others load the same and take over its chat template."""

        def chosen(template: tuple[str | None] | None = None) -> None:
            where = self.saved.path if self.saved else None
            self.tokenizer, self.tokenizer_note = choose(
                self.job.kind, self.cfg, self.origins, self.path, where, self.report, template
            )

        def lead() -> str | None:
            chosen()
            return self.tokenizer.chat_template

        template = self.world.share(lead)
        if not self.world.leads:
            chosen((template,))

    def _corpus(self) -> None:
        piped = corpus.piped_store(self.path) if self.place.resuming and "-" in self.cfg.data.data else None

        def gathered(piped: Path | None) -> None:
            self.corpus = corpus.gather(self.job.kind, self.cfg, self.tokenizer, self.report, piped)

        def lead() -> str:
            gathered(piped)
            return str(self.corpus.store.path)

        made = self.world.share(lead)
        self.world.first(lambda: None if self.world.leads else gathered(Path(made)))

    def _model(self) -> None:
        """Weights: from --model, or new ones from the seed. Then float32 masters behind the compute precision."""
        from minigpt.core import runtime as rt
        from minigpt.core.infer.model import check_fit
        from minigpt.core.models import folder
        from minigpt.core.models.decoder import Decoder
        from minigpt.core.train import parallel

        cfg = self.cfg
        self.runtime = rt.Runtime.open(cfg.device.device, cfg.device.dtype, self.world)
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
        self.parameters = self.model.num_parameters()
        self.model.to(self.runtime.device)
        self.model.recompute = cfg.train.grad_checkpoint
        if cfg.train.compile:
            self._compile()
        self.parallel = parallel.choose(cfg.train.parallel, self.world, self.runtime)
        self.masters = self.parallel.masters(self.model)

    def _compile(self) -> None:
        """Compile each block in place: alike blocks share the work, and no name in the state dict changes."""
        if self.runtime.device.type != "cuda":
            self.report.warn(f"--compile is for CUDA; on {self.runtime.device.type} the model runs as it is")
            return
        for block in self.model.model.layers:
            block.compile()

    def _record(self) -> None:
        """The run's first lines on disk and on screen: from here on it can be resumed."""
        cfg = self.cfg
        facts = {
            "argv": self.job.context.argv,
            "stage": self.job.stage,
            "seed": cfg.device.seed,
            "device": self.runtime.name,
            "parameters": self.parameters,
            "model_type": self.model.config.model_type,
            "size": getattr(cfg, "size", None),
            "parent": self._parent(),
            "data": self.corpus.store.meta["sources"],
            "store": str(self.corpus.store.path),
            "steps": self.pacing.total,
            "world_size": self.world.size,
        }
        announce.title(self)
        self.tracker = track.open(
            cfg.train.track if self.world.leads and not cfg.train.dry_run else [],
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
        if self.saved is not None and self.parent:
            return self.parent
        weights = Path(self.cfg.model) / "model.safetensors"
        made_of = {"origin": self.made_of} if self.made_of else {}
        return {"path": self.cfg.model, **made_of, "sha256": sha256(weights) if weights.exists() else ""}

    # ------------------------------------------------------------------------------------------ the run

    def _fit(self) -> Result:
        trainer = self.trainer()
        if self.saved is not None:
            self._go_on(trainer)
        last = trainer.fit()
        return self._finish(last)

    def trainer(self) -> Trainer:
        """All pieces put together."""
        from minigpt.core.data.source import PackedSource
        from minigpt.core.train.losses import next_token
        from minigpt.core.train.optim import Optimizer
        from minigpt.core.train.trainer import Hooks, Trainer
        from minigpt.stages.validation import Validation

        cfg, pacing, world = self.cfg, self.pacing, self.world
        self.source = PackedSource(
            self.corpus.store,
            self.corpus.plan,
            rows_per_step=pacing.rows_per_step,
            micro_rows=pacing.micro_rows,
            seed=cfg.device.seed,
            epochs=pacing.epochs,
            weights=self.corpus.store.weights,
            pad_id=self.tokenizer.pad_id,
            rank=world.rank,
            world=world.size,
            fixed=world.size > 1 and (cfg.train.parallel == "fsdp" or cfg.train.compile),
        )
        validation = Validation(self)
        flops, peak = announce.operations(self)
        return Trainer(
            model=self.model,
            masters=self.masters,
            optimizer=Optimizer(self.masters.named, cfg.optim),
            schedule=pacing.schedule,
            source=self.source,
            step=next_token,
            run=self.log,
            runtime=self.runtime,
            parallel=self.parallel,
            pace=pacing.pace,
            hooks=Hooks(
                self._write_model,
                validation.scores if validation.batches else None,
                validation.samples,
                self._check_first_loss,
                {"fingerprints": self._fingerprints(), "stage": self.job.stage},
                self.tracker,
                flops,
                peak,
            ),
            report=self.report,
        )

    def _fingerprints(self) -> dict[str, Any]:
        """What must be the same for a run to go on as itself."""
        shape = json.dumps(self.model.config.to_hf(), sort_keys=True)
        return {
            "data": self.corpus.store.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "model": hashlib.sha256(shape.encode()).hexdigest(),
            "rows_per_step": self.pacing.rows_per_step,
        }

    def _check_resume(self) -> None:
        """Refuse before anything of the run is touched."""
        files = resume.changed_files(self.read_before, self.corpus.store.meta["sources"])
        resume.compare(self.saved.state["fingerprints"], self._fingerprints(), self.cfg.train.allow_changes, files)
        if self.pacing.total < self.saved.step:
            raise UsageError(
                f"the run is at step {self.saved.step:,} already, beyond the {self.pacing.total:,} asked for",
                fix="ask for more, or go back to an earlier step with --resume RUN/step-…",
            )

    def _go_on(self, trainer: Trainer) -> None:
        """Take up the checkpoint; later steps, if any, are kept aside."""
        from minigpt.core.train import checkpoint

        if self.world.leads:
            checkpoint.set_aside(self.path, self.saved.step, self.report)
        trainer.load(self.saved)
        lr = self.pacing.schedule(self.saved.step)
        self.report.note("resume", f"step {self.saved.step:,} of {self.pacing.total:,}, lr {lr:.2g}")
        self.log.event("resumed", f"at step {self.saved.step:,}", self.saved.step)

    def _write_model(self, target: Path, weights: dict[str, Tensor]) -> None:
        from minigpt.core.models import folder

        folder.write(
            target,
            weights,
            self.model.config,
            bos_token_id=self.tokenizer.opening_id,
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
        metrics = {k: v for k, v in (rows[-1] if rows else {}).items() if k not in ("tok_s", "mem_gb", "mfu")}
        self.log.finish("done", metrics=metrics)
        best = pointer(self.path, "best")
        mark = " (best)" if best == last.name else f" (best: {best})" if best else ""
        self.report.note("saved", f"{last}{mark} · loss.svg · metrics.jsonl")
        self.report.note("next", NEXT[self.job.stage].format(run=quoted(self.path)))
        seconds = time.perf_counter() - self.started
        return Result(
            str(last), {"run_dir": str(self.path), "model": str(last), "metrics": metrics, "seconds": seconds}
        )


NEXT = {
    "pretrain": "minigpt sft -m {run} -d conversations.jsonl      minigpt generate -m {run} -p …",
    "sft": "minigpt chat -m {run}      minigpt eval -m {run} -d held-out.jsonl",
}
