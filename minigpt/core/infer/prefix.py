"""Prompts that begin alike are computed once: whole chunks, as a prefill made them, kept until others need the room.

Only such chunks are used again, never what decoding wrote: the numbers of a prompt must not depend on who was there
before.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from minigpt.core.infer.cache import Piece, Pool


@dataclass
class Chunk:
    """piece: its positions. hidden: (1, C) behind its last token."""

    piece: Piece
    hidden: Tensor


class Prefixes:
    """The chunks used last. tokens: most positions kept."""

    def __init__(self, pool: Pool, tokens: int):
        self._pool, self._limit = pool, tokens
        self._chunks: OrderedDict[bytes, Chunk] = OrderedDict()
        self._held = 0

    def __len__(self) -> int:
        return len(self._chunks)

    def find(self, key: bytes) -> Chunk | None:
        chunk = self._chunks.get(key)
        if chunk is not None:
            self._chunks.move_to_end(key)
        return chunk

    def add(self, key: bytes, row: int, begin: int, length: int, hidden: Tensor) -> None:
        if length > self._limit or key in self._chunks:
            return
        while self._held + length > self._limit:
            self.forget()
        self._chunks[key] = Chunk(self._pool.take(row, begin, length), hidden)
        self._held += length

    def forget(self) -> bool:
        """Let the chunk go that was not used for the longest time. False = there is none."""
        if not self._chunks:
            return False
        _, chunk = self._chunks.popitem(last=False)
        self._held -= chunk.piece.length
        self._pool.drop(chunk.piece)
        return True

    def clear(self) -> None:
        while self.forget():
            pass


def keys(prompt: Sequence[int], size: int) -> Iterator[bytes]:
    """A name for each chunk of a prompt, which says all the tokens up to its end."""
    name = b""
    for begin in range(0, len(prompt), size):
        name = hashlib.blake2b(name + array("q", prompt[begin : begin + size]).tobytes(), digest_size=16).digest()
        yield name
