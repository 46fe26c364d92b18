"""Files → raw rows, each with the place it came from. One row at a time: memory does not grow with the file.

JSON of any layout, tables and plain text, any of them compressed with gzip, bzip2 or xz. A file's first bytes say how
it is compressed, its suffix whether it is JSON, a table or text; where the suffix says nothing, its beginning does.
"""

from __future__ import annotations

import bz2
import codecs
import difflib
import glob
import gzip
import hashlib
import io
import lzma
import math
import os
import sys
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from minigpt.core.data import sample
from minigpt.core.data.jsonstream import json_rows, looks_like_json
from minigpt.core.data.plaintext import has_blank_lines, text_rows
from minigpt.core.data.schema import Row
from minigpt.core.data.table import SEPARATORS, table_rows
from minigpt.core.errors import DataError, MissingError, UsageError
from minigpt.core.files import cache_dir, disk_error, quoted

_CHUNK = 1 << 20
_OPENING = 4096  # bytes that show what a file is
_JSON = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".md")
_COLUMNS = {".parquet": "read_parquet", ".arrow": "read_feather"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_ABOUT = ("readme", "license", "licence", "changelog", "notice")  # stand beside data without being any


class Input(NamedTuple):
    """One file to read, or a token store's directory.

    weight: its share of an epoch, 1 = all of it once. name: how messages call it. times: how often it was named.
    """

    path: Path
    weight: float
    name: str
    times: int = 1


# ------------------------------------------------------------------------------------------------ which files


def expand(specs: Sequence[str]) -> list[Input]:
    """Files behind `--data` values: a file, a directory (recursive), a glob, `-` for stdin, `sample[:PART[:LANG]]`
    for the data set that comes with minigpt; each may end in `:WEIGHT`. A file called `sample` goes before that set.

    A file that is named twice, be it by a link or in a folder, is one input: its weights add up.
    UsageError for a path that does not exist and for a directory without data.
    """
    found: dict[Path, Input] = {}
    for spec in specs:
        path, weight = _split_weight(str(spec))
        for file in _files(path):
            name = "stdin" if path == "-" else path if _is_sample(path) else _shown(file)
            before = found.get(place := file.resolve())
            found[place] = (
                Input(file, weight, name)
                if before is None
                else before._replace(weight=before.weight + weight, times=before.times + 1)
            )
    return list(found.values())


def anchored(spec: str) -> str:
    """A `--data` value that means the same from every working directory."""
    path, _ = _split_weight(spec)
    return spec if path == "-" or _is_sample(path) else os.path.abspath(os.path.expanduser(spec))


def total_bytes(specs: Sequence[str]) -> int:
    """Size on disk of everything that `specs` name."""
    return sum(size_of(i.path) for i in expand(specs))


def size_of(path: Path) -> int:
    """Bytes of a file, or of a token store's tokens."""
    return (path / "tokens.bin" if path.is_dir() else path).stat().st_size


def text_size(path: Path) -> int:
    """About how many bytes a file has once it is decompressed."""
    return size_of(path) * (4 if path.suffix.lower() in _COMPRESSED else 1)


def reading(source: Input, split_docs: str) -> str:
    """How `rows` reads a file, as far as its bytes alone do not say."""
    suffix = _suffix(source.path)
    if suffix in _JSON or suffix in SEPARATORS:
        kind = "json" if suffix in _JSON else suffix
        return f"{kind}, endoftext" if split_docs == "endoftext" else kind
    return f"{'text' if suffix in _TEXT else 'by its beginning'}, {split_docs}"


def is_named_json(source: Input) -> bool:
    """Whether a file is read as JSON whatever it holds."""
    return _suffix(source.path) in _JSON


def is_store(path: Path) -> bool:
    """Whether a directory is a token store."""
    return (path / "meta.json").is_file() and (path / "tokens.bin").is_file()


def _split_weight(spec: str) -> tuple[str, float]:
    path, _, weight = spec.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        return spec, 1.0
    if not path or os.path.exists(spec):
        return spec, 1.0
    if not (math.isfinite(value) and value > 0):
        raise UsageError(
            f"the weight of {path} must be above 0", found=weight, fix="leave the file out, or use 0.3, 2, …"
        )
    return path, value


def _files(spec: str) -> list[Path]:
    if spec == "-":
        return [_spooled_stdin()]
    if _is_sample(spec):
        return [sample.path_of(spec)]
    path = Path(spec).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return [path]
    if glob.has_magic(spec):
        matches = sorted(Path(m) for m in glob.glob(str(path), recursive=True))
        files = [f for f in matches if f.is_file()] or [f for folder in matches for f in _in_folder(folder)]
        if files:
            return files
        raise UsageError(f"--data: no file matches {spec}")
    raise UsageError(f"--data: {spec} does not exist", fix=_nearest(path))


def _is_sample(spec: str) -> bool:
    return sample.is_spec(spec) and not os.path.exists(spec)


def _in_folder(folder: Path) -> list[Path]:
    """Data files below a folder by name, or a token store itself. Hidden files, READMEs and other kinds are no data."""
    if is_store(folder):
        return [folder]
    files = []
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        passed_over = _is_about(path) or any(part.startswith(".") for part in below.parts)
        if path.is_file() and not passed_over and _suffix(path) in (*_JSON, *_TEXT, *SEPARATORS, *_COLUMNS):
            files.append(path)
    if not files:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise UsageError(
            f"--data: {folder} holds no data files", found=held, fix="put .jsonl, .json, .csv or .txt files there"
        )
    return files


def _is_about(path: Path) -> bool:
    return path.stem.lower() in _ABOUT and path.suffix.lower() in _TEXT


def _suffix(path: Path) -> str:
    """The suffix that tells the kind of data, below that of a compression."""
    name = path.name.lower()
    for packed in _COMPRESSED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else str(path)


def _nearest(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {parent / close[0]}?"
    return f"{parent} holds {', '.join(names[:5]) or 'nothing'}"


_spooled: weakref.WeakKeyDictionary[Any, Path] = weakref.WeakKeyDictionary()


def _spooled_stdin() -> Path:
    """Stdin as a file in the cache, named by its content. Read once, however often a process asks for it."""
    if sys.stdin not in _spooled:
        stream: IO[bytes] = getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode("utf-8"))
        _spooled[sys.stdin] = _spool(stream)
    return _spooled[sys.stdin]


def _spool(stream: IO[bytes]) -> Path:
    folder = cache_dir() / "stdin"
    digest, size = hashlib.sha256(), 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as f:
                while block := stream.read(_CHUNK):
                    digest.update(block)
                    size += len(block)
                    f.write(block)
            if not size:
                raise UsageError(
                    "--data -: nothing came in on stdin", fix="pipe a file in: cat a.jsonl | minigpt … -d -"
                )
            path = folder / digest.hexdigest()
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as e:
        raise disk_error(e, folder) from e
    return path


# ------------------------------------------------------------------------------------------------ one file


class DataFile:
    """An open file, decompressed by what its first bytes say. name, stream, done: as jsonstream.Source.

    MissingError for zstd, parquet and arrow; DataError for what is no text.
    """

    def __init__(self, source: Input):
        self.name = source.name
        self._raw = open(source.path, "rb")  # noqa: SIM115  (closed by __exit__)
        try:
            self.stream: Any = self._open(source)
        except BaseException:
            self._raw.close()
            raise

    def _open(self, source: Input) -> Any:
        start = self._raw.peek(8)[:8]
        _refuse(source, start)
        plain: Any = None
        if start.startswith(b"\x1f\x8b"):
            plain = gzip.GzipFile(fileobj=self._raw)
        elif start.startswith(b"BZh"):
            plain = bz2.BZ2File(self._raw)
        elif start.startswith(b"\xfd7zXZ"):
            plain = lzma.LZMAFile(self._raw)  # noqa: SIM115
        stream: Any = self._raw if plain is None else io.BufferedReader(plain, _CHUNK)
        start = stream.peek(_OPENING)[:_OPENING]
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{self.name} is UTF-16", fix=f"iconv -f UTF-16 -t UTF-8 {self.name} > utf8.txt")
        if b"\0" in start:
            raise DataError(f"{self.name} is not text", fix="data is JSON lines, a JSON array or plain text")
        if start.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        return stream

    @property
    def done(self) -> int:
        return self._raw.tell()

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stream.close()
        self._raw.close()


def _refuse(source: Input, start: bytes) -> None:
    """Say what to do with kinds that are not read."""
    name = source.name
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        raise MissingError(
            f"{name} is compressed with zstd, which is not read", fix=f"unpack it first: zstd -d {quoted(name)}"
        )
    suffix = _suffix(source.path)
    if start.startswith(b"PAR1"):
        suffix = ".parquet"
    elif start.startswith(b"ARROW1"):
        suffix = ".arrow"
    if suffix in _COLUMNS:
        write = f"to_json('{Path(name).with_suffix('.jsonl')}', orient='records', lines=True, force_ascii=False)"
        call = f"import pandas; pandas.{_COLUMNS[suffix]}('{name}').{write}"
        raise MissingError(
            f"{name} is a {suffix[1:]} table, which is not read", fix=f'make JSON lines of it: python -c "{call}"'
        )


def rows(source: Input, split_docs: str = "auto") -> Iterator[Row]:
    """Every row of a file in order, those that cannot be parsed included (`Row.fault`).

    split_docs: documents of a text file: `blank` = stretches between blank lines, `line`, `file`, `endoftext` =
    stretches between these marks; `auto` = paragraphs joined to about 4 kB where there are blank lines, else lines.
    DataError or MissingError for a file that is of another kind or damaged, and for a token store.
    """
    if source.path.is_dir():
        raise DataError(f"{source.name} is a token store: its rows are gone", fix="name the files it was made from")
    try:
        with DataFile(source) as file:
            if (suffix := _suffix(source.path)) in SEPARATORS:
                yield from table_rows(file, suffix)
                return
            if _is_json(source.path, file):
                yield from json_rows(file)
                return
            if split_docs == "auto":
                with DataFile(source) as again:
                    split_docs = "joined" if has_blank_lines(again.stream) else "line"
            yield from text_rows(file, split_docs)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as e:
        raise DataError(f"{source.name} is damaged: it cannot be unpacked to its end", found=str(e)) from None
    except OSError as e:
        raise DataError(f"{source.name} cannot be read", found=e.strerror or str(e)) from None


def _is_json(path: Path, file: DataFile) -> bool:
    suffix = _suffix(path)
    return suffix in _JSON or (suffix not in _TEXT and looks_like_json(bytes(file.stream.peek(_OPENING))))
