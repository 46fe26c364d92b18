"""From ids to text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

BROKEN = "\ufffd"  # what half a character decodes to


class Decodes(Protocol):
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


class Detokenizer:
    """Emits text as soon as it is final. The parts joined are the decoding of all ids."""

    def __init__(self, tokenizer: Decodes):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # of the window that is decoded: text before it is out
        self._done = 0  # ids whose text is out

    def add(self, id: int) -> str:
        """The text that this id completes; empty while a character is not whole."""
        self.hold(id)
        new = self._pending()
        if not new or new.endswith(BROKEN):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return new

    def hold(self, id: int) -> None:
        """Take an id without looking for text; the next `add` or `finish` emits it."""
        self._ids.append(id)

    def finish(self) -> str:
        """What is left: half a character as U+FFFD."""
        return self._pending()

    def _pending(self) -> str:
        """Text behind what is out. Decoded with the ids before it, since some tokenizers look back at a space."""
        before = self._tokenizer.decode(self._ids[self._start : self._done])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]


class StopText:
    """Cuts a stream at the first stop string, holding back text that may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def add(self, text: str) -> str:
        """The text that is surely before any stop string."""
        if self.hit or not self._stops:
            return "" if self.hit else text
        self._held += text
        found = [at for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            self.hit = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max(self._overlap(s) for s in self._stops)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def finish(self) -> str:
        """What was held back and turned out to be text."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
