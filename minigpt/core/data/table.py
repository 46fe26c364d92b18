"""Comma- and tab-separated tables → rows: the header names the keys (RFC 4180; quoted cells may hold line ends)."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from minigpt.core.data.jsonstream import LONGEST_ROW, Source
from minigpt.core.data.schema import TEXT_KEYS, BadRow, Row, not_utf8
from minigpt.core.errors import DataError
from minigpt.core.files import without_bom

SEPARATORS = {".csv": ",;\t", ".tsv": "\t,;"}  # the usual one first: spreadsheets write what their country uses
_LISTS = ("messages", "conversations", "history", "choices")  # columns whose cells hold JSON


def table_rows(file: Source, suffix: str) -> Iterator[Row]:
    """Every row under the header as an object of texts; an empty cell is null, or an empty text in a column of text.

    A row is named by the line that it begins in. One with more or fewer cells than the header, with bytes that are not
    UTF-8 or with a quote in the wrong place is faulty. DataError for a header that does not name columns.
    """
    lines = _Lines(file)
    header = next((line for line in lines if line.strip()), None)
    if header is None:
        return
    csv.field_size_limit(LONGEST_ROW)
    records = csv.reader(
        itertools.chain([header], lines), delimiter=_separator(header, SEPARATORS[suffix]), strict=True
    )
    try:
        names = _names(next(records), file.name)
    except csv.Error as e:
        raise DataError(f"{file.name}: the header is not one of a table", found=str(e)) from None
    while True:
        lines.held.clear()
        try:
            cells = next(records)
            if not any(cells):
                continue
            value = _row(names, cells)
        except StopIteration:
            return
        except (csv.Error, BadRow) as e:
            fault = e if isinstance(e, BadRow) else BadRow("a quote in the wrong place", f": {e}", fix=_QUOTES)
            yield Row(f"{file.name}:{lines.held[0][0]}", lines.shown(), file.done, fault)
        else:
            yield Row(f"{file.name}:{lines.held[0][0]}", value, file.done)


_QUOTES = "put the cell into quotes, and write a quote in it twice"


class _Lines:
    """The lines of a table as text. Bytes that are not UTF-8 pass as lone surrogates.

    held: (number, line) of those that were read since it was last cleared.
    """

    def __init__(self, file: Source):
        self._raw = enumerate(file.stream, 1)
        self.held: list[tuple[int, str]] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        number, raw = next(self._raw)
        line = without_bom(raw).decode("utf-8", "surrogateescape")
        self.held.append((number, line))
        return line

    def shown(self) -> str:
        """The held lines for an error."""
        return "".join(line for _, line in self.held).strip("\r\n").encode("utf-8", "replace").decode()


def _separator(header: str, usual: str) -> str:
    """The usual separator, or the one that the header has when it has not that."""
    return next((s for s in usual if s in header), usual[0])


def _names(cells: Sequence[str], file: str) -> list[str]:
    """Keys of the columns. The first one may have no name: it numbers the rows."""
    names = [cell.strip() for cell in cells]
    if any("\ud800" <= c <= "\udfff" for c in "".join(names)):
        raise DataError(f"{file} is not UTF-8", fix=f"iconv -f GB18030 -t UTF-8 {file} > utf8.csv")
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise DataError(f"{file} has two columns of one name", found=twice[0], fix="rename one of them")
    if not any(names):
        raise DataError(
            f"{file}: the header names no columns", fix="write the names of the columns into the first line"
        )
    return names


def _row(names: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    """BadRow says why cells are no row of these columns."""
    if any("\ud800" <= c <= "\udfff" for c in "".join(cells)):
        raise not_utf8()
    if len(cells) != len(names):
        raise BadRow("another number of cells than the header", f": {len(cells)}, not {len(names)}", fix=_QUOTES)
    if any(cell and not name for name, cell in zip(names[1:], cells[1:], strict=True)):
        raise BadRow("a cell in a column without a name", fix="name the column in the header")
    return {name: _value(name, cell) for name, cell in zip(names, cells, strict=True) if name}


def _value(name: str, cell: str) -> Any:
    if not cell:
        return "" if name in TEXT_KEYS else None
    if name in _LISTS and cell.lstrip()[:1] == "[":
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            raise BadRow(f"invalid JSON in {name}", fix="write it as JSON, in quotes") from None
    return cell.replace("\r\n", "\n")
