"""`--dry-run`: everything of a training run but the training. What it would read, learn, take and last."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from minigpt.core.config import dump, values
from minigpt.core.data.batch import IGNORED
from minigpt.core.data.chat import Rendered
from minigpt.core.report import Result
from minigpt.core.train.metrics import short, spell_time
from minigpt.stages import announce
from minigpt.stages.data import cut, spans

if TYPE_CHECKING:
    from minigpt.core.data.batch import Batch
    from minigpt.core.train.trainer import Trainer
    from minigpt.stages.supervised import Session

TIMED = 3  # steps, after a first one that is not: it compiles and allocates


def _timed(trainer: Trainer, count: int) -> Iterator[float]:
    """Seconds of each of the run's first steps."""
    for _ in range(count):
        began = time.perf_counter()
        trainer.advance()
        yield time.perf_counter() - began


def first_row(batch: Batch) -> Rendered:
    """The documents of a batch's first row, one after another: their tokens, and which of them are learnt."""
    ids: list[int] = []
    mask: list[bool] = []
    for segment in batch.segments[0].unique_consecutive().tolist():
        inside = batch.segments[0] == segment
        if segment < 0 or not inside.any():
            continue
        labels = batch.labels[0][inside].tolist()  # of each token the one after it
        learnt = [False, *(label != IGNORED for label in labels)]
        last = labels[-1:] if learnt[-1] else []  # it is no input, and known only when it is learnt
        piece = [*batch.input_ids[0][inside].tolist(), *last]
        ids += piece
        mask += learnt[: len(piece)]
    return Rendered(ids, mask)


def rehearse(session: Session) -> Result:
    """Show the first row with what is learnt of it, how long the run would take, and with --verbose every option."""
    s, report = session, session.report
    trainer = s.trainer()
    start = trainer.source.state_dict()
    row = first_row(trainer.source.next_step()[0])
    trainer.source.load_state_dict(start)
    seconds = list(_timed(trainer, min(TIMED + 1, s.pacing.total)))
    step = statistics.median(seconds[1:] or seconds)
    tokens = s.pacing.rows_per_step * s.cfg.data.max_len
    need = announce.needed(s)
    report.note(
        "time",
        f"about {spell_time(step * s.pacing.total)} for {s.pacing.total:,} steps of {step:.2f} s "
        f"({short(tokens / step)} tok/s), validation and saving not counted",
    )
    report.note("peak", f"{s.runtime.memory_gb():.1f} GB in those steps; estimated {need.total / 1e9:.1f} GB")
    if s.cfg.common.verbose:
        report.out(dump(s.cfg, s.origins))
    report.out(f"the first row, {len(row.ids):,} tokens; what is learnt is marked:")
    report.marked(cut(spans(s.tokenizer, row)))
    facts: dict[str, Any] = {
        "config": values(s.cfg),
        "parameters": s.parameters,
        "steps": s.pacing.total,
        "tokens_per_step": tokens,
        "documents": len(s.corpus.store.indices("train")),
        "estimated_bytes": need.total,
        "peak_gb": s.runtime.memory_gb(),
        "seconds_per_step": step,
        "eta_seconds": step * s.pacing.total,
        "sample": {"ids": row.ids, "learnt": row.mask},
    }
    return Result(None, facts)
