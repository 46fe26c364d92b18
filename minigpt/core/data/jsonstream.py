"""JSON of any layout → rows: one object a line, an array, `{"data": […]}`, objects pretty-printed one after another."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, Protocol

from minigpt.core.data.schema import BadRow, Row, not_utf8
from minigpt.core.files import is_blank, without_bom

LONGEST_ROW = 1 << 28  # characters of one row; a missing bracket must not pull in a whole file
_CHUNK = 1 << 20
_DATA = re.compile(rb'\s*\{\s*"data"\s*:\s*(?=\[)')
_OBJECT_LINE = re.compile(r"\n[ \t]*(?=\{)")
_OBJECT = re.compile(r'\s*(?:\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')
_CUT_SHORT = 16  # a literal, number or escape that is cut by the end of the buffer fails this close to it


class Source(Protocol):
    """An open file. name: as messages call it. stream: buffered bytes. done: bytes of it read so far."""

    name: str
    stream: Any

    @property
    def done(self) -> int: ...


def json_rows(file: Source) -> Iterator[Row]:
    """Every row of a JSON file, in the layout that its beginning shows. Memory holds one row and a buffer."""
    start = bytes(file.stream.peek(4096))
    if opening := _DATA.match(start):
        line = file.stream.read(opening.end()).count(b"\n") + 1
        yield from _stream(file, line, b"", in_data=True)
    elif start.lstrip()[:1] == b"[":
        yield from _stream(file, 1, b"")
    else:
        yield from _lines(file)


def begins_object(text: str) -> bool:
    """Whether text begins as an object does, or a list of them: no prose begins with `{"name":`."""
    return _OBJECT.match(text) is not None


def looks_like_json(start: bytes) -> bool:
    """Whether a file without a telling name is JSON. start: its beginning, which may end anywhere.

    A bracket alone decides nothing: `[Verse 1]` and `{{ name }}` begin texts.
    """
    text = start.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
    if text[:1] not in ("{", "["):
        return False
    if begins_object(text):
        return True
    lines = [line for line in text.splitlines() if line.strip()]
    if 2 * sum(map(begins_object, lines)) >= len(lines) > 1:  # its first line is broken
        return True
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except RecursionError:
        return True
    except json.JSONDecodeError as e:
        goes_on = e.pos >= len(text.rstrip()) or e.msg.startswith("Unterminated string")
        return goes_on and text.lstrip("[ \t\r\n")[:1] == '"'  # an array of texts
    of_rows = isinstance(value, dict) or all(isinstance(row, (str, dict, list)) for row in value)
    return of_rows and text[end:].lstrip(" \t,")[:1] in ("", "\r", "\n", "{", "[")


def _lines(file: Source) -> Iterator[Row]:
    """One object a line. A first line that is only the beginning of an object means pretty-printed objects."""
    first = True
    for number, raw in enumerate(file.stream, 1):
        raw = without_bom(raw)
        if is_blank(raw):
            continue
        where = f"{file.name}:{number}"
        try:
            value = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError:
            yield Row(where, raw.decode("utf-8", "replace").strip(), file.done, not_utf8())
        except (ValueError, RecursionError) as e:
            if first and isinstance(e, json.JSONDecodeError) and e.pos >= len(e.doc.rstrip()):
                yield from _stream(file, number, raw)
                return
            yield from _several(where, raw.decode("utf-8").strip(), file.done)
        else:
            yield from _unwrapped(where, value, file.done)
        first = False


def _several(where: str, text: str, done: int) -> Iterator[Row]:
    """Objects that share a line; the line is one bad row if it is anything else."""
    decoder, values, at = json.JSONDecoder(), [], 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            if not isinstance(value, dict):
                raise json.JSONDecodeError("Extra data", text, at)
            values.append(value)
            while at < len(text) and text[at] in " \t,\ufeff":
                at += 1
    except (ValueError, RecursionError) as e:
        yield Row(where, text, done, _invalid(e, 0))
        return
    for value in values:
        yield Row(where, value, done)


def _unwrapped(where: str, value: Any, done: int) -> Iterator[Row]:
    """A row, or the rows of an object whose `data` lists them."""
    data = value.get("data") if isinstance(value, dict) else None
    if isinstance(data, list) and data and isinstance(data[0], dict):
        for i, item in enumerate(data, 1):
            yield Row(f"{where} (row {i})", item, done)
    else:
        yield Row(where, value, done)


def _stream(file: Source, line: int, begun: bytes, in_data: bool = False) -> Iterator[Row]:
    """Elements of an array, or objects one after another, and those of files that were joined to this one.

    begun: bytes that were read already. in_data: they are elements of an object's `data`, which was opened already.
    After a fault reading goes on at the next line that begins an object.
    """
    window = _Window(file, line, begun)
    array = window.open_array()
    number = 0
    while window.skip(" \t\r\n,\ufeff"):
        closes = array and window.text[window.at] == "]"
        number += not closes
        where = f"{file.name}:{window.line}" + (f" (row {number})" if array else "")
        try:
            if closes:
                window.close_array(in_data)
                array, in_data = window.open_array(), False
                continue
            value = window.decode()
        except (ValueError, RecursionError) as e:
            fault = _invalid(e, window.at)
            yield Row(where, window.resync(), file.done, fault)
            continue
        begin = window.begin
        try:
            window.text[begin : window.at].encode("utf-8")
        except UnicodeEncodeError:
            raw = window.text[begin : window.at].encode("utf-8", "replace").decode()
            yield Row(where, raw, file.done, not_utf8())
            continue
        if array:
            yield Row(where, value, file.done)
        else:
            yield from _unwrapped(where, value, file.done)
    if array:
        fault = BadRow("no closing bracket", ": the array is cut off", fix="fetch the file again")
        yield Row(f"{file.name}:{window.line}", "", file.done, fault)


class _Window:
    """The part of a JSON text that is being decoded. Bytes that are not UTF-8 pass as lone surrogates.

    text: what is held. begin, at: the value decoded last is text[begin:at]. line: where `at` is, counted from 1.
    """

    def __init__(self, file: Source, line: int, begun: bytes):
        self.file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json = json.JSONDecoder()
        self.text = self._utf8.decode(begun)
        self.begin = self.at = 0
        self._line, self._counted = line, 0
        self._ended = False

    @property
    def line(self) -> int:
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def more(self, size: int = 0) -> bool:
        """Read on, forgetting what lies before the cursor. False at the end of the file."""
        block = self.file.stream.read(size or _CHUNK)
        self._ended = not block
        fresh = self._utf8.decode(block, final=self._ended)  # the end of a file may still give half a character
        self._line = self.line
        self.text = self.text[self.at :] + fresh
        self.at = self._counted = 0
        return bool(block or fresh)

    def skip(self, characters: str) -> bool:
        """Move to the next character that is none of these; False when there is none left."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in characters:
                self.at += 1
            if self.at < len(self.text):
                return True
            if not self.more():
                return False

    def open_array(self) -> bool:
        """Step over the bracket of an array, if there is one."""
        if self.skip(" \t\r\n\ufeff") and self.text[self.at] == "[":
            self.at += 1
            return True
        return False

    def close_array(self, in_data: bool) -> None:
        """Step over the bracket, and over what follows it in an object: `], "version": 1}`. ValueError as `decode`."""
        self.at += 1
        if not in_data or not self.skip(" \t\r\n"):
            return
        if self.text[self.at] == ",":  # the rest as an object of its own
            self.text = self.text[: self.at] + "{" + self.text[self.at + 1 :]
            self.decode()
        else:
            self.at += 1

    def decode(self) -> Any:
        """The value at the cursor, reading on while it is not whole. ValueError when it cannot become one."""
        size = _CHUNK
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.at)
            except json.JSONDecodeError as e:
                whole = e.pos < len(self.text) - _CUT_SHORT and not e.msg.startswith("Unterminated string")
                if whole or self._ended:
                    raise
                if len(self.text) - self.at > LONGEST_ROW:
                    raise ValueError(f"no end within {LONGEST_ROW:,} characters") from None
            else:
                if end < len(self.text) or self._ended or self.text[end - 1] in '}]"':
                    self.begin, self.at = self.at, end
                    return value
            self.more(size)
            size *= 2  # doubling keeps one huge row linear

    def resync(self) -> str:
        """Go to the next line that begins an object, or to the end. Returns the beginning of what was passed over."""
        passed = self.text[self.at : self.at + 300].encode("utf-8", "replace").decode()
        while True:
            if found := _OBJECT_LINE.search(self.text, self.at):
                self.at = found.end()
                return passed.rstrip()
            held = self.text.rstrip(" \t")
            self.at = len(held) - 1 if held.endswith("\n") else len(self.text)  # the object may come with the next read
            if not self.more():
                self.at = len(self.text)
                return passed.rstrip()


def _invalid(e: Exception, begin: int) -> BadRow:
    """begin: where in the parsed text the row begins."""
    detail = f": {e.msg} at its character {e.pos - begin + 1}" if isinstance(e, json.JSONDecodeError) else f": {e}"
    return BadRow("invalid JSON", detail)
