"""Which documents share a row: a pure function of their lengths. No tokens are read here, and none is lost.

Best-fit decreasing (Johnson, 1974): longest piece first, into the fullest row that still holds it. All pieces of one
length are placed together, so the cost depends on the number of different lengths and not on the number of documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from minigpt.core.errors import DataError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """Rows of pieces, as CSR: row r holds pieces `ptr[r]:ptr[r + 1]`.

    A piece is `length` consecutive (input, label) positions of document `doc`, beginning at its position `start`.
    group: (R,) what each row's documents have in common (their source), when rows were not to mix groups.
    """

    max_len: int
    ptr: Ints
    doc: Ints
    start: Ints
    length: Ints
    group: Ints
    truncated: int = 0  # documents cut at max_len
    dropped: int = 0  # documents left out because they are longer
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.ptr) - 1

    @property
    def positions(self) -> int:
        """Real positions over all rows."""
        return int(self.length.sum())

    @property
    def fill(self) -> float:
        """Share of the rows that is not padding."""
        return self.positions / (len(self) * self.max_len) if len(self) else 0.0


def plan(lengths: Ints, max_len: int, *, mode: str = "pack", long: str = "split", groups: Ints | None = None) -> Plan:
    """Lay documents out in rows of at most `max_len` positions.

    lengths: (N,) positions of each document, tokens - 1; documents without any are left out.
    mode: `pack`, or `pad` for one piece a row.
    long: what becomes of longer documents: `split` keeps every position, `truncate`, `drop`, or `error` (DataError).
    groups: (N,) documents of different groups never share a row.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    over = lengths > max_len
    if long == "error" and over.any():
        first = int(np.flatnonzero(over)[0])
        raise DataError(
            f"document {first + 1:,} has {int(lengths[first]) + 1:,} tokens, more than --max-len {max_len:,}",
            fix="raise --max-len, or choose --long split, truncate or drop",
        )
    doc, start, length = _pieces(lengths, max_len, long)
    group = np.zeros_like(doc) if groups is None else np.asarray(groups, dtype=np.int64)[doc]
    row = np.arange(len(doc)) if mode == "pad" else _best_fit(length, group, max_len)
    order = _stable_order(row)
    count = np.bincount(row, minlength=0) if len(row) else np.zeros(0, dtype=np.int64)
    ptr = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
    truncated = int(over.sum()) if long == "truncate" else 0
    dropped = int(over.sum()) if long == "drop" else 0
    notes = []
    if truncated:
        lost = int((lengths[over] - max_len).sum())
        notes.append(
            f"{truncated:,} documents are longer than {max_len:,} tokens and were cut ({lost:,} tokens left out)"
        )
    if dropped:
        notes.append(f"{dropped:,} documents are longer than {max_len:,} tokens and were left out")
    return Plan(
        max_len, ptr, doc[order], start[order], length[order], group[order][ptr[:-1]], truncated, dropped, tuple(notes)
    )


def _pieces(lengths: Ints, max_len: int, long: str) -> tuple[Ints, Ints, Ints]:
    """Documents cut to pieces of at most max_len: (document, start, length) of each, in document order."""
    if long == "truncate":
        lengths = np.minimum(lengths, max_len)
    elif long == "drop":
        lengths = np.where(lengths > max_len, 0, lengths)
    count = -(-lengths // max_len)  # pieces of each document
    doc = np.repeat(np.arange(len(lengths)), count)
    first = np.cumsum(count) - count
    start = (np.arange(len(doc)) - first[doc]) * max_len
    return doc, start, np.minimum(lengths[doc] - start, max_len)


def _best_fit(length: Ints, group: Ints, max_len: int) -> Ints:
    """The row of each piece. Rows are numbered in the order they were opened."""
    row = np.empty(len(length), dtype=np.int64)
    opened = 0
    if not len(length):
        return row
    several = group.min() < group.max()
    for members in [np.flatnonzero(group == g) for g in np.unique(group)] if several else [np.arange(len(length))]:
        opened = _fill_rows(length, members, max_len, row, opened)
    return row


def _stable_order(values: Ints) -> Ints:
    """argsort of whole numbers from 0 to 2**32, equal ones as they come: numpy sorts 16 bits at a time in one pass."""
    low = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    if not len(values) or values.max() < 1 << 16:
        return low
    high = (values >> 16).astype(np.uint16)[low]
    return np.asarray(low[np.argsort(high, kind="stable")])


def _fill_rows(length: Ints, members: Ints, max_len: int, row: Ints, opened: int) -> int:
    """Place one group's pieces into rows from number `opened` on; returns the next free number."""
    room: list[list[Ints]] = [[] for _ in range(max_len + 1)]  # room[r]: rows with r positions left
    order = members[_stable_order(max_len - length[members])]  # the longest first
    falling = length[order]
    begins = np.flatnonzero(np.diff(falling, prepend=max_len + 1))
    ends = np.append(begins[1:], len(order))
    for size, begin, end in zip(falling[begins].tolist(), begins.tolist(), ends.tolist(), strict=True):
        waiting = order[begin:end]
        for left in range(size, max_len + 1):
            while room[left] and len(waiting):
                rows = room[left].pop()
                taken = rows[: len(waiting)]
                row[waiting[: len(taken)]] = taken
                waiting = waiting[len(taken) :]
                if len(rows) > len(taken):
                    room[left].append(rows[len(taken) :])
                if left - size >= size and len(waiting):  # the same rows are now the fullest that fit: go on with them
                    taken, waiting = _refill(row, waiting, taken, size, left - size, room)
                else:
                    room[left - size].append(taken)
            if not len(waiting):
                break
        if len(waiting):
            each = max_len // size
            fresh = opened + np.arange(-(-len(waiting) // each))
            row[waiting] = np.repeat(fresh, each)[: len(waiting)]
            opened += len(fresh)
            full, last = fresh[:-1], fresh[-1:]
            room[max_len - each * size].append(full)
            room[max_len - (len(waiting) - each * (len(fresh) - 1)) * size].append(last)
    return opened


def _refill(row: Ints, waiting: Ints, rows: Ints, size: int, left: int, room: list[list[Ints]]) -> tuple[Ints, Ints]:
    """Give each of `rows` as many more pieces of one size as it holds. Returns (rows used, pieces still waiting)."""
    each = left // size
    target = np.repeat(rows, each)[: len(waiting)]
    row[waiting[: len(target)]] = target
    used = np.bincount(np.repeat(np.arange(len(rows)), each)[: len(target)], minlength=len(rows))
    for n in np.unique(used):
        room[left - int(n) * size].append(rows[used == n])
    return rows, waiting[len(target) :]
