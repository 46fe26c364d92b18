"""What is told of good rows: columns that nobody reads, parts that no template writes, placeholders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from minigpt.core.data import chat
from minigpt.core.data.formats import Reading
from minigpt.core.data.placeholders import placeholders
from minigpt.core.data.schema import Conversation
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.data.unwritten import REASONING, unwritten

UNREAD, BESIDE, UNWRITTEN, PLACEHOLDERS = "unread", "beside", "unwritten", "placeholders"
_SHOWN = 8  # names in one sentence


class Remarks:
    """Counts by kind, by source and by name, each with its first row.

    counts: kind → number of the source → {"rows": n, "first": place, "names": {name: [rows, first place]}}. A place is
    what follows the file's name: `:12`. JSON holds it as it is.
    """

    def __init__(self, counts: dict[str, dict[str, Any]] | None = None):
        self.counts: dict[str, dict[str, Any]] = {} if counts is None else counts

    def add(self, kind: str, names: Iterable[str], source: int, place: str) -> None:
        """One row's names of a kind."""
        if not (names := list(names)):
            return
        of_source = self.counts.setdefault(kind, {}).setdefault(str(source), {"rows": 0, "first": place, "names": {}})
        of_source["rows"] += 1
        for name in names:
            of_source["names"].setdefault(name, [0, place])[0] += 1

    def add_row(
        self,
        reading: Reading,
        source: int,
        place: str,
        tokenizer: Tokenizer | None = None,
        parts: chat.Parts | None = None,
    ) -> None:
        """All that is to be told of a good row. parts: what the tokenizer's chat template made of a conversation."""
        record = reading.record
        self.add(UNREAD, reading.unread, source, place)
        self.add(BESIDE, reading.beside, source, place)
        self.add(PLACEHOLDERS, placeholders(record), source, place)
        if isinstance(record, Conversation) and tokenizer is not None and parts is not None:
            self.add(UNWRITTEN, unwritten(tokenizer, record, parts), source, place)

    def sentences(self, sources: Sequence[str]) -> Iterator[str]:
        """One for each file with columns that are not read, one for each other kind. sources: names of the files."""
        for number, found in self.counts.get(UNREAD, {}).items():
            columns = [f"{name} ({_rows(n)})" for name, (n, _) in _frequent(found["names"])]
            yield f"{sources[int(number)]}: not read: {_listed(columns)}"
        if lost := self._over_sources(UNWRITTEN, sources):
            hint = "; sft and pack write reasoning with --thinking on" if REASONING in lost else ""
            parts = [f"{name} ({_rows(n)}, first {place})" for name, (n, place) in _frequent(lost)]
            yield f"the chat template does not write, so nobody learns: {_listed(parts)}{hint}"
        if held := self._over_sources(PLACEHOLDERS, sources):
            n = sum(found["rows"] for found in self.counts[PLACEHOLDERS].values())
            first = next(iter(held.values()))[1]
            names = f"{_listed([name for name, _ in _frequent(held)])} (first {first})"
            key = next(iter(held)).strip("{}")
            hold = "holds" if n == 1 else "hold"
            yield f"{_rows(n)} {hold} placeholders such as {names}: learnt as they stand; --fill {key}=… fills them"

    def names(self, kind: str) -> dict[str, int]:
        """name → rows, over all sources."""
        total: Counter[str] = Counter()
        for found in self.counts.get(kind, {}).values():
            total.update({name: n for name, (n, _) in found["names"].items()})
        return dict(total)

    def _over_sources(self, kind: str, sources: Sequence[str]) -> dict[str, tuple[int, str]]:
        """name → (rows, first file:line)."""
        total: dict[str, tuple[int, str]] = {}
        for number, found in self.counts.get(kind, {}).items():
            for name, (n, place) in found["names"].items():
                before, first = total.get(name, (0, sources[int(number)] + place))
                total[name] = (before + n, first)
        return total


def _rows(n: int) -> str:
    return f"{n:,} {'row' if n == 1 else 'rows'}"


def _frequent(names: Mapping[str, Sequence[Any]]) -> list[tuple[str, Sequence[Any]]]:
    return sorted(names.items(), key=lambda item: -item[1][0])


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more
