"""Weights laid out for sampling: products that take the same input become one, and int8 ones on request.

Both change a model in place and for good: it computes, and is not trained or saved any more.

Shapes: M tokens · N outputs · K inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.core.errors import UsageError
from minigpt.core.models.decoder import Block, Decoder

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


class Joined:
    """x @ W.T for the rows of several matrices. No module: its weight is theirs, which have names in files."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Int8Linear(nn.Module):
    """x @ W.T with both sides in 8 bits: a scale a row of W, and a scale a token found anew in every call.

    The product of integers is exact, so a token's result does not depend on the others (LLM.int8() without its
    outliers: Dettmers et al., 2022, arXiv:2208.07339).

    weight: (N, K) of any float type. packed: lay W out for FBGEMM, whose product also rounds x and scales the result;
    None = where this build of torch has it. Otherwise these are steps around `torch._int_mm`.
    """

    steps: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, packed: bool | None = None):
        super().__init__()
        wide = weight.detach().float()
        scale = wide.abs().amax(1).div_(127)  # (N,)
        steps = (wide / scale[:, None]).nan_to_num_().round_().to(torch.int8)  # a row of zeros stays zeros
        self.packed = _pack(steps, scale) if packed or (packed is None and FBGEMM is not None) else None
        if self.packed is None:
            self.register_buffer("steps", steps)
            self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K). Returns (..., N) in x's type."""
        flat = x.reshape(-1, x.shape[-1]).float()  # (M, K)
        size = flat.abs().amax(-1, keepdim=True)  # a token of zeros divides by 0, and is scaled by it too
        unit = flat / size
        if self.packed is not None:
            out = FBGEMM(unit, 1 / 127, 128, self.packed)
        else:
            steps = (unit * 127).round_().to(torch.int8)
            out = torch._int_mm(steps, self.steps.t()) * self.scale * (1 / 127)
        return out.mul_(size).view(*x.shape[:-1], -1).to(x.dtype)


def _pack(steps: Tensor, scale: Tensor) -> Any:
    """W in FBGEMM's layout. Unsigned steps of x around 128 are its signed ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # making quantized tensors is deprecated, and is the only way into this layout
        zero = torch.zeros(len(scale), dtype=torch.long)
        quantized = torch._make_per_channel_quantized_tensor(steps, scale.double(), zero, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)


def _fbgemm() -> Any:
    """Rounds its input to given steps, multiplies, scales. None where this build of torch does not have it."""
    op = getattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32", None)
    if op is None or "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    return getattr(op.default, "_op", op.default)  # without looking, at every call, for what only a compiler brings


FBGEMM = _fbgemm()


def int8(model: Decoder, packed: bool | None = None) -> None:
    """Put every matrix but the embedding into 8 bits. packed: as for Int8Linear; a compiler sees through the other way.

    UsageError where there is no such product.
    """
    if model.head_weight.device.type != "cpu":
        raise UsageError("--quant int8 is for CPUs", fix="leave it out: a GPU is faster in 16 bits")

    def joined(module: nn.Module, names: Sequence[str]) -> Int8Linear:
        made = Int8Linear(torch.cat([getattr(module, name).weight for name in names]), packed)
        for name in names:
            delattr(module, name)
        return made

    for block in _blocks(model):
        attention, mlp = block.self_attn, block.mlp
        attention.fused, mlp.fused = joined(attention, QKV), joined(mlp, GATE_UP)
        for module, name in ((attention, "o_proj"), (mlp, "down_proj")):
            setattr(module, name, joined(module, [name]))
    model.quantised_head = Int8Linear(model.head_weight, packed)


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
