"""Tokens on disk: sources are tokenised once and kept in the cache under a hash of all that shaped them.

A store is a directory: `tokens.bin` (uint16, uint32 for vocabularies above 65,536), `mask.bin` (uint8, 1 = learnt),
`docs.npy` (one record a document) and `meta.json`. Which documents are held out follows from the hash of their content
when the store is opened, so another share needs no new store.
"""

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
from numpy.typing import NDArray

from minigpt.core.data import chat, reader
from minigpt.core.data.formats import read
from minigpt.core.data.placeholders import filled
from minigpt.core.data.remarks import Remarks
from minigpt.core.data.schema import BadRow, BadRows, Conversation, Document, Record, WrongStage, reasons
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError, UsageError
from minigpt.core.files import cache_dir, new_dir, read_json, remembered_sha256, write_json
from minigpt.core.report import Report

FORMAT = 2  # raise whenever the same sources would give another store
KINDS = ("text", "chat")
BATCH_DOCUMENTS = 1000  # tokenised at once
BATCH_BYTES = 4 << 20  # … or fewer, when they are long
AUTO_DOCUMENTS = 200  # documents that --val-split auto holds out …
AUTO_SHARE = (0.005, 0.05)  # … within these shares
_SAVED = np.dtype(
    [("offset", "u8"), ("length", "u4"), ("supervised", "u4"), ("bytes", "u4"), ("source", "u2"), ("hash", "u8")]
)
DOCS = np.dtype([*_SAVED.descr, ("val", "?")])

Ints = NDArray[np.int64]


