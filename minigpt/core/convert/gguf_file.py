"""The container GGUF: keys and values, then descriptions of tensors, then their data.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Read with every count and length checked against the size of the file, so that a damaged or hostile header costs
neither memory nor time: nothing is allocated that the file could not fill.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from minigpt.core.errors import DataError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # value type → struct format; 8 text, 9 list
_TEXT, _LIST = 8, 9
_MOST_DIMENSIONS = 4  # ggml's
_MOST = 1 << 24  # entries of a list, keys or tensors: no vocabulary comes near
_LONGEST = 1 << 26  # bytes of a text


@dataclass(frozen=True)
class Tensor:
    """One tensor. shape: rows first, as torch has it. begin: where its first byte stands in the file."""

    name: str
    type: Type
    shape: tuple[int, ...]
    begin: int

    @property
    def row(self) -> int:
        """Values in one row: everything but the first dimension."""
        return math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """Bytes of data."""
        values, bytes = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // values * bytes


@dataclass
class GGUFFile:
    """An opened file: its keys and the place of its tensors. `read` gives their rows."""

    path: Path
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Read the header. DataError names what is wrong with the file."""
        file = cls(Path(path))
        try:
            with open(path, "rb") as f:
                _Header(file, f).read()
        except OSError as e:
            raise DataError(f"{path} cannot be read", found=e.strerror or str(e)) from None
        return file

    def read(self, tensor: Tensor, first: int, end: int) -> NDArray[np.float32]:
        """Rows `first` to `end` as float32, (end - first, …), dequantised."""
        values, bytes = gguf.GGML_QUANT_SIZES[tensor.type]
        row = tensor.row // values * bytes
        raw = np.fromfile(self.path, np.uint8, (end - first) * row, offset=tensor.begin + first * row)
        return gguf.dequantize(raw.reshape(end - first, row), tensor.type).reshape(end - first, *tensor.shape[1:])


class _Header:
    """Reads the header of one file into a GGUFFile."""

    def __init__(self, file: GGUFFile, f: BinaryIO):
        self.file, self.f = file, f
        self.size = os.fstat(f.fileno()).st_size

    def read(self) -> None:
        if self.take(4, "its first bytes") != _MAGIC:
            raise DataError(f"{self.file.path} is no GGUF file", fix="such a file begins with the letters GGUF")
        version = self.number("I")
        if version not in _VERSIONS:
            raise DataError(
                f"{self.file.path} is a GGUF file of another version, or of a machine with the other byte order",
                found=f"version {version}",
                fix="versions 2 and 3, little-endian, are read",
            )
        tensors, keys = self.count(24, "tensors"), self.count(13, "keys")  # the least that each takes
        for _ in range(keys):
            name = self.text("a key")
            if name in self.file.keys:
                self.damaged(f"the key {name} twice")
            self.file.keys[name] = self.value(name)
        described = [self.tensor() for _ in range(tensors)]
        self.place(described)

    def value(self, name: str) -> Any:
        kind = self.number("I")
        if kind == _TEXT:
            return self.text(name)
        if kind == _LIST:
            inner = self.number("I")
            if inner == _TEXT:
                return [self.text(name) for _ in range(self.count(8, name))]
            if inner in _SCALARS:
                width = struct.calcsize(f"<{_SCALARS[inner]}")
                count = self.count(width, name)
                return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self.take(count * width, name)))
            self.damaged(f"{name} is a list of the unknown kind {inner}")
        if kind not in _SCALARS:
            self.damaged(f"{name} is of the unknown kind {kind}")
        return self.number(_SCALARS[kind])

    def tensor(self) -> tuple[str, Type, tuple[int, ...], int]:
        name = self.text("a tensor's name")
        dimensions = self.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            self.damaged(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        kind, offset = self.number("I"), self.number("Q")
        try:
            return name, Type(kind), shape, offset
        except ValueError:
            self.damaged(f"{name} is of the unknown type {kind}")

    def place(self, described: list[tuple[str, Type, tuple[int, ...], int]]) -> None:
        """Where data begins, and that every tensor lies within it."""
        alignment = self.file.keys.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self.damaged(f"general.alignment is {alignment}")
        begin = -(-self.f.tell() // alignment) * alignment
        for name, kind, shape, offset in described:
            values, _ = gguf.GGML_QUANT_SIZES[kind]
            tensor = Tensor(name, kind, shape, begin + offset)
            if name in self.file.tensors:
                self.damaged(f"the tensor {name} twice")
            if not all(shape) or shape[-1] % values or offset % alignment:
                self.damaged(f"{name} has shape {shape}, type {kind.name} and offset {offset}")
            if tensor.begin + tensor.size > self.size:
                self.damaged(f"{name} ends at byte {tensor.begin + tensor.size:,}, the file at {self.size:,}")
            self.file.tensors[name] = tensor

    # ------------------------------------------------------------------------------------ pieces

    def take(self, length: int, what: str) -> bytes:
        left = self.size - self.f.tell()
        if length > min(left, _LONGEST):
            self.damaged(f"{what} would take {length:,} bytes, {left:,} are left")
        return self.f.read(length)

    def number(self, form: str) -> Any:
        (value,) = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}"), "a number"))
        return value

    def count(self, least: int, what: str) -> int:
        """How many of something follow, each of at least `least` bytes."""
        count = self.number("Q")
        left = self.size - self.f.tell()
        if count * least > left or count > _MOST:
            self.damaged(f"{count:,} entries of {what} in {left:,} bytes")
        return int(count)

    def text(self, what: str) -> str:
        try:
            return self.take(self.number("Q"), what).decode("utf-8")
        except UnicodeDecodeError as e:
            self.damaged(f"{what} is no UTF-8: {e.reason}")

    def damaged(self, found: str) -> NoReturn:
        raise DataError(
            f"{self.file.path} cannot be read: it is damaged or was not copied whole", found=found, fix="copy it again"
        )
