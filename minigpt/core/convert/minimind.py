"""MiniMind's raw `.pth` files (https://github.com/jingyaogong/minimind), both ways.

A file is a state dict and nothing else: version 2 is Llama with other constants, version 3 is Qwen3, and both carry
Hugging Face's names, with the tied head stored a second time. Shapes tell width, depth, vocabulary and key/value heads.
The number of query heads is in the shapes of version 3 only (its per-head norms); what is in none are constants of
MiniMind's own configuration: 8 heads, theta 1e6, a context of 32,768 and the norms' epsilon.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.core.convert import stream, weights
from minigpt.core.data.tokenizer import Tokenizer
from minigpt.core.errors import DataError, UsageError
from minigpt.core.models import architecture, folder
from minigpt.core.models.config import ModelConfig

HEADS = 8
COMMON = {"max_position_embeddings": 32_768, "rope_theta": 1e6}
HARMLESS = ("initializer_range", "max_position_embeddings")  # may differ: neither changes what is computed
# what a name says about a file that is no dense model of version 2 or 3
FOREIGN = (
    (("mlp.experts.", "mlp.gate.weight", "shared_expert"), "a mixture of experts, which is not supported yet"),
    ((".lora.",), "a LoRA file: it changes another model and is none itself; that is not supported yet"),
    (("tok_embeddings.weight",), "a file of MiniMind 1, whose layout is not supported"),
)


# ---------------------------------------------------------------------------------------------- reading


def read(path: Path) -> dict[str, Tensor]:
    """The state dict of a `.pth` file, its tensors mapped from the disk. Of a resume file, the model's part.

    Nothing in the file can run: `weights_only=True`. DataError for anything but tensors by name.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
        raise DataError(
            f"{path} is not a file of tensors, or is damaged",
            found=str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__,
            fix="a .pth file must hold a plain state dict, as torch.save(model.state_dict(), …) writes it",
        ) from None
    if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise DataError(f"{path} is no state dict of a model", found=type(found).__name__)
    return {str(name): tensor for name, tensor in found.items()}


