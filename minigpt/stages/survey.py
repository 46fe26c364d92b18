"""One pass over a file of data: every row as a record, what is wrong with it, and what nobody will learn of it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minigpt.core.errors import UsageError
from minigpt.core.files import quoted
from minigpt.core.report import Progress, Report

if TYPE_CHECKING:
    from minigpt.core.data.reader import Input
    from minigpt.core.data.remarks import Remarks
    from minigpt.core.data.schema import BadRow, Record, Row
    from minigpt.core.data.tokenizer import Tokenizer
    from minigpt.stages.data import FilesConfig


@dataclass
class Finding:
    """A bad row. where: file:line."""

    where: str
    fault: BadRow

    def __str__(self) -> str:
        return f"{self.where}: {self.fault.reason}{self.fault.detail}"


def new_remarks() -> Remarks:
    from minigpt.core.data.remarks import Remarks

    return Remarks()


@dataclass
class Survey:
    """What one pass over a file found. bad: reason → rows. remarks: on good rows, of source 0.

    empty: rows of text without any, which are no bad ones. records: good ones. marks: documents with the letters of an
    end-of-document token. json_as_text: the file is JSON, and read as text.
    """

    name: str
    kind: str = "text"
    rows: int = 0
    empty: int = 0
    records: int = 0
    marks: int = 0
    json_as_text: bool = False
    shapes: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    remarks: Remarks = field(default_factory=new_remarks)

    def facts(self) -> dict[str, Any]:
        bad = {"bad": sum(self.bad.values()), "reasons": dict(self.bad)}
        counts = {"shapes": dict(self.shapes), "empty": self.empty, **bad}
        told = {kind: self.remarks.names(kind) for kind in self.remarks.counts}
        return {"file": self.name, "kind": self.kind, "rows": self.rows, **counts, "told": told}

    def tell(self, report: Report) -> None:
        """What of the good rows nobody will learn or may be misread, and what only tells about them."""
        from minigpt.core.data import misread
        from minigpt.core.data.remarks import BESIDE

        if self.json_as_text:
            report.warn(misread.json_as_text(self.name))
        if self.marks:
            report.warn(misread.marks(self.marks))
        for sentence in self.remarks.sentences([self.name]):
            report.warn(sentence)
        if beside := self.remarks.names(BESIDE):
            report.note("beside", f"{self.name}: columns that only tell about a row: {', '.join(beside)}")


def survey(
    source: Input, cfg: FilesConfig, found: Survey, bar: Progress, before: int = 0, tokenizer: Tokenizer | None = None
) -> Iterator[tuple[Row, Record | Finding]]:
    """Every row of a file with its record, or with what is wrong with it; `found` is filled on the way.

    before: bytes of earlier files, for the bar. tokenizer: try its chat template with every conversation.
    """
    from minigpt.core.data import misread
    from minigpt.core.data.formats import PLAIN, read, split_text
    from minigpt.core.data.reader import rows
    from minigpt.core.data.schema import BadRow, EmptyText

    if source.path.is_dir():
        raise UsageError(f"{source.name} is a token store", fix=f"minigpt info {quoted(source.name)}")
    stream = rows(source, cfg.split_docs)
    opening = list(itertools.islice(stream, 20))
    found.kind = cfg.kind if cfg.kind != "auto" else _kind(opening)
    for row in itertools.chain(opening, stream):
        found.rows += 1
        bar.update(before + row.done, f"{source.name}: {found.rows:,} rows")
        try:
            if row.fault:
                raise row.fault
            reading = read(row.value, found.kind)
            if tokenizer is not None:
                remark_unwritten(tokenizer, row, reading.record, found)
        except EmptyText:
            found.empty += 1
            continue
        except BadRow as fault:
            found.bad[fault.reason] += 1
            yield row, Finding(row.where, fault)
            continue
        found.shapes[reading.shape] += 1
        found.remarks.add_row(reading, 0, row.where.removeprefix(source.name))
        if found.rows == 1 and reading.shape == PLAIN:
            found.json_as_text = misread.is_json_as_text(source, reading.record)
        for part in split_text(reading.record, cfg.split_docs):
            found.records += 1
            found.marks += misread.has_mark(part)
            yield row, part


def remark_unwritten(tokenizer: Tokenizer, row: Row, record: Record, found: Survey) -> None:
    """Note what of a conversation the chat template does not write. BadRow when it writes nothing at all."""
    from minigpt.core.data.chat import prepare
    from minigpt.core.data.remarks import UNWRITTEN
    from minigpt.core.data.schema import Conversation
    from minigpt.core.data.unwritten import unwritten

    if isinstance(record, Conversation):
        parts = prepare(tokenizer, record.messages, record.tools or None)
        found.remarks.add(UNWRITTEN, unwritten(tokenizer, record, parts), 0, row.where.removeprefix(found.name))


def has_own_template(tokenizer: Tokenizer | None) -> bool:
    """Whether its template is another than ours, whose think blocks sft chooses by the data."""
    from minigpt.core.data.chat import template

    return tokenizer is not None and tokenizer.chat_template not in (None, template(False))


def _kind(opening: list[Row]) -> str:
    """`text` when the first row that has a shape is text, else `chat`."""
    from minigpt.core.data.formats import PLAIN, detect

    shapes = filter(None, (detect(row.value) for row in opening if not row.fault))
    return "text" if next(shapes, PLAIN) in ("text", PLAIN) else "chat"


def describe(found: Survey) -> str:
    """`a.jsonl: 12 rows to fine-tune on (Alpaca)`."""
    use = {"text": "to pretrain on", "chat": "to fine-tune on"}[found.kind]
    shapes = ", ".join(f"{name} {n:,}" if len(found.shapes) > 1 else name for name, n in found.shapes.most_common())
    empty = f", {found.empty:,} empty" if found.empty else ""
    bad = f", {sum(found.bad.values()):,} bad" if found.bad else ""
    return f"{found.name}: {found.rows:,} rows {use} ({shapes or 'no good row'}){empty}{bad}"
