"""Batches from a token store, in an order that depends on the seed and the row number alone.

Row k of a run is the same row whatever the number of devices or the size of a micro-batch, and resuming is a cursor.

Shapes: B rows · T tokens a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minigpt.core.data.batch import IGNORED, Batch
from minigpt.core.data.packing import Ints, Plan, plan

if TYPE_CHECKING:
    from minigpt.core.data.store import Store


class Order:
    """Which row of the plan is the run's k-th, for every k.

    A source of weight w gives round(w * rows) of its rows an epoch, going on in its own endless sequence of
    permutations, so that over the epochs no row is favoured or left out.
    """

    def __init__(self, groups: Ints, weights: Mapping[int, float], seed: int):
        self.seed = seed
        several = len(groups) and groups.min() < groups.max()
        names = np.unique(groups) if several else groups[:1]
        self.members = {int(g): np.flatnonzero(groups == g) for g in names}
        self.share = {
            g: max(1, round(weights.get(g, 1.0) * len(rows))) for g, rows in self.members.items() if weights.get(g, 1.0)
        }
        self.rows_per_epoch = sum(self.share.values())
        self._cached: tuple[int, Ints] | None = None

    def __call__(self, k: int) -> int:
        epoch, place = divmod(k, self.rows_per_epoch)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._epoch(epoch))
        return int(self._cached[1][place])

    def _epoch(self, epoch: int) -> Ints:
        parts = [self._stretch(g, epoch * n, (epoch + 1) * n) for g, n in self.share.items()]
        rows = np.concatenate(parts)
        return rows[self._permutation(len(rows), epoch, 0)]

    def _stretch(self, group: int, begin: int, end: int) -> Ints:
        """Places begin…end of a group's endless sequence."""
        rows = self.members[group]
        parts = []
        for cycle in range(begin // len(rows), -(-end // len(rows))):
            shuffled = rows[self._permutation(len(rows), cycle, group + 1)]
            low = max(begin - cycle * len(rows), 0)
            parts.append(shuffled[low : end - cycle * len(rows)])
        return np.concatenate(parts)

    def _permutation(self, n: int, *key: int) -> Ints:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, *key]))).permutation(n)


