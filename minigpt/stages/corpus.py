"""What a supervised run trains on: token stores, and which rows they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.errors import DataError
from minigpt.core.files import read_json

if TYPE_CHECKING:
    from minigpt.core.data.packing import Plan
    from minigpt.core.data.store import Store
    from minigpt.core.data.tokenizer import Tokenizer
    from minigpt.core.report import Report

PIPE_AGAIN = "start a new run with another --out, and pipe the same data into it"


@dataclass(frozen=True)
class Corpus:
    """Training rows, and where validation documents are: `val_split` of `val_store`."""

    store: Store
    val_store: Store
    val_split: str
    plan: Plan
    rows_per_epoch: int

    @property
    def longest_row(self) -> int:
        """Positions of the longest row: no batch is wider."""
        import numpy as np

        return int(np.add.reduceat(self.plan.length, self.plan.ptr[:-1]).max())


def gather(kind: str, cfg: Any, tokenizer: Tokenizer, report: Report, piped: Path | None = None) -> Corpus:
    """Open the stores of --data and --val-data, making them when they are not in the cache, and lay out the rows.

    piped: the store of what once came through stdin, which cannot be read again.
    """
    from minigpt.core.data import store
    from minigpt.core.data.placeholders import parse_fill
    from minigpt.core.data.source import Order, plan_rows

    data = cfg.data
    options = {
        "kind": kind,
        "max_bad": data.max_bad,
        "split_docs": data.split_docs,
        "fill": parse_fill(data.fill),
        "report": report,
    }
    share = 0.0 if data.val_data else data.val_split
    if piped is not None and "-" in data.data:
        if not (piped / "meta.json").is_file():
            raise DataError(f"the tokens of what came through the pipe are gone from {piped}", fix=PIPE_AGAIN)
        train = store.Store.load(piped, share)
    else:
        train = store.build(data.data, tokenizer, val_share=share, **options)
    held, split = train, "val"
    if data.val_data:
        held, split = store.build(data.val_data, tokenizer, val_share=0.0, **options), "all"
        for note in held.notes:
            report.warn(f"--val-data: {note}")
    weighted = any(w != 1.0 for w in train.weights.values())
    plan = plan_rows(train, "train", data.max_len, mode=data.pack, long=data.long, by_source=weighted)
    if not len(plan):
        why = "; ".join([*train.notes, *plan.notes])
        raise DataError(
            "there is nothing to train on", found=why or f"{len(train.docs):,} documents", fix="raise --max-len"
        )
    return Corpus(train, held, split, plan, Order(plan.group, train.weights, cfg.device.seed).rows_per_epoch)


def piped_store(run: Path) -> Path:
    """The store that a run's first session made."""
    return Path(read_json(run / "run.json")["store"])


def default_max_len(cfg: Any) -> int:
    """Tokens a row when --max-len is not given: by the size's preset, or the given model's context up to 512."""
    from minigpt.core.models.folder import read_config
    from minigpt.core.models.presets import PRESETS

    if not cfg.model:
        return int(PRESETS[cfg.size]["max_len"])
    config, _ = read_config(Path(cfg.model))
    return min(config.max_position_embeddings, 512)
