"""What a model thinks apart from what it says, while both still come."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"

Part = tuple[str, bool]  # some text, and whether it is thought


class ThinkSplitter:
    """Tells thought from speech in a stream of text. The tags, and the newlines that set them off, are neither.

    Only what an answer begins with is thought: a tag further on is text, since an answer may speak of tags.

    opened: the prompt ended with the opening tag, so the stream begins inside the thought.
    """

    def __init__(self, opened: bool = False):
        self._held = ""  # may still turn out to be a tag, or newlines beside one
        self._undecided = not opened
        self._thinking = opened
        self._fresh = opened  # directly behind a tag, where newlines are dropped

    def add(self, text: str) -> list[Part]:
        """The parts that this piece makes final; none holds a piece of a tag."""
        self._held += text
        if self._undecided:
            self._decide()
        parts = []
        if self._thinking:
            parts.append((self._thought(), True))
        if not self._thinking and not self._undecided:
            parts.append((self._said(), False))
        return [part for part in parts if part[0]]

    def finish(self) -> list[Part]:
        """What was held back and turned out to be no tag."""
        rest, self._held = self._held, ""
        rest = rest.rstrip("\n") if self._thinking else rest
        return [(rest, self._thinking)] if rest else []

    def _decide(self) -> None:
        """Does the answer begin with a thought? Open while it may be the start of a tag."""
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self._held = start[len(OPEN) :]
            self._thinking = self._fresh = True
        self._undecided = not self._thinking and OPEN.startswith(start)

    def _thought(self) -> str:
        self._skip_newlines()
        thought, tag, rest = self._held.partition(CLOSE)
        if tag:
            self._thinking, self._fresh, self._held = False, True, rest
            return thought.rstrip("\n")
        most = min(len(CLOSE) - 1, len(thought))
        begun = next((n for n in range(most, 0, -1) if thought.endswith(CLOSE[:n])), 0)
        ready = thought[: len(thought) - begun].rstrip("\n")
        self._held = thought[len(ready) :]
        return ready

    def _said(self) -> str:
        self._skip_newlines()
        said, self._held = self._held, ""
        return said

    def _skip_newlines(self) -> None:
        if self._fresh:
            self._held = self._held.lstrip("\n")
            self._fresh = not self._held
