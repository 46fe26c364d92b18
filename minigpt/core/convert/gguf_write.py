"""A model folder as one GGUF file for llama.cpp, Ollama and LM Studio.

Tensors are read, quantised and written a few rows at a time, so memory does not grow with the model. Norms stay
float32, as llama.cpp wants them; matrices take the type asked for, except where it does not fit (see `_plan`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from minigpt.core.convert import gguf_arch, gguf_tokenizer, stream, weights
from minigpt.core.errors import DataError, UsageError
from minigpt.core.files import new_file
from minigpt.core.models import folder as model_folder
from minigpt.core.models.config import ModelConfig
from minigpt.core.report import Report

QUANTS = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}


class Written(NamedTuple):
    """path: the file. size: bytes. tensors: how many. wider: tensors in a wider type than asked for → that type."""

    path: Path
    size: int
    tensors: int
    wider: dict[str, str]


class _Tensor(NamedTuple):
    name: str  # in the GGUF file
    stored: stream.Stored
    type: Type
    head_dim: int | None  # rows of heads of this size change places

    @property
    def size(self) -> int:
        """Bytes in the GGUF file."""
        values, bytes = gguf.GGML_QUANT_SIZES[self.type]
        return self.stored.shape[0] * self.stored.row // values * bytes


def write(
    folder: Path, out: Path, *, quant: str = "f16", license: str | None = None, report: Report | None = None
) -> Written:
    """Write the Hugging Face model folder `folder` as the GGUF file `out`.

    quant: a name of QUANTS. license: an identifier such as apache-2.0; None names none.
    report: hears which tensors stay wider and what llama.cpp cannot express.
    UsageError: an unknown quant. DataError: weights that do not fit config.json, are not finite or overflow float16; an
    architecture, RoPE scaling or tokenizer that llama.cpp has no words for; the disk.
    """
    report = report or Report()
    if quant not in QUANTS:
        raise UsageError("--quant is not one of the types", found=quant, fix=f"choose {', '.join(QUANTS)}")
    folder, out = Path(folder), Path(out)
    config, _ = model_folder.read_config(folder)
    arch = gguf_arch.of(config.model_type)
    tensors, wider = _plan(config, weights.checked(folder), quant)
    if wider:
        kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in wider)
        report.warn(f"written as f16, as rows that are no multiple of 32 do not fit {quant}: {', '.join(kinds)}")
    factors = gguf_arch.rope_factors(config)

    writer = gguf.GGUFWriter(None, arch.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(out.stem)
    if license:
        writer.add_license(license)
    writer.add_file_type(_FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in gguf_arch.to_keys(config).items():
        kind_of = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        kind_of(f"{arch.name}.{key}", value)  # type: ignore[operator]
    gguf_tokenizer.add(writer, folder, config.vocab_size, report)
    if factors is not None:
        writer.add_tensor_info(gguf_arch.ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        _add_info(writer, tensor)

    with new_file(out) as path:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with open(path, "ab") as f:
            _pad(f)
            if factors is not None:
                f.write(factors.tobytes())
                _pad(f)
            for tensor in tensors:
                for block in _blocks(tensor):
                    f.write(block.data)
                _pad(f)
            size = f.tell()
    return Written(out, size, len(tensors) + (factors is not None), wider)


def _plan(config: ModelConfig, stored: Mapping[str, stream.Stored], quant: str) -> tuple[list[_Tensor], dict[str, str]]:
    """Every tensor with its name and type in the file, and those that are wider because their rows do not fit.

    Vectors are float32. In a q4_0 file the matrix that makes the logits is q8_0: llama.cpp's own quantiser widens it
    too, and few bits cost most there.
    """
    names = gguf_arch.tensor_names(config, list(stored))
    head = model_folder.EMBEDDING if config.tie_word_embeddings else model_folder.HEAD
    tensors, wider = [], {}
    for name, tensor in stored.items():
        wanted = QUANTS[quant]
        if len(tensor.shape) == 1:
            wanted = Type.F32
        elif quant == "q4_0" and name == head:
            wanted = Type.Q8_0
        if tensor.row % gguf.GGML_QUANT_SIZES[wanted][0] and len(tensor.shape) > 1:
            wanted = Type.F16  # llama.cpp's own way out
            wider[name] = "f16"
        head_dim = config.head_size if gguf_arch.is_permuted(config, name) else None
        tensors.append(_Tensor(names[name], tensor, wanted, head_dim))
    return tensors, wider


def _add_info(writer: gguf.GGUFWriter, tensor: _Tensor) -> None:
    shape, size = tensor.stored.shape, tensor.size
    values, bytes = gguf.GGML_QUANT_SIZES[tensor.type]
    if tensor.type in (Type.F32, Type.F16):
        dtype = np.dtype(np.float32 if tensor.type == Type.F32 else np.float16)
    else:  # the writer wants the shape in bytes
        dtype, shape = np.dtype(np.uint8), (*shape[:-1], shape[-1] // values * bytes)
    writer.add_tensor_info(tensor.name, shape, dtype, size, raw_dtype=tensor.type)


def _blocks(tensor: _Tensor) -> Iterator[NDArray[np.uint8]]:
    """The tensor's bytes in the GGUF file, a few rows at a time."""
    stored = tensor.stored
    for rows in stream.pieces(stored.shape[0], stored.row, tensor.head_dim or 1):
        values = stream.read(stored, *rows)
        if not np.isfinite(values).all():
            raise DataError(f"{stored.file}: {tensor.name} holds values that are not numbers: the model has diverged")
        if tensor.head_dim:
            values = gguf_arch.to_neighbours(values, tensor.head_dim)
        with np.errstate(over="ignore"):
            packed = gguf.quantize(np.ascontiguousarray(values), tensor.type)
        if tensor.type == Type.F16 and not np.isfinite(packed).all():
            raise DataError(
                f"{stored.file}: {tensor.name} holds values too large for float16",
                found=f"{np.abs(values).max():g}",
                fix="use --quant bf16",
            )
        yield packed.view(np.uint8)


def _pad(f: BinaryIO) -> None:
    """Data begins at multiples of the alignment."""
    f.write(bytes(-f.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
