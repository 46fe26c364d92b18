"""Tokens on disk: sources are tokenised once and kept in the cache under a hash of all that shaped them.

A store is a directory: `tokens.bin` (uint16, uint32 for vocabularies above 65,536), `mask.bin` (uint8, 1 = learnt),
`docs.npy` (one record a document) and `meta.json`. Which documents are held out follows from the hash of their content
when the store is opened, so another share needs no new store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.core.data import misread, reader
from minigpt.core.data.holdout import hold_out
from minigpt.core.data.remarks import Remarks
from minigpt.core.data.schema import BadRows, reasons
from minigpt.core.data.store_builder import FORMAT, SAVED, Builder, frame_of, vocabulary_of
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError, UsageError
from minigpt.core.files import cache_dir, read_json, remembered_sha256
from minigpt.core.report import Report

KINDS = ("text", "chat")
DOCS = np.dtype([*SAVED.descr, ("val", "?")])

Ints = NDArray[np.int64]


class Store:
    """An opened token store.

    docs: (N,) records: offset and length (tokens), supervised (positions that are learnt), bytes (of text in those),
    source (index into meta["sources"]), hash (of the content), val (held out).
    meta: format, kind, fingerprint, tokenizer, vocabulary, sources, rows, documents, tokens, supervised, characters,
    bad, empty, unsupervised, shapes, remarks (see Remarks), and what may be misread: unwritable, marks, json_as_text.
    """

    def __init__(self, path: Path, meta: dict[str, Any], saved: NDArray[Any], val_share: float | None):
        self.path, self.meta = path, meta
        width = np.dtype(meta["dtype"])
        self._tokens = _mapped(path / "tokens.bin", width, meta["tokens"])
        self._mask = _mapped(path / "mask.bin", np.dtype("u1"), meta["tokens"])
        self.docs = np.zeros(len(saved), dtype=DOCS)
        for name in SAVED.names or ():
            self.docs[name] = saved[name]
        self.docs["val"], self._split_note = hold_out(saved["hash"], val_share)

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
        if saved.dtype != SAVED or len(saved) != meta["documents"]:
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
        return _notes(self.meta) + ([self._split_note] if self._split_note else [])

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
    key = _key(inputs, hashes, tokenizer, kind, split_docs, fill)
    path = cache_dir() / "stores" / key[:32] if out is None else Path(out)
    bad = BadRows(max_bad)
    store = _made_before(path, key, bad, val_share)
    if store is None:
        if out is not None:
            _refuse_foreign(path)
        Builder(inputs, hashes, tokenizer, kind, split_docs, fill, bad, report or Report()).write(path, key)
        store = Store.load(path, val_share)
    for entry, source in zip(store.meta["sources"], inputs, strict=True):  # the same content may be elsewhere today
        entry |= {"path": source.name, "weight": source.weight, "times": source.times}
    return store


def _key(
    inputs: Sequence[reader.Input],
    hashes: Sequence[str],
    tokenizer: Tokenizer,
    kind: str,
    split_docs: str,
    fill: Mapping[str, str],
) -> str:
    """sha256 of all that shapes a store's rows: what is read, how, as what, and what it is framed by."""
    options = {
        "format": FORMAT,
        "kind": kind,
        "tokenizer": tokenizer.fingerprint,
        "frame": frame_of(tokenizer),
        "fill": dict(fill),
        "reading": [reader.reading(i, split_docs) for i in inputs],
    }
    return hashlib.sha256(json.dumps([hashes, options], sort_keys=True).encode()).hexdigest()


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
    frame = frame_of(tokenizer)
    same = meta["tokenizer"] == tokenizer.fingerprint and meta["frame"] == frame
    if not same and (
        meta["templated"] or [meta["vocabulary"], *meta["frame"][:2]] != [vocabulary_of(tokenizer), *frame[:2]]
    ):
        raise DataError(
            f"{source.name} was made with another tokenizer",
            found=f"{meta['tokenizer'][:12]} in the store, {tokenizer.fingerprint[:12]} given",
            fix="train with the tokenizer it was made with, or make it again with minigpt tokenize pack",
        )
    for entry in meta["sources"]:
        entry["weight"] *= source.weight
    return store


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
    if n := meta["empty"]:
        notes.append(misread.empty(n))
    if n := meta["unsupervised"]:
        notes.append(f"{n:,} {'conversation' if n == 1 else 'conversations'} left out: nothing to learn in them")
    for source in meta["sources"]:
        if (times := source.get("times", 1)) > 1:
            notes.append(f"{source['path']} is named {times} times: its weights add up to {source['weight']:g}")
    for number in meta["json_as_text"]:
        notes.append(misread.json_as_text(meta["sources"][number]["path"]))
    if n := meta["marks"]:
        notes.append(misread.marks(n))
    if n := meta["unwritable"]["lost"]:
        found = meta["unwritable"]
        notes.append(
            f"the tokenizer cannot write {n:,} of {found['characters']:,} characters in the first {found['texts']:,} "
            f"texts, such as {' '.join(found['such_as'])}: they are not learnt"
        )
    return notes + list(Remarks(meta["remarks"]).sentences([s["path"] for s in meta["sources"]]))