class Store:
    """An opened token store.

    docs: (N,) records: offset and length (tokens), supervised (positions that are learnt), bytes (of text in those),
    source (index into meta["sources"]), hash (of the content), val (held out).
    meta: format, kind, fingerprint, tokenizer, vocabulary, sources, rows, documents, tokens, supervised, characters,
    bad, unsupervised, shapes, remarks (see Remarks).
    """

    def __init__(self, path: Path, meta: dict[str, Any], saved: NDArray[Any], val_share: float | None):
        self.path, self.meta = path, meta
        width = np.dtype(meta["dtype"])
        self._tokens = _mapped(path / "tokens.bin", width, meta["tokens"])
        self._mask = _mapped(path / "mask.bin", np.dtype("u1"), meta["tokens"])
        self.docs = np.zeros(len(saved), dtype=DOCS)
        for name in _SAVED.names or ():
            self.docs[name] = saved[name]
        self.docs["val"] = held_out(saved["hash"], val_share)

    @classmethod
    def load(cls, path: str | Path, val_share: float | None = 0.0) -> Store:
        """Open a store. val_share: as in `build`. DataError when a file is missing or not of the size it should be."""
        path = Path(path)
        meta = read_json(path / "meta.json")
        if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("kind") not in KINDS:
            raise DataError(
                f"{path} is not a token store of this version", fix="make it again with minigpt tokenize pack"
            )
        width = np.dtype(meta["dtype"]).itemsize
        for name, size in (("tokens.bin", meta["tokens"] * width), ("mask.bin", meta["tokens"])):
            file = path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                raise _damaged(file, f"{size:,} bytes", "none" if found is None else f"{found:,} bytes")
        try:
            saved = np.load(path / "docs.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise _damaged(path / "docs.npy", "an array of documents", str(e)) from None
        if saved.dtype != _SAVED or len(saved) != meta["documents"]:
            raise _damaged(path / "docs.npy", f"{meta['documents']:,} documents", f"{len(saved):,}")
        return cls(path, meta, saved, val_share)

    @property
    def fingerprint(self) -> str:
        """sha256 of the content and of which documents are held out: equal fingerprints train on the same tokens."""
        parts = [self.meta["fingerprint"], hashlib.sha256(np.packbits(self.docs["val"]).tobytes()).hexdigest()]
        return hashlib.sha256(json.dumps([*parts, sorted(self.weights.items())]).encode()).hexdigest()

    @property
    def notes(self) -> list[str]:
        """What was left out or should be known, in sentences."""
        return _notes(self.meta)

    @property
    def weights(self) -> dict[int, float]:
        """Share of an epoch that each source has; 1 = all of it once."""
        return {i: float(s["weight"]) for i, s in enumerate(self.meta["sources"])}

    def indices(self, split: str = "train") -> Ints:
        """Numbers of the documents of `train`, `val` or `all`, ascending."""
        if split == "all":
            return np.arange(len(self.docs), dtype=np.int64)
        return np.flatnonzero(self.docs["val"] == (split == "val")).astype(np.int64)

    def positions(self, docs: Ints) -> Ints:
        """(input, label) positions of documents: their tokens - 1."""
        return self.docs["length"][docs].astype(np.int64) - 1

    def piece(self, doc: int, start: int, count: int) -> tuple[Ints, NDArray[np.bool_]]:
        """Tokens start … start + count of one document, and which of them are learnt."""
        begin = int(self.docs["offset"][doc]) + start
        return self._tokens[begin : begin + count].astype(np.int64), self._mask[begin : begin + count] != 0


def held_out(hashes: NDArray[np.uint64], share: float | None) -> NDArray[np.bool_]:
    """Which documents are validation: those whose 64-bit hash lies in the first `share` of all hashes.

    A document therefore keeps its side when rows are added, removed or moved. share: None = 200 documents, but from
    0.5 to 5 %. With two documents and a share above 0 each side has at least one; a single one is trained on.
    """
    n = len(hashes)
    if n < 2 or share == 0:
        return np.zeros(n, dtype=np.bool_)
    if share is None:
        share = min(max(AUTO_DOCUMENTS / n, AUTO_SHARE[0]), AUTO_SHARE[1])
    val: NDArray[np.bool_] = np.asarray(hashes < np.uint64(min(int(share * 2**64), 2**64 - 1)))
    if not val.any():
        val[int(np.argmin(hashes))] = True
    if val.all():
        val[int(np.argmax(hashes))] = False
    return val


# ------------------------------------------------------------------------------------------------ making


def build(
    specs: Sequence[str],
    tokenizer: Tokenizer,
    *,
    kind: str = "text",
    val_share: float | None = None,
    max_bad: str = "0",
    split_docs: str = "auto",
    fill: Mapping[str, str] | None = None,
    report: Report | None = None,
    out: Path | None = None,
) -> Store:
    """The token store of some `--data` values, from the cache when it was made before.

    kind: `text` learns every token, `chat` the assistant's. val_share: share of documents held out, by hash; None =
    200 documents, 0.5 to 5 %. max_bad: see BadRows. fill: see placeholders.filled. out: a directory to make the store
    in, instead of the cache.
    A store's directory is taken as it is. DataError for bad rows, UsageError for paths that are not there.
    """
    inputs = reader.expand(specs)
    fill = dict(fill or {})
    if any(i.path.is_dir() for i in inputs):
        if fill:
            raise UsageError("--fill is for rows, and a token store has none", fix="fill them when it is packed")
        return _open_given(inputs, tokenizer, kind, val_share)
    hashes = [remembered_sha256(i.path) for i in inputs]
    options = {"format": FORMAT, "kind": kind, "tokenizer": tokenizer.fingerprint, "split_docs": split_docs}
    options["fill"] = fill
    key = hashlib.sha256(json.dumps([hashes, options], sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "stores" / key[:32] if out is None else Path(out)
    bad = BadRows(max_bad)
    store = _made_before(path, key, bad, val_share)
    if store is None:
        if out is not None:
            _refuse_foreign(path)
        _Builder(inputs, hashes, tokenizer, kind, split_docs, fill, bad, report or Report()).write(path, key)
        store = Store.load(path, val_share)
    for entry, source in zip(store.meta["sources"], inputs, strict=True):  # the same content may be elsewhere today
        entry |= {"path": source.name, "weight": source.weight}
    return store


def _made_before(path: Path, key: str, bad: BadRows, val_share: float | None) -> Store | None:
    """The store, if it is there, whole, and made from no more bad rows than are allowed now."""
    if not (path / "meta.json").is_file():
        return None
    try:
        store = Store.load(path, val_share)
    except DataError:
        return None
    meta = store.meta
    allowed = meta["fingerprint"] == key and bad.allows(sum(meta["bad"].values()), meta["rows"])
    return store if allowed else None


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not reader.is_store(path) and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(
            f"--out {path} exists and is not a token store", fix="choose a directory that is not there yet"
        )


def _open_given(inputs: Sequence[reader.Input], tokenizer: Tokenizer, kind: str, val_share: float | None) -> Store:
    source = inputs[0]
    if len(inputs) > 1:
        raise UsageError(
            "a token store cannot be mixed with other data", fix="name the store alone, or the files it is of"
        )
    store = Store.load(source.path, val_share)
    meta = store.meta
    if meta["kind"] != kind:
        stages = {"text": "minigpt pretrain", "chat": "minigpt sft"}
        raise DataError(
            f"{source.name} is a {meta['kind']} store, {kind} is needed", fix=f"use it with {stages[meta['kind']]}"
        )
    same = meta["tokenizer"] == tokenizer.fingerprint
    if not same and (meta["templated"] or meta["vocabulary"] != _vocabulary(tokenizer)):
        raise DataError(
            f"{source.name} was made with another tokenizer",
            found=f"{meta['tokenizer'][:12]} in the store, {tokenizer.fingerprint[:12]} given",
            fix="train with the tokenizer it was made with, or make it again with minigpt tokenize pack",
        )
    for entry in meta["sources"]:
        entry["weight"] *= source.weight
    return store


def _vocabulary(tokenizer: Tokenizer) -> str:
    """Fingerprint of a tokenizer without its chat template, which running text does not meet."""
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    return bare.fingerprint


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


class _Builder:
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
        self._opening, self._closing = tokenizer.opening_id, tokenizer.document_id

    def write(self, path: Path, key: str) -> None:
        """Make the store at `path`: there whole, or not at all."""
        with new_dir(path) as work:
            self._fill(work)
            self.bad.finish(sum(self.rows))
            if not self.documents:
                raise self._nothing()
            raw = np.memmap(work / "docs.raw", dtype=_SAVED, mode="r")
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
            yield reading.record, parts

    def _parts(self, record: Conversation) -> chat.Parts:
        if self.tokenizer.chat_template is None:
            raise WrongStage(
                "a conversation, and this tokenizer has no chat template to write it with",
                fix="learn from conversations with minigpt sft",
            )
        return chat.prepare(self.tokenizer, record.messages, record.tools or None)

    def _store(self, batch: _Batch, files: Sequence[IO[bytes]]) -> None:
        """Append a batch to tokens, mask and docs."""
        encoded = iter(batch.encoded.result())
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
        files[2].write(np.array(docs, dtype=_SAVED).tobytes())

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
            "vocabulary": _vocabulary(self.tokenizer),
            "templated": self.templated,
            "dtype": self.dtype.str,
            "sources": [{"path": i.name, "sha256": h, "rows": n, "weight": i.weight} for i, h, n in entries],
            "rows": sum(self.rows),
            "documents": self.documents,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "characters": self.characters,
            "bad": dict(self.bad.counts),
            "unsupervised": self.unsupervised,
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


# ------------------------------------------------------------------------------------------------ opening


def _mapped(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


def _damaged(file: Path, wanted: str, found: str) -> DataError:
    return DataError(
        f"{file} is damaged: it should hold {wanted}",
        found=found,
        fix=f"delete {file.parent}; it is made again from the data",
    )


def _notes(meta: dict[str, Any]) -> list[str]:
    """What was left out, and what of the rest nobody learns, in sentences."""
    notes = []
    if bad := meta["bad"]:
        n = sum(bad.values())
        notes.append(f"{n:,} {'row' if n == 1 else 'rows'} skipped: {reasons(bad)}")
    if n := meta["unsupervised"]:
        notes.append(f"{n:,} {'conversation' if n == 1 else 'conversations'} left out: nothing to learn in them")
    return notes + list(Remarks(meta["remarks"]).sentences([s["path"] for s in meta["sources"]]))