class PackedSource:
    """The training source: every optimizer step takes the next `rows_per_step` global rows.

    rank, world: this process computes rows rank, rank + world, … of each step.
    micro_rows: rows a micro-batch.
    epochs: the run ends after round(epochs * rows_per_epoch) rows, so its last step may be short; None = endless.
    fixed: pad every micro-batch to max_len and to equal shapes on all ranks; else to its longest row.
    """

    def __init__(
        self,
        store: Store,
        rows: Plan,
        *,
        rows_per_step: int,
        micro_rows: int,
        seed: int,
        pad_id: int,
        epochs: float | None = None,
        weights: Mapping[int, float] | None = None,
        rank: int = 0,
        world: int = 1,
        fixed: bool = False,
    ):
        self.order = Order(rows.group, weights or {}, seed)
        self.reader = RowReader(store, rows, pad_id)
        self.rows_per_step = rows_per_step
        self.micro_rows = micro_rows
        self.end = None if epochs is None else max(1, round(epochs * self.order.rows_per_epoch))
        self.rank, self.world, self.fixed = rank, world, fixed
        self.row = 0

    @property
    def epoch(self) -> float:
        return self.row / self.order.rows_per_epoch

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step. StopIteration after the last row."""
        stop = self.row + self.rows_per_step
        if self.end is not None:
            stop = min(stop, self.end)
        if stop == self.row:
            raise StopIteration("the source has no rows left")
        mine = range(self.row + self.rank, stop, self.world)
        count = -(-(stop - self.row) // self.world) if self.fixed else len(mine)
        numbers = [mine[i] if i < len(mine) else None for i in range(max(count, 1))]
        self.row = stop
        return [
            self.reader.batch(
                [(k, None if k is None else self.order(k)) for k in numbers[i : i + self.micro_rows]], self.fixed
            )
            for i in range(0, len(numbers), self.micro_rows)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.row = int(state["row"])


class RowReader:
    """Rows of a plan as batches."""

    def __init__(self, store: Store, rows: Plan, pad_id: int):
        self.store, self.rows, self.pad_id = store, rows, pad_id
        self.most_pieces = int(np.diff(rows.ptr).max(initial=1))

    def batch(self, wanted: list[tuple[int | None, int | None]], fixed: bool = False) -> Batch:
        """wanted: (global number, plan row) of each row; (None, None) is a row without loss, to fill a shape."""
        plan, pieces = self.rows, []
        width = plan.max_len if fixed else 1
        for _, row in wanted:
            mine = [] if row is None else list(range(int(plan.ptr[row]), int(plan.ptr[row + 1])))
            width = max(width, sum(int(plan.length[p]) for p in mine))
            pieces.append(mine)
        shape = (len(wanted), width)
        ids = np.full(shape, self.pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        segments = np.full(shape, -1, dtype=np.int64)
        for i, ((number, _), mine) in enumerate(zip(wanted, pieces, strict=True)):
            at = 0
            for j, p in enumerate(mine):
                end = at + int(plan.length[p])
                tokens, trained = self.store.piece(int(plan.doc[p]), int(plan.start[p]), int(plan.length[p]) + 1)
                ids[i, at:end] = tokens[:-1]
                labels[i, at:end] = np.where(trained[1:], tokens[1:], IGNORED)
                positions[i, at:end] = np.arange(end - at)
                segments[i, at:end] = (number or 0) * self.most_pieces + j
                at = end
            positions[i, at:] = np.arange(width - at)  # padding is a document of its own
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            torch.from_numpy(positions),
            torch.from_numpy(segments),
            units=float((labels != IGNORED).sum()),
            rows=tuple(k for k, _ in wanted if k is not None),
        )


def plan_rows(
    store: Store,
    split: str,
    max_len: int,
    *,
    mode: str = "pack",
    long: str = "split",
    by_source: bool = False,
    most: int | None = None,
) -> Plan:
    """The packing plan of a store's documents.

    split: `train`, `val` or `all`. by_source: rows never mix sources, so that they can be weighted.
    most: no more documents than fill about this many rows, taken in an order that does not depend on their length, so
    that a part stands for the whole.
    """
    docs = store.indices(split)
    notes: tuple[str, ...] = ()
    if long == "truncate":
        docs, notes = _learnable(store, docs, max_len)
    if most is not None:
        docs = docs[np.random.Generator(np.random.Philox(0)).permutation(len(docs))]
        docs = docs[: int(np.searchsorted(np.cumsum(store.positions(docs)), most * max_len)) + 1]
    groups = store.docs["source"][docs] if by_source else None
    rows = plan(store.positions(docs), max_len, mode=mode, long=long, groups=groups)
    return replace(rows, doc=docs[rows.doc], notes=(*rows.notes, *notes))


def _learnable(store: Store, docs: Ints, max_len: int) -> tuple[Ints, tuple[str, ...]]:
    """Leave out documents of which nothing learnt is left when they are cut at max_len."""
    over = np.flatnonzero(store.positions(docs) > max_len)
    lost = [i for i in over if not store.piece(int(docs[i]), 0, max_len + 1)[1][1:].any()]
    if not lost:
        return docs, ()
    note = f"{len(lost):,} documents were left out: cut at {max_len:,} tokens, nothing to learn is left in them"
    return np.delete(docs, lost), (note,)


def eval_batches(
    store: Store,
    *,
    max_len: int,
    max_rows: int,
    micro_rows: int,
    pad_id: int,
    split: str = "val",
    long: str = "split",
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Up to `max_rows` packed rows of a store's `split`, always the same ones in the same order.

    rank, world: the share of one of several processes. All get equally many batches; the last ones may be empty.
    """
    rows = plan_rows(store, split, max_len, long=long, most=max_rows)
    reader = RowReader(store, rows, pad_id)
    count = min(len(rows), max_rows)
    for first in range(0, count, micro_rows * world):
        mine = range(first + rank * micro_rows, min(first + (rank + 1) * micro_rows, count))
        yield reader.batch([(k, k) for k in mine] or [(None, None)])
