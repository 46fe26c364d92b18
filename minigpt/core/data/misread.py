"""Sentences on rows that are good, and yet may not be read as their owner means them."""

from __future__ import annotations

from pathlib import Path

from minigpt.core.data import reader
from minigpt.core.data.jsonstream import begins_object
from minigpt.core.data.plaintext import MARK
from minigpt.core.data.schema import Document, Record


def has_mark(record: Record) -> bool:
    """Whether a text holds the letters of an end-of-document token."""
    return isinstance(record, Document) and MARK in record.text


def is_json_as_text(source: reader.Input, record: Record) -> bool:
    """Whether the first record of a file shows JSON that is read as plain text."""
    return isinstance(record, Document) and not reader.is_named_json(source) and begins_object(record.text)


def marks(documents: int) -> str:
    """documents: how many have a mark."""
    where = f"{documents:,} {'document' if documents == 1 else 'documents'}"
    return f"the letters {MARK} stand in {where} and are learnt as letters: --split-docs endoftext ends documents there"


def json_as_text(name: str) -> str:
    """name: of the file."""
    better = Path(name).with_suffix(".jsonl")
    return f"{name} holds JSON lines and is read as plain text: rename it to {better}"


def empty(rows: int) -> str:
    """rows: how many hold no text."""
    return f"{rows:,} empty {'row' if rows == 1 else 'rows'} skipped"
