"""The files of a token store, made from rows: tokenised a batch at a time while the next is read."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from minigpt.core.data import chat, misread, reader
from minigpt.core.data.added_tokens import ROLES
from minigpt.core.data.formats import PLAIN, read, split_text, texts
from minigpt.core.data.placeholders import filled
from minigpt.core.data.remarks import Remarks
from minigpt.core.data.roundtrip import RoundTrip
from minigpt.core.data.schema import BadRow, BadRows, Conversation, Document, Record, WrongStage
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError
from minigpt.core.files import new_dir, write_json
from minigpt.core.report import Report

FORMAT = 2  # raise whenever the same sources would give another store
BATCH_DOCUMENTS = 1000  # tokenised at once
BATCH_BYTES = 4 << 20  # … or fewer, when they are long
SAVED = np.dtype(
    [("offset", "u8"), ("length", "u4"), ("supervised", "u4"), ("bytes", "u4"), ("source", "u2"), ("hash", "u8")]
)


class _Piece(NamedTuple):
    """One document, ready to be written. mask: a byte an id. size: bytes of text that is learnt. content: to hash."""

    ids: list[int]
    mask: bytes
    supervised: int
    size: int
    characters: int
    content: bytes


_Written = tuple[Record, chat.Parts | None]  # a row, and what the chat template made of it if it is a conversation


class _Batch(NamedTuple):
    """Rows on their way. encoded: the ids of their running texts, when they are done. read: bytes of the input.

    parts: what the chat template made of each conversation.
    """

    records: list[Record]
    parts: list[chat.Parts]
    source: int
    encoded: Future[list[list[int]]]
    read: int


class Builder:
    """Rows in, a store's files out, a batch at a time."""

    def __init__(
        self,
        inputs: Sequence[reader.Input],
        hashes: Sequence[str],
        tokenizer: Tokenizer,
        kind: str,
        split_docs: str,
        fill: Mapping[str, str],
        bad: BadRows,
        report: Report,
    ):
        self.inputs, self.hashes, self.tokenizer, self.kind = inputs, hashes, tokenizer, kind
        self.split_docs, self.fill, self.bad, self.report = split_docs, fill, bad, report
        self.dtype = np.dtype("u2" if tokenizer.vocab_size <= 1 << 16 else "u4")
        self.rows = [0] * len(inputs)
        self.shapes: Counter[str] = Counter()
        self.remarks = Remarks()
        self.documents = self.tokens = self.supervised = self.characters = self.unsupervised = self.read = 0
        self.templated = False
        self.marks = 0  # documents with the letters of an end-of-document token
        self.json_as_text = [False] * len(inputs)
        self.trip = RoundTrip(tokenizer)
        self._opening, self._closing = tokenizer.opening_id, tokenizer.document_id

    def write(self, path: Path, key: str) -> None:
        """Make the store at `path`: there whole, or not at all."""
        with new_dir(path) as work:
            self._fill(work)
            self.trip.check()
            self.bad.finish(sum(self.rows))
            if not self.documents:
                raise self._nothing()
            raw = np.memmap(work / "docs.raw", dtype=SAVED, mode="r")
            np.save(work / "docs.npy", raw, allow_pickle=False)
            del raw
            (work / "docs.raw").unlink()
            write_json(work / "meta.json", self._meta(key))

    def _nothing(self) -> DataError:
        names = ", ".join(i.name for i in self.inputs[:3])
        if self.unsupervised:
            return DataError(f"{names}: no conversation has anything to learn in it", fix="add answers")
        return DataError(f"{names}: there is nothing in it", found=f"{sum(self.rows):,} rows", fix="name other --data")

    def _fill(self, work: Path) -> None:
        total = sum(reader.size_of(i.path) for i in self.inputs)
        with ExitStack() as stack:
            files = [stack.enter_context(open(work / n, "wb")) for n in ("tokens.bin", "mask.bin", "docs.raw")]
            bar = stack.enter_context(self.report.progress(total, label="tokenize"))
            for batch in self._ahead(stack.enter_context(ThreadPoolExecutor(1))):
                self._store(batch, files)
                bar.update(batch.read, f"{self.documents:,} documents · {self.tokens:,} tokens")
            bar.update(total, f"{self.documents:,} documents · {self.tokens:,} tokens")

    def _ahead(self, worker: Executor) -> Iterator[_Batch]:
        """Batches in order, each with its texts being tokenised: while one is, the next is read and the last written.

        The tokenizer computes outside of Python's lock, so that both go on at the same time.
        """
        waiting: _Batch | None = None
        before = 0
        for number, source in enumerate(self.inputs):
            for rows in _batches(self._records(number, source)):
                records = [record for record, _ in rows]
                texts = [r.text for r in records if isinstance(r, Document)]
                encoded = worker.submit(self.tokenizer.encode_batch, texts)
                if waiting is not None:
                    yield waiting
                parts = [parts for _, parts in rows if parts is not None]
                waiting = _Batch(records, parts, number, encoded, before + self.read)
            before += reader.size_of(source.path)
        if waiting is not None:
            yield waiting

    def _records(self, number: int, source: reader.Input) -> Iterator[_Written]:
        for row in reader.rows(source, self.split_docs):
            self.rows[number] += 1
            self.read = row.done
            try:
                if row.fault:
                    raise row.fault
                reading = read(row.value, self.kind)
                if self.fill:
                    reading = reading._replace(record=filled(reading.record, self.fill))
                parts = self._parts(reading.record) if isinstance(reading.record, Conversation) else None
            except BadRow as fault:
                self.bad.add(row.where, fault, row.value)
                continue
            self.shapes[reading.shape] += 1
            place = row.where.removeprefix(source.name)
            self.remarks.add_row(reading, number, place, self.tokenizer, parts)
            for part in split_text(reading.record, self.split_docs):
                self.marks += misread.has_mark(part)
                if self.rows[number] == 1 and reading.shape == PLAIN:
                    self.json_as_text[number] = misread.is_json_as_text(source, part)
                yield part, parts

    def _parts(self, record: Conversation) -> chat.Parts:
        if self.tokenizer.chat_template is None:
            raise WrongStage(
                "a conversation, and this tokenizer has no chat template to write it with",
                fix="learn from conversations with minigpt sft",
            )
        return chat.prepare(self.tokenizer, record.messages, record.tools or None)

    def _store(self, batch: _Batch, files: Sequence[IO[bytes]]) -> None:
        """Append a batch to tokens, mask and docs."""
        ids = batch.encoded.result()
        if not self.trip.complete:
            self._try(batch.records, ids)
        encoded = iter(ids)
        rendered = iter(chat.encode(self.tokenizer, batch.parts))
        pieces: list[_Piece] = []
        docs: list[tuple[int, ...]] = []
        for record in batch.records:
            if isinstance(record, Document):
                piece = self._framed(record, next(encoded))
            else:
                piece = self._templated(record, next(rendered))
            if not piece.supervised:
                self.unsupervised += 1
                continue
            digest = int.from_bytes(hashlib.blake2b(piece.content, digest_size=8).digest(), "little")
            docs.append((self.tokens, len(piece.ids), piece.supervised, piece.size, batch.source, digest))
            pieces.append(piece)
            self.tokens += len(piece.ids)
            self.supervised += piece.supervised
            self.characters += piece.characters
        self.documents += len(docs)
        count = sum(len(p.ids) for p in pieces)
        tokens = np.fromiter(itertools.chain.from_iterable(p.ids for p in pieces), dtype=np.int64, count=count)
        if count and int(tokens.max()) > np.iinfo(self.dtype).max:
            raise DataError("the tokenizer gives ids beyond its own vocabulary", found=str(int(tokens.max())))
        files[0].write(tokens.astype(self.dtype).tobytes())
        files[1].write(b"".join(p.mask for p in pieces))
        files[2].write(np.array(docs, dtype=SAVED).tobytes())

    def _try(self, records: list[Record], encoded: list[list[int]]) -> None:
        """Do the texts come back? encoded: the ids of the running texts among the records."""
        self.trip.add((r.text for r in records if isinstance(r, Document)), encoded)
        said = [t for r in records if isinstance(r, Conversation) for t in texts(r) if t]
        self.trip.add(said, self.tokenizer.encode_batch(said))
        if self.trip.complete:
            self.trip.check()

    def _framed(self, record: Document, encoded: list[int]) -> _Piece:
        ids = [self._opening, *encoded, self._closing]
        content = record.text.encode("utf-8")
        return _Piece(ids, b"\1" * len(ids), len(ids) - 1, len(content), len(record.text), content)

    def _templated(self, record: Conversation, rendered: chat.Rendered) -> _Piece:
        self.templated = True
        ids, learnt = rendered
        mask = np.array(learnt, dtype=np.uint8) | (self.kind == "text")
        size = int(self.tokenizer.token_bytes[np.array(ids, dtype=np.int64)[mask != 0]].sum())
        characters = sum(len(m["content"]) + len(m.get("reasoning_content", "")) for m in record.messages)
        content = json.dumps([record.messages, record.tools], sort_keys=True).encode()
        return _Piece(ids, mask.tobytes(), int(mask[1:].sum()), size, characters, content)

    def _meta(self, key: str) -> dict[str, Any]:
        entries = zip(self.inputs, self.hashes, self.rows, strict=True)
        return {
            "format": FORMAT,
            "kind": self.kind,
            "fingerprint": key,
            "tokenizer": self.tokenizer.fingerprint,
            "vocabulary": vocabulary_of(self.tokenizer),
            "frame": frame_of(self.tokenizer),
            "templated": self.templated,
            "dtype": self.dtype.str,
            "sources": [{"path": i.name, "sha256": h, "rows": n, "weight": i.weight} for i, h, n in entries],
            "rows": sum(self.rows),
            "documents": self.documents,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "characters": self.characters,
            "bad": dict(self.bad.counts),
            "empty": self.bad.empty,
            "unsupervised": self.unsupervised,
            "marks": self.marks,
            "json_as_text": [number for number, found in enumerate(self.json_as_text) if found],
            "unwritable": {
                "texts": self.trip.texts,
                "characters": self.trip.characters,
                "lost": self.trip.lost.total(),
                "such_as": [sign for sign, _ in self.trip.lost.most_common(3)],
            },
            "shapes": dict(self.shapes),
            "remarks": self.remarks.counts,
        }


def _batches(rows: Iterator[_Written]) -> Iterator[list[_Written]]:
    batch: list[_Written] = []
    size = 0
    for row in rows:
        batch.append(row)
        record, _ = row
        size += len(record.text) if isinstance(record, Document) else sum(len(m["content"]) for m in record.messages)
        if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def frame_of(tokenizer: Tokenizer) -> list[Any]:
    """What a tokenizer's config, which its fingerprint leaves out, puts into rows.

    The ids around a document, and the special tokens that the chat template asks for by their roles.
    """
    asked = [name for name in ROLES if name in (tokenizer.chat_template or "")]
    return [tokenizer.opening_id, tokenizer.document_id, {name: tokenizer.role(name) for name in asked}]


def vocabulary_of(tokenizer: Tokenizer) -> str:
    """Fingerprint of a tokenizer without its chat template, which running text does not meet."""
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    return bare.fingerprint
