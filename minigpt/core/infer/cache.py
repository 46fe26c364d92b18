"""Keys and values of the past: a contiguous slot a sequence, or pages of one pool behind a table a sequence.

Both answer the same questions. A row is reserved for a sequence, windows of consecutive rows are given to a forward,
and whole pieces that a prefill made can be remembered and put into other rows. Positions are written before a query may
see them, so what an earlier owner left behind is never used.

Shapes: B rows · T new tokens · S positions read · K key/value heads · D head_dim · L positions of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from minigpt.core.nn.cache import KV, Cache

PAGE = 64  # positions
STEP = 16  # positions by which one token reads more keys from slots: few sizes, and little read for nothing
VIEWS = 256  # windows whose views are kept
Layers = list[tuple[Tensor, Tensor]]


def pages(positions: int) -> int:
    return -(-positions // PAGE)


def stepped(positions: int) -> int:
    return -(-positions // STEP) * STEP


@dataclass
class Piece:
    """Some positions of a sequence: shared pages first, then copies. copies: a layer's k, v (K, L, D)."""

    length: int
    shared: list[int] = field(default_factory=list)
    copies: Layers = field(default_factory=list)


class Pool(Protocol):
    """What the engine asks of a cache."""

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens can be held at all."""
        ...

    def open(self, row: int, tokens: int, at_once: int) -> bool:
        """Reserve room in a free row for a sequence that needs `at_once` and may grow to `tokens`. False = none now."""
        ...

    def extend(self, row: int, tokens: int) -> bool:
        """Make sure of room for `tokens` where less was reserved. False = there is none now."""
        ...

    def close(self, row: int) -> None: ...

    def move(self, source: int, target: int, length: int) -> None:
        """Give the sequence of `source`, of so many positions, to the free row `target`."""
        ...

    def prepare(self, rows: int, capacity: int) -> None:
        """Let windows of so many rows and positions be given without new memory, and memory have few sizes: a compiled
        program holds for one of them.
        """
        ...

    def window(self, first: int, position_ids: Tensor, seen: int, places: Tensor | None = None) -> Cache:
        """Rows `first` … for a forward of position_ids (B, T), no query of which stands at `seen` or beyond.

        places: what `places` says of these rows; None = ask it.
        """
        ...

    def places(self, first: int, rows: int, seen: int) -> Tensor | None:
        """Where the first `seen` positions of some rows lie, if that changes from step to step: a compiled program must
        be told.
        """
        ...

    def take(self, row: int, begin: int, length: int, copy: bool = False) -> Piece:
        """Remember positions, by sharing where that is possible unless `copy`."""
        ...

    def put(self, row: int, begin: int, piece: Piece) -> None:
        """Give a row positions that were taken elsewhere."""
        ...

    def drop(self, piece: Piece) -> None: ...


# ---------------------------------------------------------------------------------------------- slots


class Slots:
    """A row is a stretch of memory of its own. It grows with what is asked of it; a window is a view.

    limit: most tokens over all rows, each of which has room for the longest; None = no limit.
    """

    def __init__(self, specs: Sequence[KV], device: torch.device, dtype: torch.dtype, limit: int | None = None):
        self._specs, self._limit = list(specs), limit
        self._options = {"device": device, "dtype": dtype}
        self.rows = self.capacity = 0
        self._layers: Layers = []
        self._views: dict[tuple[int, int, int], list[_SlotLayer]] = {}
        self._open: set[int] = set()
        self._grow(1, PAGE)

    def fits(self, tokens: int) -> bool:
        return self._limit is None or tokens <= self._limit

    def open(self, row: int, tokens: int, at_once: int) -> bool:
        rows, capacity = max(self.rows, row + 1), max(self.capacity, pages(tokens) * PAGE)
        if self._limit is not None and rows * capacity > max(self._limit, capacity) and self._open:
            return False
        self._grow(rows, capacity)
        self._open.add(row)
        return True

    def extend(self, row: int, tokens: int) -> bool:
        return True

    def close(self, row: int) -> None:
        self._open.discard(row)

    def move(self, source: int, target: int, length: int) -> None:
        for layer in self._layers:
            for x in layer:
                x[target, :, :length] = x[source, :, :length]
        self._open.discard(source)
        self._open.add(target)

    def prepare(self, rows: int, capacity: int) -> None:
        capacity = max(capacity, self.capacity)
        if self._limit is None:
            capacity = 1 << (capacity - 1).bit_length()
        self._grow(max(rows, self.rows), capacity)

    def places(self, first: int, rows: int, seen: int) -> None:
        return None

    def window(self, first: int, position_ids: Tensor, seen: int, places: Tensor | None = None) -> Cache:
        rows, length = position_ids.shape
        held = min(self.capacity, stepped(seen) if length == 1 else pages(seen) * PAGE)
        self._grow(first + rows, self.capacity)
        return _SlotWindow(self, first, position_ids, held)

    def layers(self, first: int, rows: int, held: int) -> list[_SlotLayer]:
        """Every layer's part of a window. Steps ask for the same one over and over, and views cost time."""
        key = (first, rows, held)
        found = None if torch.compiler.is_compiling() else self._views.get(key)
        if found is None:
            found = [_SlotLayer(k, v, *key) for k, v in self._layers]
            if not torch.compiler.is_compiling():  # which would hand them over as results
                if len(self._views) == VIEWS:
                    self._views.clear()
                self._views[key] = found
        return found

    def addresses(self) -> list[int]:
        """Where everything lies: it moves when rows or positions are added."""
        return [x.data_ptr() for layer in self._layers for x in layer]

    def take(self, row: int, begin: int, length: int, copy: bool = False) -> Piece:
        return Piece(length, copies=[(k[row, :, begin:][:, :length].clone(), v[row, :, begin:][:, :length].clone())
                                     for k, v in self._layers])  # fmt: skip

    def put(self, row: int, begin: int, piece: Piece) -> None:
        _paste(self._layers, row, begin, piece)

    def drop(self, piece: Piece) -> None:
        pass

    def _grow(self, rows: int, capacity: int) -> None:
        if rows <= self.rows and capacity <= self.capacity:
            return
        if rows > self.rows:  # twice as many, so that a growing number of rows is not copied at every step
            ahead = self.rows * 2
            rows = max(rows, ahead if self._limit is None else min(ahead, self._limit // max(capacity, self.capacity)))
        old, self.rows, self.capacity = self._layers, rows, max(capacity, self.capacity)
        self._views.clear()
        shapes = [(rows, spec.heads, self.capacity, spec.head_dim) for spec in self._specs]
        self._layers = [(torch.zeros(s, **self._options), torch.zeros(s, **self._options)) for s in shapes]  # type: ignore[call-overload]
        for before, after in zip(old, self._layers, strict=False):
            for a, b in zip(before, after, strict=True):
                b[: a.shape[0], :, : a.shape[2]] = a


def _paste(layers: Layers, row: int, begin: int, piece: Piece) -> None:
    for (k, v), (piece_k, piece_v) in zip(layers, piece.copies, strict=True):
        k[row, :, begin : begin + piece.length] = piece_k
        v[row, :, begin : begin + piece.length] = piece_v


class _SlotWindow:
    """Rows first … first + B of the slots, and where a forward's tokens go in them."""

    def __init__(self, slots: Slots, first: int, position_ids: Tensor, held: int):
        self._first, self._capacity, self.end, self._ids = first, slots.capacity, held, position_ids
        self._layers = slots.layers(first, len(position_ids), held)
        self._at: dict[int, Tensor] = {}

    def layer(self, index: int) -> _WindowLayer:
        layer = self._layers[index]
        return _WindowLayer(layer, self.at(layer.heads))

    def at(self, heads: int) -> Tensor:
        """Where a head's new positions lie in (rows * K * capacity), (B * K * T,). Layers of one shape share it."""
        if heads not in self._at:
            rows, device = len(self._ids), self._ids.device
            slot = torch.arange(self._first * heads, (self._first + rows) * heads, device=device) * self._capacity
            self._at[heads] = (slot.view(rows, heads, 1) + self._ids[:, None]).flatten()
        return self._at[heads]


class _SlotLayer:
    """One layer's memory: all of it as rows of D numbers, and what a window shows of it."""

    def __init__(self, k: Tensor, v: Tensor, first: int, rows: int, held: int):
        self.heads, dim = k.shape[1], k.shape[3]  # k, v: (slots, K, capacity, D)
        self.flat = k.view(-1, dim), v.view(-1, dim)
        self.seen = k[first : first + rows, :, :held], v[first : first + rows, :, :held]


class _WindowLayer:
    def __init__(self, layer: _SlotLayer, at: Tensor):
        self._layer, self._at = layer, at

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._layer.flat
        if k.dtype != keys.dtype:
            k, v = k.to(keys.dtype), v.to(keys.dtype)
        keys.index_copy_(0, self._at, k.reshape(-1, k.shape[-1]))
        values.index_copy_(0, self._at, v.reshape(-1, v.shape[-1]))
        return self._layer.seen


# ---------------------------------------------------------------------------------------------- pages


class Pages:
    """Pages of PAGE positions out of one pool, a table of them a row (Kwon et al., 2023, arXiv:2309.06180).

    Rows share whole pages that a prefill made; each is free again when its last user is gone.

    tokens: size of the pool. reserve: share of what a sequence may come to need that is set aside when it is opened;
    below 1 more sequences are let in than surely fit, and `extend` may fail.
    """

    def __init__(
        self, specs: Sequence[KV], device: torch.device, dtype: torch.dtype, tokens: int, reserve: float = 1.0
    ):
        self.count = pages(tokens) + 1
        self._device, self._reserve = device, reserve
        shapes = [(spec.heads, self.count * PAGE, spec.head_dim) for spec in specs]
        self._layers: Layers = [
            (torch.zeros(s, device=device, dtype=dtype), torch.zeros(s, device=device, dtype=dtype)) for s in shapes
        ]
        self._free = list(range(self.count - 1, 0, -1))  # page 0 takes what rows without an owner write
        self._users = [0] * self.count
        self._tables: dict[int, list[int]] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def fits(self, tokens: int) -> bool:
        return pages(tokens) < self.count

    def open(self, row: int, tokens: int, at_once: int) -> bool:
        self._tables[row] = []
        if self.extend(row, max(at_once, round(tokens * self._reserve))):
            return True
        del self._tables[row]
        return False

    def extend(self, row: int, tokens: int) -> bool:
        table = self._tables[row]
        need = pages(tokens) - len(table)
        if need > len(self._free):
            return False
        for _ in range(need):
            page = self._free.pop()
            self._users[page] = 1
            table.append(page)
        return True

    def close(self, row: int) -> None:
        for page in self._tables.pop(row, ()):
            self._release(page)

    def _release(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            self._free.append(page)

    def move(self, source: int, target: int, length: int) -> None:
        self._tables[target] = self._tables.pop(source)

    def prepare(self, rows: int, capacity: int) -> None:
        pass

    def places(self, first: int, rows: int, seen: int) -> Tensor:
        """(B, S) in the pool."""
        width = pages(seen)
        tables = [self._tables.get(row, [])[:width] for row in range(first, first + rows)]
        padded = [table + [0] * (width - len(table)) for table in tables]
        table = torch.tensor(padded, device=self._device)  # (B, pages)
        return (table[:, :, None] * PAGE + torch.arange(PAGE, device=self._device)).flatten(1)

    def window(self, first: int, position_ids: Tensor, seen: int, places: Tensor | None = None) -> Cache:
        token = self.places(first, len(position_ids), seen) if places is None else places
        return _PageWindow(self._layers, self.count * PAGE, token, position_ids)

    def take(self, row: int, begin: int, length: int, copy: bool = False) -> Piece:
        table = self._tables[row]
        shared = [] if copy else table[begin // PAGE : (begin + length) // PAGE]
        for page in shared:
            self._users[page] += 1
        at = self._positions(row, begin + len(shared) * PAGE, begin + length)
        return Piece(length, shared, [(k[:, at].clone(), v[:, at].clone()) for k, v in self._layers])

    def put(self, row: int, begin: int, piece: Piece) -> None:
        table = self._tables[row]
        for i, page in enumerate(piece.shared, begin // PAGE):
            self._users[page] += 1
            self._release(table[i])
            table[i] = page
        at = self._positions(row, begin + len(piece.shared) * PAGE, begin + piece.length)
        for (k, v), (piece_k, piece_v) in zip(self._layers, piece.copies, strict=True):
            k[:, at], v[:, at] = piece_k, piece_v

    def drop(self, piece: Piece) -> None:
        for page in piece.shared:
            self._release(page)

    def _positions(self, row: int, begin: int, end: int) -> Tensor:
        table = self._tables[row]
        return torch.tensor([table[p // PAGE] * PAGE + p % PAGE for p in range(begin, end)], device=self._device,
                            dtype=torch.long)  # fmt: skip


class _PageWindow:
    """Where the positions of some rows lie in the pool. token: (B, S). size: positions of the pool."""

    def __init__(self, layers: Layers, size: int, token: Tensor, position_ids: Tensor):
        self._layers, self._size, self._token = layers, size, token
        self.end = token.shape[1]
        self._new = token.gather(1, position_ids)  # (B, T)
        self._at: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int) -> _PageLayer:
        return _PageLayer(self, *self._layers[index])

    def at(self, heads: int) -> tuple[Tensor, Tensor]:
        """Of new and of all positions, every head's place in (K * size): (B * K * T,), (B * K * S,)."""
        if heads not in self._at:
            head = (torch.arange(heads, device=self._token.device) * self._size)[None, :, None]
            self._at[heads] = tuple((x[:, None] + head).flatten() for x in (self._new, self._token))  # type: ignore[assignment]
        return self._at[heads]


class _PageLayer:
    def __init__(self, window: _PageWindow, k: Tensor, v: Tensor):
        self._window, self._k, self._v = window, k, v  # (K, size, D)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows, heads, _, dim = k.shape
        new, seen = self._window.at(heads)
        out = []
        for store, fresh in ((self._k, k), (self._v, v)):
            flat = store.view(-1, dim)
            flat.index_copy_(0, new, fresh.reshape(-1, dim).to(store.dtype))
            out.append(flat.index_select(0, seen).view(rows, heads, -1, dim))
        return out[0], out[1]
