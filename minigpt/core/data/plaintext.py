"""Plain text → documents: lines, paragraphs, what stands between marks, or the whole file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from minigpt.core.data.jsonstream import Source
from minigpt.core.data.schema import Row, not_utf8
from minigpt.core.files import is_blank, without_bom

JOINED = 4096  # bytes of UTF-8 that --split-docs auto joins paragraphs to
MARK = "<|endoftext|>"  # these letters, as some corpora write them between documents

Numbered = Iterator[tuple[int, bytes]]  # (line that it begins in, bytes)


def text_rows(file: Source, how: str) -> Iterator[Row]:
    """Documents of a text file. how: `line`, `file`, `blank` = stretches between blank lines, `joined` = neighbouring
    ones up to JOINED bytes, `endoftext` = stretches between MARKs."""
    lines = _lines(file)
    if how == "line":
        documents: Numbered = lines
    elif how == "file":
        documents = iter([(1, b"".join(raw for _, raw in lines))])
    elif how == "endoftext":
        documents = _between_marks(lines)
    else:
        documents = _paragraphs(lines)
        if how == "joined":
            documents = _joined(documents)
    for number, raw in documents:
        if is_blank(raw):
            continue
        try:
            yield Row(f"{file.name}:{number}", raw.decode("utf-8").replace("\r\n", "\n").strip("\n"), file.done)
        except UnicodeDecodeError as e:
            number += raw.count(b"\n", 0, e.start)
            yield Row(f"{file.name}:{number}", raw.decode("utf-8", "replace").strip(), file.done, not_utf8())


def has_blank_lines(lines: Iterable[bytes]) -> bool:
    """Whether a blank line stands between two others."""
    text = blank = False
    for line in lines:
        if is_blank(line):
            blank = text
        elif blank:
            return True
        else:
            text = True
    return False


def _lines(file: Source) -> Numbered:
    return ((number, without_bom(raw)) for number, raw in enumerate(file.stream, 1))


def _paragraphs(lines: Numbered) -> Numbered:
    """The lines of each stretch between blank lines."""
    begin = 1
    held: list[bytes] = []
    for number, raw in lines:
        if not is_blank(raw):
            begin = begin if held else number
            held.append(raw)
        elif held:
            yield begin, b"".join(held)
            held = []
    if held:
        yield begin, b"".join(held)


def _joined(paragraphs: Numbered) -> Numbered:
    """Neighbours together while they stay within JOINED bytes, a blank line between them."""
    begin, text = 0, b""
    for number, paragraph in paragraphs:
        if text and len(text) + 1 + len(paragraph) > JOINED:
            yield begin, text
            text = b""
        begin, text = (begin, text + b"\n" + paragraph) if text else (number, paragraph)
    if text:
        yield begin, text


def _between_marks(lines: Numbered) -> Numbered:
    """What stands between MARKs, wherever in a line they are, without blank lines at the beginning."""
    begin = 1
    held: list[bytes] = []
    mark = MARK.encode()
    for number, raw in lines:
        *ended, rest = raw.split(mark)
        for part in ended:
            yield (begin if held else number), b"".join([*held, part])
            held = []
        if held or not is_blank(rest):
            begin = begin if held else number
            held.append(rest)
    if held:
        yield begin, b"".join(held)
