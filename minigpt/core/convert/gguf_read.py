"""A GGUF file as a model of ours: configuration, tensors under our names, tokenizer; or as a model folder.

Quantised tensors become float32, with the gguf package's own arithmetic, a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from minigpt.core.convert import card, gguf_arch, gguf_tokenizer, stream
from minigpt.core.convert.gguf_file import GGUFFile
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError
from minigpt.core.files import new_dir, write_json
from minigpt.core.models import folder as model_folder
from minigpt.core.models.config import ModelConfig

READ = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q2_K, Type.Q3_K,
        Type.Q4_K, Type.Q5_K, Type.Q6_K)  # fmt: skip
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


@dataclass
class Foreign:
    """A model in a file of another kind. names: our name of a tensor → its name there."""

    config: ModelConfig
    tokenizer: Tokenizer
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    file: GGUFFile

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(our name, float32 tensor), one after the other; no two are in memory unless the caller keeps them."""
        for name in self.names:
            yield name, self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor by our name, float32."""
        values = torch.empty(self.shapes[name])
        for first, block in self.blocks(name):
            values[first : first + len(block)] = torch.from_numpy(block)
        return values

    def blocks(self, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, some rows) of one tensor, float32, in our layout."""
        tensor = self.file.tensors[self.names[name]]
        head_dim = self.config.head_size if gguf_arch.is_permuted(self.config, name) else None
        for first, end in stream.pieces(tensor.shape[0], tensor.row, head_dim or 1):
            block = self.file.read(tensor, first, end)
            yield first, gguf_arch.from_neighbours(block, head_dim) if head_dim else block


def read(path: str | Path) -> Foreign:
    """Open a GGUF file: its header is read and checked, its tensors are not touched yet.

    DataError names what is damaged, missing or not supported here: the architecture, a key that changes the maths, a
    type of tensor, the tokenizer.
    """
    file = GGUFFile.open(path)
    try:
        return _read(file)
    except DataError as e:
        raise DataError(f"{path}: {e.message}", found=e.found, fix=e.fix) from None


def _read(file: GGUFFile) -> Foreign:
    name = file.keys.get("general.architecture")
    if not isinstance(name, str):
        raise DataError("the key general.architecture is missing")
    if file.keys.get("split.count", 1) not in (0, 1):
        raise DataError("it is one part of a model in several files", fix="merge them with llama.cpp's gguf-split")
    keys = {key.removeprefix(f"{name}."): value for key, value in file.keys.items() if key.startswith(f"{name}.")}
    embedding = file.tensors.get(_EMBEDDING)
    if embedding is None:
        raise DataError(f"the tensor {_EMBEDDING} is missing")
    _check_tensors(file, keys)
    factors = file.tensors.get(gguf_arch.ROPE_FACTORS)
    config = gguf_arch.from_keys(
        name,
        keys,
        vocab_size=embedding.shape[0],
        tied=_HEAD not in file.tensors,
        factors=None if factors is None else file.read(factors, 0, factors.shape[0]),
    )
    shapes = model_folder.expected(config)
    names = gguf_arch.tensor_names(config, list(shapes))
    missing = sorted(set(names.values()) - file.tensors.keys())
    unexpected = sorted(file.tensors.keys() - set(names.values()) - {gguf_arch.ROPE_FACTORS})
    if missing or unexpected:
        raise DataError(
            "its tensors do not fit its keys",
            found=f"missing: {missing[:5] or 'none'}; unexpected: {unexpected[:5] or 'none'}",
        )
    for ours, shape in shapes.items():
        tensor = file.tensors[names[ours]]
        if tensor.shape != shape:
            raise DataError(
                f"{tensor.name} has another shape than its keys say", found=f"{tensor.shape}, expected {shape}"
            )
    tokenizer = gguf_tokenizer.load(file.keys, config.max_position_embeddings)
    return Foreign(config, tokenizer, names, shapes, file)


def _check_tensors(file: GGUFFile, keys: dict[str, object]) -> None:
    """All are of a type that is read, and no size is larger than the number of their values: it might be allocated."""
    for tensor in file.tensors.values():
        if tensor.type not in READ or (len(tensor.shape) == 1 and GGML_QUANT_SIZES[tensor.type][0] > 1):
            raise DataError(f"{tensor.name} is of a type that is not read here", found=tensor.type.name)
    most = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    for key in gguf_arch.SIZES:
        value = keys.get(key)
        limit = len(file.tensors) if key == "block_count" else most
        if key != "context_length" and isinstance(value, int) and value > limit:
            raise DataError(f"{key} is larger than the whole file", found=f"{value:,}")


def unpack(path: str | Path, out: Path) -> None:
    """Write the model in the GGUF file `path` as the Hugging Face folder `out`, float32, tensor by tensor.

    Its licence, where it names one, is kept as the model card that other conversions look at.
    """
    foreign = read(path)
    tokenizer = foreign.tokenizer
    with new_dir(Path(out)) as work:
        hf = foreign.config.to_hf(
            bos_token_id=tokenizer.role("bos_token"), eos_token_id=tokenizer.eos_ids, pad_token_id=tokenizer.pad_id
        )
        tokens = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(work / "config.json", hf)
        write_json(work / "generation_config.json", {"_from_model_config": True, **tokens})
        tokenizer.save(work)
        if isinstance(license := foreign.file.keys.get("general.license"), str):
            (work / "README.md").write_text(card.front_matter({"license": license}) + "\n", encoding="utf-8")
        with open(work / model_folder.WEIGHTS, "wb") as f:
            f.write(stream.header({name: ("F32", shape) for name, shape in foreign.shapes.items()}))
            for name in foreign.names:
                for _, block in foreign.blocks(name):
                    f.write(np.ascontiguousarray(block, "<f4").data)
