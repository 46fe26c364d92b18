"""A model folder's weights on their way to other files, a few rows at a time: memory does not grow with the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from minigpt.core.convert import stream
from minigpt.core.convert.stream import Stored
from minigpt.core.errors import DataError
from minigpt.core.files import write_json
from minigpt.core.models import folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what safetensors calls them
SHARD = 5_000_000_000  # bytes of a file above which weights are split, as transformers 4 does


def checked(path: Path) -> dict[str, Stored]:
    """Every tensor of a model folder by name, in the model's order, once all of them fit `config.json`.

    A copy of a tied embedding is left out. DataError names what is missing, left over, of another shape or no float, a
    head that is no copy although the configuration says so, and a damaged file.
    """
    config, _ = folder.read_config(path)
    expected, tied = folder.expected(config), config.tie_word_embeddings
    found = stream.index(folder.weight_files(path))
    folder.check_fit({name: tensor.shape for name, tensor in found.items()}, expected, tied, path)
    if tied and folder.HEAD in found and not _equal(found[folder.HEAD], found[folder.EMBEDDING]):
        raise DataError(f"{path}: config.json ties the embeddings, but {folder.HEAD} differs from embed_tokens")
    return {name: found[name] for name in expected}


def dtype_of(weights: Mapping[str, Stored]) -> str:
    """The dtype that holds every number of some weights: their own when they share one, else float32."""
    kinds = {tensor.dtype for tensor in weights.values()}
    return next((name for name, short in NAMES.items() if kinds == {short}), "float32")


def write(out: Path, weights: Mapping[str, Stored], dtype: str, *, shard_bytes: int = SHARD) -> list[Path]:
    """Write `model.safetensors` into the directory `out`, or shards and their index above `shard_bytes`.

    dtype: float32, bfloat16 or float16, of every tensor written. Returns the weight files.
    DataError when a number is too large for float16.
    """
    shards = _split(weights, dtype, shard_bytes)
    count = len(shards)
    names = (
        [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [folder.WEIGHTS]
    )
    for name, shard in zip(names, shards, strict=True):
        _write_file(out / name, shard, dtype)
    if count > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in sorted(shard)}
        total = sum(_size(tensor, dtype) for tensor in weights.values())
        write_json(out / folder.INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return [out / name for name in names]


def _split(weights: Mapping[str, Stored], dtype: str, shard_bytes: int) -> list[dict[str, Stored]]:
    """The tensors in order, a new shard whenever the next one does not fit. A tensor is never split."""
    shards: list[dict[str, Stored]] = [{}]
    filled = 0
    for name, tensor in weights.items():
        size = _size(tensor, dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    return shards


def _size(tensor: Stored, dtype: str) -> int:
    return math.prod(tensor.shape) * DTYPES[dtype].itemsize


def _write_file(path: Path, weights: Mapping[str, Stored], dtype: str) -> None:
    with open(path, "wb") as f:
        f.write(stream.header({name: (NAMES[dtype], tensor.shape) for name, tensor in weights.items()}))
        for name, tensor in weights.items():
            for piece in pieces(name, tensor, dtype):
                f.write(piece)


def pieces(name: str, tensor: Stored, dtype: str) -> Iterator[memoryview]:
    """The bytes of one tensor in another dtype, a few rows at once. DataError: a number too large for float16."""
    for rows in stream.pieces(tensor.shape[0], tensor.row):
        values = torch.from_numpy(stream.read(tensor, *rows))
        kept = values.to(DTYPES[dtype])
        if dtype == "float16" and bool((kept.isinf() & values.isfinite()).any()):
            raise DataError(
                f"{tensor.file}: `{name}` holds numbers too large for float16",
                found=f"{values.abs().max():g}",
                fix="use --dtype bfloat16",
            )
        yield kept.view(torch.uint8).numpy().data


def _equal(a: Stored, b: Stored) -> bool:
    return a.shape == b.shape and all(
        np.array_equal(stream.read(a, *rows), stream.read(b, *rows)) for rows in stream.pieces(a.shape[0], a.row)
    )