def infer(
    shapes: Mapping[str, tuple[int, ...]], overrides: Mapping[str, Any] | None = None, tied: bool = True
) -> ModelConfig:
    """The configuration behind some shapes.

    overrides: config keys, with or without `model.` in front; they win, above all `num_attention_heads`.
    DataError says what else a file is when it is no dense model; UsageError when the heads do not divide the width.
    """
    for parts, what in FOREIGN:
        if named := next((name for name in shapes if any(part in name for part in parts)), None):
            raise DataError(f"this is {what}", found=named, fix="dense models of MiniMind 2 and 3 can be read")
    first = "model.layers.0."
    needed = [folder.EMBEDDING, *(first + n for n in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"))]
    needed.append(first + "mlp.gate_proj.weight")
    if missing := [name for name in needed if len(shapes.get(name, ())) != 2]:
        raise DataError("these weights are not MiniMind's", found=f"no {missing[0]} among {len(shapes)} tensors")
    changed = {k.removeprefix("model."): v for k, v in (overrides or {}).items()}
    (vocab, hidden), (queries, _), (keys, _), (ffn, _) = (shapes[name] for name in needed)
    norm = shapes.get(first + "self_attn.q_norm.weight")
    if norm:
        head_dim = norm[0]
    else:
        heads = changed.get("num_attention_heads", HEADS)
        if not isinstance(heads, int) or heads < 1 or queries % heads or keys % (queries // heads):
            raise UsageError(
                f"{heads} heads do not fit the shapes, from which alone their number cannot be told",
                found=f"queries {queries}, keys {keys}",
                fix="say it with --set model.num_attention_heads=…",
            )
        head_dim = queries // heads
    kind = "qwen3" if norm else "llama"
    return folder.create(
        {
            "model_type": kind,
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": 1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("model.layers.")),
            "num_attention_heads": queries // head_dim,
            "num_key_value_heads": keys // head_dim,
            "head_dim": head_dim,
            "tie_word_embeddings": tied,
            **COMMON,
            **architecture(kind).Config.minimind,
        },
        overrides=changed,
    )


def unpack(path: Path, out: Path, tokenizer: Tokenizer, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """Write a `.pth` file as the model folder `out`, in the file's own precision.

    DataError when a tensor is missing, unknown or of another shape than the others say, or the tokenizer has more
    tokens than the embedding has rows. Nothing here is atomic: build `out` inside `files.new_dir`.
    """
    state = read(path)
    head = state.get(folder.HEAD)
    embedding = state.get(folder.EMBEDDING)
    tied = head is None or embedding is None or (head.shape == embedding.shape and torch.equal(head, embedding))
    try:
        config = infer({name: tuple(t.shape) for name, t in state.items()}, overrides, tied)
    except DataError as e:
        raise DataError(f"{path}: {e.message}", found=e.found, fix=e.fix) from None
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    folder.check_fit(shapes, folder.expected(config), tied, path)
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"the tokenizer for {path} has {tokenizer.vocab_size:,} tokens, the model {config.vocab_size:,}",
            fix="name the tokenizer that the model was trained with: --tokenizer DIR",
        )
    if tied:
        state.pop(folder.HEAD, None)
    kinds = {t.dtype for t in state.values()}
    folder.write(
        out,
        state,
        config,
        bos_token_id=tokenizer.role("bos_token"),
        eos_token_id=list(tokenizer.eos_ids),
        pad_token_id=tokenizer.pad_id,
        dtype=next((name for name, dtype in weights.DTYPES.items() if kinds == {dtype}), "float32"),
    )
    tokenizer.save(out)
    return config


def find_tokenizer(path: Path) -> Path:
    """The tokenizer of a `.pth` file: beside it, or where MiniMind's own repository keeps it (`out/` and `model/`)."""
    for place in (path.parent, path.parent / "tokenizer", path.absolute().parent.parent / "model"):
        if (place / "tokenizer.json").is_file():
            return place
    raise UsageError(
        f"{path} comes without a tokenizer",
        found=f"no tokenizer.json beside it, nor in {path.absolute().parent.parent / 'model'}",
        fix="put tokenizer.json and tokenizer_config.json beside it, or name their directory with --tokenizer",
    )


# ---------------------------------------------------------------------------------------------- writing


def write(
    source: Path, out: Path, *, dtype: str = "float16", overrides: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Write the model folder `source` as a `.pth` file for MiniMind, which stores float16.

    overrides: config keys that the reader will be told as well. UsageError names each key whose value would be lost: a
    `.pth` file holds no configuration. Memory: a few rows of a tensor. Nothing here is atomic.
    """
    config, _ = folder.read_config(source)
    stored = weights.checked(source)
    _check_constants(config, {name: t.shape for name, t in stored.items()}, overrides)
    # torch.empty touches no memory and skip_data writes none of it, so the numbers can follow from file to file
    state = {name: torch.empty(t.shape, dtype=weights.DTYPES[dtype]) for name, t in stored.items()}
    if config.tie_word_embeddings:
        state[folder.HEAD] = state[folder.EMBEDDING]
    with torch.serialization.skip_data():
        torch.save(state, out)
    _fill(out, stored, dtype)
    return config


def _check_constants(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], overrides: Mapping[str, Any] | None
) -> None:
    """A `.pth` file of this model must be read back as this model."""
    read_as = vars(infer(shapes, overrides))
    lost = {k: v for k, v in vars(config).items() if k not in HARMLESS and read_as[k] != v}
    if "num_attention_heads" in lost:  # these follow from it and the shapes
        lost.pop("num_key_value_heads", None)
        lost.pop("head_dim", None)
    if config.rope_parameters["rope_type"] != "default":
        raise UsageError(
            "a .pth file holds no configuration, so it cannot say how this model's context was extended",
            found=str(config.rope_parameters),
            fix="use --to hf or --to gguf",
        )
    if lost:
        flags = {"rope_theta" if k == "rope_parameters" else k: v for k, v in lost.items()}
        flags |= {k: config.rope_parameters[k] for k in flags if k == "rope_theta"}
        raise UsageError(
            f"a .pth file holds no configuration, and MiniMind's own differs from this model's in {', '.join(flags)}",
            found="; ".join(f"{k}: {v}, MiniMind has {read_as[k]}" for k, v in lost.items()),
            fix="use --to hf, or say that its reader will be told too: "
            + " ".join(f"--set model.{key}={value}" for key, value in flags.items()),
        )


def as_python(config: ModelConfig) -> str:
    """How MiniMind's own code builds the model behind a file: its configuration with what its defaults may not say."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    values = {key: getattr(config, key) for key in (*keys, "vocab_size", "rms_norm_eps")}
    values["rope_theta"] = config.rope_parameters["rope_theta"]
    return f"MiniMindConfig({', '.join(f'{key}={value}' for key, value in values.items())})"


def _fill(path: Path, stored: Mapping[str, stream.Stored], dtype: str) -> None:
    """Put the numbers into a file that torch.save left without: a zip archive with one entry a tensor, `…/data/0` on.

    An entry is a header of 30 bytes, its name and extra field (whose lengths end the header), the data, and a signature
    with the checksum. The directory at the archive's end, records of 46 bytes and three fields, repeats the checksum.
    """
    with zipfile.ZipFile(path) as archive:
        entries, record = archive.infolist(), archive.start_dir
    order = dict(enumerate(stored.items()))
    with open(path, "rb+") as f:
        for entry in entries:
            f.seek(record + 28)
            lengths = struct.unpack("<HHH", f.read(6))
            number = entry.filename.rpartition("/data/")[2]
            if number.isdigit():
                f.seek(entry.header_offset + 26)
                f.seek(sum(struct.unpack("<HH", f.read(4))), os.SEEK_CUR)
                checksum = 0
                for piece in weights.pieces(*order[int(number)], dtype):
                    f.write(piece)
                    checksum = zlib.crc32(piece, checksum)
                f.seek(4, os.SEEK_CUR)
                f.write(struct.pack("<I", checksum))
                f.seek(record + 16)
                f.write(struct.pack("<I", checksum))
            record += 46 + sum(lengths)
