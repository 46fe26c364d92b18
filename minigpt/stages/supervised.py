"""The body that pretraining and fine-tuning share: data, model and trainer put together from one config.

Only the kind of data, the start of the weights and a few defaults differ, and `Job` names those.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt.core.config import dump
from minigpt.core.errors import DataError, MinigptError, Stopped, UsageError
from minigpt.core.files import RunLock, new_dir, read_json
from minigpt.core.report import Context, Result
from minigpt.core.train import resume
from minigpt.core.train.run import Run, make, refuse_or_clear


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
    preflight(cfg)
    place = resume.place(job.stage, cfg.train.out, cfg.train.resume)
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


def preflight(cfg: Any) -> None:
    """What can be refused before torch is imported: paths that are not there. Makes paths absolute on the way."""
    from minigpt.core.data.reader import expand
    from minigpt.core.models.folder import resolve

    for key in ("data", "val_data"):
        paths = getattr(cfg.data, key)
        expand([p for p in paths if p != "-"])
        setattr(cfg.data, key, [p if p == "-" else str(Path(p).absolute()) for p in paths])
    if cfg.model is not None and cfg.train.resume is None:
        cfg.model = str(resolve(cfg.model).absolute())
    if cfg.data.tokenizer is not None:
        cfg.data.tokenizer = str(Path(cfg.data.tokenizer).absolute())


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
        if self.place.resuming:
            self._open_checkpoint()
        self._tokenizer()
        self._data()
        self._model()
        self._length()
        self._record()
        try:
            return self._fit()
        except Stopped:
            self.log.finish("stopped")
            raise
        except MinigptError as e:
            self.log.finish("failed", error=e.message)
            raise
        except BaseException as e:
            self.log.finish("failed", error=f"{type(e).__name__}: {e}")
            raise

    # ------------------------------------------------------------------------------------------ pieces

    def _open_checkpoint(self) -> None:
        from minigpt.core.train import checkpoint

        if self.place.from_step is not None:
            checkpoint.set_aside(self.path, self.place.from_step, self.report)
        self.saved = checkpoint.load_newest(self.path, self.report)
        if self.saved is None:
            self.report.note("resume", f"{self.path} has no checkpoint yet: starting at step 0")

    def _tokenizer(self) -> None:
        """--tokenizer, else the model's, else one trained on the data and kept in the run directory."""
        from minigpt.core.data.tokenizer import Tokenizer, suggested_vocab

        cfg, own = self.cfg, self.path / "tokenizer"
        self.tokenizer_note = ""
        if self.saved is not None:
            self.tokenizer = Tokenizer.load(self.saved.path)
        elif own.is_dir():
            self.tokenizer = Tokenizer.load(own)
        elif cfg.data.tokenizer:
            self.tokenizer = Tokenizer.load(cfg.data.tokenizer)
            self.tokenizer_note = f"tokenizer {cfg.data.tokenizer}"
        elif cfg.model:
            self.tokenizer = Tokenizer.load(cfg.model)
        else:
            self.tokenizer = self._train_tokenizer(own, Tokenizer, suggested_vocab)
        if self.job.stage == "pretrain" and not cfg.model:
            self.tokenizer.chat_template = None  # a base model does not know how to chat

    def _train_tokenizer(self, own: Path, tokenizer_class: Any, suggested: Any) -> Any:
        from minigpt.core.data.reader import total_bytes
        from minigpt.core.data.tokenizer import texts_for_training
        from minigpt.core.models.presets import PRESETS

        cfg = self.cfg
        if cfg.vocab_size is None:
            cfg.vocab_size = PRESETS[cfg.size].get("vocab_size") or suggested(total_bytes(cfg.data.data))
            self.origins["vocab_size"] = "auto"
        texts = texts_for_training(cfg.data.data, split_docs=cfg.data.split_docs, max_bad=cfg.data.max_bad)
        with self.report.progress(None, label="tokenizer") as bar:
            bar.update(0, f"training {cfg.vocab_size:,} tokens on the data")
            tokenizer = tokenizer_class.train(texts, cfg.vocab_size)
        with new_dir(own) as work:
            tokenizer.save(work)
        self.tokenizer_note = f"{tokenizer.vocab_size:,} BPE trained here"
        return tokenizer

    def _data(self) -> None:
        raise NotImplementedError
