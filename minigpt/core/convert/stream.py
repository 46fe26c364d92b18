"""Safetensors read and written piece by piece, so that a file larger than memory passes through.

Format: 8 bytes, the length of a JSON header as a little-endian integer; the header with dtype, shape and data_offsets
of every tensor; the data. https://huggingface.co/docs/safetensors

The library maps whole files instead, and a mapped page that was read counts as memory of the process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minigpt.core.errors import DataError

PIECE = 1 << 20  # values in memory at once: 4 MB of float32
# safetensors' name → how numpy reads it; bfloat16, which numpy lacks, as its 16 bits
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_LONGEST_HEADER = 100_000_000  # bytes; the library's own limit


class Stored(NamedTuple):
    """One tensor in a safetensors file. begin: where its first byte stands in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def row(self) -> int:
        """Values in one row: everything but the first dimension."""
        return math.prod(self.shape[1:])


def pieces(rows: int, row: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(first, end) of consecutive rows that hold about PIECE values together, in whole multiples of `multiple` rows."""
    step = max(multiple, PIECE // max(row, 1) // multiple * multiple)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


# ---------------------------------------------------------------------------------------------- reading


def index(files: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor of some safetensors files by name. DataError names a damaged file, or a tensor that is no float."""
    found: dict[str, Stored] = {}
    for file in files:
        found.update(_header(file))
    return found


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(f.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, end = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            if entry["dtype"] not in DTYPES:
                raise DataError(f"{file}: `{name}` is not stored as a float", found=str(entry["dtype"]))
            if not 0 <= first <= end <= size - 8 - length:
                raise ValueError(f"`{name}` ends after the file")
            if min(shape, default=0) < 0 or end - first != math.prod(shape) * DTYPES[entry["dtype"]].itemsize:
                raise ValueError(f"`{name}` has {end - first:,} bytes for shape {shape}")
            yield name, Stored(file, entry["dtype"], shape, 8 + length + first)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:  # UnicodeDecodeError is a ValueError
        raise DataError(
            f"{file} cannot be read: it is damaged or was not copied whole", found=str(e), fix="copy it again"
        ) from None


def read(stored: Stored, first: int, end: int) -> NDArray[np.float32]:
    """Rows `first` to `end` as float32, (end - first, …)."""
    dtype = DTYPES[stored.dtype]
    values = np.fromfile(
        stored.file, dtype, (end - first) * stored.row, offset=stored.begin + first * stored.row * dtype.itemsize
    )
    if stored.dtype == "BF16":  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False).reshape(end - first, *stored.shape[1:])


# ---------------------------------------------------------------------------------------------- writing


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The beginning of a safetensors file. tensors: name → (dtype, shape), in the order in which data will follow."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins aligned
    return len(text).to_bytes(8, "little") + text
