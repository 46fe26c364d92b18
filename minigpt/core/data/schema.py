"""What a row of training data can be, and the account of the rows that are none of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minigpt.core.errors import DataError, UsageError

Message = dict[str, Any]  # see Conversation

TEXT_KEYS = ("text", "content", "document", "raw_content")  # where a row has running text
ROLES = ("system", "user", "assistant", "tool")
_SHOWN = 2000  # characters of a bad row that an error carries; the console cuts further


@dataclass(frozen=True, slots=True)
class Document:
    """Running text: every token is learnt."""

    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of which the assistant's are learnt.

    messages: role (one of ROLES), content (str) and perhaps name; an assistant's may have reasoning_content (str),
    tool_calls ([{"type": "function", "function": {"name": str, "arguments": dict}}], perhaps with an id) and
    weight (0: it is not learnt), a tool's tool_call_id.
    tools: OpenAI's function descriptions that the template shows to the model.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


Record = Document | Conversation


class BadRow(Exception):
    """A row that cannot be trained on.

    reason: a noun phrase that follows "has" and "with", the same for all rows with this fault: `no assistant message`.
    detail: goes on from it in an error, its punctuation included: `, so there is nothing to learn from it`.
    fix: what to do about the row itself.
    """

    skippable = True  # --max-bad is a sensible way out

    def __init__(self, reason: str, detail: str = "", *, fix: str = "mend the row"):
        super().__init__(reason + detail)
        self.reason = reason
        self.detail = detail
        self.fix = fix


class WrongStage(BadRow):
    """A good row, but another stage's. `fix` names that stage."""

    skippable = False


class EmptyText(BadRow):
    """A row of running text without any, as corpora of lines have them: passed over and counted, whatever --max-bad."""

    def __init__(self, key: str):
        super().__init__(f"an empty {key}", fix="add the text")


def not_utf8() -> BadRow:
    """The fault of a row whose bytes are no text."""
    return BadRow("bytes that are not UTF-8", fix="convert the file, such as with iconv -f GB18030 -t UTF-8")


class Row(NamedTuple):
    """One raw row of a file.

    where: `file:line`. value: what JSON held, or a text document. done: bytes of the file read so far.
    fault: why the row could not be read; value is then its raw text.
    """

    where: str
    value: Any
    done: int
    fault: BadRow | None = None


class BadRows:
    """Counts bad rows against --max-bad and raises DataError once there are too many.

    limit: `10` = up to ten rows; `1%` = up to that share of all rows, judged by `finish`. `0` stops at the first one.
    counts: reason → rows. empty: rows of text without any, which are no bad ones.
    """

    def __init__(self, limit: str = "0"):
        self.limit = str(limit).strip()
        self._most, self._share = _parse(self.limit)
        self.counts: Counter[str] = Counter()
        self.empty = 0
        self._first: DataError | None = None

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, where: str, fault: BadRow, row: Any) -> None:
        """One bad row. where: `file:line`. row: its value, or the text that could not be parsed."""
        if isinstance(fault, EmptyText):
            self.empty += 1
            return
        self.counts[fault.reason] += 1
        self._first = self._first or _row_error(where, fault, row)
        if self._most == 0:
            raise self._first
        if self._most is not None and self.total > self._most:
            raise self._too_many(f"{self.total:,} rows are bad")

    def finish(self, rows: int) -> None:
        """After the last row: is the share of bad ones allowed? rows: all rows read, good and bad."""
        if not self.allows(self.total, rows):
            raise self._too_many(f"{self.total:,} of {rows:,} rows are bad ({self.total / rows:.2%})")

    def allows(self, bad: int, rows: int) -> bool:
        """Whether this limit lets `bad` of `rows` pass."""
        return bad <= (self._share * rows if self._most is None else self._most)

    def _too_many(self, what: str) -> DataError:
        assert self._first is not None
        return DataError(
            f"{what}, more than --max-bad {self.limit} allows: {reasons(self.counts)}; first {self._first.message}",
            found=self._first.found,
            fix=self._first.fix,
        )


def _parse(limit: str) -> tuple[int | None, float]:
    """(rows, 0) or (None, share)."""
    try:
        if limit.endswith("%"):
            share = float(limit[:-1]) / 100
            if 0 <= share <= 1:
                return (None, share) if share else (0, 0.0)
        elif int(limit) >= 0:
            return int(limit), 0.0
    except ValueError:
        pass
    raise UsageError("--max-bad takes a number of rows or a share of them", found=limit, fix="such as 0, 10 or 1%")


def _row_error(where: str, fault: BadRow, row: Any) -> DataError:
    fix = f"{fault.fix}, or pass --max-bad 1% to skip and count such rows" if fault.skippable else fault.fix
    return DataError(f"{where} has {fault.reason}{fault.detail}", found=as_found(row), fix=fix)


def as_found(row: Any) -> str:
    """A row as one line for an error."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def reasons(counts: Mapping[str, int]) -> str:
    """`2 with no assistant message, 1 with invalid JSON`, most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n:,} with {reason}" for reason, n in ordered)
