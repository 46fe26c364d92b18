"""Weights laid out for sampling: products that take the same input become one, laid out as the library reads them, and
in fewer bits on request.

Each changes a model in place and for good: it computes, and is not trained or saved any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from minigpt.core.errors import UsageError
from minigpt.core.infer.products import FP16, ONEDNN, BlockedLinear, Fp16Linear, Int8Linear, Joined
from minigpt.core.models.decoder import Block, Decoder
from minigpt.core.runtime import tolerant_dtype

Product = Callable[[Tensor], Tensor]  # of the last dimension with a matrix
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def pack(model: Decoder) -> None:
    """The same numbers in the fastest layout that is here: oneDNN's on a CPU that has the model's type, else `fuse`."""
    weight = model.head_weight
    if ONEDNN is not None and weight.is_cpu and weight.dtype in (torch.float32, tolerant_dtype(weight.device)):
        _replace(model, "none", BlockedLinear)
    else:
        fuse(model)


def int8(model: Decoder, packed: bool | None = None, compile: bool = False) -> None:
    """Put every matrix but the embedding into 8 bits. packed, compile: as for Int8Linear.

    UsageError where there is no such product.
    """
    _replace(model, "int8", lambda weight: Int8Linear(weight, packed, compile))


def fp16(model: Decoder) -> None:
    """Put every matrix but the embedding into 16 bits; what is computed with them stays in the model's own type.

    UsageError where there is no such product, DataError where a weight is too large for it.
    """
    if FP16 is None:
        raise UsageError("--quant fp16 needs a torch with FBGEMM", fix="use --dtype float16")
    _replace(model, "fp16", Fp16Linear)


def _replace(model: Decoder, name: str, make: Callable[[Tensor], Product]) -> None:
    if model.head_weight.device.type != "cpu":
        raise UsageError(f"--quant {name} is for CPUs", fix="leave it out: a GPU is fast in --dtype bfloat16")

    def joined(module: nn.Module, names: Sequence[str]) -> Product:
        made = make(torch.cat([getattr(module, name).weight for name in names]))
        for name in names:
            delattr(module, name)
        return made

    for block in _blocks(model):
        attention, mlp = block.self_attn, block.mlp
        attention.fused, mlp.fused = joined(attention, QKV), joined(mlp, GATE_UP)
        for module, matrix in ((attention, "o_proj"), (mlp, "down_proj")):
            setattr(module, matrix, joined(module, [matrix]))
    model.packed_head = make(model.head_weight)


def fuse(model: Decoder) -> None:
    """Make one product of those that take the same input. The weights remain the same numbers in the same memory."""

    def joined(*weights: nn.Parameter) -> Joined:
        whole = torch.cat([w.detach() for w in weights])
        for weight, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
            weight.data = part
        return Joined(whole)

    for block in _blocks(model):
        attention, mlp = block.self_attn, block.mlp
        attention.fused = joined(*(getattr(attention, name).weight for name in QKV))
        mlp.fused = joined(*(getattr(mlp, name).weight for name in GATE_UP))


def _blocks(model: Decoder) -> Iterator[Block]:
    return (cast(Block, block) for block in model.model.layers)
